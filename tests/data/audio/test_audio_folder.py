"""Trees of recordings: speakers, splits, left-out files, and a cache that is checked and rebuilt."""

import os
import sys

import numpy as np
import pytest

from cpc_ext.data import load_dataset
from cpc_ext.data.audio import decoded
from tests.data.audio.conftest import levels, write

pytest.importorskip("soundfile", reason="needs cpc_ext[audio]")

pytestmark = [pytest.mark.usefixtures("cache"), pytest.mark.filterwarnings("ignore:(?s).*are held out:UserWarning")]


@pytest.fixture
def root(tmp_path):
    return tmp_path / "speech"


@pytest.fixture
def builds(monkeypatch) -> list[int]:
    """A list with one entry for each decoding."""
    counts: list[int] = []
    original = decoded.decode_files

    def counted(files, out):
        counts.append(len(files))
        return original(files, out)

    monkeypatch.setattr(decoded, "decode_files", counted)
    return counts


def load(root):
    return load_dataset("audio-folder", root)


def test_sub_folders_are_speakers_and_a_tenth_of_each_is_held_out(root):
    for speaker, base in (("zoe", 100), ("ann", 200)):
        for number in range(20):
            write(root / speaker / f"{number:02}.wav", base + number, 1600 + number)
    with pytest.warns(UserWarning, match="6 of 40 recordings, about a tenth of each speaker's, are held"):
        dataset = load(root)
    assert dataset.speakers == ("ann", "zoe")
    assert dataset.phone_names == ()
    assert (len(dataset.train), len(dataset.test)) == (34, 6)
    assert dataset.train.speakers.tolist() == [0] * 19 + [1] * 15
    assert dataset.test.speakers.tolist() == [0, 1, 1, 1, 1, 1]
    both = levels(dataset.train) | levels(dataset.test)
    assert both == {f"{who}/{n:02}.wav": base + n for who, base in (("zoe", 100), ("ann", 200)) for n in range(20)}
    assert isinstance(dataset.train.samples, np.memmap)
    assert levels(load(root).test) == levels(dataset.test)


def test_folders_of_the_splits(root, recwarn):
    for path, level in (("train/b/0.wav", 1), ("train/a/0.flac", 2), ("train/a/1.wav", 3), ("test/b/0.wav", 4)):
        write(root / path, level)
    dataset = load(root)
    assert not recwarn.list
    assert list(levels(dataset.train).items()) == [("train/a/0.flac", 2), ("train/a/1.wav", 3), ("train/b/0.wav", 1)]
    assert levels(dataset.test) == {"test/b/0.wav": 4}
    assert (dataset.train.speakers.tolist(), dataset.test.speakers.tolist()) == ([0, 0, 1], [1])


def test_test_speakers_may_be_others(root):
    for path in ("train/a/0.wav", "train/b/0.wav", "test/c/0.wav", "test/a/0.wav"):
        write(root / path, 1)
    with pytest.warns(UserWarning, match="1 speakers of the test recordings are not trained on"):
        dataset = load(root)
    assert dataset.speakers == ("a", "b")
    assert dataset.test.speakers is None
    assert dataset.train.speakers.tolist() == [0, 1]


def test_test_recordings_in_no_folders_leave_the_training_recordings_their_speakers(root):
    for path in ("train/a/0.wav", "train/b/0.wav", "test/0.wav"):
        write(root / path, 1)
    with pytest.warns(
        UserWarning, match=r"test/0\.wav is in no class folder, so the test recordings have no labels"
    ) as told:
        dataset = load(root)
    assert "not trained on" not in str(told[0].message)
    assert (dataset.speakers, dataset.test.speakers) == (("a", "b"), None)
    assert dataset.train.speakers.tolist() == [0, 1]


def test_the_splits_of_librispeech_are_no_speakers(root):
    for path in ("train-clean-100/7/8/7-8-0.flac", "train-clean-100/9/1/9-1-0.flac", "test-clean/3/2/3-2-0.flac"):
        write(root / path, 1)
    with pytest.warns(
        UserWarning, match="taken for training recordings: train-clean-100; for test recordings: test-cl"
    ):
        dataset = load(root)
    assert dataset.speakers == ("7", "9")
    assert list(levels(dataset.test)) == ["test-clean/3/2/3-2-0.flac"]


def test_speakers_below_a_lone_folder(root):
    for speaker in range(3):
        for number in range(2):
            write(root / "wav" / f"id{speaker}" / f"{number}.wav", 1)
    with pytest.warns(UserWarning, match="taken for classes: the folders in wav, beside which there is nothing"):
        assert load(root).speakers == ("id0", "id1", "id2")


def test_unlabelled_recordings_are_of_no_speaker_and_left_out(root):
    for path in ("a/0.wav", "a/1.wav", "b/0.wav", "b/1.wav", "unlabeled/0.wav"):
        write(root / path, 1)
    with pytest.warns(UserWarning, match=r"1: in an unlabelled folder, of which .* \(unlabeled/0\.wav\)"):
        dataset = load(root)
    assert dataset.speakers == ("a", "b")
    assert (len(dataset.train), len(dataset.test), dataset.unlabeled) == (2, 2, None)


def test_files_in_no_folders_have_no_speakers(root):
    for number in range(3):
        write(root / f"{number}.wav", number)
    dataset = load(root)
    assert dataset.speakers == ()
    assert dataset.train.speakers is None
    assert len(dataset.train) + len(dataset.test) == 3


