"""The printed form of layers and losses shows the arguments that they were made with, and defaults."""

import pytest
import torch

from cpc_ext import nn

CASES = {
    "grid": (lambda: nn.GridInfoNCE(3, pred_steps=2), "3, 3, pred_steps=2, pred_directions=1, skip=1, neg_samples=16"),
    "grid-given": (
        lambda: nn.GridInfoNCE(3, 4, pred_steps=2, pred_directions=5, skip=0, neg_samples=7),
        "3, 4, pred_steps=2, pred_directions=5, skip=0, neg_samples=7",
    ),
    "target": (lambda: nn.TargetInfoNCE(3), "pred_steps=None, pred_directions=1, skip=1, scale=0.1, reduction=mean"),
    "target-given": (
        lambda: nn.TargetInfoNCE(3, pred_steps=2, pred_directions=5, skip=0, scale=0.3, reduction="sum"),
        "pred_steps=2, pred_directions=5, skip=0, scale=0.3, reduction=sum",
    ),
    "sequence": (
        lambda: nn.SequenceInfoNCE(3),
        "3, 3, pred_steps=12, predictor=linear, sampling=permuted, neg_samples=10, reduction=mean, score=dot",
    ),
    "sequence-given": (
        lambda: nn.SequenceInfoNCE(3, 4, predictor="ffd", sampling="shifted", reduction="sum", score="mean"),
        "3, 4, pred_steps=12, predictor=ffd, sampling=shifted, neg_samples=10, reduction=sum, score=mean",
    ),
    "channel-norm": (lambda: nn.ChannelNorm(3), "3, eps=1e-05"),
    "attention": (lambda: nn.CausalTransformerLayer(8, 5), "positions=5, heads=8, dropout=0.1"),
    "attention-given": (
        lambda: nn.CausalTransformerLayer(6, None, heads=2, dropout=0.2),
        "positions=None, heads=2, dropout=0.2",
    ),
    "info-nce": (lambda: nn.InfoNCELoss(), "temperature=1.0, reduction=mean"),
    "info-nce-given": (lambda: nn.InfoNCELoss(0.2, reduction="sum"), "temperature=0.2, reduction=sum"),
    "nt-xent": (lambda: nn.NTXentLoss(), "temperature=0.5, gather_negatives=none"),
    "nt-xent-given": (
        lambda: nn.NTXentLoss(0.2, gather_negatives="ring"),
        "temperature=0.2, gather_negatives=ring",
    ),
    "nt-xent-distributed": (
        lambda: nn.NTXentLoss(gather_distributed=True, gather_negatives="gather"),
        "temperature=0.5, gather_negatives=gather",
    ),
    "nt-xent-gather": (lambda: nn.NTXentLoss(0.2, 0, True), "temperature=0.2, gather_negatives=gather"),
    "queue": (lambda: nn.MoCoLoss(1, 1).queue, "1, 1"),
    "bank": (lambda: nn.NTXentLoss(0.2, (2, 1)).memory_bank, "2, 1"),
    "info-nce-learnt": (
        lambda: nn.InfoNCELoss(0.2, learnable=True),
        "temperature=0.2, reduction=mean, learnable=True, max_scale=100.0",
    ),
    "clip": (lambda: nn.CLIPLoss(), ""),
    "clip-given": (lambda: nn.CLIPLoss(gather_negatives="ring"), "gather_negatives=ring"),
    "clip-ranks": (
        lambda: nn.CLIPLoss(True, rank=1, world_size=2),
        "local_loss=True, gather_with_grad=False, rank=1, world_size=2",
    ),
    "siglip": (lambda: nn.SigLIPLoss(), ""),
    "siglip-given": (lambda: nn.SigLIPLoss(gather_negatives="gather"), "gather_negatives=gather"),
    "siglip-ranks": (lambda: nn.SigLIPLoss(rank=1, world_size=2), "rank=1, world_size=2"),
    "sup-con": (lambda: nn.SupConLoss(), "temperature=0.07, contrast_mode=all, base_temperature=0.07"),
    "dcl": (lambda: nn.DecoupledContrastiveLoss(), "temperature=0.1, gather_negatives=none"),
    "dcl-given": (
        lambda: nn.DecoupledContrastiveLoss(0.2, max, True),
        "temperature=0.2, weight_fn=<built-in function max>, gather_negatives=gather",
    ),
    "moco": (lambda: nn.MoCoLoss(3, 5), "temperature=0.07, normalize=True, gather_negatives=gather"),
    "labelled": (lambda: nn.LabelledNTXentLoss(), "temperature=0.07"),
    "labelled-given": (lambda: nn.LabelledNTXentLoss(0.2), "temperature=0.2"),
    "ranking": (
        lambda: nn.MultipleNegativesRankingLoss(),
        "scale=20.0, similarity_fct=cos_sim, directions=('query_to_doc',), partition_mode=joint, gather_negatives=none",
    ),
    "ranking-given": (
        lambda: nn.MultipleNegativesRankingLoss(
            5.0,
            "dot_score",
            directions=("doc_to_query", "query_to_doc"),
            partition_mode="per_direction",
            gather_negatives="ring",
        ),
        "scale=5.0, similarity_fct=dot_score, directions=('doc_to_query', 'query_to_doc'), "
        "partition_mode=per_direction, gather_negatives=ring",
    ),
    "patchify": (lambda: nn.Patchify(5), "patch_size=5, stride=2, gray=False"),
    "patchify-least": (lambda: nn.Patchify(1), "patch_size=1, stride=1, gray=False"),
    "patchify-given": (lambda: nn.Patchify(8, 6, gray=True), "patch_size=8, stride=6, gray=True"),
    "masked": (lambda: nn.MaskedConv2d(3, 4, (1, 5), "A"), "3, 4, kernel_size=(1, 5), mask=A"),
    "masked-tensor": (lambda: nn.MaskedConv2d(3, 4, 3, torch.ones(3, 3)), "3, 4, kernel_size=(3, 3), mask=custom"),
    "shifted": (lambda: nn.ShiftedConv2d(3, 4, (2, 3), "down"), "3, 4, kernel_size=(2, 3), down, stride=1"),
    "shifted-half": (
        lambda: nn.ShiftedConv2d(3, 4, (2, 2), "down-right", stride=2),
        "3, 4, kernel_size=(2, 2), down-right, stride=2",
    ),
    "transposed": (
        lambda: nn.ShiftedConvTranspose2d(3, 4, (2, 2), "down-right"),
        "3, 4, kernel_size=(2, 2), down-right",
    ),
    "mix": (lambda: nn.ChannelMix(8, 3), "8, 3, sources=1"),
    "mix-given": (lambda: nn.ChannelMix(8, 3, sources=2), "8, 3, sources=2"),
}


@pytest.mark.parametrize("name", CASES)
def test_printed(name):
    make, text = CASES[name]
    assert make().extra_repr() == text
