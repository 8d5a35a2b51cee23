"""extract_patches against scaling, normalising and unfolding: colour images to normalised overlapping patches.

Forward cases take uint8 images, as training does, or normalised images of the patches' type; forward and backward cases
take float32 images. The bytes are those of the images and patches (and of their gradients), each read or written once,
and the ceiling is a copy of the patches. For uint8 images the rate is that of the kernel writing into existing memory,
as fresh pages can cost more than writing.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from benchmark import Case, Op, Problem, both_passes, compiled
from torch import Tensor

from cpc_ext._native import KERNEL_DEVICES, native
from cpc_ext.ops import extract_patches
from cpc_ext.ops._patch_options import scale_and_shift

MEAN, STD = (0.4313, 0.4156, 0.3663), (0.2683, 0.2610, 0.2687)

# The compiled code's tiles add 2 * i to an index in place of i, beyond the buffer, which corrupts the heap.
UNSAFE_UNFOLD_BACKWARD = "torch.compile's multi-threaded CPU code for unfold's backward writes out of bounds (2.13.0)"


def plain_patches(images: Tensor, patch: int, stride: int, dtype: torch.dtype) -> Tensor:
    """Extract patches in plain PyTorch: scale and normalise the batch, unfold, make the patches contiguous."""
    mean = torch.tensor(MEAN, device=images.device).view(1, 3, 1, 1)
    std = torch.tensor(STD, device=images.device).view(1, 3, 1, 1)
    scaled = images.float() / 255 if images.dtype == torch.uint8 else images
    normalised = ((scaled - mean) / std).to(dtype)
    return unfolded(normalised, patch, stride)


def unfolded(images: Tensor, patch: int, stride: int) -> Tensor:
    return images.unfold(2, patch, stride).unfold(3, patch, stride).permute(0, 2, 3, 1, 4, 5).contiguous()


@dataclass(frozen=True)
class PatchCase(Case):
    """A batch of square colour images cut into overlapping patches; sides and stride in pixels."""

    batch: int
    side: int
    patch: int
    stride: int
    normalised: bool = False  # Images are normalised, and have the patches' type.

    @property
    def label(self) -> str:
        sizes = f"[{self.batch},3,{self.side},{self.side}] {self.patch}/{self.stride}"
        return f"{sizes} normalised" if self.normalised else sizes

    @property
    def size(self) -> int:
        return self.batch


def prepare(case: PatchCase, device: torch.device) -> Problem:
    dtype = getattr(torch, case.dtype)
    shape = case.batch, 3, case.side, case.side
    if case.normalised:
        return _pieces(case, torch.randn(shape, dtype=dtype, device=device))
    return _backward(case, shape, dtype, device) if case.backward else _forward(case, shape, dtype, device)


def _pieces(case: PatchCase, images: Tensor) -> Problem:
    plain_compiled = compiled(unfolded)
    alternatives = {
        "eager": lambda: unfolded(images, case.patch, case.stride),
        "compiled": lambda: plain_compiled(images, case.patch, case.stride),
        "ours": lambda: extract_patches(images, case.patch, case.stride),
    }
    written = unfolded(images, case.patch, case.stride).nbytes
    return Problem(alternatives, images.nbytes + written, copied_bytes=written)


def _forward(case: PatchCase, shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Problem:
    images = torch.randint(0, 256, shape, dtype=torch.uint8, device=device)
    plain_compiled = compiled(plain_patches)
    patches = extract_patches(images, case.patch, case.stride, mean=MEAN, std=STD, dtype=dtype)
    scale, shift = scale_and_shift(images.dtype, 3, MEAN, STD)

    def ours() -> Tensor:
        return extract_patches(images, case.patch, case.stride, mean=MEAN, std=STD, dtype=dtype)

    def into_existing() -> None:
        window = case.patch, case.stride, case.side, case.side
        native.extract_patches(images, patches, *window, None, None, False, False, False, scale, shift)

    alternatives = {
        "eager": lambda: plain_patches(images, case.patch, case.stride, dtype),
        "compiled": lambda: plain_compiled(images, case.patch, case.stride, dtype),
        "ours": ours,
    }
    headline = "ours"
    if device.type in KERNEL_DEVICES:
        headline = "ours into existing memory"
        alternatives[headline] = into_existing
    return Problem(alternatives, images.nbytes + patches.nbytes, headline=headline, copied_bytes=patches.nbytes)


def _backward(case: PatchCase, shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Problem:
    images = torch.rand(shape, device=device).requires_grad_()
    plain_compiled = compiled(plain_patches)
    with torch.no_grad():
        grad = torch.randn_like(plain_patches(images, case.patch, case.stride, dtype))

    def gradient(patches: Tensor) -> Tensor:
        return torch.autograd.grad(patches, images, grad)[0]

    alternatives = {
        "eager": lambda: gradient(plain_patches(images, case.patch, case.stride, dtype)),
        "compiled": lambda: gradient(plain_compiled(images, case.patch, case.stride, dtype)),
        "ours": lambda: gradient(extract_patches(images, case.patch, case.stride, mean=MEAN, std=STD, dtype=dtype)),
    }
    left_out = {}
    if device.type == "cpu" and torch.get_num_threads() > 1:
        del alternatives["compiled"]
        left_out["compiled"] = UNSAFE_UNFOLD_BACKWARD
    return Problem(alternatives, 2 * (images.nbytes + grad.nbytes), copied_bytes=grad.nbytes, left_out=left_out)


CASES = (
    # CPCV2-PyTorch's STL-10 patches, over the batch.
    *(
        case
        for batch in (4, 16, 64, 256, 1024)
        for case in both_passes(PatchCase, batch, 64, 16, 8, sweep=True, quick=batch in (4, 64))
    ),
    PatchCase(64, 64, 16, 8, dtype="bfloat16", quick=True),
    PatchCase(1024, 64, 16, 8, dtype="bfloat16"),
    *(PatchCase(1024, 64, 16, 8, dtype=dtype, normalised=True) for dtype in ("float32", "bfloat16")),
    PatchCase(64, 64, 16, 8, dtype="bfloat16", normalised=True, quick=True),
    # Its CIFAR-10 patches, CPC v1's ImageNet patches and CPC v2's.
    PatchCase(64, 30, 10, 5),
    PatchCase(16, 256, 64, 32),
    PatchCase(16, 256, 64, 32, backward=True),
    PatchCase(8, 260, 80, 36),
)

OPS = (Op("extract_patches", "memory", "images of 64x64, patches 16 / 8", CASES, prepare),)
