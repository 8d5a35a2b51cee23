"""Runs that learn nothing, told early: by a loss that is still the one of guessing, or by encodings that are all alike.

From what a run has logged and what it makes of some examples to a sentence, with what to try.
"""

from __future__ import annotations

from torch import Tensor

from cpc_ext.measures.effective_rank import effective_rank
from cpc_ext.training.config import RunConfig

__all__ = ["trouble"]

# A run guesses while its loss is within this share of that of guessing and its accuracy under so many times as high.
_LOSS, _ACCURACY = 0.02, 2.0
# Fewer directions than this are a collapse: an encoder with its initial weights has several.
_RANK = 1.5


def trouble(means: dict[str, float], guess: dict[str, float], features: Tensor, config: RunConfig) -> str | None:
    """What is wrong, and what to try; None where nothing is.

    means, guess: loss and accuracy, of the last steps and of guessing. features: of some examples, [N, D].
    """
    said = []
    loss, accuracy = means.get("loss"), means.get("accuracy")
    if (
        loss is not None
        and accuracy is not None
        and loss > (1 - _LOSS) * guess["loss"]
        and accuracy < _ACCURACY * guess["accuracy"]
    ):
        said.append(
            f"the loss is {loss:.3g}, the accuracy {accuracy:.2g}, and guessing has {guess['loss']:.3g} and "
            f"{guess['accuracy']:.2g}"
        )
    finite = features.isfinite().all(1)
    if not bool(finite.all()):
        said.append(f"the encodings of {int((~finite).sum())} of {len(features)} examples are not finite")
    elif len(features) > 1 and (rank := effective_rank(features)) < _RANK:
        said.append(f"the encodings of {len(features)} examples are nearly alike (effective rank {rank:.2f})")
    if not said:
        return None
    return f"the model learns nothing so far: {'; '.join(said)}. Try {', or '.join(config.remedies())}"
