"""The cache of decoded images: its key changes with the files, it is synced before its rename, and it is checked."""

import errno
import json
import os
import shutil
import threading
import time
from pathlib import Path

import numpy as np
import pytest
from filelock import FileLock
from PIL import Image

from cpc_ext.data import cache as cache_module
from cpc_ext.data import decoded_cache
from cpc_ext.data.images import decode, decode_cache
from cpc_ext.data.images.folders.folder import load as load_folder

pytestmark = pytest.mark.filterwarnings("ignore:.*no folder of test images:UserWarning")


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("CPC_EXT_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture
def root(tmp_path):
    root = tmp_path / "images"
    for part, count in (("train", 40), ("test", 5)):
        (root / part).mkdir(parents=True)
        for number in range(count):
            Image.new("RGB", (40, 40), (number + 1, 7, 9)).save(root / part / f"{number:02}.bmp")
    return root


def means(root: Path) -> list[float]:
    """Return the mean red of each training image."""
    return load_folder(root).pretrain.images[:, 0].mean((1, 2)).tolist()


EXPECTED = [float(number + 1) for number in range(40)]


@pytest.fixture
def builds(monkeypatch) -> list[int]:
    """A list with one entry for each decoding."""
    counts: list[int] = []
    original = decode_cache.decode_all

    def counted(files, *rest):
        counts.append(len(files))
        return original(files, *rest)

    monkeypatch.setattr(decode_cache, "decode_all", counted)
    return counts


@pytest.mark.parametrize("how", ["replaced", "written in place"])
def test_a_file_of_equal_size_and_time_is_another(root, builds, how):
    """As archives unpack over each other, with the times that they recorded."""
    path = root / "train" / "00.bmp"
    os.utime(path, (0, 0))
    assert means(root) == EXPECTED
    size = path.stat().st_size
    if how == "replaced":
        path.unlink()
        Image.new("RGB", (40, 40), (200, 7, 9)).save(path)
    else:
        with path.open("r+b") as file:
            file.seek(54)
            file.write(bytes([9, 7, 200]) * 1600)
    os.utime(path, (0, 0))
    assert path.stat().st_size == size
    assert means(root) == [200.0, *EXPECTED[1:]]
    assert builds == [45, 45]


def damage_zeroed(directory: Path) -> None:
    size = (directory / "images.bin").stat().st_size
    (directory / "images.bin").write_bytes(bytes(size))


def damage_short(directory: Path) -> None:
    os.truncate(directory / "images.bin", 10_000)


def damage_zeroed_in_part(directory: Path) -> None:
    with (directory / "images.bin").open("r+b") as file:
        file.seek(100_000)
        file.write(bytes(8192))


def damage_index_zeroed(directory: Path) -> None:
    size = (directory / "index.json").stat().st_size
    (directory / "index.json").write_bytes(bytes(size))


def damage_index_other(directory: Path) -> None:
    (directory / "index.json").write_text("[]")


def damage_index_mean(directory: Path) -> None:
    index = json.loads((directory / "index.json").read_text())
    index["content"]["statistics"]["mean"][0] += 0.1
    (directory / "index.json").write_text(json.dumps(index))


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (damage_zeroed, "their checksum is wrong"),
        (damage_zeroed_in_part, "their checksum is wrong"),
        (damage_short, "images.bin has 10000 bytes, not 216000"),
        (damage_index_zeroed, "index.json holds something else"),
        (damage_index_other, "index.json holds something else"),
        (damage_index_mean, "their checksum is wrong"),
        (lambda directory: (directory / "images.bin").unlink(), "images.bin is missing"),
        (lambda directory: (directory / "index.json").unlink(), "index.json is missing"),
    ],
)
def test_a_damaged_cache_is_told_and_made_again(root, cache, builds, damage, message):
    before = load_folder(root)
    (images,) = cache.rglob("images.bin")
    damage(images.parent)
    with pytest.warns(UserWarning, match=f"do not serve \\({message}\\), so they are decoded again"):
        after = load_folder(root)
    assert after.pretrain.images[:, 0].mean((1, 2)).tolist() == EXPECTED
    assert (after.mean, after.std) == (before.mean, before.std)
    assert means(root) == EXPECTED
    assert builds == [45, 45]