def test_what_is_left_out_is_named(root):
    write(root / "train" / "a" / "good.wav", 7)
    write(root / "train" / "b" / "good.wav", 8)
    write(root / "test" / "a" / "good.wav", 9)
    write(root / "test" / "a" / "short.wav", 9, 399)
    (root / "train" / "a" / "empty.wav").touch()
    (root / "train" / "a" / "text.flac").write_text("text")
    (root / "train" / "b" / "film.m4a").write_text("text")
    (root / "train" / "b" / "notes.txt").write_text("text")
    for _ in range(2):  # The second time from the cache.
        with pytest.warns(UserWarning, match="left out 4 recordings:") as warned:
            dataset = load(root)
        (said,) = [str(warning.message) for warning in warned]
        for line in (
            "1: .m4a is not read by libsndfile .* here (train/b/film.m4a)",
            "1: the file is empty (train/a/empty.wav)",
            "1: Format not recognised. (train/a/text.flac)",
            "1: 399 samples at 16 kHz, shorter than 400 (test/a/short.wav)",
        ):
            head, _, tail = line.partition(".*")
            assert head in said
            assert tail in said
        assert "notes.txt" not in said
        assert levels(dataset.train) == {"train/a/good.wav": 7, "train/b/good.wav": 8}
        assert dataset.train.speakers.tolist() == [0, 1]
        assert levels(dataset.test) == {"test/a/good.wav": 9}


def test_loud_floating_point_is_told(root):
    soundfile = pytest.importorskip("soundfile")
    write(root / "a" / "0.wav", 1)
    loud = np.full(1600, 0.25, np.float32)
    loud[0] = 1.5
    soundfile.write(root / "a" / "loud.wav", loud, 16_000, subtype="FLOAT")
    for _ in range(2):
        with pytest.warns(UserWarning, match=r"beyond -1 to 1 were cut off in 1 files of floating point: a/loud\.wav"):
            load(root)


def test_nothing_to_train_on_is_an_error(root, tmp_path):
    with pytest.raises(FileNotFoundError, match="name the folder of recordings with --data-dir"):
        load(tmp_path / "none")
    (root / "a").mkdir(parents=True)
    with pytest.raises(ValueError, match=r"found no recording \(\.wav, \.flac, \.ogg, \.mp3 and what else libsndfile"):
        load(root)
    (root / "a" / "0.wav").touch()
    with pytest.raises(ValueError, match=r"none of the 1 recordings could be read, first a/0\.wav: the file is empty"):
        load(root)
    write(root / "test" / "a" / "0.wav", 1)
    (root / "a").rename(root / "train")
    with pytest.raises(ValueError, match="none of the 1 training recordings could be read\n  left out 1 recordings"):
        load(root)


def test_recordings_are_decoded_once(root, builds):
    for number in range(4):
        write(root / "a" / f"{number}.wav", number)
    before = levels(load(root).train)
    assert levels(load(root).train) == before
    assert builds == [4]
    # Another file of the same size and time.
    path = root / "a" / next(iter(before)).partition("/")[2]
    os.utime(path, (0, 0))
    load(root)
    path.unlink()
    write(path, 9)
    os.utime(path, (0, 0))
    assert 9 in levels(load(root).train).values()
    assert builds == [4, 4, 4]


@pytest.mark.parametrize(
    ("damage", "said"),
    [
        (lambda file: os.truncate(file, 100), "recordings.bin has 100 bytes, not 12800"),
        (lambda file: file.write_bytes(bytes(12800)), "their checksum is wrong"),
        (lambda file: file.unlink(), "recordings.bin is missing"),
        (lambda file: (file.parent / "index.json").write_text("[]"), "index.json holds something else"),
    ],
)
def test_a_damaged_cache_is_told_and_made_again(root, cache, builds, damage, said):
    for number in range(4):
        write(root / "a" / f"{number}.wav", number + 1)
    before = levels(load(root).train)
    (file,) = cache.rglob("recordings.bin")
    damage(file)
    with pytest.warns(UserWarning, match=f"recordings kept here do not serve \\({said}\\), so they are decoded again"):
        assert levels(load(root).train) == before
    assert builds == [4, 4]


def test_an_interrupted_decoding_leaves_nothing(root, cache, monkeypatch):
    write(root / "a" / "0.wav", 1)
    write(root / "a" / "1.wav", 1)

    def interrupt(files, out):
        out.write(b"half of it")
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(decoded, "decode_files", interrupt)
        with pytest.raises(KeyboardInterrupt):
            load(root)
    assert not [path for path in cache.rglob("*") if path.is_file() and path.suffix != ".lock"]
    assert set(levels(load(root).train).values()) == {1}


def test_a_folder_may_hold_images_as_well(root, cache):
    """Either kind has a cache of its own, and does not replace the other's."""
    image = pytest.importorskip("PIL.Image")
    for number in range(2):
        write(root / "a" / f"{number}.wav", 1)
        image.new("RGB", (8, 8)).save(root / "a" / f"{number}.png")
    assert len(load(root).train) == 1
    with pytest.warns(UserWarning, match="held out"):
        assert len(load_dataset("folder", root).pretrain) == 1
    load(root)
    assert len(list(cache.rglob("index.json"))) == 2


def test_a_missing_library_is_told(root, monkeypatch):
    write(root / "a" / "0.wav", 1)
    monkeypatch.setitem(sys.modules, "soxr", None)
    with pytest.raises(ImportError, match=r"pip install 'cpc_ext\[audio\]'"):
        load(root)
