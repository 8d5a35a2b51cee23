"""Decoding of image files of every mode to the right colours, and the reasons for files that cannot be decoded."""

import io
import struct
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, TiffImagePlugin, features

from cpc_ext.data.images.decode import decode_all, decode_image, decode_stream

# 16 bits: 0, 1024, 2048, ..., and what they are in 8: 65535 / 255 = 257.
RAMP = np.tile(np.arange(64) * 1024, (64, 1))
LEVELS = np.round(RAMP[0] / 257).astype(np.uint8)


def gray(path: Path) -> np.ndarray:
    """The first row of a grey image."""
    pixels = decode_image(path)
    assert pixels.dtype == np.uint8
    np.testing.assert_array_equal(pixels, pixels[:1, :, :1].repeat(len(pixels), 0).repeat(3, 2))
    return pixels[0, :, 0]


def pgm(maxval: int, values: np.ndarray) -> bytes:
    height, width = values.shape
    return b"P5\n%d %d\n%d\n" % (width, height, maxval) + values.astype(">u2").tobytes()


def tiff(values: np.ndarray, **tags: int) -> bytes:
    """An uncompressed TIFF of one strip; tags by Pillow's names, little endian unless the values are big endian."""
    order = ">" if values.dtype.byteorder == ">" else "<"
    entries = {
        "ImageWidth": values.shape[1],
        "ImageLength": values.shape[0],
        "BitsPerSample": 8 * values.itemsize,
        "Compression": 1,
        "PhotometricInterpretation": 1,
        "StripOffsets": 8,
        "SamplesPerPixel": 1,
        "RowsPerStrip": values.shape[0],
        "StripByteCounts": values.nbytes,
        "SampleFormat": {"u": 1, "i": 2, "f": 3}[values.dtype.kind],
        **tags,
    }
    codes = {tag.name: code for code, tag in TiffImagePlugin.TiffTags.TAGS_V2.items()}
    directory = struct.pack(order + "H", len(entries))
    for code, value in sorted((codes[name], value) for name, value in entries.items()):
        directory += struct.pack(order + "HHII", code, 4, 1, value)
    header = (b"MM\0*" if order == ">" else b"II*\0") + struct.pack(order + "I", 8 + values.nbytes)
    return header + values.tobytes() + directory + bytes(4)


def test_16_bits_of_every_format(tmp_path):
    (tmp_path / "0.pgm").write_bytes(pgm(65535, RAMP))
    Image.fromarray(RAMP.astype(np.uint16)).save(tmp_path / "1.png")
    Image.fromarray(RAMP.astype(np.uint16)).save(tmp_path / "2.tif")
    (tmp_path / "3.tif").write_bytes(tiff(RAMP.astype(">u2")))
    (tmp_path / "4.tif").write_bytes(tiff(RAMP.astype("<u2")))
    if features.check("jpg_2000"):
        Image.fromarray(RAMP.astype(np.uint16)).save(tmp_path / "5.jp2")
    for path in sorted(tmp_path.iterdir()):
        np.testing.assert_array_equal(gray(path), LEVELS, err_msg=path.name)


def test_the_ends_of_16_bits_are_those_of_8(tmp_path):
    values = np.array([[0, 128, 129, 32767, 32768, 65406, 65407, 65535]], np.uint16)
    Image.fromarray(values).save(tmp_path / "0.png")
    assert gray(tmp_path / "0.png").tolist() == [0, 0, 1, 127, 128, 254, 255, 255]


def test_black_is_white_where_the_file_says_so(tmp_path):
    (tmp_path / "0.tif").write_bytes(tiff(RAMP.astype("<u2"), PhotometricInterpretation=0))
    np.testing.assert_array_equal(gray(tmp_path / "0.tif"), 255 - LEVELS)


@pytest.mark.parametrize("maxval", [255, 300, 1023, 4095, 65535])
def test_pgm_is_scaled_by_its_maximum(tmp_path, maxval):
    values = np.round(np.linspace(0, maxval, 64)).astype(int)[None].repeat(2, 0)
    content = pgm(maxval, values)
    if maxval < 256:
        content = content[: -values.size * 2] + values.astype(np.uint8).tobytes()
    (tmp_path / "0.pgm").write_bytes(content)
    # Pillow rounds to 16 bits first.
    np.testing.assert_allclose(gray(tmp_path / "0.pgm"), values[0] * 255 / maxval, atol=0.51)


def test_12_bit_tiff(tmp_path):
    values = np.arange(64) * 65
    first, second = values[::2], values[1::2]
    packed = np.stack([first >> 4, (first & 15) << 4 | second >> 8, second & 255], 1).astype(np.uint8)
    (tmp_path / "0.tif").write_bytes(tiff(packed.reshape(1, -1), ImageWidth=64, BitsPerSample=12))
    np.testing.assert_array_equal(gray(tmp_path / "0.tif"), np.round(values * 255 / 4095))


