"""LibriSpeech: recordings in folders SPEAKER/CHAPTER, with the split lists and phone labels of CPC papers if given.

Source: Panayotov et al. 2015, https://www.openslr.org/12. The split of train-clean-100 and its 41 phones, from forced
alignments, are those of van den Oord et al. 2018, arXiv 1807.03748, published as `train_split.txt`, `test_split.txt`
and `converted_aligned_phones.txt`.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np

from cpc_ext._messages import some
from cpc_ext.data.audio.dataset import SpeechDataset
from cpc_ext.data.audio.decode import read_recordings
from cpc_ext.data.audio.decoded import decoded_recordings, fitting_labels
from cpc_ext.data.cache import datasets_dir
from cpc_ext.data.download import Archive, require_folder
from cpc_ext.data.file_tree import FileTree, TreeFile
from cpc_ext.data.notice import tell
from cpc_ext.data.splits import hold_out

SUBSET = "train-clean-100"
# The published checksum is an MD5, 2a93770f6d5c6c964bc36631d331a522. The SHA-256 is that of torchaudio
# (torchaudio/datasets/librispeech.py), the size that of TensorFlow Datasets.
ARCHIVE = Archive(
    url="https://www.openslr.org/resources/12/train-clean-100.tar.gz",
    sha256="d4ddd1d5a6ab303066f14971d768ee43278a5f2a0aa43dc716b0e64ecbbbf6e2",
    size=6_387_309_499,
    unpacked=6_600_000_000,  # A bound: FLAC does not become smaller in an archive.
    folder="LibriSpeech",
)
LISTS, TRAIN_LIST, TEST_LIST = "LibriSpeech100_labels_split", "train_split.txt", "test_split.txt"
LABELS, NAMES = "converted_aligned_phones.txt", "phones.txt"
PHONES = 41


def load(data_dir: str | Path | None = None, *, download: bool = False) -> SpeechDataset:
    """Open LibriSpeech's train-clean-100, or any folder with files SPEAKER/CHAPTER/SPEAKER-CHAPTER-NUMBER.flac.

    data_dir: that folder, or one that holds it as `train-clean-100` or `LibriSpeech/train-clean-100`. The lists and the
        labels are searched in that folder, in those above it up to the one that holds LibriSpeech, and in their
        folders `LibriSpeech100_labels_split`.

    `train_split.txt` and `test_split.txt`, with one SPEAKER-CHAPTER-NUMBER on each line, are the splits, and recordings
    in neither are left out. With one of the lists, the other split has all other recordings. Without lists, or with
    lists next to another subset that name none of its recordings, a tenth of each speaker's recordings is held out, the
    same ones on every run. Phones are read from `converted_aligned_phones.txt`. Their names are those in `phones.txt`,
    whose lines are a number and a name, else their numbers.

    Raises FileNotFoundError if files are missing, ValueError if no file has that layout or a list is damaged,
    DownloadError, ImportError if soundfile or soxr is missing, OSError if the cache cannot be written.
    """
    root = _home(data_dir, download=download)
    tree = read_recordings(root, splits=False)
    files = _utterances(root, tree)
    given = _given(root, tree.notes)
    training, testing = _split(root, files, given, tree.notes)
    speakers = tuple(sorted({file.label for file in (*training, *testing)}, key=_as_number))
    order = {speaker: number for number, speaker in enumerate(speakers)}
    training, testing = (sorted(part, key=lambda file: order[file.label]) for part in (training, testing))
    decoded = decoded_recordings(root, training, testing, tree.left_out, tree.notes, variant="librispeech")
    names = [_name(file) for file in decoded.files]
    numbers = [order[file.label] for file in decoded.files]
    phones: dict[str, np.ndarray] | None = None
    phone_names: tuple[str, ...] = ()
    if LABELS in given:
        wanted = {name for name, length in zip(names, decoded.lengths, strict=True) if length}
        phones = fitting_labels(decoded, names, _labels(given[LABELS], wanted), tree.notes)
        highest = max((int(found.max(initial=0)) for found in phones.values()), default=0)
        phone_names = _phone_names(given.get(NAMES), highest)
    tell(root, [*tree.notes, *tree.left_out.lines()])
    test = decoded.part(range(len(training), len(names)), names, numbers, phones)
    return SpeechDataset(
        name="librispeech",
        train=decoded.part(range(len(training)), names, numbers, phones),
        test=test if len(test) else None,
        speakers=speakers,
        phone_names=phone_names,
    )


def _home(data_dir: str | Path | None, *, download: bool) -> Path:
    """Return the folder that contains the speakers' folders."""
    root = datasets_dir(data_dir)

    def found() -> Path | None:
        places = (root, root / SUBSET, root / ARCHIVE.folder / SUBSET, root / ARCHIVE.folder)
        return next((place for place in places if _has_utterances(place)), None)

    home = found()
    if home is None:
        folder = require_folder(ARCHIVE, data_dir, download=download)
        home = found()
        if home is None:
            raise FileNotFoundError(
                f"{folder} has no {SUBSET}: name the folder of another subset, which has those of the speakers, with "
                f"--data-dir, or a --data-dir without {ARCHIVE.folder} and pass --download"
            )
    return home


