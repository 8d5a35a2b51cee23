"""Cached facts about a mask follow its changes, do not keep it alive, and are not read from it where that may stall."""

from __future__ import annotations

import gc
import sys
import weakref

import pytest
import torch
import torch.nn.functional as F

from cpc_ext._native import native
from cpc_ext.nn import MaskedConv2d
from cpc_ext.ops import masked_conv2d

ops = sys.modules["cpc_ext.ops.masked_conv2d"]


def draw(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def by_data(mask, value):
    mask.data.copy_(value)


def by_numpy(mask, value):
    mask.numpy()[...] = value.numpy()


def by_dlpack(mask, value):
    torch.from_dlpack(mask).copy_(value)


def in_place(mask, value):
    mask.copy_(value)


@pytest.mark.parametrize("change", [by_data, by_numpy, by_dlpack, in_place])
@pytest.mark.parametrize("channels", [False, True])
@pytest.mark.parametrize("dtype", [torch.bool, torch.float64, torch.int32])
def test_every_change_counts_forwards_and_backwards(change, channels, dtype):
    shape = (5, 3, 3, 3) if channels else (3, 3)
    mask = torch.zeros(shape, dtype=dtype)
    mask[..., 1, 1] = 1
    input, weight = draw(1, 3, 4, 5).requires_grad_(), draw(5, 3, 3, 3, seed=1).requires_grad_()
    masked_conv2d(input, weight, mask=mask).sum().backward()
    for seed in range(3):
        value = torch.rand(shape, generator=torch.Generator().manual_seed(seed)) < 0.4
        change(mask, value.to(dtype))
        exact = F.conv2d(input, weight * value, padding=1)
        output = masked_conv2d(input, weight, mask=mask)
        torch.testing.assert_close(output, exact)
        upstream = draw(*output.shape, seed=2)
        for one, other in zip(
            *(torch.autograd.grad(result, (input, weight), upstream) for result in (output, exact)), strict=True
        ):
            torch.testing.assert_close(one, other)


def test_a_layers_mask_changed_past_pytorch():
    layer, input = MaskedConv2d(2, 3, 3, "B").double(), draw(1, 2, 6, 6)
    layer(input)
    layer.mask.data.fill_(True)
    torch.testing.assert_close(layer(input), F.conv2d(input, layer.weight, layer.bias, padding=1))


@pytest.mark.parametrize("channels", [False, True])
@pytest.mark.parametrize("dtype", [torch.bool, torch.float32])
def test_masks_are_not_kept_alive(channels, dtype):
    input, weight = torch.randn(1, 4, 5, 5), torch.randn(6, 4, 3, 3, requires_grad=True)
    masks = []
    for _ in range(5):
        mask = torch.ones(weight.shape if channels else (3, 3), dtype=dtype)
        masks.append(weakref.ref(mask))
        masked_conv2d(input, weight, mask=mask).sum().backward()
        del mask
    gc.collect()
    assert not any(mask() is not None for mask in masks)


@pytest.mark.parametrize("outputs", [1, 7, 64, 65])
@pytest.mark.parametrize("inputs", [1, 3, 64])
@pytest.mark.parametrize("kernel", [(1, 1), (1, 3), (3, 3), (2, 4)])
def test_taps_that_some_channel_sees(outputs, inputs, kernel):
    generator = torch.Generator().manual_seed(outputs)
    for share in (0, 0.5 / (outputs * inputs), 2 / (outputs * inputs), 0.5):
        mask = torch.rand(outputs, inputs, *kernel, generator=generator) < share
        for layout in (mask, mask.contiguous(memory_format=torch.channels_last), mask.transpose(0, 1)):
            expected = layout.flatten(0, 1).any(0).flatten().nonzero().flatten().tolist()
            assert native.masked_conv2d_taps(layout) == expected


@pytest.mark.parametrize("where", range(0, 66 * 5 * 6, 53))
def test_one_visible_tap_of_many(where):
    mask = torch.zeros(66, 5, 2, 3, dtype=torch.bool)
    mask.view(-1)[where] = True
    assert native.masked_conv2d_taps(mask) == [where % 6]


# --- Devices on which reading values stalls a stream ---


class OnGPU:
    """Stub of a mask on a GPU, which counts how often its values are read."""

    device, is_cuda = torch.device("cuda"), True

    def __init__(self, mask: torch.Tensor, inference: bool = False) -> None:
        self.mask, self.dtype, self.shape, self.inference, self.looks = mask, mask.dtype, mask.shape, inference, 0

    @property
    def _version(self):
        if self.inference:
            raise RuntimeError("Inference tensors do not track version counter.")
        return self.mask._version

    def ne(self, other):
        self.looks += 1
        return self.mask.ne(other)

    def is_inference(self):
        return self.inference

    def reshape(self, *shape):
        self.looks += 1
        return self.mask.reshape(*shape)


@pytest.fixture
def capturing(monkeypatch):
    state = {"capturing": False}
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: state["capturing"])
    return state


