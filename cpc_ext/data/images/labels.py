"""Labels as people have them, numbers or names, as indices of classes."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import torch

from cpc_ext._messages import some

__all__ = ["NO_LABEL", "Classes", "Label", "class_indices", "label_in", "plain_label"]

# What an example is called: a number, a name, or nothing.
Label = int | str | None
# Labels of this value say that there is none, as torchvision has it.
NO_LABEL = -1


class Classes(NamedTuple):
    """names: of the classes, indexed by label; empty without labels. train, test: int64 [N], or None without."""

    names: tuple[str, ...] = ()
    train: np.ndarray | None = None
    test: np.ndarray | None = None


def plain_label(label: Any) -> Label:
    """A label as it is kept, None for -1. TypeError where it is neither an integer, of any type, nor a name."""
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
    """The label that a table or a text holds, and what is to be remarked of it.

    Tables turn integers with gaps into floating point, NaN where there is none.
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
    """The labels of training and test images as indices of classes.

    names: of the classes, where the source has them; integers are then indices of these. Otherwise the classes are the
        labels that there are, sorted.
    notes: where it goes that there are no labels, although some images have one.

    Images of fewer than two classes have no labels, and test images none where one lacks it. Raises ValueError where a
    label is none of the classes, test images have one that training images lack, or two classes have the same name.
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
