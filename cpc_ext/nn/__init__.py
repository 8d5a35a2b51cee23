"""Layers and losses built on the ops."""

from cpc_ext.nn.across_ranks import gather_from_ranks
from cpc_ext.nn.causal_attention import CausalTransformerLayer
from cpc_ext.nn.channel_norm import ChannelNorm
from cpc_ext.nn.clip_loss import CLIPLoss
from cpc_ext.nn.conv2d import Conv2d
from cpc_ext.nn.decoupled_contrastive_loss import DecoupledContrastiveLoss
from cpc_ext.nn.delta_orthogonal import delta_orthogonal_
from cpc_ext.nn.grad_cache import grad_cache
from cpc_ext.nn.grid_info_nce import GridInfoNCE, GridInfoNCEOutput
from cpc_ext.nn.info_nce_loss import InfoNCELoss
from cpc_ext.nn.labelled_nt_xent_loss import LabelledNTXentLoss
from cpc_ext.nn.logistic_mixture_loss import LogisticMixtureLoss
from cpc_ext.nn.masked_conv2d import MaskedConv2d
from cpc_ext.nn.moco_loss import MoCoLoss
from cpc_ext.nn.multiple_negatives_ranking_loss import MultipleNegativesRankingLoss
from cpc_ext.nn.nt_xent_loss import NTXentLoss, NTXentOutput
from cpc_ext.nn.patchify import Patchify
from cpc_ext.nn.sequence_info_nce import SequenceInfoNCE, SequenceInfoNCEOutput
from cpc_ext.nn.sequence_negatives import SequenceNegatives
from cpc_ext.nn.shifted_conv2d import ChannelMix, ShiftedConv2d, ShiftedConvTranspose2d
from cpc_ext.nn.siglip_loss import SigLIPLoss
from cpc_ext.nn.sup_con_loss import SupConLoss
from cpc_ext.nn.target_info_nce import TargetInfoNCE

__all__ = [
    "CLIPLoss",
    "CausalTransformerLayer",
    "ChannelMix",
    "ChannelNorm",
    "Conv2d",
    "DecoupledContrastiveLoss",
    "GridInfoNCE",
    "GridInfoNCEOutput",
    "InfoNCELoss",
    "LabelledNTXentLoss",
    "LogisticMixtureLoss",
    "MaskedConv2d",
    "MoCoLoss",
    "MultipleNegativesRankingLoss",
    "NTXentLoss",
    "NTXentOutput",
    "Patchify",
    "SequenceInfoNCE",
    "SequenceInfoNCEOutput",
    "SequenceNegatives",
    "ShiftedConv2d",
    "ShiftedConvTranspose2d",
    "SigLIPLoss",
    "SupConLoss",
    "TargetInfoNCE",
    "delta_orthogonal_",
    "gather_from_ranks",
    "grad_cache",
]
