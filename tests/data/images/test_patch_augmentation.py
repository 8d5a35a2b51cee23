"""PatchAugmentation: the frequency of each transform, ranges of the draws, and switching off."""

from __future__ import annotations

import pytest
import torch

from cpc_ext.data import AUTO_AUGMENT, PatchAugmentation
from cpc_ext.ops import AugmentationPlan, Transform, augment_patches

OFF = {
    "transforms": (),
    "elastic_probability": 0,
    "histogram_probability": 0,
    "jitter_probability": 0,
    "gray_probability": 0,
    "crop": 1,
}
GRID = 40, 10, 10


def draw(seed=0, grid=GRID, patch_size=16, channels=3, **options) -> AugmentationPlan:
    generator = torch.Generator().manual_seed(seed)
    return PatchAugmentation(**options).plan(*grid, patch_size, channels=channels, generator=generator)


def share(plan: AugmentationPlan, transform: Transform) -> float:
    """Return the share of patches that get a transform."""
    return (plan.codes == transform).any(-1).float().mean().item()


def parameters_of(plan: AugmentationPlan, transform: Transform) -> torch.Tensor:
    """Return the parameters of all occurrences of a transform, [M, 3]."""
    return plan.parameters[plan.codes == transform]


def test_a_plan_has_the_shapes_that_the_op_takes():
    plan = draw(grid=(4, 3, 3))
    images = torch.randint(0, 256, (4, 3, 32, 32), dtype=torch.uint8)
    assert augment_patches(images, 16, 8, plan).shape == (4, 3, 3, 3, 16, 16)
    gray = draw(grid=(4, 3, 3), channels=1)
    assert augment_patches(images[:, :1], 16, 8, gray).shape == (4, 3, 3, 1, 16, 16)
    assert draw(grid=(0, 3, 3)).codes.shape[:3] == (0, 3, 3)


def test_everything_off_is_an_empty_plan():
    plan = draw(**OFF)
    assert plan.codes.shape == (*GRID, 0)
    assert plan.partners is None
    assert plan.displacements is None


def test_two_different_transforms_of_the_list_each_as_likely():
    plan = draw(**OFF | {"transforms": AUTO_AUGMENT})
    first, second = plan.codes.unbind(-1)
    assert (first != second).all()
    for name in AUTO_AUGMENT:
        for codes in (first, second):
            assert (codes == Transform[name.upper()]).float().mean() == pytest.approx(1 / 16, abs=0.012)
    pairs = set(zip(first.flatten().tolist(), second.flatten().tolist(), strict=True))
    assert len(pairs) == 16 * 15


@pytest.mark.parametrize("number", [0, 1, 3])
def test_so_many_transforms_of_those_named(number):
    names = ("invert", "cutout", "rotate")
    plan = draw(**OFF | {"transforms": names, "num_transforms": number})
    assert plan.codes.shape[-1] == number
    wanted = {int(Transform[name.upper()]) for name in names}
    assert set(plan.codes.flatten().tolist()) == (wanted if number else set())
    if number == 3:
        assert (plan.codes.sort(-1).values == torch.tensor(sorted(wanted))).all()


@pytest.mark.parametrize(
    ("transform", "low", "high"),
    [
        ("shear_x", -0.3, 0.3),
        ("shear_y", -0.3, 0.3),
        ("translate_x", -150 / 331 * 16, 150 / 331 * 16),
        ("translate_y", -150 / 331 * 16, 150 / 331 * 16),
        ("rotate", -30, 30),
        ("solarize", 0, 256),
        ("contrast", 0.1, 1.9),
        ("color", 0.1, 1.9),
        ("brightness", 0.1, 1.9),
        ("sharpness", 0.1, 1.9),
        ("sample_pairing", 0, 0.4),
    ],
)
def test_magnitudes_fill_the_published_ranges_evenly(transform, low, high):
    plan = draw(**OFF | {"transforms": (transform,), "num_transforms": 1})
    drawn = parameters_of(plan, Transform[transform.upper()])[:, 0]
    assert low <= drawn.min()
    assert drawn.max() <= high
    share = (drawn - low) / (high - low)
    assert share.sort().values.numpy() == pytest.approx(torch.linspace(0, 1, len(share)).numpy(), abs=0.03)


