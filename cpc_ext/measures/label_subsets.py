"""Which of the labels an evaluation may look at: so many of every class, drawn from a seed.

From "10" or "1%" to indices of training images. A draw orders the images of each class once and takes the first of
them, so that a larger subset of the same draw holds all of a smaller one.
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
    """How many labels there are to learn from: a number of every class, or a share of every class's.

    per_class: labels a class; or share: in 0..1, of which every class gets at least one label.
    """

    per_class: int | None = None
    share: float | None = None

    def __str__(self) -> str:
        return str(self.per_class) if self.share is None else f"{100 * self.share:g}%"

    def subset(self, labels: np.ndarray, classes: Sequence[str], *, seed: int, draw: int) -> np.ndarray:
        """Indices, ascending, of one draw from training images with these labels, int64 [N].

        classes: their names. draw: the number of this draw from the seed.

        Classes without any are passed over. Raises TrainingError where another has fewer labels than asked for.
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
            # A generator of its own: how many images another class has does not change which ones are drawn.
            chosen.append(np.random.default_rng((seed, draw, label)).permutation(indices)[:count])
        return np.sort(np.concatenate(chosen))


def parse_label_budgets(text: str) -> list[LabelBudget]:
    """ "10,1%" → ten labels a class, and a hundredth of them. TrainingError where it is neither."""
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
