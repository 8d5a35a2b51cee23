"""Early detection of runs that learn nothing, by a loss no better than guessing or by encodings that are all alike."""

from __future__ import annotations

from torch import Tensor

from cpc_ext.measures.effective_rank import effective_rank
from cpc_ext.training.config import RunConfig

__all__ = ["trouble"]

# A run is guessing while its loss is above (1 - _LOSS) times that of guessing, and its accuracy below _ACCURACY times.
_LOSS, _ACCURACY = 0.02, 2.0
# An effective rank below this is a collapse; encodings of an encoder with its initial weights have several directions.
_RANK = 1.5


def trouble(means: dict[str, float], guess: dict[str, float], features: Tensor, config: RunConfig) -> str | None:
    """Return a sentence that says what is wrong and what to try; None if nothing is wrong.

    means, guess: loss and accuracy of the last steps, and of guessing. features: encodings of some examples, [N, D].
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
