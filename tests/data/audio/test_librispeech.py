"""LibriSpeech's layout: the folders searched, split lists and labels, left-out files, and download."""

from pathlib import Path

import numpy as np
import pytest

from cpc_ext.data import load_dataset
from cpc_ext.data.audio.published import librispeech
from tests.data.audio.conftest import levels, write

pytest.importorskip("soundfile", reason="needs cpc_ext[audio]")

pytestmark = [pytest.mark.usefixtures("cache"), pytest.mark.filterwarnings("ignore:(?s).*are held out:UserWarning")]

# Level and number of samples of each recording, by name; there are enough for at least one label.
UTTERANCES = {
    "103-1240-0000": (1, 400),
    "103-1240-0001": (2, 560),
    "103-1241-0000": (3, 800),
    "19-198-0000": (4, 720),
    "19-198-0001": (5, 400),
}


@pytest.fixture
def root(tmp_path) -> Path:
    """LibriSpeech as unpacked, with its lists next to it."""
    for name, (level, samples) in UTTERANCES.items():
        speaker, chapter, _ = name.split("-")
        write(tmp_path / "LibriSpeech" / "train-clean-100" / speaker / chapter / f"{name}.flac", level, samples)
        (tmp_path / "LibriSpeech" / "train-clean-100" / speaker / chapter / f"{speaker}-{chapter}.trans.txt").touch()
    return tmp_path


@pytest.fixture
def lists(root) -> Path:
    folder = root / "LibriSpeech100_labels_split"
    folder.mkdir()
    (folder / "train_split.txt").write_text("103-1240-0000\n103-1241-0000 \n\n19-198-0000\n")
    (folder / "test_split.txt").write_text("19-198-0001\n103-1240-0001\n")
    (folder / "converted_aligned_phones.txt").write_text(
        "103-1240-0000 7 \n103-1240-0001 0 40\n103-1241-0000 1 2 3\n19-198-0000 4 5 6\n19-198-0001 9\n9-9-9999 1\n"
    )
    return folder


def load(folder):
    return load_dataset("librispeech", folder)


@pytest.mark.parametrize("place", ["", "LibriSpeech", "LibriSpeech/train-clean-100"])
def test_lists_and_labels_are_found_from_wherever(root, lists, place, recwarn):
    dataset = load(root / place)
    assert not recwarn.list
    # Speakers in the order of their numbers.
    assert dataset.speakers == ("19", "103")
    assert list(levels(dataset.train).items()) == [("19-198-0000", 4), ("103-1240-0000", 1), ("103-1241-0000", 3)]
    assert levels(dataset.test) == {"19-198-0001": 5, "103-1240-0001": 2}
    assert dataset.train.speakers.tolist() == [0, 1, 1]
    assert [dataset.train.phones_of(number).tolist() for number in range(3)] == [[4, 5, 6], [7], [1, 2, 3]]
    assert [dataset.test.phones_of(number).tolist() for number in range(2)] == [[9], [0, 40]]
    assert dataset.phone_names == tuple(map(str, range(41)))
    assert dataset.name == "librispeech"


def test_lists_in_the_folder_itself(root, lists):
    lists.rename(root / "LibriSpeech" / "train-clean-100" / lists.name)
    (root / "LibriSpeech").rename(root / "other")
    assert levels(load(root / "other").test) == {"19-198-0001": 5, "103-1240-0001": 2}


def test_without_lists_a_tenth_of_each_speaker_is_held_out(root):
    with pytest.warns(UserWarning, match="no list of test recordings: 2 of 5, a tenth of each speaker's, are held out"):
        dataset = load(root)
    assert dataset.test.speakers.tolist() == [0, 1]
    assert set(levels(dataset.train)) | set(levels(dataset.test)) == set(UTTERANCES)
    assert (dataset.train.phones, dataset.phone_names) == (None, ())
    assert levels(load(root).test) == levels(dataset.test)


def test_one_list_leaves_the_rest_to_the_other(root, lists, recwarn):
    (lists / "test_split.txt").unlink()
    assert set(levels(load(root).test)) == {"19-198-0001", "103-1240-0001"}
    (lists / "test_split.txt").write_text("103-1240-0000\n")
    (lists / "train_split.txt").unlink()
    assert set(levels(load(root).train)) == set(UTTERANCES) - {"103-1240-0000"}
    assert not recwarn.list


def test_empty_lists_are_as_none(root, lists):
    for name in ("train_split.txt", "test_split.txt", "converted_aligned_phones.txt"):
        (lists / name).write_text("")
    with pytest.warns(UserWarning, match=r"train_split\.txt is empty, so it is taken as not given") as warned:
        dataset = load(root)
    assert str(warned[0].message).count("taken as not given") == 3
    assert dataset.train.phones is None


