"""Search of a folder for files of a kind, images or recordings, divided into those for training and for testing.

A sub-folder is a class. Folders called train and test or validation, in the usual spellings and at any depth, are
splits, and a folder called unlabeled holds files to learn from in place of those in classes. Files and folders are
identified by device and inode: each counts once, whatever links lead to it, so that no link makes the walk endless,
duplicates files or carries test files into training. The result notes what had to be guessed and what was left out.
"""

from __future__ import annotations

import mimetypes
import os
import re
import stat
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Literal, NamedTuple

from cpc_ext._messages import some
from cpc_ext.data.notice import LeftOut

Split = Literal["train", "validation", "test", "unlabeled", "beside"]

_SPLIT_NAMES: dict[str, Split] = {
    **dict.fromkeys(("train", "training", "trn", "tr", "trainset", "trainval"), "train"),
    **dict.fromkeys(("val", "valid", "validation", "valset", "dev", "eval", "evaluation"), "validation"),
    **dict.fromkeys(("test", "testing", "tst", "ts", "te", "testset", "heldout", "holdout"), "test"),
    **dict.fromkeys(("unlabeled", "unlabelled", "pretrain", "unsupervised"), "unlabeled"),
}
# Words in a split's name that are ignored, as in test_set or trainImages.
_FILLERS = {"set", "data", "dataset", "image", "images", "img", "imgs", "audio", "wav", "wavs", "split"}
# Folders that other programs leave behind: Synology's thumbnails, macOS's archives, recycle bins.
_FOREIGN = {"@eadir", "__macosx", "#recycle", "$recycle.bin", "system volume information", "lost+found"}
# Levels of folders with a single sub-folder that are followed: a link to itself would never end.
_DEEP = 32


class FileKind(NamedTuple):
    """A kind of files, recognised by the suffixes of their names.

    what: noun for such a file in the singular and the plural, for messages.
    examples: well-known suffixes, for a message.
    suffixes: suffixes that can be read, such as ".png".
    others: further suffixes of the kind, whose media type not every system knows.
    media_type: media type of the kind, such as "image", by which further suffixes that cannot be read are recognised.
    reader: the library that reads the files, and its version.
    """

    what: tuple[str, str]
    examples: str
    suffixes: frozenset[str]
    others: frozenset[str]
    media_type: str
    reader: str


@dataclass(frozen=True)
class TreeFile:
    """A file of a tree.

    path: relative to the tree, with / between parts. label: the folder that is its class, "" for none.
    size, mtime_ns, ctime_ns, inode: properties by which a change shows. Tools that unpack or copy files may restore
        size and mtime, but not ctime and inode.
    """

    path: str
    label: str
    size: int
    mtime_ns: int
    ctime_ns: int
    inode: int


@dataclass
class FileTree:
    """The files of a tree, in an order given by their names alone: a folder's files, then its folders, each sorted.

    left_out: files that are not used, with the reasons. train: files for training. test: files in a test or validation
        folder. unlabeled: unlabelled files, to train on in place of train. notes: remarks for the user.
    """

    left_out: LeftOut
    train: list[TreeFile] = field(default_factory=list)
    test: list[TreeFile] = field(default_factory=list)
    unlabeled: list[TreeFile] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)


def read_tree(root: Path, kind: FileKind, *, splits: bool = True) -> FileTree:
    """Find the files of a kind below root.

    splits: divide them by the folders' names; otherwise all are `train`.

    Raises FileNotFoundError, NotADirectoryError or PermissionError for the tree or a folder in it, ValueError if it
    holds no file to train on.
    """
    if not root.exists():
        raise FileNotFoundError(f"{root}: no such folder; name the folder of {kind.what[1]} with --data-dir")
    if not root.is_dir():
        others = "; --dataset says what else a file may be of, such as npy" if kind.media_type == "image" else ""
        raise NotADirectoryError(f"{root}: a file, where a folder of {kind.what[1]} is expected{others}")
    return _Walk(root, kind, splits).tree()


def passed_over(name: str) -> bool:
    """Return whether a folder of this name is hidden or belongs to another program."""
    return name.startswith(".") or name.lower() in _FOREIGN


def split_of(name: str) -> Split | None:
    """Return the split that a folder's name stands for ("Train", "testing", "VAL", "test_set", ...), or None."""
    if re.search(r"[^A-Za-z0-9 ._-]", name):
        return None
    words = (word.lower() for word in re.findall(r"[A-Z]?[a-z]+|[A-Z]+(?![a-z])", name))
    # A single letter names a domain, as in trainA and trainB.
    return _SPLIT_NAMES.get("".join(word for word in words if word not in _FILLERS and len(word) > 1))