def test_bits_and_squares_are_whole():
    bits = parameters_of(draw(**OFF | {"transforms": ("posterize",), "num_transforms": 1}), Transform.POSTERIZE)[:, 0]
    values, counts = bits.unique(return_counts=True)
    assert values.tolist() == [4, 5, 6, 7, 8]
    assert (counts / len(bits)).numpy() == pytest.approx(0.2, abs=0.03)
    options = OFF | {"transforms": ("cutout",), "num_transforms": 1, "cutout": (0.25, 0.5)}
    top, left, side = parameters_of(draw(**options), Transform.CUTOUT).unbind(1)
    assert side.unique().tolist() == [4, 5, 6, 7, 8]
    for corner in (top, left):
        middle = corner + (side / 2).floor()
        assert middle.unique().tolist() == list(range(16))


@pytest.mark.parametrize(
    ("name", "transform", "published"),
    [
        ("elastic_probability", Transform.ELASTIC, 0.2),
        ("histogram_probability", Transform.TONE_CURVE, 0.2),
        ("jitter_probability", Transform.HUE, 0.8),
        ("gray_probability", Transform.GRAY, 0.25),
    ],
)
def test_probabilities_are_the_published_ones_and_can_be_set(name, transform, published):
    defaults = {field: value for field, value in OFF.items() if field != name}
    assert share(draw(**defaults), transform) == pytest.approx(published, abs=0.03)
    assert share(draw(**OFF | {name: 0.5}), transform) == pytest.approx(0.5, abs=0.03)
    assert share(draw(**OFF | {name: 1}), transform) == 1
    assert share(draw(**{field: value for field, value in OFF.items() if field == name}), transform) == 0


def test_deformed_patches_are_sheared_too():
    plan = draw(**OFF | {"elastic_probability": 0.5})
    deformed = (plan.codes == Transform.ELASTIC).any(-1)
    along_x, along_y = ((plan.codes == code).any(-1) for code in (Transform.SHEAR_X, Transform.SHEAR_Y))
    assert torch.equal(deformed, along_x | along_y)
    assert not (along_x & along_y).any()
    assert along_x[deformed].float().mean() == pytest.approx(0.5, abs=0.05)
    assert plan.displacements.abs().max() <= 1.6
    assert plan.displacements.std() == pytest.approx(1.6 / 3**0.5, rel=0.02)
    assert share(draw(**OFF | {"elastic_probability": 1, "elastic_shear": (0, 0)}), Transform.SHEAR_X) == 0


def test_jitter_changes_all_four_in_random_order():
    plan = draw(**OFF | {"jitter_probability": 0.5, "jitter": (0.4, 0.3, 0.2, 0.1)})
    changes = [Transform.BRIGHTNESS, Transform.CONTRAST, Transform.COLOR, Transform.HUE]
    jittered = (plan.codes != Transform.NONE).any(-1)
    assert jittered.float().mean() == pytest.approx(0.5, abs=0.03)
    assert (plan.codes[jittered].sort(-1).values == torch.tensor(sorted(changes))).all()
    assert len(plan.codes[jittered].unique(dim=0)) == 24
    for change, strength, middle in zip(changes, (0.4, 0.3, 0.2, 0.1), (1, 1, 1, 0), strict=True):
        amount = parameters_of(plan, change)[:, 0] - middle
        assert amount.abs().max() <= strength + 1e-6
        assert amount.std() == pytest.approx(strength / 3**0.5, rel=0.05)
        assert share(draw(**OFF | {"jitter_probability": 1, "jitter": (0.0,) * 4}), change) == 0
    factors = parameters_of(draw(**OFF | {"jitter_probability": 1, "jitter": (2, 0, 0, 0)}), Transform.BRIGHTNESS)
    assert factors[:, 0].min() == 0