def test_what_is_not_listed_or_not_there_is_told(root, lists):
    (lists / "train_split.txt").write_text("103-1240-0000\n8-8-8888\n")
    with pytest.warns(UserWarning, match="2 recordings are in neither list, and left out") as warned:
        dataset = load(root)
    assert "1 of 2 recordings in train_split.txt are not there: 8-8-8888" in str(warned[0].message)
    assert levels(dataset.train) == {"103-1240-0000": 1}


def test_files_that_are_called_otherwise_are_named(root, lists):
    folder = root / "LibriSpeech" / "train-clean-100"
    write(folder / "103" / "1240" / "104-1240-0000.flac", 9)
    write(folder / "noise.flac", 9)
    write(folder / "103" / "1240" / "103-1240-0000.wav", 9)
    (folder / "19" / "198" / "19-198-0001.flac").write_bytes(b"fLaC")
    with pytest.warns(UserWarning, match="left out 4 recordings") as warned:
        dataset = load(root)
    said = str(warned[0].message)
    assert "2: not called SPEAKER/CHAPTER/SPEAKER-CHAPTER-NUMBER (noise.flac, 103/1240/104-1240-0000.flac)" in said
    assert "another file of an utterance that is taken (103/1240/103-1240-0000.wav)" in said
    assert "19/198/19-198-0001.flac" in said
    assert levels(dataset.test) == {"103-1240-0001": 2}
    assert levels(dataset.train)["103-1240-0000"] == 1


def test_labels_a_little_off_are_cut_and_others_left_out(root, lists):
    (lists / "converted_aligned_phones.txt").write_text(
        "103-1240-0000 7 8 9\n103-1240-0001 1\n103-1241-0000 1 2 3 4 5 6\n19-198-0000 4 5\n"
    )
    with pytest.warns(UserWarning, match=r"not as many as .*: 103-1241-0000 \(6 for 3\)\n") as warned:
        dataset = load(root)
    assert str(warned[0].message).endswith("1 of 5 recordings have no labels of phones: 19-198-0001")
    # The recordings of the training list, of speaker 19 first, have room for 3, 1 and 3 labels.
    assert [dataset.train.phones_of(number).tolist() for number in range(3)] == [[4, 5], [7], []]
    assert [dataset.test.phones_of(number).tolist() for number in range(2)] == [[], [1]]


def test_lists_beside_another_subset_are_not_its_own(root, lists):
    (root / "LibriSpeech" / "train-clean-100").rename(root / "LibriSpeech" / "dev-clean")
    subset = root / "LibriSpeech" / "dev-clean"
    expected = set(UTTERANCES)
    for name in ("train_split.txt", "test_split.txt"):
        (lists / name).write_text("1-2-3\n4-5-6\n")
    with pytest.warns(UserWarning, match="train_split.txt has none of the recordings, so it is taken as not") as warned:
        dataset = load(subset)
    assert "test_split.txt has none of the recordings" in str(warned[0].message)
    assert {*dataset.train.names, *dataset.test.names} == expected
    # Lists that name some of the recordings are taken.
    (lists / "train_split.txt").write_text("1-2-3\n103-1240-0000\n")
    with pytest.warns(UserWarning, match="1 of 2 recordings in train_split.txt are not there: 1-2-3"):
        assert load(subset).train.names == ["103-1240-0000"]
    lists.rename(subset / lists.name)
    with pytest.raises(ValueError, match=r"test_split\.txt: none of its 2 recordings is there"):
        load(subset)


def test_labels_of_other_recordings_are_none(root, lists):
    """Such as those of another subset, or names that end in .flac."""
    text = (lists / "converted_aligned_phones.txt").read_text()
    (lists / "converted_aligned_phones.txt").write_text(text.replace(" ", ".flac ", 1).replace("\n19", "\n20"))
    with pytest.warns(UserWarning, match="3 of 5 recordings have no labels of phones: 19-198-0000, 103-1240-0000, 19"):
        dataset = load(root)
    assert dataset.train.phones_of(2).tolist() == [1, 2, 3]
    (lists / "converted_aligned_phones.txt").write_text("\n".join(f"{name}.flac 0" for name in UTTERANCES))
    with pytest.warns(UserWarning, match="5 of 5 recordings have no labels of phones: 19-198-0000, .*"):
        dataset = load(root)
    assert dataset.train.phones is dataset.test.phones is None


def test_a_byte_order_mark_is_no_part_of_a_name(root, lists, recwarn):
    (lists / "phones.txt").write_text("\n".join(f"{number} P{number}" for number in range(41)))
    for file in lists.iterdir():
        file.write_bytes(b"\xef\xbb\xbf" + file.read_bytes().replace(b"\n", b"\r\n"))
    dataset = load(root)
    assert not recwarn.list
    assert levels(dataset.train) == {"19-198-0000": 4, "103-1240-0000": 1, "103-1241-0000": 3}
    assert dataset.train.phones_of(1).tolist() == [7]
    assert dataset.phone_names[0] == "P0"


