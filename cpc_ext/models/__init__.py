"""Encoders, context networks and the models made of them, and models of images pixel by pixel."""

from cpc_ext.models.cpc import CPC
from cpc_ext.models.gated_pixelcnn import GatedPixelCNN
from cpc_ext.models.gated_pixelcnn_context import GatedPixelCNNContext
from cpc_ext.models.greedy_infomax import GreedyInfoMax, GreedySupervised
from cpc_ext.models.layer_norm_resnet import LayerNormResNetEncoder
from cpc_ext.models.mobilenet_v2 import MobileNetV2Encoder
from cpc_ext.models.patch_encoder import PatchEncoder
from cpc_ext.models.pixelcnn import PixelCNN
from cpc_ext.models.pixelcnnpp import PixelCNNPP
from cpc_ext.models.residual_context import ResidualContext
from cpc_ext.models.resnet_v2 import ResNetV2Encoder
from cpc_ext.models.simclr import SimCLR
from cpc_ext.models.timm_encoder import TimmEncoder
from cpc_ext.models.wide_resnet import WideResNetEncoder

__all__ = [
    "CPC",
    "GatedPixelCNN",
    "GatedPixelCNNContext",
    "GreedyInfoMax",
    "GreedySupervised",
    "LayerNormResNetEncoder",
    "MobileNetV2Encoder",
    "PatchEncoder",
    "PixelCNN",
    "PixelCNNPP",
    "ResNetV2Encoder",
    "ResidualContext",
    "SimCLR",
    "TimmEncoder",
    "WideResNetEncoder",
]