def test_what_is_kept_is_what_was_decoded(root, builds):
    """Reasons, frames and statistics from the cache are those of decoding."""
    (root / "train" / "10.bmp").write_bytes(b"")
    frames = [Image.new("RGB", (40, 40), (value, 0, 0)) for value in (41, 250)]
    frames[0].save(root / "train" / "99.tif", save_all=True, append_images=frames[1:])
    said = []
    for _ in range(2):
        with pytest.warns(UserWarning, match="left out 1 images") as warned:
            dataset = load_folder(root)
        said.append([str(warning.message) for warning in warned])
        assert dataset.pretrain.images[:, 0].mean((1, 2)).tolist() == [*EXPECTED[:10], *EXPECTED[11:], 41]
        pixels = dataset.pretrain.images / 255
        np.testing.assert_allclose(dataset.mean, pixels.mean((0, 2, 3)), rtol=1e-5)
        np.testing.assert_allclose(dataset.std, pixels.std((0, 2, 3)).clip(1 / 255), rtol=1e-4)
    assert said[0] == said[1]
    assert "took the first of several images or frames in 1 files: train/99.tif" in said[0][0]
    assert builds == [46]


def test_another_pillow_tries_what_one_could_not_read(root, builds, monkeypatch):
    load_folder(root)
    monkeypatch.setattr("PIL.__version__", "99.0")
    load_folder(root)
    assert builds == [45]
    (root / "train" / "10.bmp").write_bytes(b"")
    load_folder(root)
    monkeypatch.setattr("PIL.__version__", "99.1")
    with pytest.warns(UserWarning, match=r"Pillow 99\.0 could not read all of them, this is 99\.1"):
        load_folder(root)
    load_folder(root)
    assert builds == [45, 45, 45]


@pytest.mark.parametrize("number", [errno.EIO, errno.EMFILE])
def test_an_error_that_may_pass_is_not_kept(root, cache, monkeypatch, number):
    """A network's disk may answer the next time: an image must not be missing until Pillow has another version."""
    original = decode._decode

    def failing(path, size):
        if path.name == "07.bmp":
            raise OSError(number, os.strerror(number))
        return original(path, size)

    with monkeypatch.context() as patch:
        patch.setattr(decode, "_decode", failing)
        with pytest.raises(ValueError, match=rf"07\.bmp: {os.strerror(number)}; try again, or take the file away$"):
            means(root)
    assert means(root) == EXPECTED


def test_who_waits_for_another_process_says_so(root, cache):
    means(root)
    (lock,) = (cache / "folders").glob("*.lock")
    shutil.rmtree(lock.with_suffix(""))
    held = threading.Event()

    def hold() -> None:
        with FileLock(lock):
            held.set()
            time.sleep(0.3)

    other = threading.Thread(target=hold)
    other.start()
    held.wait()
    with pytest.warns(UserWarning, match="images:\n  waiting for the process that decodes the images$"):
        assert means(root) == EXPECTED
    other.join()


def test_content_is_on_disk_before_its_name(root, cache, monkeypatch):
    """The order of what a power cut may keep: content, the folder of it, the rename, the folder of that."""
    done = []
    fsync, rename = os.fsync, Path.rename

    def fsynced(descriptor):
        done.append(("sync", Path(os.readlink(f"/proc/self/fd/{descriptor}")).name))
        fsync(descriptor)

    def renamed(path, target):
        done.append(("rename", path.name))
        return rename(path, target)

    monkeypatch.setattr(os, "fsync", fsynced)
    monkeypatch.setattr(Path, "rename", renamed)
    load_folder(root)
    (images,) = cache.rglob("images.bin")
    building = f"{images.parent.name}.building"
    assert done == [
        ("sync", "images.bin"),
        ("sync", "index.json"),
        ("sync", building),
        ("rename", building),
        ("sync", images.parent.parent.name),
    ]