def test_names_of_phones(root, lists):
    names = root / "phones.txt"
    names.write_text("\n".join(f"{number} P{number}" for number in range(41)))
    assert load(root).phone_names[40] == "P40"
    for text, said in (
        ("0 SIL\n1 AA\n", "expected names of the phones 0 to 40, each once"),
        ("0 SIL\n2 AA\n", "each once"),
        ("SIL\n", "expected a number and a name a line, found 'SIL'"),
    ):
        names.write_text(text)
        with pytest.raises(ValueError, match=said):
            load(root)


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        ("train_split.txt", b"\xff\xfe", r"train_split\.txt: expected text"),
        ("train_split.txt", b"103-1240-0000 19-198-0000\n", "expected one SPEAKER-CHAPTER-NUMBER a line, found '103-"),
        ("train_split.txt", b"1-2-3\n", "none of its 1 recordings is there"),
        (
            "train_split.txt",
            b"19-198-0001\n",
            r"test_split\.txt: 1 recordings are in train_split\.txt as well: 19-198-",
        ),
        (
            "converted_aligned_phones.txt",
            b"103-1240-0001 0 40\n103-1240-0000 7\n103-1240-0000 8\n",
            "has two lines of different numbers after 103-1240-0000",
        ),
        ("converted_aligned_phones.txt", b"103-1240-0000 a\n", "expected numbers after 103-1240-0000"),
        ("converted_aligned_phones.txt", b"103-1240-0000 -1\n", "numbers from 0 after 103-1240-0000, found -1"),
        ("converted_aligned_phones.txt", b"103-1240-0000 99999\n", "expected numbers after 103-1240-0000"),
    ],
)
def test_damaged_lists_are_errors(root, lists, name, content, said):
    (lists / name).write_bytes(content)
    with pytest.raises(ValueError, match=said):
        load(root)


def test_a_list_of_all_leaves_nothing(root, lists):
    (lists / "train_split.txt").unlink()
    (lists / "test_split.txt").write_text("\n".join(UTTERANCES))
    with pytest.raises(ValueError, match="none is left to train on"):
        load(root)


def test_nothing_left_to_train_on_is_an_error(root, lists):
    (lists / "train_split.txt").write_text("103-1240-0000\n")
    (root / "LibriSpeech/train-clean-100/103/1240/103-1240-0000.flac").write_bytes(b"")
    with pytest.raises(ValueError, match="none of the 1 training recordings could be read\n  left out 1 recordings"):
        load(root)


def test_missing_data_says_what_to_do(tmp_path):
    with pytest.raises(
        FileNotFoundError, match=r"no folder 'LibriSpeech' in .*--download to fetch it from https://www\."
    ):
        load(tmp_path)
    (tmp_path / "LibriSpeech" / "dev-clean").mkdir(parents=True)
    with pytest.raises(FileNotFoundError, match="has no train-clean-100: name the folder of another subset"):
        load(tmp_path)
    write(tmp_path / "1" / "2" / "no-such-speaker.flac", 1)
    with pytest.raises(FileNotFoundError, match="has no train-clean-100"):
        load(tmp_path)
    (tmp_path / "1" / "2" / "1-2-list.txt").touch()
    with pytest.raises(ValueError, match=r"found no SPEAKER/CHAPTER/SPEAKER-CHAPTER-NUMBER\.flac\n  left out 1"):
        load(tmp_path)


def test_what_is_missing_is_fetched(root, lists, tmp_path, monkeypatch):
    """The archive is what OpenSLR publishes; fetching itself is tested of all archives."""
    archive = librispeech.ARCHIVE
    assert archive.url == "https://www.openslr.org/resources/12/train-clean-100.tar.gz"
    assert (len(archive.sha256), archive.size, archive.folder) == (64, 6_387_309_499, "LibriSpeech")
    assert archive.size < archive.unpacked < 1.1 * archive.size
    place = tmp_path / "data"

    def fetch(asked, data_dir, *, download):
        assert (asked, data_dir, download) == (archive, place, True)
        place.mkdir()
        (root / "LibriSpeech").rename(place / "LibriSpeech")
        return place / "LibriSpeech"

    monkeypatch.setattr(librispeech, "require_folder", fetch)
    dataset = load_dataset("librispeech", place, download=True)
    assert len(dataset.train) + len(dataset.test) == len(UTTERANCES)


def test_the_cache_is_the_place_where_none_is_named(root, lists, cache):
    (cache / "datasets").mkdir(parents=True)
    (root / "LibriSpeech").rename(cache / "datasets" / "LibriSpeech")
    lists.rename(cache / "datasets" / lists.name)
    dataset = load(None)
    assert len(dataset.train) == 3
    assert isinstance(dataset.train.samples, np.memmap)
