"""The waveform encoder: its layers, the positions of its frames, and its input."""

import pytest
import torch
import torch.nn.functional as F

from cpc_ext.models import WaveformEncoder

PADDINGS = {"greedy-infomax": (2, 2, 2, 2, 1), "cpc-audio": (3, 2, 1, 1, 1)}
CENTERS = {"greedy-infomax": 20, "cpc-audio": 79}


def waveforms(samples, batch=2):
    return torch.rand(batch, 1, samples, dtype=torch.float64, generator=torch.Generator().manual_seed(0)) * 2 - 1


@pytest.mark.parametrize("padding", PADDINGS)
@pytest.mark.parametrize("norm", ["none", "channel", "batch", "instance"])
def test_equals_its_layers(norm, padding):
    encoder = WaveformEncoder((3, 4, 5, 6, 7), norm=norm, padding=padding).double()
    for layer in encoder.layers:
        for name, parameter in layer.norm.named_parameters():
            torch.nn.init.uniform_(parameter, *((0.5, 1.5) if name == "weight" else (-0.5, 0.5)))
    x = waveforms(3200)
    expected = x
    for layer, pad, kernel, stride in zip(
        encoder.layers, PADDINGS[padding], (10, 8, 4, 4, 4), (5, 4, 2, 2, 2), strict=True
    ):
        assert layer.conv.kernel_size == (kernel,)
        expected = F.conv1d(expected, layer.conv.weight, layer.conv.bias, stride, pad)
        if norm != "none":
            dims = {"channel": 1, "batch": (0, 2), "instance": 2}[norm]
            variance = expected.var(dims, unbiased=norm == "channel", keepdim=True)
            expected = (expected - expected.mean(dims, keepdim=True)) / torch.sqrt(variance + 1e-5)
            expected = expected * layer.norm.weight[:, None] + layer.norm.bias[:, None]
        expected = F.relu(expected)
    made = encoder(x)
    torch.testing.assert_close(made, expected, atol=1e-12, rtol=0)
    assert encoder.features(x).shape == (2, 7, 20)
    assert encoder.out_channels == 7
    grad = torch.randn(made.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    for one, other in zip(
        *(torch.autograd.grad(y, [*encoder.parameters()], grad) for y in (made, expected)), strict=True
    ):
        torch.testing.assert_close(one, other, atol=1e-10, rtol=1e-10)


# Tolerances for the rounding of four layers of 8 times 20 products, relative to the largest value.
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-6), (torch.bfloat16, 2e-2), (torch.float16, 2e-3)])
@pytest.mark.parametrize("norm", ["none", "channel"])
def test_types_and_lengths(norm, dtype, tolerance):
    torch.manual_seed(0)
    encoder = WaveformEncoder(20, norm=norm).to(dtype)
    exact = WaveformEncoder(20, norm=norm).double()
    exact.load_state_dict(encoder.state_dict())
    for samples in (3200, 3199, 1001, 465):
        x = waveforms(samples).to(dtype)
        made, expected = encoder(x), exact(x.double())
        assert made.dtype == dtype
        assert made.stride(1) == 1
        assert (made - expected).abs().max() <= tolerance * expected.abs().max()


@pytest.mark.parametrize("channels_last", [True, False])
def test_batch_norm_is_that_of_sequences_and_keeps_their_layout(channels_last):
    ours, theirs = WaveformEncoder(5, norm="batch").layers[0].norm.double(), torch.nn.BatchNorm1d(5).double()
    assert ours.state_dict().keys() == theirs.state_dict().keys()
    sequence = torch.randn(3, 7, 5, dtype=torch.float64).transpose(1, 2)
    sequence = sequence if channels_last else sequence.contiguous()
    for _ in range(2):
        made = ours(sequence)
        torch.testing.assert_close(made, theirs(sequence))
        assert made.stride() == sequence.stride()
    torch.testing.assert_close(ours.state_dict(), theirs.state_dict())
    torch.testing.assert_close(ours.eval()(sequence), theirs.eval()(sequence))