def _begun(name: str) -> Split | None:
    """Return the split with which a folder's name begins ("train-clean-100", "test_clean"), or None."""
    first = re.match(r"([A-Za-z]{3,})[0-9]*[ ._-]", name)
    return _SPLIT_NAMES.get(first[1].lower()) if first else None


def _splits_among(folders: Sequence[os.DirEntry[str]]) -> dict[str, Split]:
    """Return the splits among neighbouring folders, by name.

    A name that only begins with a split counts if all names do, as in LibriSpeech's root.
    """
    exact = {entry.name: split for entry in folders if (split := split_of(entry.name))}
    begun = {entry.name: split for entry in folders if (split := split_of(entry.name) or _begun(entry.name))}
    guessed = len(begun) == len(folders) and _divides(begun.values()) and not _divides(exact.values())
    return begun if guessed else exact


def _divides(splits: Iterable[Split | None]) -> bool:
    """Return whether the splits include one to train on and one to test on."""
    found = {*splits}
    return "train" in found and bool(found & {"test", "validation"})


@dataclass(frozen=True)
class _Folder:
    """A folder to walk: its path, the split and class of its files, and whether it is a link."""

    path: str
    split: Split | None = None
    label: str = ""
    link: bool = False

    def below(self, name: str) -> str:
        return f"{self.path}/{name}" if self.path else name


@dataclass(frozen=True)
class _Candidate:
    """A file of the kind, which may yet turn out to be another name of a file already found."""

    file: TreeFile
    split: Split | None
    identity: tuple[int, int] | str
    link: bool


@dataclass(frozen=True)
class _Listing:
    """The sorted entries of a folder, without hidden and foreign ones.

    files: entries of the kind, each with the reason why it cannot be read, "" if it can. folders: the sub-folders.
    """

    files: list[tuple[os.DirEntry[str], str]]
    folders: list[os.DirEntry[str]]

    @property
    def empty(self) -> bool:
        return not self.files and not self.folders

    @property
    def alone(self) -> bool:
        """Return whether the folder holds one folder and nothing else."""
        return not self.files and len(self.folders) == 1

    @property
    def divided(self) -> bool:
        """Return whether the folder holds several folders and nothing else."""
        return not self.files and len(self.folders) > 1


