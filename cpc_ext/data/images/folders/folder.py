"""Any tree of image files as a dataset, decoded once into a memory-mapped cache.

A sub-folder is a class; folders named train and test or validation are splits (see image_tree). The cache's key changes
with the files, so that a changed tree is decoded again (see decode_cache).
"""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path

import numpy as np

from cpc_ext._messages import some
from cpc_ext.data.file_tree import FileTree
from cpc_ext.data.images.dataset import Dataset, ImageSet
from cpc_ext.data.images.decode_cache import decoded_images
from cpc_ext.data.images.image_tree import read_images
from cpc_ext.data.notice import tell
from cpc_ext.data.splits import class_names, hold_out


def load(data_dir: str | Path, *, image_size: int | None = None) -> Dataset:
    """Open a tree of images.

    A training and a test folder next to each other are the splits, at the top, below folders that hold nothing else, or
    within each class. They are recognised in upper and lower case and in the usual spellings (train, training, trn;
    test, testing, tst; val, valid, validation, eval, dev; also train_set, testB, val2017), and if all folders next to
    each other begin with such a word (train-clean-100, test_clean). A test folder takes precedence over a validation
    folder. Without either, about a tenth of each class is held out for testing. The choice depends on each image's path
    alone, so that runs with different seeds are comparable, and adding images does not turn training images into test
    images. A folder named unlabeled next to the others is trained on in their place.

    Labels exist if every training image lies in one of at least two class folders; otherwise `train` is None. Test
    images have labels if all lie in such folders; if none does, a validation folder with classes is tested on instead.

    image_size: side in pixels; the shorter side is resized to it and the middle square kept. Default: the images' own
        size if it is the same for all and the shorter side has at most 256 pixels, else 96.

    Every file and folder counts once, whatever links lead to it. Hidden files and folders, and those that other
    programs leave behind (@eaDir, __MACOSX), are ignored. A warning says what had to be guessed about the tree, and
    which images were left out and why; of several processes only rank 0 warns.

    Decoding takes N * 3 * H * W bytes in the cache folder (see cache_dir). Raises FileNotFoundError, NotADirectoryError
    or PermissionError for the tree, ValueError if it holds no readable image, OSError if the cache cannot be written.
    """
    root = Path(data_dir).expanduser()
    if image_size is not None and image_size < 1:
        raise ValueError(f"image_size: expected at least 1 pixel, got {image_size}")
    tree = read_images(root)
    training, testing, unlabeled = tree.train, tree.test, tree.unlabeled
    if not testing:
        training, testing = hold_out(tree.train)
        tree.notes.append(
            f"no folder of test images: {len(testing)} of {len(tree.train)} images, about a tenth of each class, "
            "are held out"
        )
    files = unlabeled + training + testing
    cached = decoded_images(root, files, len(unlabeled) or len(training), image_size)
    for number, reason in cached.decoded.reasons.items():
        tree.left_out.add(files[number].path, reason)
    kept = [number for number in range(len(files)) if number not in cached.decoded.reasons]
    first = sum(number < len(unlabeled) for number in kept)
    end = sum(number < len(unlabeled) + len(training) for number in kept)
    if cached.statistics is None or first == end:
        kind, theirs = ("training", training) if first == end else ("unlabelled", unlabeled)
        none = f"{root}: none of the {len(theirs)} {kind} images could be read"
        raise ValueError("\n  ".join([none, *tree.left_out.lines()]))
    classes = class_names(root, training, testing, "images", tree.notes)
    tell(root, _findings(tree, [files[number].path for number in cached.decoded.several]))
    paths = [files[number].path for number in kept]
    indices = {name: index for index, name in enumerate(classes)}

    def part(rows: slice, labelled: bool) -> ImageSet:
        labels = [indices[files[number].label] for number in kept[rows]] if labelled else None
        return ImageSet(cached.images[rows], None if labels is None else np.array(labels, np.int64), paths[rows])

    train = part(slice(first, end), bool(classes))
    test = part(slice(end, None), bool(classes) and all(file.label for file in testing))
    return Dataset(
        name="folder",
        pretrain=part(slice(first), False) if first else train,
        train=train if classes else None,
        test=test if len(test) else None,
        classes=classes,
        **asdict(cached.statistics),
    )


def image_files(data_dir: str | Path) -> list[str]:
    """Return the sorted paths of all images below data_dir, relative to it, with /; a warning says what is left out.

    Raises FileNotFoundError, NotADirectoryError or PermissionError for the tree, ValueError if it holds no image.
    """
    root = Path(data_dir).expanduser()
    tree = read_images(root, splits=False)
    tell(root, [*tree.notes, *tree.left_out.lines()])
    return sorted(file.path for file in tree.train)


def _findings(tree: FileTree, several: list[str]) -> list[str]:
    frames = [f"took the first of several images or frames in {len(several)} files: {some(several)}"] if several else []
    return [*tree.notes, *frames, *tree.left_out.lines()]