@pytest.mark.parametrize("norm", ["none", "channel"])
def test_forward_mode(norm):
    torch.manual_seed(0)
    encoder = WaveformEncoder((3, 4, 5, 6, 7), norm=norm).double()
    x, tangent = waveforms(3200), waveforms(3200).flip(2)
    made, derivative = torch.func.jvp(encoder, (x,), (tangent,))
    torch.testing.assert_close(made, encoder(x), atol=1e-12, rtol=0)
    step = 1e-6
    expected = (encoder(x + step * tangent) - encoder(x - step * tangent)) / (2 * step)
    torch.testing.assert_close(derivative, expected, atol=1e-6, rtol=1e-5)


def test_the_default_device_may_be_another():
    encoder, x = WaveformEncoder(4), waveforms(3200).float()
    expected = encoder(x)
    with torch.device("meta"):
        made = encoder(x)
    assert torch.equal(made, expected)


@pytest.mark.parametrize("padding", PADDINGS)
def test_what_a_frame_sees(padding):
    encoder = WaveformEncoder(4, padding=padding).double()
    for layer in encoder.layers:
        # Nothing may be cut off by ReLU.
        torch.nn.init.uniform_(layer.conv.weight, 0.1, 1)
        torch.nn.init.ones_(layer.conv.bias)
    x = (waveforms(3200, 1) + 1).requires_grad_()
    encodings = encoder(x)
    assert (encoder.downsampling, encoder.receptive_field) == (160, 465)
    centers = encoder.frame_centers(encodings.shape[2])
    assert centers.tolist() == [160 * frame + CENTERS[padding] for frame in range(20)]
    torch.testing.assert_close(encoder.frame_times(3), centers[:3].double() / 16000)
    for frame in (3, 10):
        (slope,) = torch.autograd.grad(encodings[0, 0, frame], x, retain_graph=True)
        seen = slope[0, 0].nonzero().flatten()
        assert [int(seen[0]), int(seen[-1])] == [int(centers[frame]) - 232, int(centers[frame]) + 232]


@pytest.mark.parametrize("padding", PADDINGS)
def test_lengths(padding):
    encoder = WaveformEncoder(2, padding=padding)
    expected = {"greedy-infomax": [4095, 1023, 512, 257, 128], "cpc-audio": [4096, 1024, 512, 256, 128]}[padding]
    features, as_encodings = encoder.begin(torch.zeros(1, 1, 20480))
    lengths = []
    for (layer,) in encoder.stacks:
        features = layer(features)
        lengths.append(as_encodings(features).shape[2])
    assert lengths == expected
    for samples in (20480, 20479, 1001, 161):
        assert encoder.frames(samples) == encoder(torch.zeros(1, 1, samples)).shape[2]


@pytest.mark.parametrize("padding", [*PADDINGS, (9, 1, 3, 3, 3)])
def test_too_short(padding):
    encoder = WaveformEncoder(2, padding=padding)
    least = next(samples for samples in range(1000) if encoder.frames(samples))
    assert encoder(torch.zeros(1, 1, least)).shape == (1, 2, encoder.frames(least))
    with pytest.raises(ValueError, match=f"of {least - 1} samples are too short: a frame takes at least {least}$"):
        encoder(torch.zeros(1, 1, least - 1))
    with pytest.raises(RuntimeError):
        encoder.layers(torch.zeros(1, 1, least - 1))


@pytest.mark.parametrize("padding", PADDINGS)
def test_too_short_for_instance_norm(padding):
    """A single frame has no variance over time."""
    encoder = WaveformEncoder(2, padding=padding, norm="instance").eval()
    least = next(samples for samples in range(1000) if encoder.frames(samples) == 2)
    assert encoder(torch.zeros(1, 1, least)).shape == (1, 2, 2)
    with pytest.raises(
        ValueError, match=f"{least - 1} .* too short: two frames, .* instance norm .* at least {least}$"
    ):
        encoder(torch.zeros(1, 1, least - 1))


def test_integers_and_normalisation():
    samples = torch.randint(-(2**15), 2**15, (2, 1, 800), dtype=torch.int16)
    plain = WaveformEncoder(3).double()
    torch.testing.assert_close(plain(samples), plain(samples.double() / 2**15), atol=0, rtol=1e-12)
    greedy = WaveformEncoder(3, normalization="greedy-infomax").double()
    greedy.load_state_dict(plain.state_dict())
    # The program's normalisation, for samples of 32 bits.
    theirs = plain.layers((samples.double() * 65536 + 1456218.75) / 135303504)
    for given in (samples, samples.double() / 2**15):
        torch.testing.assert_close(greedy(given), theirs, atol=1e-12, rtol=0)
    shifted = WaveformEncoder(3, normalization=(2.0, 0.5)).double()
    shifted.load_state_dict(plain.state_dict())
    torch.testing.assert_close(shifted(samples), plain.layers(samples.double() / 2**14 + 0.5), atol=1e-12, rtol=0)
    assert plain(samples).dtype == torch.float64


