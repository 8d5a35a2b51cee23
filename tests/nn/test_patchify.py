"""The patch module is the op with fixed settings."""

import torch

from cpc_ext.nn import Patchify
from cpc_ext.ops import extract_patches


def test_is_the_op():
    images = torch.randint(256, (2, 3, 20, 24), dtype=torch.uint8)
    offsets, flip = torch.tensor([[0, 1], [2, 3]]), torch.tensor([True, False])
    patches = Patchify(8, gray=True, mean=(0.4,), std=(0.2,))(images, crop=(16, 16), offsets=offsets, flip=flip)
    expected = extract_patches(
        images, 8, 4, crop=(16, 16), offsets=offsets, flip=flip, gray=True, mean=(0.4,), std=(0.2,)
    )
    assert patches.shape == (2, 3, 3, 1, 8, 8)
    assert torch.equal(patches, expected)


def test_is_the_op_with_other_settings():
    images = torch.rand(2, 3, 20, 24)
    settings = {"patch_norm": True, "dtype": torch.bfloat16, "channels_last": True}
    patches = Patchify(8, **settings)(images)
    assert patches.stride(3) == 1
    assert torch.equal(patches, extract_patches(images, 8, 4, **settings))
    assert Patchify(8)(images).is_contiguous()


def test_stride():
    assert Patchify(8, 6)(torch.zeros(1, 1, 20, 20)).shape == (1, 3, 3, 1, 8, 8)