def test_integers_of_32_bits_that_use_16(tmp_path):
    Image.fromarray(RAMP.astype(np.int32)).save(tmp_path / "0.tif")
    np.testing.assert_array_equal(gray(tmp_path / "0.tif"), LEVELS)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        (np.array([[0, 65536]], np.int32), r"mode I, 32-bit integers, has values of 0 to 65536"),
        (np.array([[-1, 300]], np.int32), r"mode I, .* values of -1 to 300"),
        # 8 bits, or dark ones of 16: not to be guessed.
        (np.array([[0, 200]], np.int32), r"mode I, .* values of 0 to 200"),
        (np.array([[-5, 300]], np.int16), r"mode I, .* values of -5 to 300"),
        (np.array([[-5, 5]], np.int8), r"mode L of signed values"),
        (np.array([[0, 255]], np.float32), r"mode F, floating point, has values of 0 to 255"),
        (np.array([[-0.5, 0.5]], np.float32), r"mode F, .* values of -0\.5 to 0\.5"),
        (np.array([[0, np.nan]], np.float32), r"mode F, .* values of nan to nan"),
        (np.array([[0, np.inf]], np.float32), r"mode F, .* values of 0 to inf"),
    ],
)
def test_an_unknown_range_is_refused(tmp_path, values, message):
    (tmp_path / "0.tif").write_bytes(tiff(values))
    with pytest.raises(ValueError, match=message):
        decode_image(tmp_path / "0.tif")


def test_floating_point_from_0_to_1(tmp_path):
    values = np.linspace(0, 1, 64, dtype=np.float32)[None].repeat(64, 0)
    Image.fromarray(values).save(tmp_path / "0.tif")
    np.testing.assert_array_equal(gray(tmp_path / "0.tif"), np.floor(values[0] * 255 + 0.5))


def test_16_bit_colour_is_cut_to_its_upper_byte(tmp_path):
    values = np.stack([RAMP, RAMP[:, ::-1], np.full_like(RAMP, 0x8042)], 2)
    (tmp_path / "0.ppm").write_bytes(b"P6\n64 64\n65535\n" + values.astype(">u2").tobytes())
    np.testing.assert_allclose(decode_image(tmp_path / "0.ppm"), values / 257, atol=1)


def test_transparency_is_dropped(tmp_path):
    clear = Image.new("RGBA", (4, 4), (10, 200, 30, 0))
    clear.save(tmp_path / "rgba.png")
    Image.new("LA", (4, 4), (90, 0)).save(tmp_path / "la.png")
    palette = Image.new("P", (4, 4), 1)
    palette.putpalette([0, 0, 0, 10, 200, 30])
    palette.save(tmp_path / "p.png", transparency=1)
    palette.save(tmp_path / "p.gif", transparency=1)
    for name, colour in (("rgba.png", [10, 200, 30]), ("la.png", [90] * 3), ("p.png", [10, 200, 30])):
        assert decode_image(tmp_path / name)[2, 2].tolist() == colour, name
    assert decode_image(tmp_path / "p.gif")[2, 2].tolist() == [10, 200, 30]


def test_cmyk_ycbcr_and_one_bit(tmp_path):
    Image.new("CMYK", (8, 8), (255, 0, 0, 0)).save(tmp_path / "0.tif")
    Image.new("CMYK", (8, 8), (255, 0, 0, 0)).save(tmp_path / "1.jpg", quality=100)
    Image.new("RGB", (8, 8), (0, 255, 255)).convert("YCbCr").save(tmp_path / "2.tif", compression="jpeg")
    for path in sorted(tmp_path.iterdir()):
        np.testing.assert_allclose(decode_image(path)[4, 4].astype(int), [0, 255, 255], atol=3, err_msg=path.name)
    bits = Image.new("1", (8, 8))
    bits.putpixel((3, 0), 1)
    for name in ("3.png", "4.tif", "5.pbm"):
        bits.save(tmp_path / name)
        assert gray_levels(tmp_path / name) == [0, 255]


def gray_levels(path: Path) -> list[int]:
    return np.unique(decode_image(path)).tolist()


def test_lab(tmp_path):
    """CIE L*a*b* (53.2, 80.1, 67.2) is sRGB's red; a and b are stored from -128."""
    Image.new("LAB", (8, 8), (136, 208, 195)).save(tmp_path / "0.tif")
    np.testing.assert_allclose(decode_image(tmp_path / "0.tif")[4, 4].astype(int), [255, 0, 0], atol=12)