def test_crops_are_anywhere_in_the_patch():
    for patch_size, side in ((16, 15), (64, 60), (80, 75)):
        plan = draw(**OFF | {"crop": 60 / 64}, patch_size=patch_size)
        assert share(plan, Transform.CROP) == 1
        top, left, sides = parameters_of(plan, Transform.CROP).unbind(1)
        assert (sides == side).all()
        for corner in (top, left):
            assert corner.unique().tolist() == list(range(patch_size - side + 1))


def test_transforms_come_in_the_papers_order():
    plan = draw(elastic_probability=1, histogram_probability=1, jitter_probability=1, gray_probability=1)
    codes = plan.codes[..., 2:]
    assert (codes[..., 0] == Transform.ELASTIC).all()
    assert torch.isin(codes[..., 1], torch.tensor([Transform.SHEAR_X, Transform.SHEAR_Y])).all()
    assert (codes[..., 2] == Transform.TONE_CURVE).all()
    assert (codes[..., -2] == Transform.GRAY).all()
    assert (codes[..., -1] == Transform.CROP).all()


def test_images_of_one_channel_get_nothing_of_colour():
    plan = draw(channels=1)
    for transform in (Transform.COLOR, Transform.HUE, Transform.GRAY):
        assert share(plan, transform) == 0
    assert share(plan, Transform.CONTRAST) > 0.7


def test_partners_are_any_patches_of_the_batch():
    partners = draw(grid=(4, 3, 3)).partners
    assert partners.min() >= 0
    assert partners.max() < 36
    assert len(draw().partners.unique()) > 2000


def test_seed_determines_the_plan():
    one, same, other = (draw(seed) for seed in (1, 1, 2))
    assert all(torch.equal(a, b) for a, b in zip(one[:4], same[:4], strict=True))
    assert not torch.equal(one.codes, other.codes)
    torch.manual_seed(5)
    first = PatchAugmentation().plan(*GRID, 16, channels=3)
    torch.manual_seed(5)
    assert torch.equal(first.codes, PatchAugmentation().plan(*GRID, 16, channels=3).codes)


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=[pytest.mark.cuda])])
def test_the_plan_does_not_depend_on_the_device(device):
    generator = torch.Generator().manual_seed(0)
    plan = PatchAugmentation().plan(*GRID, 16, channels=3, generator=generator, device=device)
    assert all(tensor.device.type == device for tensor in plan[:4])
    assert all(torch.equal(a.cpu(), b) for a, b in zip(plan[:4], draw()[:4], strict=True))


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"transforms": ("invert", "blur")}, "transforms: expected names of .*, got blur"),
        ({"transforms": ("invert", "invert")}, "transforms: expected each name once"),
        ({"num_transforms": 17}, "num_transforms: expected 0 to 16"),
        ({"num_transforms": -1}, "num_transforms: expected 0 to 16"),
        ({"gray_probability": 1.1}, "gray_probability: expected 0 to 1, got 1.1"),
        ({"jitter_probability": float("nan")}, "jitter_probability: expected 0 to 1, got nan"),
        ({"shear": (-5, 0)}, "shear: expected -4 to 4, got -5"),
        ({"shear": (0.3, -0.3)}, "shear: expected 0.3 to 4, got -0.3"),
        ({"contrast": (0.1, 4.5)}, "contrast: expected 0.1 to 4, got 4.5"),
        ({"posterize": (0, 9)}, "posterize: expected 0 to 8, got 9"),
        ({"jitter": (0.4, 0.4, 0.4, 0.6)}, "jitter: expected 0 to 0.5, got 0.6"),
        ({"histogram_strength": 2}, "histogram_strength: expected 0 to 1"),
        ({"elastic_displacement": -0.1}, "elastic_displacement: expected 0 to 0.5"),
        ({"crop": 0}, "crop: expected above 0 and at most 1, got 0"),
        ({"fill": 256}, "fill: expected 0 to 255"),
    ],
)
def test_what_does_not_make_sense_is_refused(options, words):
    with pytest.raises(ValueError, match=words):
        PatchAugmentation(**options)
