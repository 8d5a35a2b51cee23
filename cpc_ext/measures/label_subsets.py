"""Subsets of the labelled training images for evaluations, drawn from a seed: "10" per class, or "1%" of every class.

A draw shuffles the images of each class once and takes the first of them, so that a larger subset of the same draw
contains every smaller one.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from cpc_ext.training.errors import TrainingError

if TYPE_CHECKING:
    import numpy as np

__all__ = ["LabelBudget", "parse_label_budgets"]


@dataclass(frozen=True)
class LabelBudget:
    """The number of labels to learn from: a number per class, or a share of every class's labels.

    per_class: labels per class; or share: in 0..1, but every class gets at least one label.
    """

    per_class: int | None = None
    share: float | None = None

    def __str__(self) -> str:
        return str(self.per_class) if self.share is None else f"{100 * self.share:g}%"

    def subset(self, labels: np.ndarray, classes: Sequence[str], *, seed: int, draw: int) -> np.ndarray:
        """Draw a subset of the training images with these labels, int64 [N]; return ascending indices.

        classes: names of the classes. draw: number of this draw from the seed.

        Classes without labels are skipped. Raises TrainingError if another class has fewer labels than asked for.
        """
        import numpy as np

        members = {label: np.flatnonzero(labels == label) for label in np.unique(labels).tolist()}
        smallest = min(members, key=lambda label: len(members[label]))
        if (self.per_class or 1) > len(members[smallest]):
            raise TrainingError(
                f"--labels {self}: class {classes[smallest]} has {len(members[smallest])} labelled training images"
            )
        chosen = []
        for label, indices in members.items():
            count = self.per_class or max(1, round((self.share or 0) * len(indices)))
            # Each class has a generator of its own, so that its draw does not depend on the sizes of the others.
            chosen.append(np.random.default_rng((seed, draw, label)).permutation(indices)[:count])
        return np.sort(np.concatenate(chosen))


def parse_label_budgets(text: str) -> list[LabelBudget]:
    """Parse budgets such as "10,1%": ten labels per class, and a hundredth of them. TrainingError for anything else."""
    budgets = []
    for part in text.split(","):
        part = part.strip()
        try:
            if part.endswith("%"):
                share = float(part[:-1]) / 100
                budget, sound = LabelBudget(share=share), 0 < share <= 1
            else:
                count = int(part)
                budget, sound = LabelBudget(per_class=count), count >= 1
        except ValueError:
            sound = False
        if not sound:
            raise TrainingError(
                f"--labels: expected labels per class such as 10, or shares above 0% up to 100%, with commas between "
                f"them, got {part!r}"
            )
        budgets.append(budget)
    return list(dict.fromkeys(budgets))
