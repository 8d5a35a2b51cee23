"""Conversion of labels, which may be numbers or names, to class indices."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import torch

from cpc_ext._messages import some

__all__ = ["NO_LABEL", "Classes", "Label", "class_indices", "label_in", "plain_label"]

# The label of an example: a number, a name, or none.
Label = int | str | None
# A label of this value stands for none, as in torchvision.
NO_LABEL = -1


class Classes(NamedTuple):
    """The classes of a data set, and its labels as indices of them.

    names: class names, indexed by label; empty without labels. train, test: labels, int64 [N], or None.
    """

    names: tuple[str, ...] = ()
    train: np.ndarray | None = None
    test: np.ndarray | None = None


def plain_label(label: Any) -> Label:
    """Return a label as int or str, None for -1. Raises TypeError if it is neither an integer nor a name."""
    if label is None:
        return None
    value = np.asarray(label.detach().cpu() if isinstance(label, torch.Tensor) else label)
    if value.size != 1 or value.dtype.kind not in "biuSU":
        raise TypeError(f"expected a class, an integer or a name, got {type(label).__name__}")
    single = value.item()
    if isinstance(single, bytes):
        return single.decode(errors="replace")
    if isinstance(single, str):
        return single
    return None if single == NO_LABEL else int(single)


def label_in(value: Any) -> tuple[Label, str]:
    """Return the label in a value of a table or JSON, and a remark on an invalid one.

    Tables turn integers with missing values into floating point, with NaN for those that are missing.
    """
    if isinstance(value, float):
        if math.isnan(value):
            return None, ""
        value = int(value) if value.is_integer() else value
    try:
        return plain_label(value), ""
    except TypeError:
        return None, "found what is neither an integer nor a name in place of a label"


def class_indices(
    train: Sequence[Label], test: Sequence[Label], names: Sequence[str] = (), *, notes: list[str]
) -> Classes:
    """Convert the labels of training and test images to class indices.

    names: class names, if the source has them; integers are then indices into these. Otherwise the classes are the
        sorted labels of the training images.
    notes: receives a remark if labels are dropped because some images lack one.

    With fewer than two classes there are no labels, and test images have none if any of them lacks one. Raises
    ValueError if a label is none of the classes, test images have a class that training images lack, or two classes
    have the same name.
    """
    if len(set(names)) < len(names):
        repeated = [name for name, count in Counter(names).items() if count > 1]
        raise ValueError(f"classes: expected a name for each, got several that are called {some(repeated)}")
    labels = [*train, *test]
    if None in train:
        without = labels.count(None)
        if without < len(labels):
            notes.append(f"{without} of {len(labels)} images have no label, so none has")
        return Classes()
    untold = test.count(None)
    if untold:
        notes.append(f"{untold} of {len(test)} test images have no label, so none of them has")
        labels, test = [*train], []
    if names:
        index: dict[Label, int] = {name: number for number, name in enumerate(names)}
        index |= {number: number for number in range(len(names))}
        unknown = sorted({str(label) for label in labels if label not in index})
        if unknown:
            raise ValueError(f"labels {some(unknown)} are none of the {len(names)} classes ({some(names)})")
    else:
        if len({type(label) for label in labels}) > 1:
            raise ValueError("some labels are numbers, others names")
        known: list[Any] = sorted(set(train))
        index = {label: number for number, label in enumerate(known)}
        unknown = sorted({str(label) for label in test if label not in index})
        if unknown:
            raise ValueError(f"the test images have classes that the training images lack: {some(unknown)}")
        names = [str(label) for label in known]
    if len(names) < 2:
        return Classes()
    return Classes(
        tuple(names),
        np.array([index[label] for label in train], np.int64),
        None if untold else np.array([index[label] for label in test], np.int64),
    )
