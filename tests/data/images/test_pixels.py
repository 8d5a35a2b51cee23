"""Conversion of images from every supported form, and of labels."""

import numpy as np
import pytest
import torch
from PIL import Image

from cpc_ext.data.images.labels import class_indices, plain_label
from cpc_ext.data.images.pixels import channel_axis, to_pixels
from tests.data.images.conftest import encoded, pictures

COLOUR = pictures(1, 6, 5, 3)[0]
GRAY = pictures(1, 6, 5)[0]


@pytest.mark.parametrize(
    "image",
    [
        COLOUR,
        COLOUR.transpose(2, 0, 1),
        COLOUR.astype(np.int64),
        COLOUR / 255,
        (COLOUR / 255).astype(np.float16),
        COLOUR.astype(np.uint16) * 257,
        torch.from_numpy(COLOUR),
        torch.from_numpy(COLOUR).permute(2, 0, 1),
        torch.from_numpy(COLOUR).permute(2, 0, 1).float().div(255).requires_grad_(),
        COLOUR.tolist(),
        Image.fromarray(COLOUR),
        encoded(COLOUR),
        bytearray(encoded(COLOUR)),
        np.frombuffer(encoded(COLOUR), np.uint8),
    ],
)
def test_colour_is_the_same_in_every_form(image):
    pixels = to_pixels(image)
    assert pixels.dtype == np.uint8
    np.testing.assert_array_equal(pixels, COLOUR)


@pytest.mark.parametrize("image", [GRAY, GRAY[None], GRAY[..., None], GRAY / 255, torch.from_numpy(GRAY)[None] / 255])
def test_grey_arrays_have_one_channel(image):
    np.testing.assert_array_equal(to_pixels(image), GRAY[..., None])


def test_grey_of_pillow_becomes_colour_as_that_of_files_does():
    np.testing.assert_array_equal(to_pixels(Image.fromarray(GRAY)), np.repeat(GRAY[..., None], 3, 2))
    np.testing.assert_array_equal(to_pixels(encoded(GRAY)), np.repeat(GRAY[..., None], 3, 2))


def test_a_path_is_that_of_a_file(tmp_path):
    (tmp_path / "image.png").write_bytes(encoded(COLOUR))
    np.testing.assert_array_equal(to_pixels(tmp_path / "image.png"), COLOUR)
    assert to_pixels(tmp_path / "image.png", 4).shape == (4, 4, 3)
    with pytest.raises(FileNotFoundError):
        to_pixels(tmp_path / "none.png")


def test_bits_are_black_and_white():
    np.testing.assert_array_equal(to_pixels(GRAY > 99)[..., 0], np.where(GRAY > 99, 255, 0))


def test_bfloat16_is_within_its_precision():
    pixels = to_pixels(torch.from_numpy(COLOUR).bfloat16() / 255)
    assert np.abs(pixels.astype(int) - COLOUR).max() <= 1


def test_an_image_that_could_be_both_ways():
    """Nothing that anybody trains on is three pixels wide."""
    assert to_pixels(pictures(1, 3, 8, 3)[0]).shape == (3, 8, 3)
    assert [channel_axis(shape) for shape in ((3, 8, 3), (3, 8, 8), (8, 8))] == [-1, -3, None]


@pytest.mark.parametrize("image", [COLOUR, COLOUR.transpose(2, 0, 1), Image.fromarray(COLOUR)])
def test_the_middle_square_is_kept(image):
    wide = np.repeat(COLOUR, 3, 1)  # 6 x 15, of which the columns 4.5 to 10.5 are kept.
    expected = np.asarray(Image.fromarray(wide).resize((4, 4), Image.Resampling.BICUBIC, box=(4.5, 0, 10.5, 6)))
    given = Image.fromarray(wide) if isinstance(image, Image.Image) else wide
    np.testing.assert_array_equal(to_pixels(given, 4), expected)
    assert to_pixels(GRAY, 4).shape == (4, 4, 1)


def test_somebodys_image_stays_as_it_was():
    image = Image.fromarray(COLOUR)
    image.getexif()[0x0112] = 6  # Turned by a quarter.
    assert to_pixels(image).shape == (5, 6, 3)
    assert image.size == (5, 6)
    assert image.getexif()[0x0112] == 6