def _has_utterances(folder: Path) -> bool:
    """Return whether any file below is named SPEAKER/CHAPTER/SPEAKER-CHAPTER-NUMBER, with any extension."""
    return any(path.name.startswith("-".join((*path.parts[-3:-1], ""))) for path in folder.glob("*/*/*-*-*.*"))


def _name(file: TreeFile) -> str:
    """Return SPEAKER-CHAPTER-NUMBER."""
    return file.path.rpartition("/")[2].rpartition(".")[0]


def _as_number(speaker: str) -> tuple[bool, int, str]:
    return (not speaker.isdecimal(), int(speaker) if speaker.isdecimal() else 0, speaker)


def _utterances(root: Path, tree: FileTree) -> list[TreeFile]:
    """Return the recordings whose names agree with their folders, one of each name, in the order of the tree."""
    found: dict[str, TreeFile] = {}
    for file in tree.train:
        name, parts = _name(file), file.path.split("/")
        if len(parts) != 3 or name.split("-")[:-1] != parts[:2]:
            tree.left_out.add(file.path, "not called SPEAKER/CHAPTER/SPEAKER-CHAPTER-NUMBER")
        elif name in found:
            tree.left_out.add(file.path, "another file of an utterance that is taken")
        else:
            found[name] = replace(file, label=parts[0])
    if not found:
        lines = tree.left_out.lines()
        raise ValueError("\n  ".join([f"{root}: found no SPEAKER/CHAPTER/SPEAKER-CHAPTER-NUMBER.flac", *lines]))
    return list(found.values())


def _given(root: Path, notes: list[str]) -> dict[str, Path]:
    """Find the files of lists and labels, by name, next to the speakers or above them in LibriSpeech's folders."""
    places = [root]
    if root.name == SUBSET or root.parent.name == ARCHIVE.folder:
        places.append(root.parent)
    if ARCHIVE.folder in (root.name, root.parent.name):
        places.append(places[-1].parent)
    given = {}
    for name in (TRAIN_LIST, TEST_LIST, LABELS, NAMES):
        candidates = (folder / name for place in places for folder in (place, place / LISTS))
        path = next((path for path in candidates if path.is_file()), None)
        if path is not None and path.stat().st_size:
            given[name] = path
        elif path is not None:
            notes.append(f"{path} is empty, so it is taken as not given")
    return given


