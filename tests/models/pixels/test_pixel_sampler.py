"""Sampling: cached features give what the whole network gives, and what is asked for is kept, drawn or refused."""

from __future__ import annotations

import itertools

import pytest
import torch

from cpc_ext._native import native
from cpc_ext.models import GatedPixelCNN, PixelCNN
from cpc_ext.models.pixels.pixel_sampler import Sampler

# The references of the convolution of an image and of a pixel may round differently.
BIT_FOR_BIT = hasattr(native, "masked_conv2d")
KINDS = ("pixelcnn", "gated-pixelcnn", "gated-pixelcnn of classes")


def model_of(kind, colors, dtype=torch.float64):
    torch.manual_seed(0)
    if kind == "pixelcnn":
        model = PixelCNN(colors, hidden_channels=2 * colors, layers=2)
    else:
        classes = 4 if kind.endswith("classes") else None
        model = GatedPixelCNN(colors, channels=2 * colors, layers=3, num_classes=classes, kernel_size=5)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    return model.to(dtype)


def labels_of(model, count):
    return None if model.num_classes is None else torch.arange(count) % model.num_classes


def gumbel(*shape, dtype=torch.float64):
    return -torch.empty(*shape, dtype=dtype).exponential_(generator=torch.Generator().manual_seed(1)).log()


def logits_of(model, images, labels, known_rows, cached):
    """The logits of every drawn value as a sampler computes them while it draws ``images``."""
    start = images.clone()
    start[:, :, known_rows:] = 0
    noise = torch.zeros(*images.shape, 256, dtype=torch.float64)
    noise.scatter_(4, images.long().unsqueeze(4), 1e9)  # Leaves no choice.
    sampler = Sampler(model, start, labels, temperature=1.0, cached=cached)
    inner, seen = sampler._features.logits, []
    sampler._features.logits = lambda *at: (seen.append(inner(*at).clone()), seen[-1])[1]
    drawn = sampler.run(known_rows=known_rows, noise=noise, progress=iter)
    assert torch.equal(drawn, images)
    return torch.stack(seen)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("colors", "known_rows"), [(1, 0), (3, 0), (3, 2)])