@pytest.mark.parametrize(
    ("arguments", "problem"),
    [
        ({"channels": 0}, "channels must be one number or 5, each at least 1, got 0"),
        ({"channels": (1, 2, 3)}, "channels must be one number or 5"),
        ({"norm": "layer"}, "norm must be one of none, channel, batch, instance, got 'layer'"),
        ({"norm": "channel", "channels": 1}, "channels must be at least 2"),
        ({"padding": "same"}, "padding must be numbers or one of greedy-infomax, cpc-audio, got 'same'"),
        ({"padding": (1, 1)}, "padding must be 5 numbers of at least 0"),
        ({"padding": (1, 1, 1, 1, -1)}, "padding must be 5 numbers of at least 0"),
        ({"normalization": "unit"}, "normalization must be numbers or one of none, greedy-infomax"),
        ({"normalization": (1.0,)}, "normalization must be a factor and a shift"),
    ],
)
def test_wrong_settings(arguments, problem):
    with pytest.raises(ValueError, match=problem):
        WaveformEncoder(**arguments)


def test_wrong_input():
    encoder = WaveformEncoder(2)
    for shape in ((1, 800), (1, 2, 800), (800,), (1, 1, 1, 800)):
        with pytest.raises(ValueError, match=r"waveforms must be \[B, 1, T\], got shape"):
            encoder(torch.zeros(shape))
    for dtype in (torch.int32, torch.uint8, torch.bool):
        with pytest.raises(TypeError, match="floating in ±1, or int16, got torch"):
            encoder(torch.zeros(1, 1, 800, dtype=dtype))
    # As soundfile reads, and what NumPy makes of it.
    with pytest.raises(
        TypeError, match=r"waveforms must be of the encoder's type, torch.float32, or int16, got torch.float64"
    ):
        encoder(torch.zeros(1, 1, 800, dtype=torch.float64))
    with torch.autocast("cpu", torch.bfloat16):
        with pytest.raises(TypeError, match=r"waveforms must be of the encoder's type, torch.float32"):
            encoder(torch.zeros(1, 1, 800, dtype=torch.float64))
        assert encoder(torch.zeros(1, 1, 800, dtype=torch.bfloat16)).dtype == torch.bfloat16


@pytest.mark.parametrize("argument", [{"channels": 8.0}, {"padding": 2}, {"normalization": 2.0}])
def test_what_are_no_numbers_is_named(argument):
    ((name, value),) = argument.items()
    with pytest.raises(TypeError, match=f"^{name} must be a sequence of numbers, got {value}$"):
        WaveformEncoder(**argument)


@pytest.mark.parametrize("norm", ["none", "channel", "batch", "instance"])
@pytest.mark.parametrize("padding", ["greedy-infomax", "cpc-audio", (9, 7, 3, 3, 3), (0, 0, 0, 0, 0)])
def test_pieces_are_the_whole(norm, padding):
    """Frames near a cut are those of a piece that reaches beyond it, whatever the lengths, and after any layers."""
    encoder = WaveformEncoder(3, norm=norm, padding=padding).double().eval()
    for samples in (650, 1026, 3999):  # 1026: behind pieces of 170 a layer has a single frame.
        given = waveforms(samples)
        for layers in range(1, 6):
            whole = encoder.layers[:layers](encoder.prepared(given))
            for length in (170, 1000, 10**6):
                parts = encoder.pieces(samples, length, layers=layers)
                made = [
                    encoder.layers[:layers](encoder.prepared(given[:, :, part]))[:, :, kept] for part, kept in parts
                ]
                torch.testing.assert_close(torch.cat(made, 2), whole)
                longest = max(part.stop - part.start for part, _ in parts)
                assert longest == samples if norm == "instance" else longest <= max(length, 160) + 4 * 465