def _split(
    root: Path, files: list[TreeFile], given: dict[str, Path], notes: list[str]
) -> tuple[list[TreeFile], list[TreeFile]]:
    """Split the recordings into those to train and to test on, by the lists that are given."""
    listed = {name: _ids(given[name]) for name in (TRAIN_LIST, TEST_LIST) if name in given}
    have = {_name(file) for file in files}
    for name, ids in list(listed.items()):
        if not ids & have:
            if root.name == SUBSET or given[name].is_relative_to(root):
                raise ValueError(f"{given[name]}: none of its {len(ids)} recordings is there")
            # Lists next to another subset are those of train-clean-100.
            notes.append(f"{given[name]} has none of the recordings, so it is taken as not given")
            del listed[name]
        elif missing := sorted(ids - have):
            notes.append(f"{len(missing)} of {len(ids)} recordings in {name} are not there: {some(missing)}")
    both = listed.get(TRAIN_LIST, set()) & listed.get(TEST_LIST, set())
    if both:
        raise ValueError(
            f"{given[TEST_LIST]}: {len(both)} recordings are in {TRAIN_LIST} as well: {some(sorted(both))}"
        )
    if TEST_LIST in listed:
        testing = [file for file in files if _name(file) in listed[TEST_LIST]]
        rest = [file for file in files if _name(file) not in listed[TEST_LIST]]
        training = [file for file in rest if _name(file) in listed.get(TRAIN_LIST, have)]
    else:
        training = [file for file in files if _name(file) in listed.get(TRAIN_LIST, have)]
        testing = [file for file in files if _name(file) not in listed.get(TRAIN_LIST, have)]
    if not testing:
        count = len(training)
        training, testing = hold_out(training, drawn=True)
        notes.append(f"no list of test recordings: {len(testing)} of {count}, a tenth of each speaker's, are held out")
    unlisted = len(files) - len(training) - len(testing)
    if unlisted:
        notes.append(f"{unlisted} recordings are in neither list, and left out")
    if not training:
        raise ValueError(f"{given[TEST_LIST]}: it has all recordings, so none is left to train on")
    return training, testing


def _lines(path: Path) -> Iterator[list[str]]:
    """Yield the words of every line that is not blank. Raises ValueError if the file is not text."""
    try:
        # Some editors begin a file with a byte order mark, which would be part of the first name.
        with path.open(encoding="utf-8-sig") as lines:
            for line in lines:
                if words := line.split():
                    yield words
    except UnicodeDecodeError as error:
        raise ValueError(f"{path}: expected text: {error}") from None


def _ids(path: Path) -> set[str]:
    ids = set()
    for words in _lines(path):
        if len(words) != 1:
            raise ValueError(f"{path}: expected one SPEAKER-CHAPTER-NUMBER a line, found {' '.join(words)[:80]!r}")
        ids.add(words[0].removesuffix(".flac"))
    return ids


def _labels(path: Path, wanted: set[str]) -> dict[str, np.ndarray]:
    """Read the labels of the wanted recordings, int16."""
    labels: dict[str, np.ndarray] = {}
    for name, *numbers in _lines(path):
        if name in wanted:
            try:
                found = np.array(list(map(int, numbers)), np.int64)
                if found.max(initial=0) > np.iinfo(np.int16).max:  # NumPy 1 would wrap it around without an error.
                    raise OverflowError(f"{found.max()} is too large")
            except (ValueError, OverflowError) as error:
                raise ValueError(f"{path}: expected numbers after {name}: {error}") from None
            if len(found) and found.min() < 0:
                raise ValueError(f"{path}: expected numbers from 0 after {name}, found {found.min()}")
            if name in labels and not np.array_equal(labels[name], found):
                raise ValueError(f"{path}: has two lines of different numbers after {name}")
            labels[name] = found.astype(np.int16)
    return labels


def _phone_names(path: Path | None, highest: int) -> tuple[str, ...]:
    """Return the names of the phones, from a file if given, else their numbers. The file must name all of them."""
    if path is None:
        return tuple(map(str, range(max(PHONES, highest + 1))))
    names = {}
    for words in _lines(path):
        if len(words) != 2 or not words[0].isdecimal():
            raise ValueError(f"{path}: expected a number and a name a line, found {' '.join(words)[:80]!r}")
        names[int(words[0])] = words[1]
    if sorted(names) != list(range(len(names))) or highest >= len(names):
        raise ValueError(f"{path}: expected names of the phones 0 to {max(highest, len(names) - 1)}, each once")
    return tuple(names[number] for number in range(len(names)))