def visible_taps(mask):
    return ops._visible(mask).taps


def test_a_gpus_mask_is_looked_at_once_and_after_changes(capturing):
    mask = OnGPU(torch.tensor([[True, False], [False, False]]))
    for _ in range(3):
        assert visible_taps(mask) == [0]
    assert mask.looks == 1
    capturing["capturing"] = True
    assert visible_taps(mask) == [0]
    capturing["capturing"] = False
    mask.mask[1, 0] = True
    assert visible_taps(mask) == [0, 2]
    assert mask.looks == 2
    another = OnGPU(torch.tensor([[True, True], [False, False]]))
    assert visible_taps(another) == [0, 1]
    assert visible_taps(mask) == [0, 2]


def test_numbers_in_a_gpus_mask_are_brought_to_bools_once(capturing):
    mask = OnGPU(torch.tensor([[0.0, 1.0], [0.0, 0.0]]))
    first = ops._visible(mask)
    assert torch.equal(first.mask, torch.tensor([[False, True], [False, False]]))
    assert first.taps == [1]
    assert ops._visible(mask).mask is first.mask
    assert mask.looks == 1
    mask.mask[1] = 1
    assert ops._visible(mask).mask.tolist() == [[False, True], [True, True]]
    plain = OnGPU(torch.ones(2, 2, dtype=torch.bool))
    assert ops._visible(plain).mask is plain
    assert ops._visible(plain).mask is plain


def test_no_look_while_a_graph_is_captured(capturing):
    mask = OnGPU(torch.tensor([[True, False], [False, False]]))
    capturing["capturing"] = True
    assert visible_taps(mask) == [0, 1, 2, 3]
    mask.mask[0, 0] = False
    assert visible_taps(mask) == [0, 1, 2, 3]
    assert mask.looks == 0
    capturing["capturing"] = False
    assert visible_taps(mask) == []
    capturing["capturing"] = True
    assert visible_taps(mask) == []
    mask.mask[1, 1] = True
    assert visible_taps(mask) == [0, 1, 2, 3]
    assert mask.looks == 1


def test_no_look_at_masks_made_in_inference_mode(capturing):
    mask = OnGPU(torch.tensor([[True, False], [False, False]]), inference=True)
    for _ in range(3):
        assert visible_taps(mask) == [0, 1, 2, 3]
    assert mask.looks == 0


def test_what_was_seen_goes_with_its_mask(capturing):
    before = len(ops._looked_at)
    masks = [OnGPU(torch.ones(2, 2, dtype=torch.bool)) for _ in range(4)]
    for mask in masks:
        visible_taps(mask)
    assert len(ops._looked_at) == before + 4
    dead = weakref.ref(masks[0])
    del mask, masks
    gc.collect()
    assert dead() is None
    assert len(ops._looked_at) == before


def test_taps_beyond_the_visible_ones_change_nothing(request, device, monkeypatch):
    """What is computed where nobody may look, which the CPU always may."""
    if request.node.callspec.params["device"] == "cpu":
        pytest.skip("the CPU's kernels rely on the taps")
    mask = torch.tensor([[True, True, False], [True, False, False], [False, False, False]], device=device)
    tensors = [draw(2, 4, 5, 6).to(device).requires_grad_(), draw(6, 4, 3, 3, seed=1).to(device).requires_grad_()]

    def results():
        output = masked_conv2d(*tensors, mask=mask, activation="gated")
        return output, *torch.autograd.grad(output.square().sum(), tensors)

    expected = results()
    monkeypatch.setattr(ops, "_visible", lambda mask: ops._Visible(mask, list(range(9))))
    for one, other in zip(results(), expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-12, atol=1e-12)
    assert not results()[2][:, :, ~mask].any()


@torch.inference_mode()
def test_masks_made_in_inference_mode_on_the_cpu():
    mask = torch.tensor([[False, True, False]])
    input, weight = draw(1, 2, 3, 3), draw(2, 2, 1, 3, seed=1)
    for _ in range(2):
        torch.testing.assert_close(
            masked_conv2d(input, weight, mask=mask), F.conv2d(input, weight * mask, padding=(0, 1))
        )
        mask[0, 0] = True
