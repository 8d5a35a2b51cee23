"""Sampling from PixelCNNPP: kept features give what the whole network gives, and steps do not depend on their host."""

from __future__ import annotations

import itertools

import pytest
import torch

from cpc_ext._native import native
from cpc_ext.models import PixelCNNPP
from cpc_ext.models.pixels import pixelcnnpp_sampler
from cpc_ext.models.pixels.pixelcnnpp_sampler import MixtureSampler
from cpc_ext.ops import logistic_mixture_nll

RUNNERS = ("kernel", "tensors") if hasattr(native, "PixelSteps") else ("tensors",)


@pytest.fixture(params=RUNNERS)
def runner(request, monkeypatch):
    """What steps are run by."""
    monkeypatch.setattr(pixelcnnpp_sampler, "_uses_kernel", lambda image: request.param == "kernel")
    return request.param


def model_of(colors=3, classes=None, *, dtype=torch.float64, channels=5, blocks=1, mixtures=2, std=0.4):
    torch.manual_seed(0)
    model = PixelCNNPP(colors, channels=channels, blocks=blocks, mixtures=mixtures, num_classes=classes)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=std)
    return model.to(dtype)


def labels_of(model, count):
    return None if model.num_classes is None else torch.arange(count) % model.num_classes


def uniform(model, count, *size):
    generator = torch.Generator().manual_seed(1)
    return torch.rand(count, model.mixtures + model.in_channels, *size, generator=generator, dtype=torch.float64)