@pytest.mark.parametrize(
    ("image", "kind", "message"),
    [
        (COLOUR * 2.0, ValueError, "values of .* which are to be 0 to 1"),
        (np.full((4, 4), np.nan), ValueError, "floating point has values of nan"),
        (COLOUR.astype(np.int32) * 2, ValueError, "int32 has values of .* which are to be 0 to 255"),
        (COLOUR.astype(np.uint16), ValueError, "uint16 has values up to 2.., which may be of 8 bits or of 16"),
        (COLOUR.astype(np.int16) - 256, ValueError, "int16 has values of -"),
        (np.zeros((4, 4, 2), np.uint8), ValueError, r"expected an image .*shape \[4, 4, 2\]"),
        (np.zeros((2, 4, 4, 3), np.uint8), ValueError, "expected an image"),
        (np.zeros((0, 4, 3), np.uint8), ValueError, "expected an image"),
        (np.zeros((4, 4), np.complex64), TypeError, "array of numbers, got ndarray"),
        ("cat.png", TypeError, r"the text 'cat\.png'; a file is given as pathlib\.Path"),
        (None, TypeError, "array of numbers, got NoneType"),
        (7, TypeError, "array of numbers, got int"),
        ([[1, 2], [3]], TypeError, "expected an image or an array, got list"),
        (b"no image", Image.UnidentifiedImageError, "cannot identify"),
        (encoded(COLOUR)[:60], OSError, "truncated"),
    ],
)
def test_what_is_no_image_is_refused(image, kind, message):
    with pytest.raises(kind, match=message):
        to_pixels(image)


@pytest.mark.parametrize(
    ("label", "plain"),
    [
        *((None, None), (3, 3), (True, 1), ("cat", "cat"), (b"cat", "cat"), (np.int32(3), 3), (np.str_("cat"), "cat")),
        *((torch.tensor(3), 3), (np.array([3]), 3), (torch.tensor([3]), 3), ([3], 3)),
    ],
)
def test_labels_become_plain(label, plain):
    assert plain_label(label) == plain
    assert type(plain_label(label)) is type(plain)


@pytest.mark.parametrize("label", [1.5, {"boxes": []}, [1, 2], torch.zeros(3), object()])
def test_what_is_no_label_is_refused(label):
    with pytest.raises(TypeError, match="expected a class"):
        plain_label(label)


def test_classes_are_the_labels_that_there_are():
    notes: list[str] = []
    found = class_indices([7, 3, 7], [3], notes=notes)
    assert found.names == ("3", "7")
    assert (found.train.tolist(), found.test.tolist(), notes) == ([1, 0, 1], [0], [])
    assert class_indices(["b", "a"], ["b"], notes=notes).test.tolist() == [1]


def test_classes_that_have_names():
    found = class_indices([2, "ant"], [0], ("ant", "bee", "cow"), notes=[])
    assert found.names == ("ant", "bee", "cow")
    assert (found.train.tolist(), found.test.tolist()) == ([2, 0], [0])


def test_without_labels_for_all_there_are_none():
    notes: list[str] = []
    assert class_indices([None, None], [None], notes=notes) == ((), None, None)
    assert class_indices([1, 1], [1], notes=notes).names == ()
    assert notes == []
    assert class_indices([1, None], [1], notes=notes) == ((), None, None)
    assert notes == ["1 of 3 images have no label, so none has"]


@pytest.mark.parametrize("names", [(), ("ant", "bee", "cow")])
def test_test_images_without_labels_leave_the_others_theirs(names):
    notes: list[str] = []
    found = class_indices([2, 1, 2], [1, None], names, notes=notes)
    assert (found.names, found.train.tolist(), found.test) == (
        names or ("1", "2"),
        [2, 1, 2] if names else [1, 0, 1],
        None,
    )
    assert notes == ["1 of 2 test images have no label, so none of them has"]


@pytest.mark.parametrize(
    ("train", "test", "names", "message"),
    [
        ([0, 1], [2], (), "test images have classes that the training images lack: 2"),
        ([0, 2], [], ("ant", "bee"), r"labels 2 are none of the 2 classes \(ant, bee\)"),
        ([0, "ant"], [], (), "some labels are numbers, others names"),
        ([0, 2], [], ("cat", "cat", "dog"), "classes: expected a name for each, got several that are called cat$"),
        ([None], [], ("a", "b", "a", "b"), "got several that are called a, b$"),
    ],
)
def test_labels_that_do_not_fit(train, test, names, message):
    with pytest.raises(ValueError, match=message):
        class_indices(train, test, names, notes=[])