@torch.no_grad()
def test_cached_logits_are_those_of_the_whole_network(kind, colors, known_rows):
    model = model_of(kind, colors)
    images = torch.randint(0, 256, (2, colors, 5, 6), dtype=torch.uint8)
    labels = labels_of(model, 2)
    cached, naive = (logits_of(model, images, labels, known_rows, cached) for cached in (True, False))
    torch.testing.assert_close(cached, naive, rtol=1e-11, atol=1e-11)
    if BIT_FOR_BIT:
        assert torch.equal(cached, naive)
    # Both are the logits that the likelihood is made of.
    logits = model(images, labels).permute(3, 4, 1, 0, 2)[known_rows:].flatten(0, 2)
    torch.testing.assert_close(cached, logits, rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_cached_samples_are_those_of_the_whole_network(kind, dtype):
    model = model_of(kind, 3, dtype)
    options = {"labels": labels_of(model, 3), "noise": gumbel(3, 3, 4, 5, 256, dtype=dtype)}
    cached, naive = (model.sample(3, (4, 5), cached=cached, **options) for cached in (True, False))
    assert cached.shape == (3, 3, 4, 5)
    assert cached.dtype == torch.uint8
    assert torch.equal(cached, naive)
    by_generator = [
        model.sample(
            3,
            (4, 5),
            labels=options["labels"],
            generator=torch.Generator().manual_seed(5),
            cached=cached,
            temperature=0.7,
        )
        for cached in (True, False)
    ]
    assert torch.equal(*by_generator)
    assert not torch.equal(by_generator[0], cached)


def test_every_feature_is_computed_once(monkeypatch):
    from cpc_ext.models.pixels import pixel_sampler

    model = model_of("gated-pixelcnn", 3)
    done = []
    original = pixel_sampler.PixelConvolution.__call__

    def call(self, input, output, position, *, condition=None):
        done.append((output.data_ptr(), *position.tolist()))
        original(self, input, output, position, condition=condition)

    monkeypatch.setattr(pixel_sampler.PixelConvolution, "__call__", call)
    model.sample(1, (2, 3))
    # Logits, wherever they are of, are written to one place: a call for each of three colours and six pixels.
    places = [place for place in done if done.count(place) == 1]
    assert len(done) - len(places) == 3 * 6
    # Three layers with vertical, its gate but in the last, and what is handed over, once; what has colours thrice.
    assert len(places) == 6 * (3 * 2 + 2 + 3 * 3 * 2 + 2 * 3)


@pytest.mark.parametrize("kind", ["pixelcnn", "gated-pixelcnn"])
def test_draws_have_the_models_probabilities(kind):
    model = model_of(kind, 1, torch.float32)
    with torch.no_grad():
        model.logits_layer.weight.mul_(4)
    drawn = model.sample(4000, (1, 2), generator=torch.Generator().manual_seed(0))
    first = model(torch.zeros(1, 1, 1, 2, dtype=torch.uint8))[0, 0, :, 0, 0].softmax(0)
    frequency = torch.bincount(drawn[:, 0, 0, 0].long(), minlength=256) / 4000
    assert (frequency - first).abs().max() < 0.03
    most = int(first.argmax())
    given = drawn[drawn[:, 0, 0, 0] == most][:, 0, 0, 1].long()
    image = torch.tensor([[[[most, 0]]]], dtype=torch.uint8)
    second = model(image)[0, 0, :, 0, 1].softmax(0)
    assert (torch.bincount(given, minlength=256) / len(given) - second).abs().max() < 0.15


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("known_rows", [0, 2, 5])
def test_known_rows_are_kept(kind, known_rows):
    model = model_of(kind, 3)
    images = torch.randint(0, 256, (2, 3, 5, 4), dtype=torch.uint8)
    noise = gumbel(2, 3, 5, 4, 256)
    options = {"labels": labels_of(model, 2), "images": images, "known_rows": known_rows, "noise": noise}
    drawn, naive = (model.sample(2, (5, 4), cached=cached, **options) for cached in (True, False))
    assert torch.equal(drawn, naive)
    assert torch.equal(drawn[:, :, :known_rows], images[:, :, :known_rows])
    # What was drawn before is known now, and the rest comes out as it did.
    options.update(images=drawn, known_rows=min(known_rows + 1, 5))
    assert torch.equal(model.sample(2, (5, 4), **options), drawn)


def test_temperature():
    model = model_of("pixelcnn", 3)
    coldest = [model.sample(2, 4, temperature=0) for _ in range(2)]
    assert torch.equal(*coldest)
    logits = model(coldest[0])
    assert torch.equal(logits.argmax(2), coldest[0].long())
    noise = gumbel(2, 3, 4, 4, 256)
    assert torch.equal(model.sample(2, 4, temperature=1e-9, noise=noise), coldest[0])
    assert not torch.equal(model.sample(2, 4, temperature=1.0, noise=noise), coldest[0])


def test_labels_decide_the_image():
    model = model_of("gated-pixelcnn of classes", 1)
    noise = gumbel(1, 1, 8, 8, 256)
    for layer in model.layers:
        for embedding in layer.class_biases:
            torch.nn.init.normal_(embedding.weight, std=3)
    options = {"temperature": 0.1}  # Otherwise the noise has more say than the class.
    by_class = [model.sample(1, 8, labels=label, noise=noise, **options) for label in range(4)]
    assert len({tuple(image.flatten().tolist()) for image in by_class}) == 4
    mixed = model.sample(2, 8, labels=torch.tensor([3, 1]), noise=noise.expand(2, -1, -1, -1, -1), **options)
    assert torch.equal(mixed, torch.cat([by_class[3], by_class[1]]))


def test_progress_goes_through_the_rows():
    seen = []

    def progress(rows):
        for row in rows:
            seen.append(row)
            yield row

    model = model_of("pixelcnn", 1)
    images = torch.zeros(1, 1, 4, 3, dtype=torch.uint8)
    model.sample(1, (4, 3), images=images, known_rows=1, progress=progress)
    assert seen == [1, 2, 3]


def test_steps_do_not_know_where_they_are():
    """As in a CUDA graph: what the host does in a step must be the same at every pixel."""
    model = model_of("gated-pixelcnn", 3)
    sampler = Sampler(model, torch.zeros(2, 3, 3, 3, dtype=torch.uint8), None, temperature=1.0, cached=True)
    noise = gumbel(2, 3, 3, 3, 256)
    operators = []
    for pixel, (row, col) in enumerate(itertools.product(range(3), range(3))):
        if col == 0:
            sampler._go_to_row(row)
            sampler._start_row()
        sampler._go_to(pixel)
        sampler._noise.copy_(noise[:, :, row, col])
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
            sampler._step()
        operators.append([event.name for event in profile.events()])
    if BIT_FOR_BIT:  # The reference looks at the position; kernels pack their weights at the first call.
        assert all(each == operators[1] for each in operators[2:])
    drawn = (sampler._image.double() + 1).mul(127.5).round().to(torch.uint8)
    assert torch.equal(drawn, model.sample(2, 3, noise=noise))


def test_no_images():
    assert model_of("pixelcnn", 3).sample(0, (4, 5)).shape == (0, 3, 4, 5)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"count": -1}, "count must be at least 0, got -1"),
        ({"size": (0, 4)}, "size must be at least 1 pixel, got 0 x 4"),
        ({"temperature": -1.0}, "temperature must be at least 0 and finite, got -1.0"),
        ({"temperature": float("nan")}, "temperature must be at least 0 and finite, got nan"),
        ({"labels": 0}, "labels are for a model with num_classes"),
        ({"known_rows": 1}, "known_rows=1 needs images"),
        ({"images": torch.zeros(2, 3, 4, 4, dtype=torch.uint8), "known_rows": 5}, "known_rows must be 0 to 4, got 5"),
        (
            {"images": torch.zeros(2, 3, 4, 5, dtype=torch.uint8)},
            r"images must be uint8 \(2, 3, 4, 4\), got torch.uint8",
        ),
        ({"images": torch.zeros(2, 3, 4, 4)}, r"images must be uint8 \(2, 3, 4, 4\), got torch.float32"),
        ({"noise": torch.zeros(2, 3, 4, 4)}, r"noise must have shape \(2, 3, 4, 4, 256\), got \(2, 3, 4, 4\)"),
    ],
)
def test_wrong_arguments(arguments, message):
    model = PixelCNN(3, hidden_channels=3, layers=1)
    with pytest.raises(ValueError, match=message):
        model.sample(**{"count": 2, "size": 4, **arguments})


def test_label_out_of_range():
    with pytest.raises(ValueError, match=r"labels must be in 0..3, got 4..4"):
        model_of("gated-pixelcnn of classes", 3).sample(2, 4, labels=4)