@pytest.mark.parametrize("when", ["images.bin", "index.json"])
def test_a_disk_that_is_full_when_it_is_to_keep_leaves_nothing(root, cache, monkeypatch, when):
    fsync = os.fsync

    def full(descriptor):
        if os.readlink(f"/proc/self/fd/{descriptor}").endswith(when):
            raise OSError(28, "No space left on device")
        fsync(descriptor)

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", full)
        with pytest.raises(OSError, match=r"cannot keep the decoded images .*No space left on device.*CPC_EXT_CACHE"):
            load_folder(root)
    assert not [path for path in cache.rglob("*") if path.is_file() and path.suffix != ".lock"]
    assert means(root) == EXPECTED


def test_a_file_system_that_syncs_no_folders_serves(root, monkeypatch):
    def refuse(path):
        raise OSError(22, "Invalid argument")

    monkeypatch.setattr(cache_module, "sync_file", refuse)
    assert means(root) == EXPECTED


def test_a_file_system_without_locks_is_told(root, monkeypatch):
    class NoLock:
        def __init__(self, path):
            raise NotImplementedError("FileSystem does not appear to support flock")

    monkeypatch.setattr(decoded_cache, "FileLock", NoLock)
    with pytest.raises(OSError, match=r"does not appear to support flock.*CPC_EXT_CACHE"):
        load_folder(root)


def test_a_cache_that_is_there_is_only_read(root, cache, monkeypatch):
    """A cache folder that cannot be written serves once the images are in it."""
    load_folder(root)
    monkeypatch.setattr(decoded_cache, "FileLock", None)
    monkeypatch.setattr(Path, "mkdir", None)
    assert means(root) == EXPECTED


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everything")
def test_a_damaged_cache_that_cannot_be_written_is_told(root, cache):
    load_folder(root)
    (images,) = cache.rglob("images.bin")
    damage_short(images.parent)
    folders = [images.parent, images.parent.parent, cache / "folders"]
    for folder in folders:
        folder.chmod(0o500)
    try:
        with pytest.raises(PermissionError, match="CPC_EXT_CACHE names another"):
            load_folder(root)
    finally:
        for folder in folders:
            folder.chmod(0o700)


def test_the_cache_of_an_earlier_version_is_replaced(root, cache):
    load_folder(root)
    (images,) = cache.rglob("images.bin")
    old = images.parent.with_name("0" * 32)
    images.parent.rename(old)
    assert means(root) == EXPECTED
    assert not old.exists()


def test_long_and_strange_names_of_the_tree(root):
    for name in ("\N{GRINNING FACE}" * 60, os.fsdecode(b"\xff" * 200), "n" * 255):
        tree = root.with_name(name)
        shutil.copytree(root, tree)
        assert means(tree) == EXPECTED


@pytest.mark.parametrize(("rank", "world", "speaks"), [("0", "4", True), ("3", "4", False), ("3", "1", True)])
def test_one_process_says_what_was_found(root, cache, monkeypatch, recwarn, rank, world, speaks):
    (root / "train" / "broken.png").write_text("text")
    monkeypatch.setenv("RANK", rank)
    monkeypatch.setenv("WORLD_SIZE", world)
    load_folder(root)
    assert bool([warning for warning in recwarn if "broken.png" in str(warning.message)]) == speaks
    # The process that rebuilds a cache warns, whatever its rank, since no other process knows.
    (images,) = cache.rglob("images.bin")
    damage_short(images.parent)
    load_folder(root)
    assert [warning for warning in recwarn if "do not serve" in str(warning.message)]