@pytest.mark.parametrize(("colors", "classes", "known_rows"), [(1, None, 0), (3, None, 0), (3, 4, 0), (3, 4, 5)])
@torch.no_grad()
def test_kept_features_are_those_of_the_whole_network(runner, colors, classes, known_rows, monkeypatch):
    model = model_of(colors, classes, blocks=2)
    labels, size = labels_of(model, 3), (8, 12)
    seen = []
    sample = pixelcnnpp_sampler._sample_logistic_mixture

    def spy(params, *options):
        seen.append(params.clone())
        return sample(params, *options)

    monkeypatch.setattr(pixelcnnpp_sampler, "_sample_logistic_mixture", spy)
    images = torch.randint(0, 256, (3, colors, *size), dtype=torch.uint8)
    drawn = model.sample(
        3, size, labels=labels, images=images, known_rows=known_rows, noise=uniform(model, 3, *size), temperature=0.5
    )
    assert len(seen) == (size[0] - known_rows) * size[1]
    # What is drawn is what the likelihood is made of.
    params = model.eval()(drawn, labels)[:, :, known_rows:].permute(2, 3, 0, 1).flatten(0, 1)
    torch.testing.assert_close(torch.stack(seen)[..., 0, 0], params, rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize(
    ("colors", "classes", "size"), [(1, None, (8, 8)), (3, None, (12, 12)), (3, 4, (4, 8)), (1, 4, (8, 4))]
)
def test_samples_are_those_of_the_whole_network(runner, colors, classes, size):
    model = model_of(colors, classes)
    options = {"labels": labels_of(model, 3), "noise": uniform(model, 3, *size)}
    kept, naive = (model.sample(3, size, cached=cached, **options) for cached in (True, False))
    assert kept.shape == (3, colors, *size)
    assert kept.dtype == torch.uint8
    assert kept.is_contiguous()
    assert torch.equal(kept, naive)
    assert len(kept.unique()) > 20
    by_generator = [
        model.sample(
            3,
            size,
            labels=options["labels"],
            generator=torch.Generator().manual_seed(5),
            cached=cached,
            temperature=0.7,
        )
        for cached in (True, False)
    ]
    assert torch.equal(*by_generator)
    assert not torch.equal(by_generator[0], kept)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_other_types(runner, dtype):
    # Rounding may decide a value, and with it all that follow: few pixels, and known ones.
    model = model_of(dtype=dtype, std=0.1)
    images = torch.randint(0, 256, (2, 3, 8, 8), dtype=torch.uint8)
    options = {"images": images, "known_rows": 7, "noise": uniform(model, 2, 8, 8)}
    kept, naive = (model.sample(2, 8, cached=cached, **options).int() for cached in (True, False))
    assert (kept - naive).abs()[:, :, :, 0].max() <= (1 if dtype == torch.float32 else 16)


@pytest.mark.parametrize("known_rows", [0, 3, 8])
def test_known_rows_are_kept(runner, known_rows):
    model = model_of(3, 4)
    images = torch.randint(0, 256, (2, 3, 8, 4), dtype=torch.uint8)
    options = {"labels": labels_of(model, 2), "images": images, "known_rows": known_rows}
    options["noise"] = uniform(model, 2, 8, 4)
    drawn, naive = (model.sample(2, (8, 4), cached=cached, **options) for cached in (True, False))
    assert torch.equal(drawn, naive)
    assert torch.equal(drawn[:, :, :known_rows], images[:, :, :known_rows])
    # What was drawn before is known now, and the rest comes out as it did.
    options.update(images=drawn, known_rows=min(known_rows + 1, 8))
    assert torch.equal(model.sample(2, (8, 4), **options), drawn)


def test_temperature(runner):
    model = model_of()
    coldest = [model.sample(2, 8, temperature=0) for _ in range(2)]
    assert torch.equal(*coldest)
    noise = uniform(model, 2, 8, 8)
    assert torch.equal(model.sample(2, 8, temperature=1e-12, noise=noise), coldest[0])
    assert not torch.equal(model.sample(2, 8, temperature=1.0, noise=noise), coldest[0])


def test_labels_decide_the_image(runner):
    model = model_of(1, 4)
    noise = uniform(model, 1, 8, 8)
    by_class = [model.sample(1, 8, labels=label, noise=noise) for label in range(4)]
    assert len({tuple(image.flatten().tolist()) for image in by_class}) == 4
    mixed = model.sample(2, 8, labels=torch.tensor([3, 1]), noise=noise.expand(2, -1, -1, -1))
    assert torch.equal(mixed, torch.cat([by_class[3], by_class[1]]))


def test_dropout_has_no_part_in_it(runner):
    model = model_of().train()
    noise = uniform(model, 1, 4, 4)
    drawn = [model.sample(1, 4, noise=noise, cached=cached) for cached in (True, False, False)]
    assert model.training
    assert torch.equal(drawn[0], drawn[1])
    assert torch.equal(drawn[1], drawn[2])


@torch.no_grad()
def test_draws_have_the_models_probabilities(runner):
    model = model_of(1, dtype=torch.float32, std=0.2)
    drawn = model.sample(3000, 4, generator=torch.Generator().manual_seed(0))
    # Of the first pixel, by its likelihood: all other pixels see it, but it sees none.
    images = torch.zeros(256, 1, 4, 4, dtype=torch.uint8)
    images[:, 0, 0, 0] = torch.arange(256)
    params = model.eval()(images)[:, :, :1, :1]
    probabilities = torch.exp(-logistic_mixture_nll(images[:, :, :1, :1], params))
    assert probabilities.sum().item() == pytest.approx(1, abs=1e-3)
    expected, drawn = probabilities.view(16, 16).sum(1), torch.bincount(drawn[:, 0, 0, 0].long() // 16, minlength=16)
    assert (drawn / 3000 - expected).abs().max() < 0.03


def test_progress_goes_through_the_rows(runner):
    seen = []

    def progress(rows):
        for row in rows:
            seen.append(row)
            yield row

    model_of(1).sample(1, 4, images=torch.zeros(1, 1, 4, 4, dtype=torch.uint8), known_rows=1, progress=progress)
    assert seen == [1, 2, 3]


def test_steps_do_not_know_where_they_are(monkeypatch):
    """As in a CUDA graph: what the host does in a step may differ by the resolutions that begin, but not otherwise."""
    monkeypatch.setattr(pixelcnnpp_sampler, "_uses_kernel", lambda image: False)
    model = model_of()
    sampler = MixtureSampler(model, torch.zeros(2, 3, 8, 4, dtype=torch.uint8), None, temperature=1.0, cached=True)
    sampler._pixels[..., :3] = -1
    noise = uniform(model, 2, 8, 4)
    done = {}

    def profiled(kind, work, *at):
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
            work(*at)
        done.setdefault((kind, at[-1]), []).append([event.name for event in profile.events()])

    for row, col in itertools.product(range(8), range(4)):
        if col == 0:
            sampler._positions.go_to_row(row)
            # As replayed: the host's row is not looked at.
            profiled("row", sampler._features.start_row, 0, pixelcnnpp_sampler._levels(row))
        sampler._positions.go_to(row, col)
        sampler._noise.copy_(noise[:, :, row : row + 1, col : col + 1])
        profiled("pixel", sampler._step, 0, 0, pixelcnnpp_sampler._levels(row, col))
    assert {key: len(events) for key, events in done.items()} == {
        ("row", 1): 4,
        ("row", 2): 2,
        ("row", 3): 2,
        ("pixel", 1): 24,
        ("pixel", 2): 6,
        ("pixel", 3): 2,
    }
    for events in done.values():
        assert all(each == events[0] for each in events)
    drawn = (sampler._pixels[..., :3].permute(0, 3, 1, 2) + 1).mul(127.5).round().to(torch.uint8)
    assert torch.equal(drawn, model.sample(2, (8, 4), noise=noise))


@pytest.mark.cuda
def test_graphs_draw_what_the_whole_network_draws():
    if not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    model = model_of(3, 4).cuda()
    images = torch.randint(0, 256, (3, 3, 8, 12), dtype=torch.uint8)
    options = {"labels": labels_of(model, 3), "noise": uniform(model, 3, 8, 12), "images": images, "known_rows": 3}
    kept, naive = (model.sample(3, (8, 12), cached=cached, **options) for cached in (True, False))
    assert torch.equal(kept, naive)


def test_no_images():
    assert model_of().sample(0, (4, 8)).shape == (0, 3, 4, 8)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"count": -1}, "count must be at least 0, got -1"),
        ({"size": (0, 4)}, "size must be a multiple of 4 pixels each way, .* got 0 x 4"),
        ({"size": (8, 6)}, "size must be a multiple of 4 pixels each way, .* got 8 x 6"),
        ({"temperature": -1.0}, "temperature must be at least 0 and finite, got -1.0"),
        ({"labels": 0}, "labels are for a model with num_classes"),
        ({"known_rows": 1}, "known_rows=1 needs images"),
        ({"noise": torch.zeros(2, 3, 4, 4)}, r"noise must have shape \(2, 5, 4, 4\), got \(2, 3, 4, 4\)"),
    ],
)
def test_wrong_arguments(arguments, message):
    with pytest.raises(ValueError, match=message):
        model_of().sample(**{"count": 2, "size": 4, **arguments})
