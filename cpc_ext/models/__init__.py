"""Encoders of images and sound, context networks and the models made of them, and models of images pixel by pixel."""

from cpc_ext.models.contexts.causal_transformer_context import CausalTransformerContext
from cpc_ext.models.contexts.gated_pixelcnn_context import GatedPixelCNNContext
from cpc_ext.models.contexts.recurrent_context import RecurrentContext
from cpc_ext.models.contexts.residual_context import ResidualContext
from cpc_ext.models.cpc import CPC
from cpc_ext.models.encoders.layer_norm_resnet import LayerNormResNetEncoder
from cpc_ext.models.encoders.mobilenet_v2 import MobileNetV2Encoder
from cpc_ext.models.encoders.patch_encoder import PatchEncoder
from cpc_ext.models.encoders.resnet_v2 import ResNetV2Encoder
from cpc_ext.models.encoders.timm_encoder import TimmEncoder
from cpc_ext.models.encoders.waveform_encoder import WaveformEncoder
from cpc_ext.models.encoders.wide_resnet import WideResNetEncoder
from cpc_ext.models.greedy_infomax import GreedyInfoMax, GreedySupervised
from cpc_ext.models.image_backbone import ImageBackbone
from cpc_ext.models.moco import MoCo
from cpc_ext.models.pixels.binary_gated_pixelcnn import BinaryGatedPixelCNN
from cpc_ext.models.pixels.gated_pixelcnn import GatedPixelCNN
from cpc_ext.models.pixels.pixelcnn import PixelCNN
from cpc_ext.models.pixels.pixelcnnpp import PixelCNNPP
from cpc_ext.models.simclr import SimCLR
from cpc_ext.models.supcon import SupCon

__all__ = [
    "CPC",
    "BinaryGatedPixelCNN",
    "CausalTransformerContext",
    "GatedPixelCNN",
    "GatedPixelCNNContext",
    "GreedyInfoMax",
    "GreedySupervised",
    "ImageBackbone",
    "LayerNormResNetEncoder",
    "MoCo",
    "MobileNetV2Encoder",
    "PatchEncoder",
    "PixelCNN",
    "PixelCNNPP",
    "RecurrentContext",
    "ResNetV2Encoder",
    "ResidualContext",
    "SimCLR",
    "SupCon",
    "TimmEncoder",
    "WaveformEncoder",
    "WideResNetEncoder",
]
