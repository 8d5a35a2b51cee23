"""Arrays in .npy and .npz files: roles by name, mapped and converted arrays, held-out images, and refused files."""

import warnings

import numpy as np
import pytest

from cpc_ext.data import load_dataset
from cpc_ext.data.images.samples import move_to_end
from cpc_ext.data.images.source_files import split_in
from tests.data.images.conftest import pictures

pytestmark = pytest.mark.usefixtures("cache")
X, Y = pictures(40, 20, 20, 3), np.arange(40) % 4


def quiet(path, **options):
    """Load the data set, and require that it does so without a warning."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        return load_dataset("npy", path, **options)


@pytest.mark.parametrize(
    "names",
    [
        ("x_train", "y_train", "x_test", "y_test"),  # Keras
        ("train_images", "train_labels", "test_images", "test_labels"),  # MedMNIST
        ("X", "y", "testImages", "testTargets"),
        ("train_images", "train_image_labels", "val_image", "val_image_class"),
        ("train/data", "train/label", "val/data", "val/label"),
        ("xtrain", "ytrain", "xtest", "ytest"),
        ("trX", "trY", "teX", "teY"),
        ("Xtr", "ytr", "Xte", "yte"),
        ("trainimages", "trainlabels", "testimages", "testlabels"),
        ("imgtrain", "targettrain", "imgval", "targetval"),
    ],
)
@pytest.mark.parametrize("kind", ["npz", "npy"])
def test_names_tell_what_arrays_hold(tmp_path, names, kind):
    arrays = dict(zip(names, (X[:30], Y[:30], X[30:], Y[30:]), strict=True))
    if kind == "npz":
        path = tmp_path / "data.npz"
        np.savez(path, **arrays)
    else:
        path = tmp_path / "data"
        for name, array in arrays.items():
            (path / f"{name}.npy").parent.mkdir(parents=True, exist_ok=True)
            np.save(path / f"{name}.npy", array)
    data = quiet(path)
    np.testing.assert_array_equal(data.train.images, X[:30].transpose(0, 3, 1, 2))
    np.testing.assert_array_equal(data.test.images, X[30:].transpose(0, 3, 1, 2))
    np.testing.assert_array_equal(data.train.labels, Y[:30])
    np.testing.assert_array_equal(data.test.labels, Y[30:])
    assert data.pretrain is data.train
    assert (data.name, data.classes) == ("npy", ("0", "1", "2", "3"))
    np.testing.assert_allclose(data.mean, (X[:30] / 255).mean((0, 1, 2)), rtol=1e-5)


@pytest.mark.parametrize("layout", ["NHWC", "NCHW", "NHW"])
def test_arrays_as_they_are_wanted_stay_where_they_are(tmp_path, cache, layout):
    images = {"NHWC": X, "NCHW": X.transpose(0, 3, 1, 2), "NHW": X[..., 0]}[layout]
    np.save(tmp_path / "train.npy", images)
    np.save(tmp_path / "test.npy", images[:3])
    data = quiet(tmp_path)
    assert isinstance(data.pretrain.images, np.memmap)
    assert not data.pretrain.images.flags.writeable
    np.testing.assert_array_equal(data.pretrain.images, X.transpose(0, 3, 1, 2)[:, : data.image_shape[0]])
    assert data.image_shape == (1 if layout == "NHW" else 3, 20, 20)
    assert (data.train, data.test.labels) == (None, None)
    assert not cache.exists()


def test_a_tenth_of_each_class_is_held_out(tmp_path):
    np.savez(tmp_path / "all.npz", images=X, labels=Y)
    with pytest.warns(UserWarning, match="5 of 40, about a tenth of each class, are held out"):
        data = load_dataset("npy", tmp_path / "all.npz")
    assert (len(data.train), len(data.test)) == (35, 5)
    assert set(data.test.labels) == {0, 1, 2, 3}
    rows = [int(path.removeprefix("images[").removesuffix("]")) for path in [*data.train.paths, *data.test.paths]]
    assert sorted(rows) == list(range(40))
    np.testing.assert_array_equal(np.concatenate([data.train.images, data.test.images]), X[rows].transpose(0, 3, 1, 2))
    np.testing.assert_array_equal(np.concatenate([data.train.labels, data.test.labels]), Y[rows])


@pytest.mark.parametrize("images", [X / 255, X.astype(np.int64), X.astype(np.uint16) * 257, (X / 255).astype("f2")])
def test_other_types_are_converted(tmp_path, images):
    np.savez_compressed(tmp_path / "all.npz", train_images=images[:30], test_images=images[30:])
    data = quiet(tmp_path)
    np.testing.assert_array_equal(data.pretrain.images, X[:30].transpose(0, 3, 1, 2))
    np.testing.assert_array_equal(data.test.images, X[30:].transpose(0, 3, 1, 2))


def test_what_was_converted_is_kept(tmp_path, cache, monkeypatch):
    np.savez(tmp_path / "all.npz", train_images=X[:30] / 255, test_images=X[30:] / 255)
    quiet(tmp_path)
    monkeypatch.setattr("cpc_ext.data.images.samples.to_pixels", None)  # Nothing is converted again.
    assert len(quiet(tmp_path).pretrain) == 30
    np.savez(tmp_path / "all.npz", train_images=X[:20] / 255, test_images=X[30:] / 255)
    monkeypatch.undo()
    monkeypatch.setenv("CPC_EXT_CACHE", str(cache))
    assert len(quiet(tmp_path).pretrain) == 20


def test_files_beside_each_other_are_kept_beside_each_other(tmp_path, monkeypatch):
    for name, rows in (("a", X[:20]), ("b", X[20:])):
        np.savez(tmp_path / f"{name}.npz", train_images=rows / 255, test_images=rows / 255)
        quiet(tmp_path / f"{name}.npz")
    monkeypatch.setattr("cpc_ext.data.images.samples.to_pixels", None)  # Nothing is converted again.
    for name, rows in (("a", X[:20]), ("b", X[20:])):
        data = quiet(tmp_path / f"{name}.npz")
        np.testing.assert_array_equal(data.pretrain.images, rows.transpose(0, 3, 1, 2))


def test_another_size(tmp_path):
    np.savez(tmp_path / "all.npz", train_images=X[:30], test_images=X[30:])
    assert quiet(tmp_path, image_size=16).image_shape == (3, 16, 16)
    np.savez(tmp_path / "wide.npz", train_images=pictures(4, 20, 24), test_images=pictures(4, 20, 24))
    assert quiet(tmp_path / "wide.npz", image_size=20).image_shape == (1, 20, 20)
    (tmp_path / "wide.npz").unlink()
    np.testing.assert_array_equal(quiet(tmp_path, image_size=20).test.images, X[30:].transpose(0, 3, 1, 2))
    with pytest.raises(ValueError, match="image_size: expected at least 1 pixel, got 0"):
        load_dataset("npy", tmp_path, image_size=0)


def test_large_images_are_brought_to_96_pixels(tmp_path):
    images = pictures(4, 260, 300)
    np.savez(tmp_path / "all.npz", train_images=images, test_images=images)
    assert quiet(tmp_path).image_shape == (1, 96, 96)


def test_unlabelled_images_are_trained_on(tmp_path):
    parts = {"train_x": X[:10], "train_y": Y[:10], "test_x": X[10:20], "test_y": Y[10:20], "unlabeled_x": X[20:]}
    np.savez(tmp_path / "all.npz", **parts)
    data = quiet(tmp_path)
    assert [len(part) for part in (data.pretrain, data.train, data.test)] == [20, 10, 10]
    assert data.pretrain.labels is None
    np.testing.assert_allclose(data.mean, (X[20:] / 255).mean((0, 1, 2)), rtol=1e-5)
    np.testing.assert_array_equal(data.pretrain.images, X[20:].transpose(0, 3, 1, 2))
    smaller = quiet(tmp_path, image_size=16)
    assert [len(part) for part in (smaller.pretrain, smaller.train, smaller.test)] == [20, 10, 10]
    np.testing.assert_array_equal(smaller.test.labels, Y[10:20])
    np.testing.assert_allclose(smaller.mean, (smaller.pretrain.images / 255).mean((0, 2, 3)), rtol=1e-5)


def test_several_arrays_of_a_part_follow_each_other(tmp_path):
    names = ["train_a_x", "train_b_x", "unlabeled_a_x", "unlabeled_b_x", "test_x"]
    np.savez(tmp_path / "all.npz", **dict(zip(names, (X[:5], X[5:10], X[10:18], X[18:30], X[30:]), strict=True)))
    said = r"trained on as one: train_a_x, train_b_x\n +trained on as one: unlabeled_a_x, unlabeled_b_x$"
    with pytest.warns(UserWarning, match=said):
        data = load_dataset("npy", tmp_path)
    np.testing.assert_array_equal(data.pretrain.images, X[10:30].transpose(0, 3, 1, 2))
    np.savez(tmp_path / "all.npz", train_x=X[:5], unlabeled_a_x=X[10:18], unlabeled_b_x=X[18:30], test_x=X[30:])
    with pytest.warns(UserWarning, match=r":\n +trained on as one: unlabeled_a_x, unlabeled_b_x$"):
        data = load_dataset("npy", tmp_path)
    np.testing.assert_array_equal(data.pretrain.images, X[10:30].transpose(0, 3, 1, 2))
    labels = {"train_a_y": Y[:5], "train_b_y": Y[5:10], "test_y": Y[30:]}
    np.savez(tmp_path / "all.npz", train_a_x=X[:5], train_b_x=X[5:10], test_x=X[30:], **labels)
    with pytest.warns(UserWarning, match=r":\n +trained on as one: train_a_x, train_b_x$"):
        data = load_dataset("npy", tmp_path)
    np.testing.assert_array_equal(data.train.labels, Y[:10])


@pytest.mark.parametrize(
    ("images", "labels"),
    [
        (["x_b", "x_a"], ["y_a", "y_b"]),
        (["images_9", "images_10"], ["labels_10", "labels_09"]),
        (["images/b", "images/a"], ["labels/a", "labels/b"]),
        (["fold2/trainX", "train_image_fold1"], ["fold1_label_train", "fold2/trainY"]),
        (["x2", "x1"], ["y1", "y2"]),
        (["bärX", "bürX"], ["bürY", "bärY"]),
    ],
)
@pytest.mark.parametrize("kind", ["npz", "npy"])
def test_labels_belong_to_the_images_of_their_name(tmp_path, images, labels, kind):
    """The first images have the last labels."""
    arrays = dict(zip(images, (X[:20], X[20:30]), strict=True)) | dict(zip(labels, (Y[20:30], Y[:20]), strict=True))
    arrays |= {"x_test": X[30:], "y_test": Y[30:]}
    if kind == "npz":
        np.savez(tmp_path / "all.npz", **arrays)
    else:
        for name, array in arrays.items():
            (tmp_path / name).parent.mkdir(exist_ok=True)
            np.save(tmp_path / f"{name}.npy", array)
    with pytest.warns(UserWarning, match="trained on as one"):
        data = load_dataset("npy", tmp_path)
    rows = [
        index
        for pixels in data.train.images
        for index in np.flatnonzero((pixels.transpose(1, 2, 0) == X).all((1, 2, 3)))
    ]
    assert sorted(rows) == list(range(30))
    np.testing.assert_array_equal(data.train.labels, Y[rows])


def test_unlabelled_images_with_a_part_to_hold_out(tmp_path):
    np.savez(tmp_path / "all.npz", x=X[:20], y=Y[:20], unlabeled_x=X[20:])
    with pytest.warns(UserWarning, match="4 of 20, about a tenth of each class"):
        data = load_dataset("npy", tmp_path)
    assert [len(part) for part in (data.pretrain, data.train, data.test)] == [20, 16, 4]
    np.testing.assert_array_equal(data.pretrain.images, X[20:].transpose(0, 3, 1, 2))
    rows = [int(path.removeprefix("x[").removesuffix("]")) for path in data.train.paths]
    np.testing.assert_array_equal(data.train.images, X[rows].transpose(0, 3, 1, 2))
    np.testing.assert_array_equal(data.train.labels, Y[rows])


def test_classes_have_names_where_an_array_has_them(tmp_path):
    parts = {"x_train": X[:30], "y_train": Y[:30, None], "x_test": X[30:], "y_test": Y[30:].astype("f4")}
    for names in ("classes", "class_names", "label_names"):
        np.savez(tmp_path / "all.npz", **parts, **{names: np.array(["ant", "bee", "cow", "dog", "elk"])})
        data = quiet(tmp_path)
        assert data.classes == ("ant", "bee", "cow", "dog", "elk")
        np.testing.assert_array_equal(data.test.labels, Y[30:])
    np.savez(tmp_path / "all.npz", **parts | {"y_train": np.array(list("abcd"))[Y[:30]], "y_test": list("abcdabcdab")})
    data = quiet(tmp_path)
    assert data.classes == ("a", "b", "c", "d")
    np.testing.assert_array_equal(data.train.labels, Y[:30])


def test_a_table_called_classes_is_none_of_names(tmp_path):
    """As dSprites' latents_classes, a row of factors for each image."""
    np.savez(tmp_path / "shapes.npz", imgs=X, latents_classes=np.stack([Y, Y // 2], 1))
    with pytest.warns(UserWarning, match="passed over arrays that are no images: latents_classes"):
        data = load_dataset("npy", tmp_path / "shapes.npz")
    assert data.test is not None
    assert (len(data.pretrain) + len(data.test), data.classes) == (40, ())


def test_labels_of_minus_one_are_none(tmp_path):
    np.savez(tmp_path / "all.npz", x_train=X[:30], y_train=np.full(30, -1), x_test=X[30:], y_test=np.full(10, -1))
    assert quiet(tmp_path).train is None


def test_labels_of_several_values_are_passed_over(tmp_path):
    """As those of MedMNIST's ChestMNIST, which has fourteen findings an image."""
    findings = np.random.default_rng(0).integers(0, 2, (40, 14))
    parts = {"x_train": X[:30], "y_train": findings[:30], "x_test": X[30:], "y_test": findings[30:]}
    np.savez(tmp_path / "all.npz", **parts)
    said = r"passed over labels that are not one number .*: y_train \[30, 14\], y_test \[10, 14\]"
    with pytest.warns(UserWarning, match=said):
        data = load_dataset("npy", tmp_path)
    assert (data.train, data.test.labels, data.classes) == (None, None, ())
    np.testing.assert_array_equal(data.pretrain.images, X[:30].transpose(0, 3, 1, 2))


def test_what_is_for_tests_alone_is_trained_on(tmp_path):
    np.savez(tmp_path / "all.npz", x_test=X, y_test=Y)
    with pytest.warns(UserWarning, match="x_test stands alone, so it is trained on and a part of it held out"):
        data = load_dataset("npy", tmp_path)
    assert [len(part) for part in (data.train, data.test)] == [35, 5]


def test_an_arrays_own_name_comes_before_those_of_folders(tmp_path):
    (tmp_path / "ab_test").mkdir()
    for name, array in {"x_train": X[:30], "y_train": Y[:30], "x_test": X[30:], "y_test": Y[30:]}.items():
        np.save(tmp_path / "ab_test" / f"{name}.npy", array)
    data = quiet(tmp_path)
    np.testing.assert_array_equal(data.train.images, X[:30].transpose(0, 3, 1, 2))
    np.testing.assert_array_equal(data.test.images, X[30:].transpose(0, 3, 1, 2))
    np.testing.assert_array_equal(data.test.labels, Y[30:])


def test_what_says_both_is_trained_on_where_nothing_else_is(tmp_path):
    np.savez(tmp_path / "all.npz", test_train_x=X[:30], test_x=X[30:])
    with pytest.warns(UserWarning, match=r"taken for training, as their names say that, .*: test_train_x$") as warned:
        data = load_dataset("npy", tmp_path)
    assert "alone" not in str(warned[0].message)
    np.testing.assert_array_equal(data.pretrain.images, X[:30].transpose(0, 3, 1, 2))
    np.testing.assert_array_equal(data.test.images, X[30:].transpose(0, 3, 1, 2))


def test_what_is_passed_over_is_said(tmp_path):
    arrays = {"x_train": X[:20], "x_test": X[20:30], "x_val": X[30:], "extra_ids": Y, "names": np.array(["a"])}
    np.savez(tmp_path / "all.npz", **arrays)
    with pytest.warns(UserWarning, match="left out for validation, as there is something to test on: x_val") as warned:
        load_dataset("npy", tmp_path)
    (warning,) = warned
    assert "passed over arrays that are no images: extra_ids, names" in str(warning.message)


@pytest.mark.parametrize("place", ["", "data/", "pictures/"])
def test_arrays_of_that_shape_count_only_where_none_is_called_images(tmp_path, place):
    masks = pictures(40, 20, 20, 3, seed=1)
    (tmp_path / place).mkdir(exist_ok=True)
    np.save(tmp_path / f"{place}masks.npy", masks)
    held = {"": 3, "data/": 4, "pictures/": 6}[place]
    with pytest.warns(UserWarning, match=f"{held} of 40, about a tenth"):
        assert len(load_dataset("npy", tmp_path).pretrain) == 40 - held
    np.save(tmp_path / f"{place}images.npy", X)
    with pytest.warns(UserWarning, match=f"passed over arrays that are not called images as others are: {place}masks"):
        data = load_dataset("npy", tmp_path)
    rows = np.concatenate([data.pretrain.images, data.test.images])
    assert sorted(map(bytes, rows)) == sorted(map(bytes, X.transpose(0, 3, 1, 2).copy()))


@pytest.mark.parametrize(
    ("arrays", "message"),
    [
        ({"x": X, "y": Y[:3]}, "x holds 40 images, y 3 labels"),
        ({"x": X, "fine_labels": Y, "coarse_labels": Y}, "one array of labels for x, found fine_labels, coarse_labels"),
        ({"y": Y}, r"expected an array of images .*, found y int64 \[40\]"),
        ({"x_test": X, "x_val": X}, "there is nothing to train on, by the names: x_test, x_val"),
        (
            {"x_a": X, "x_b": X, "y_b": Y, "y_c": Y},
            "do not tell which labels x_a, x_b have, of y_b, y_c: expected",
        ),
        ({"x_1": X, "x_2": X, "y_1": Y, "y_01": Y}, "do not tell which labels x_1, x_2 have, of y_1, y_01"),
        ({"x_1": X, "x_01": X, "y_1": Y, "y_2": Y}, "do not tell which labels x_1, x_01 have, of y_1, y_2"),
        ({"x": X, "y": np.eye(39)}, "x holds 40 images, y 39 labels"),
        ({"x": X, "y": np.array(3)}, r"y: expected labels \[N\], got shape \[\]"),
        ({"x": X, "y": Y + 0.5}, "y: expected a class, an integer or a name, got float"),
        ({"x": X, "y": np.where(Y == 2, np.nan, Y)}, "y: label 2 is NaN: a label that is missing is -1"),
        ({"x": X.reshape(40, -1)}, r"x: expected an image .*got shape \[1200\]"),
        ({"x": X * 2.0}, "floating point has values of .* which are to be 0 to 1"),
        ({"x_train": X, "y_train": Y, "x_test": X, "y_test": Y + 1}, "test images have classes that .* lack: 4"),
        ({"x_train": X[:0], "x_test": X}, "no image to train on could be read"),
    ],
)
def test_arrays_that_do_not_fit_together(tmp_path, arrays, message):
    np.savez(tmp_path / "all.npz", **arrays)
    with pytest.raises(ValueError, match=message) as caught:
        load_dataset("npy", tmp_path)
    assert str(caught.value).startswith(f"{tmp_path / 'all.npz'}: ")


def test_images_that_cannot_be_taken_are_left_out(tmp_path):
    images = X / 255
    images[7, 3, 4] = np.nan
    np.savez(tmp_path / "all.npz", x_train=images[:30], x_test=images[30:])
    with pytest.warns(UserWarning, match=r"left out 1 samples:\n +1: floating point .* \(x_train\[7\]\)"):
        assert len(load_dataset("npy", tmp_path).pretrain) == 29


@pytest.mark.parametrize(
    ("dtype", "factor", "said"),
    [
        ("f4", 1, "floating point has values of 0 to 255, which are to be 0 to 1"),
        ("f8", 1 / 128, "floating point has values of 0 to 1.99219, which are to be 0 to 1"),
        ("i4", 16, "int32 has values of 0 to 4080, which are to be 0 to 255"),
    ],
)
def test_the_values_of_an_array_are_judged_together(tmp_path, dtype, factor, said):
    """Dark images alone would be taken."""
    images = (X.astype("f8") * factor).astype(dtype)
    images[::2] = 0
    np.savez(tmp_path / "all.npz", x_train=images[:0:-1], x_test=X[:2])
    with pytest.raises(ValueError, match=rf"all\.npz: x_train: {said}"):
        load_dataset("npy", tmp_path / "all.npz")


def test_dark_images_of_16_bits_are_of_16(tmp_path):
    images = X.astype(np.uint16) * 257
    images[4] = 200
    np.savez(tmp_path / "all.npz", x_train=images[:30], x_test=images[30:])
    data = quiet(tmp_path)
    assert len(data.pretrain) == 30
    assert (data.pretrain.images[4] == 1).all()  # 200 / 65535 * 255, rounded.
    np.testing.assert_array_equal(data.pretrain.images[5], X[5].transpose(2, 0, 1))


def test_arrays_of_no_finite_values_leave_nothing(tmp_path):
    np.savez(tmp_path / "all.npz", x_train=np.full(X.shape, np.nan), x_test=X)
    with pytest.raises(ValueError, match="no image to train on could be read"):
        load_dataset("npy", tmp_path)


@pytest.mark.parametrize("channels", [1, 3, 4])
def test_files_of_one_image_each_are_refused(tmp_path, channels):
    for number, name in enumerate(("cat/0", "cat/1", "dog/0")):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        np.save(tmp_path / f"{name}.npy", pictures(1, 64, 64, channels, seed=number)[0])
    said = rf"cat/0: .*shape \[64, 64, {channels}\], which is that of one image: give .* one array \[N, H, W, C\]"
    with pytest.raises(ValueError, match=said):
        load_dataset("npy", tmp_path)


def test_files_of_one_image_each_with_channels_first_are_refused(tmp_path):
    for number in range(3):
        np.save(tmp_path / f"{number}.npy", pictures(1, 64, 48, 3, seed=number)[0].transpose(2, 0, 1))
    with pytest.raises(ValueError, match=r"0, 1.*shape \[3, H, W\], which is that of one image: .* \[N, C, H, W\]"):
        load_dataset("npy", tmp_path)
    (tmp_path / "2.npy").unlink()
    (tmp_path / "0.npy").rename(tmp_path / "train.npy")
    (tmp_path / "1.npy").rename(tmp_path / "test.npy")
    data = quiet(tmp_path)
    assert (data.image_shape, len(data.pretrain)) == ((1, 64, 48), 3)


def test_grey_images_of_a_few_pixels_have_an_axis_of_channels(tmp_path):
    np.savez(tmp_path / "all.npz", x_train=X[:30, :4, :4, :1], x_test=X[30:, :4, :4, :1])
    assert quiet(tmp_path).image_shape == (1, 4, 4)
    np.savez(tmp_path / "all.npz", x_train=X[:30, :4, :4, 0], x_test=X[30:, :4, :4, 0])
    assert load_dataset("codes", tmp_path).image_shape == (1, 4, 4)


def test_damaged_files_are_named(tmp_path):
    np.save(tmp_path / "x.npy", X)
    np.savez_compressed(tmp_path / "x.npz", x=X)
    for name in ("x.npy", "x.npz"):
        whole = (tmp_path / name).read_bytes()
        for damaged in (b"", whole[:-1000], whole[:50], b"\0" * 500, b"\x80\x04K\x01."):
            (tmp_path / name).write_bytes(damaged)
            with pytest.raises(ValueError, match=rf"{name}: (damaged, or no file of NumPy's|holds Python objects)"):
                load_dataset("npy", tmp_path / name)
    middle = len(whole) // 2
    (tmp_path / "x.npz").write_bytes(whole[:middle] + b"\xff" * 64 + whole[middle + 64 :])
    with pytest.raises(ValueError, match=r"x\.npz: damaged"):
        load_dataset("npy", tmp_path / "x.npz")


@pytest.mark.parametrize(
    ("array", "name", "message"),
    [
        (X[..., 0, 0], "npy", "expected an image"),
        (X / 100.0, "npy", "x: floating point has values of 0 to 2.55"),
        (X[..., 0, 0], "codes", "expected an image"),
        (X / 100.0, "codes", "codes are integers"),
    ],
)
def test_a_single_file_is_named_and_not_its_folder(tmp_path, monkeypatch, array, name, message):
    monkeypatch.chdir(tmp_path)
    np.save("x.npy", array)
    with pytest.raises(ValueError, match=rf"^x\.npy: .*{message}"):
        load_dataset(name, "x.npy")


def test_what_is_told_of_a_single_file_names_it(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    np.save("x.npy", X)
    with pytest.warns(UserWarning, match=r"^x\.npy:\n"):
        load_dataset("npy", "x.npy")


def test_python_objects_are_never_unpickled(tmp_path):
    np.save(tmp_path / "x.npy", np.array([X, None], object), allow_pickle=True)
    with pytest.raises(ValueError, match=r"x\.npy: holds Python objects"):
        load_dataset("npy", tmp_path)


def test_files_that_are_not_there(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"none\.npy: no such file or folder; name the array file"):
        load_dataset("npy", tmp_path / "none.npy")
    (tmp_path / "notes.txt").write_text("")
    with pytest.raises(ValueError, match=r"found no array file \(\.npy, \.npz"):
        load_dataset("npy", tmp_path)
    with pytest.raises(ValueError, match=r"notes\.txt: expected a file that ends in \.npy or \.npz"):
        load_dataset("npy", tmp_path / "notes.txt")
    with pytest.raises(ValueError, match="expected --data-dir"):
        load_dataset("npy")


@pytest.mark.parametrize(
    ("name", "part"),
    [
        *(("X_train", "train"), ("imagenet-val-0001", "validation"), ("camelyon_split_test_x", "test")),
        *(("unlabelledImages", "unlabeled"), ("latest", None), ("x", None), ("a/train/b", "train"), ("devset/1", None)),
        *(("yTest", "test"), ("try", None), ("tex", None), ("xtra_images", None), ("xunlabeled", "unlabeled")),
        *(("ab_test/x_train", "train"), ("train/val/x_test", "test"), ("train/val/x", "validation")),
    ],
)
def test_parts_are_told_by_words(name, part):
    assert split_in(name) == part


def test_moving_to_the_end_exchanges_rows():
    rows = np.arange(7)
    order = move_to_end(rows, {1, 3, 6})
    assert rows.tolist() == order
    assert sorted(order[4:]) == [1, 3, 6]
    assert [row for row in order[:4] if row in (0, 2)] == [0, 2]
    assert move_to_end(rows, set()) == list(range(7))
    assert move_to_end(np.arange(7), {1, 5}) == [0, 6, 2, 3, 4, 5, 1]


def test_validation_with_labels_is_tested_on_where_the_test_images_have_none(tmp_path):
    """As competitions hand out their data."""
    np.savez(tmp_path / "all.npz", x_train=X[:20], y_train=Y[:20], x_val=X[20:30], y_val=Y[20:30], x_test=X[30:])
    with pytest.warns(UserWarning, match="as only what is for validation has labels: .*x_test"):
        data = load_dataset("npy", tmp_path / "all.npz")
    assert data.test.labels.tolist() == Y[20:30].tolist()
    assert np.array_equal(data.test.images, X[20:30].transpose(0, 3, 1, 2))
    assert len(data.train) == 20