class _Walk:
    def __init__(self, root: Path, kind: FileKind, splits: bool) -> None:
        self._root = root
        self._kind = kind
        self._splits = splits
        self._problems: dict[str, str | None] = dict.fromkeys(kind.suffixes, "")
        # Suffixes of two parts, such as ".tar.gz": their last part alone may belong to other files.
        self._compound = tuple(suffix for suffix in kind.suffixes if suffix.count(".") > 1)
        self._listings: dict[str, _Listing] = {}
        # The folders above count as visited, so that a link to one of them does not add everything next to the tree.
        above = [_identity(folder, folder.stat()) for folder in root.resolve().parents]
        self._met: set[tuple[int, int] | str] = set(above)
        self._files: set[tuple[int, int] | str] = set()
        self._skipped: list[str] = []
        self._met_again: list[str] = []
        self._split_folders: dict[Split, list[str]] = {}
        # Splits that are the only one in a class, each with the folder above the class; and folders above classes that
        # are divided into splits.
        self._lone: list[tuple[str, str, Split]] = []
        self._divided: set[str] = set()
        self._stepped: list[str] = []
        self._beside: list[_Folder] = []
        self._strays: list[_Candidate] = []
        self._tree = FileTree(LeftOut(kind.what[1]))

    def tree(self) -> FileTree:
        tree = self._tree
        self._base = self._find_base() if self._splits else ""
        for end in [match.start() for match in re.finditer("/", self._base)] + [0] * bool(self._base):
            self._enter(_Folder(self._base[:end]))
        found = self._claim(self._with_lone_splits(self._walk(_Folder(self._base))))
        by_split: dict[Split | None, list[TreeFile]] = {}
        for candidate in found:
            by_split.setdefault(candidate.split, []).append(candidate.file)
        tree.train = [candidate.file for candidate in found if candidate.split in (None, "train")]
        tree.unlabeled = by_split.get("unlabeled", [])
        if not tree.train and "train" not in self._split_folders:
            tree.train, tree.unlabeled = tree.unlabeled, []
        test, validation = by_split.get("test", []), by_split.get("validation", [])
        without = not any(file.label for file in test) and _labelled(validation) and _labelled(tree.train)
        tested: Split = "test" if test and not without else "validation"
        tree.test = test if tested == "test" else validation
        if tested == "test":
            for file in validation:
                tree.left_out.add(file.path, "in a validation folder, as there is a test folder")
        else:
            for file in test:
                tree.left_out.add(file.path, "in a test folder without classes, as a validation folder has them")
        # Claimed last, so that a file that is used through a link is not reported as left out.
        strays = [candidate for folder in self._beside for candidate in self._walk(folder, links=False)]
        for candidate in self._claim(self._strays + strays, quiet=True):
            tree.left_out.add(
                candidate.file.path, f"in no folder of training or test {self._kind.what[1]}, but beside them"
            )
        tree.notes = (self._layout(tested) if self._splits else []) + self._passed_over()
        if not tree.train:
            place = ", ".join(self._split_folders.get("train", []))
            raise ValueError(
                "\n  ".join(
                    [
                        f"{self._root}: found no {self._kind.what[0]}{' to train on in ' + place if place else ''} "
                        f"({self._kind.examples} and what else {self._kind.reader} reads)",
                        *tree.left_out.lines(),
                        *tree.notes,
                    ]
                )
            )
        return tree

    def _layout(self, tested: Split) -> list[str]:
        """Return notes on how folders were interpreted, unless they are plainly train/ and test/ or classes."""
        notes, what = [], self._kind.what[1]
        folders = self._split_folders
        if folders and folders != {"train": ["train"], "test": ["test"]}:
            tests = folders.get(tested) if self._tree.test else None
            notes.append(
                f"taken for training {what}: {some(folders.get('train', ['all others']))}; "
                f"for test {what}: {some(tests or ['none'])}"
                + (f"; without labels: {some(folders['unlabeled'])}" if self._tree.unlabeled else "")
            )
        elif not folders and {split_of(name) for name in self._base.split("/")} & {"test", "validation"}:
            notes.append(f"{self._base} stands alone, so its {what} are trained on and a tenth of them held out")
        if self._stepped:
            notes.append(f"taken for classes: the folders in {some(self._stepped)}, beside which there is nothing")
        labels = sorted({file.label for file in (*self._tree.train, *self._tree.test)})
        trained = {file.label for file in self._tree.train}
        if len(trained) == 1 and "" not in trained and len({_folder_of(file) for file in self._tree.train}) > 1:
            notes.append(
                f"the only class is {trained.pop()}, so there are no labels; the folders in it are taken for no classes"
            )
        splits = [label for label in labels if split_of(label) or _begun(label)]
        if splits and len(labels) > 1:
            notes.append(
                f"taken for a class: {some(splits)}, beside {some(sorted(set(labels) - set(splits)))}; if it is no "
                f"class, put the {what} to train and to test on into folders train and test"
            )
        by_spelling: dict[str, list[str]] = {}
        for label in labels:
            by_spelling.setdefault(label.casefold(), []).append(label)
        alike = [" and ".join(names) for names in by_spelling.values() if len(names) > 1]
        if alike:
            notes.append(f"taken for different classes, although only their case differs: {some(alike)}")
        return notes

    def _passed_over(self) -> list[str]:
        notes = []
        if self._met_again:
            links = some(self._met_again)
            notes.append(f"passed over links to folders that are part of the tree without them, or hold it: {links}")
        if self._skipped:
            notes.append(f"passed over hidden files and folders, and those of other programs: {some(self._skipped)}")
        return notes

    def _find_base(self) -> str:
        """Return the folder that contains the splits or classes: the root, or the end of a chain of single folders."""
        base = folder = ""
        for _ in range(_DEEP):
            listing = self._listing(folder)
            if not listing.alone:
                break
            name = listing.folders[0].name
            folder = _Folder(folder).below(name)
            if split_of(name):
                base = folder
        listing = self._listing(folder)
        if _divides(_splits_among(listing.folders).values()):
            return folder
        if folder == base or not listing.divided:
            return base
        self._stepped.append(folder)
        return folder

    def _walk(self, start: _Folder, *, links: bool = True) -> list[_Candidate]:
        """Find all files of the kind below a folder. Links to folders are followed last."""
        found: list[_Candidate] = []
        folders, later, linked = [start], deque[_Folder](), False
        while folders or later:
            folder = folders.pop() if folders else later.popleft()
            if not self._enter(folder):
                if links:
                    self._met_again.append(folder.path)
                continue
            listing = self._listing(folder.path)
            self._listings.pop(folder.path, None)
            splits, rest = self._split(folder, listing)
            loose = any(child.split == "train" for child in splits.values())
            for candidate in self._candidates(folder, listing.files):
                (self._strays if loose else found).append(candidate)
            inner = []
            for entry in listing.folders:
                child = splits.get(entry.name) or _child(folder, entry, rest)
                if child.split == "beside" and folder.split is None:
                    self._beside.append(child)
                elif child.link:
                    if links:
                        later.append(child)
                        linked = True
                else:
                    inner.append(child)
            folders += reversed(inner)
        return sorted(found, key=lambda candidate: _order(candidate.file.path)) if linked else found

    def _enter(self, folder: _Folder) -> bool:
        """Mark the folder as visited, and return whether this is its first visit."""
        path = self._root / folder.path
        identity = _identity(path, path.stat())
        if identity in self._met:
            return False
        self._met.add(identity)
        return True

    def _split(self, folder: _Folder, listing: _Listing) -> tuple[dict[str, _Folder], Split | None]:
        """Return the sub-folders that are splits, by name, and what the other sub-folders are then (None: classes)."""
        if not self._splits or folder.split is not None:
            return {}, None
        splits = _splits_among(listing.folders)
        outer = folder.path.rpartition("/")[0]
        if _divides(splits.values()):
            if folder.label:
                self._divided.add(outer)
        elif folder.path != self._base:
            self._lone += [(outer, folder.below(name), split) for name, split in splits.items()]
            return {}, None
        else:
            # A folder with a split's name, without the other split, may be a class (cars, buses, trains) if it holds
            # files, or a split if it holds folders.
            unlabeled: dict[str, Split] = {name: split for name, split in splits.items() if split == "unlabeled"}
            plain = bool(unlabeled) and len(splits) == len(listing.folders)
            if not plain and not all(self._holds_folders(folder, name) for name in splits.keys() - unlabeled.keys()):
                splits = unlabeled
            if not splits:
                return {}, None
        for name, split in splits.items():
            self._split_folders.setdefault(split, []).append(folder.below(name))
        children = {
            entry.name: self._split_child(folder, entry, splits[entry.name])
            for entry in listing.folders
            if entry.name in splits
        }
        rest: Split = "beside" if "train" in splits.values() else "train"
        return children if folder.label else self._stepped_in(children), rest

    def _holds_folders(self, folder: _Folder, name: str) -> bool:
        listing = self._listing(folder.below(name))
        return bool(listing.folders) and not listing.files

    def _split_child(self, folder: _Folder, entry: os.DirEntry[str], split: Split) -> _Folder:
        child = replace(folder, path=folder.below(entry.name), split=split, link=entry.is_symlink())
        # Some archives unpack to test_set/test_set/CLASS.
        for _ in range(_DEEP):
            listing = self._listing(child.path)
            if not listing.alone or split_of(listing.folders[0].name) != split:
                break
            child = replace(child, path=child.below(listing.folders[0].name))
        return child

    def _stepped_in(self, children: dict[str, _Folder]) -> dict[str, _Folder]:
        """Return the splits' folders, or their only sub-folders that hold the classes, if named alike in all of them.

        Such trees have train/images/CLASS and test/images/CLASS.
        """
        inner = {
            name: child
            for name, child in children.items()
            if child.split != "unlabeled" and not self._listing(child.path).empty
        }
        for _ in range(_DEEP):
            listings = [self._listing(child.path) for child in inner.values()]
            names = {listing.folders[0].name for listing in listings if listing.alone}
            if len(names) != 1 or not all(listing.alone for listing in listings):
                break
            (name,) = names
            inner = {split: replace(child, path=child.below(name)) for split, child in inner.items()}
        train = [self._listing(child.path) for child in inner.values() if child.split == "train"]
        moved = [child.path for name, child in inner.items() if child != children[name]]
        if not moved or not train or not all(listing.divided for listing in train):
            return children
        self._stepped += moved
        return children | inner

    def _with_lone_splits(self, candidates: list[_Candidate]) -> list[_Candidate]:
        """Assign candidates in a class's only split to that split if a neighbouring class has several splits."""
        lone = {path: split for outer, path, split in self._lone if outer in self._divided}
        if not lone:
            return candidates
        for path, split in lone.items():
            self._split_folders.setdefault(split, []).append(path)
        placed = []
        for candidate in candidates:
            path = candidate.file.path
            above = (path[: slash.start()] for slash in re.finditer("/", path))
            inner = next((lone[folder] for folder in above if folder in lone), None)
            placed.append(replace(candidate, split=candidate.split or inner))
        return placed

    def _listing(self, folder: str) -> _Listing:
        if folder not in self._listings:
            files, folders = [], []
            with os.scandir(self._root / folder) as entries:
                for entry in sorted(entries, key=lambda entry: entry.name):
                    if _is_folder(entry):
                        if passed_over(entry.name):
                            self._skipped.append(_Folder(folder).below(entry.name))
                        else:
                            folders.append(entry)
                    elif (problem := self._problem(entry.name)) is not None:
                        if entry.name.startswith("."):
                            self._skipped.append(_Folder(folder).below(entry.name))
                        else:
                            files.append((entry, problem))
            self._listings[folder] = _Listing(files, folders)
        return self._listings[folder]

    def _problem(self, name: str) -> str | None:
        """Return why a file of the kind cannot be read, "" if it can be, None if the name is not of the kind."""
        if self._compound and name.lower().endswith(self._compound):
            return ""
        dot = name.rfind(".")
        suffix = name[dot:].lower() if dot > 0 else ""
        if suffix not in self._problems:
            media_type = mimetypes.guess_type(f"name{suffix}")[0] or ""
            named = suffix in self._kind.others or media_type.startswith(f"{self._kind.media_type}/")
            self._problems[suffix] = f"{suffix} is not read by {self._kind.reader} here" if named else None
        return self._problems[suffix]

    def _candidates(self, folder: _Folder, entries: Iterable[tuple[os.DirEntry[str], str]]) -> Iterator[_Candidate]:
        for entry, problem in entries:
            path = folder.below(entry.name)
            try:
                status = entry.stat()
            except OSError as error:
                # Such as a dangling link.
                self._tree.left_out.add(path, error.strerror or str(error))
                continue
            if problem:
                self._tree.left_out.add(path, problem)
            elif not stat.S_ISREG(status.st_mode):
                self._tree.left_out.add(path, "no file but a FIFO, a socket or a device")
            else:
                file = TreeFile(
                    path, folder.label, status.st_size, status.st_mtime_ns, status.st_ctime_ns, status.st_ino
                )
                yield _Candidate(file, folder.split, _identity(entry, status), entry.is_symlink())

    def _claim(self, candidates: list[_Candidate], *, quiet: bool = False) -> list[_Candidate]:
        """Return the candidates without further names of the same file; a file's own name precedes links to it."""
        again = set()
        for links in (False, True):
            for number, candidate in enumerate(candidates):
                if candidate.link == links:
                    if candidate.identity in self._files:
                        again.add(number)
                    self._files.add(candidate.identity)
        if not again:
            return candidates
        for number in sorted(again) if not quiet else ():
            self._tree.left_out.add(candidates[number].file.path, "another name of a file that is taken")
        return [candidate for number, candidate in enumerate(candidates) if number not in again]


def _child(folder: _Folder, entry: os.DirEntry[str], rest: Split | None) -> _Folder:
    """Return a sub-folder that is not a split: a class, a folder within one, or one next to the splits.

    rest: second result of _split.
    """
    label = folder.label if rest == "beside" else folder.label or entry.name
    return _Folder(folder.below(entry.name), rest or folder.split, label, entry.is_symlink())


def _folder_of(file: TreeFile) -> str:
    return file.path.rpartition("/")[0]


def _labelled(files: list[TreeFile]) -> bool:
    return bool(files) and all(file.label for file in files)


def _identity(path: os.PathLike[str], status: os.stat_result) -> tuple[int, int] | str:
    """Return device and inode, equal for all names of a file or folder; the real path if there is no inode."""
    return (status.st_dev, status.st_ino) if status.st_ino else os.path.realpath(path)


def _is_folder(entry: os.DirEntry[str]) -> bool:
    try:
        return entry.is_dir()
    except OSError:  # A link that leads in a circle.
        return False


def _order(path: str) -> list[tuple[bool, str]]:
    *folders, name = path.split("/")
    return [(True, folder) for folder in folders] + [(False, name)]
