"""augment_patches on arguments that Hypothesis makes up; conftest.py tells how."""

import math
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from hypothesis import strategies as st

from cpc_ext.ops import (
    AugmentationPlan,
    Transform,
    augment_patches,
)
from cpc_ext.ops._patch_options import PatchOptions
from cpc_ext.ops.augment_patches import augment_patches_reference
from tests.ops.properties.conftest import *
from tests.ops.properties.test_extract_patches import WRONG_PATCH_ARGUMENTS, grid


@dataclass(frozen=True)
class Augmentation:
    """Arguments of augment_patches, tensors as layouts."""

    images: Layout
    patch_size: int
    stride: int
    flip: Layout | None
    codes: Layout
    parameters: Layout
    partners: Layout
    displacements: Layout
    fill: int
    magnitude: float
    options: dict[str, Any]


@st.composite
def augmentations(draw) -> Augmentation:
    """Right arguments whose patches have some thousand pixels at most."""
    batch, channels = draw(st.sampled_from([1, 2, 0])), draw(st.sampled_from([1, 3]))
    size = draw(st.integers(1, 20)), draw(st.integers(1, 24))
    patch_size = draw(st.integers(1, min(size)))
    stride = draw(st.integers(max(1, patch_size // 2), 30) | st.sampled_from(HUGE))
    cells = (batch, *grid(size, patch_size, stride))
    steps = draw(st.integers(0, 3))
    gray = draw(st.booleans())
    out_channels = 1 if gray else channels
    return Augmentation(
        images=draw(layouts((batch, channels, *size))),
        patch_size=patch_size,
        stride=stride,
        flip=draw(st.none() | layouts((batch,))),
        codes=draw(layouts((*cells, steps))),
        parameters=draw(layouts((*cells, steps, 3))),
        partners=draw(layouts(cells)),
        displacements=draw(layouts((*cells, 2, 4, 4))),
        fill=draw(st.integers(0, 255)),
        magnitude=draw(st.sampled_from([1.0, 1.0, 10.0, 1e4, 1e30])),
        options={
            "gray": gray,
            "mean": draw(st.none() | st.just([0.4] * out_channels)),
            "std": draw(st.none() | st.just([0.5] * out_channels)),
            "patch_norm": draw(st.booleans()),
            "dtype": draw(st.sampled_from(FLOATING)),
            "channels_last": draw(st.booleans()),
        },
    )


def test_augmented_patches_are_the_references(device, for_examples):
    """Any transforms with any parameters, on any strides of images and plans."""

    @for_examples(case=augmentations())
    def holds(case: Augmentation):
        images, dense = case.images.place(device, torch.uint8, integers_below(256))
        count = math.prod(case.partners.shape)
        placed = [
            case.codes.place(device, torch.uint8, integers_below(len(Transform))),
            case.parameters.place(device, torch.float32, lambda n, g: normal(n, g) * case.magnitude),
            case.partners.place(device, torch.int64, integers_below(count)),
            case.displacements.place(device, torch.float32, lambda n, g: normal(n, g) * case.magnitude),
        ]
        plan, dense_plan = (AugmentationPlan(*tensors, case.fill) for tensors in zip(*placed, strict=True))
        flip, dense_flip = None, None
        if case.flip is not None:
            flip, dense_flip = case.flip.place(device, torch.bool, integers_below(2))

        actual = augment_patches(images, case.patch_size, case.stride, plan, flip=flip, **case.options)
        height, width = case.images.shape[2:]
        window = case.patch_size, min(case.stride, height + width), height, width, None, dense_flip
        options = PatchOptions(*window, **case.options | {"dtype": torch.float64})
        expected = augment_patches_reference(dense, options, dense_plan)
        assert actual.dtype == case.options["dtype"]
        # Pixels less the mean are up to 2 deviations, which the least contrast of 0.1 amplifies.
        amplified = 20 if case.options["patch_norm"] else 2
        assert_within(
            actual, expected, TOLERANCE[actual.dtype] * (1 + expected.abs()) + TOLERANCE[torch.float32] * amplified
        )


WRONG_AUGMENT_ARGUMENTS = {
    "images": st.none()
    | NOT_TENSORS
    | tensors(
        (2, 3, 6, 7),
        torch.uint8,
        [torch.int8, torch.bool, *FLOATING],
        fits=lambda shape: len(shape) == 4,
        leads=True,
    ),
    "codes": st.none()
    | NOT_TENSORS
    | other_layouts((2, 2, 3, 2), torch.uint8)
    | tensors((2, 2, 3, 2), torch.uint8, [torch.int64, torch.int8, torch.float32]),
    "parameters": st.none()
    | NOT_TENSORS
    | other_layouts((2, 2, 3, 2, 3), torch.float32)
    | tensors((2, 2, 3, 2, 3), torch.float32, [torch.float64, torch.bfloat16, torch.int64]),
    "partners": NOT_TENSORS
    | other_layouts((2, 2, 3), torch.int64)
    | tensors((2, 2, 3), torch.int64, [torch.int32, *FLOATING]),
    "displacements": NOT_TENSORS
    | other_layouts((2, 2, 3, 2, 4, 4), torch.float32)
    | tensors((2, 2, 3, 2, 4, 4), torch.float32, [torch.float64, torch.int64]),
    "fill": st.none() | NOT_NUMBERS | st.sampled_from([-1, 256, 1.5, True, 2**70]),
    "plan": st.none() | NOT_TENSORS | st.just((torch.zeros(2, 2, 3, 0, dtype=torch.uint8), torch.zeros(2, 2, 3, 0, 3))),
    "crop": WRONG_PATCH_ARGUMENTS["crop"],
    "flip": WRONG_PATCH_ARGUMENTS["flip"],
    "mean": WRONG_PATCH_ARGUMENTS["mean"],
    "dtype": WRONG_PATCH_ARGUMENTS["dtype"],
}


def test_wrong_arguments_of_augment_patches(device, for_examples):
    @for_examples(wrong=some_wrong(WRONG_AUGMENT_ARGUMENTS))
    def holds(wrong):
        plan = AugmentationPlan(
            torch.zeros(2, 2, 3, 2, dtype=torch.uint8),
            torch.zeros(2, 2, 3, 2, 3),
            torch.zeros(2, 2, 3, dtype=torch.int64),
            torch.zeros(2, 2, 3, 2, 4, 4),
        )
        fields = {name: wrong[name] for name in wrong if name in AugmentationPlan._fields}
        plan = AugmentationPlan(*(on(device, value) for value in plan._replace(**fields)))
        arguments = {"images": torch.zeros(2, 3, 6, 7, dtype=torch.uint8), "plan": plan}
        arguments |= {name: value for name, value in wrong.items() if name not in fields}
        arguments = {name: on(device, value) for name, value in arguments.items()}
        with refused(*wrong):
            augment_patches(arguments.pop("images"), 3, 2, arguments.pop("plan"), **arguments)


def test_codes_and_partners_stand_for_something(device, request, for_examples):
    """Any numbers: a ValueError on the CPU where they name nothing, elsewhere no transform and a clamped partner."""
    on_cpu = request.node.callspec.params["device"] == "cpu"

    @for_examples(
        code=st.integers(0, 255), partner=st.integers(-2, 14) | st.integers(-(2**63), 2**63 - 1), at=st.integers(0, 11)
    )
    def holds(code, partner, at):
        images = integers_below(256)(2 * 3 * 6 * 7, torch.Generator().manual_seed(0)).view(2, 3, 6, 7).to(torch.uint8)
        codes = torch.full((2, 2, 3, 1), int(Transform.SAMPLE_PAIRING), dtype=torch.uint8)
        partners = torch.zeros(2, 2, 3, dtype=torch.int64)
        codes.view(-1)[(at + 5) % 12], partners.view(-1)[at] = code, partner
        plan = AugmentationPlan(codes, torch.full((2, 2, 3, 1, 3), 0.5), partners, torch.ones(2, 2, 3, 2, 4, 4))

        def augmented():
            return augment_patches(images.to(device), 3, 2, AugmentationPlan(*(on(device, value) for value in plan)))

        if on_cpu and (code >= len(Transform) or not 0 <= partner < 12):
            with pytest.raises(ValueError, match=r"plan\.(codes|partners) must be"):
                augmented()
        else:
            expected = augment_patches_reference(images, PatchOptions(3, 2, 6, 7, dtype=torch.float64), plan)
            assert_within(augmented(), expected, 2e-6)
