"""The attribute out_channels that a user's own network must have."""

import pytest
from torch import nn

from cpc_ext.models import CPC, GatedPixelCNNContext


def test_out_channels_that_are_no_number_are_refused():
    encoder = nn.Identity()
    encoder.out_channels = nn.Identity()
    with pytest.raises(TypeError, match="out_channels of Identity must be an int, got Identity"):
        CPC(encoder, GatedPixelCNNContext(4), pred_steps=1)


def test_a_chain_of_layers_is_one_context():
    encoder, context = nn.Identity(), nn.Sequential(GatedPixelCNNContext(4))
    encoder.out_channels = context.out_channels = 4
    assert CPC(encoder, context, pred_steps=1, pred_directions=2).context is context