@pytest.mark.parametrize("suffix", ["gif", "tif", "png", "webp"])
def test_of_several_frames_the_first_is_taken_and_told(tmp_path, suffix):
    path = tmp_path / f"0.{suffix}"
    frames = [Image.new("RGB", (8, 8), (value, value, value)) for value in (40, 200, 250)]
    frames[0].save(path, save_all=True, append_images=frames[1:], **({"lossless": True} if suffix == "webp" else {}))
    frames[0].save(tmp_path / f"1.{suffix}", **({"lossless": True} if suffix == "webp" else {}))
    out = io.BytesIO()
    done = decode_all([path, tmp_path / f"1.{suffix}"], out, None)
    assert (done.height, done.width, done.reasons, done.several) == (8, 8, {}, [0])
    assert set(out.getvalue()) == {40}


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("mode", ["RGB", "I;16"])
def test_exif_orientation(tmp_path, orientation, mode):
    """Against what the EXIF standard says of rows and columns: 1 is as stored, odd ones are turned and mirrored."""
    stored = np.arange(12, dtype=np.uint16).reshape(3, 4) * 20
    image = Image.fromarray(stored * 257) if mode == "I;16" else Image.fromarray(stored.astype(np.uint8)).convert("RGB")
    exif = Image.Exif()
    exif[0x0112] = orientation
    image.save(tmp_path / "0.png", exif=exif)
    shown = {
        1: stored,
        2: stored[:, ::-1],
        3: stored[::-1, ::-1],
        4: stored[::-1],
        5: stored.T,
        6: stored.T[:, ::-1],
        7: stored.T[::-1, ::-1],
        8: stored.T[::-1],
    }[orientation]
    np.testing.assert_array_equal(decode_image(tmp_path / "0.png")[..., 0], shown)


@pytest.mark.parametrize("exif", [b"Exif\0\0", b"Exif\0\0no TIFF at all", b"Exif\0\0II*\0\xff\xff\xff\x7f", b"?"])
def test_damaged_exif_leaves_the_image(tmp_path, exif):
    Image.new("RGB", (8, 8), (200, 200, 200)).save(tmp_path / "0.jpg", exif=exif)
    assert abs(int(decode_image(tmp_path / "0.jpg")[0, 0, 0]) - 200) < 3


def test_a_turned_photograph_keeps_its_detail(tmp_path):
    """JPEG is decoded at a part of its size, which must be enough for the image as it is shown, not as it is stored."""
    stripes = np.zeros((512, 1024, 3), np.uint8)
    stripes[:, ::8] = 255
    stripes[:, 1::8] = 255
    exif = Image.Exif()
    exif[0x0112] = 6
    image = Image.fromarray(stripes)
    image.save(tmp_path / "turned.jpg", exif=exif, quality=95)
    image.rotate(-90, expand=True).save(tmp_path / "upright.jpg", quality=95)
    turned, upright = (decode_image(tmp_path / f"{name}.jpg", (512, 64)).astype(int) for name in ("turned", "upright"))
    assert upright[:, 32, 0].std() > 50
    np.testing.assert_allclose(turned, upright, atol=40)


def test_reasons(tmp_path, monkeypatch):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 5000)
    image = Image.effect_noise((100, 50), 80)
    contents = {}
    for suffix, kind in (("png", "PNG"), ("jpg", "JPEG"), ("bmp", "BMP")):
        buffer = io.BytesIO()
        image.save(buffer, kind)
        contents[suffix] = buffer.getvalue()
    expected = {
        "empty.png": (b"", "the file is empty"),
        "text.jpg": (b"text", "holds no image that Pillow recognises"),
        # By its first bytes, as Ghostscript is not to run for a file that is called an image.
        "drawing.png": (
            b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n",
            "holds no image that Pillow recognises",
        ),
        "short.jpg": (contents["jpg"][:-500], "truncated"),
        "short.bmp": (contents["bmp"][:-500], "truncated"),
        "short.png": (contents["png"][:-500], "runcated"),
    }
    for name, (content, _) in expected.items():
        (tmp_path / name).write_bytes(content)
    Image.new("L", (200, 51)).save(tmp_path / "large.png")
    expected["large.png"] = (b"", "more than 10000 pixels, the limit of Pillow (PIL.Image.MAX_IMAGE_PIXELS)")
    (tmp_path / "wrong-name.png").write_bytes(contents["jpg"])
    names = [*expected, "missing.png", "wrong-name.png"]
    files = [tmp_path / name for name in names]
    ((_, kept, reasons),) = decode_stream(files, (20, 20), 50)
    assert [names[number] for number in kept] == ["wrong-name.png"]
    assert decode_all(files, io.BytesIO(), 20).reasons == reasons
    assert reasons[names.index("missing.png")] == "No such file or directory"
    for number, (_, reason) in enumerate(expected.values()):
        assert reason in reasons[number], names[number]
        assert str(tmp_path) not in reasons[number]
