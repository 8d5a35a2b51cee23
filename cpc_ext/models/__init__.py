"""Encoders, context networks and the models made of them."""

from cpc_ext.models.cpc import CPC
from cpc_ext.models.gated_pixelcnn import GatedPixelCNNContext
from cpc_ext.models.resnet_v2 import ResNetV2Encoder

__all__ = ["CPC", "GatedPixelCNNContext", "ResNetV2Encoder"]
