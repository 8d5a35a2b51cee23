"""The program `python -m cpc_ext.evaluate`: its options and their first checks."""

from __future__ import annotations

from cpc_ext.evaluation.options import EvaluationOptions as Command
from cpc_ext.evaluation.options import parse_measures, parse_modes
from cpc_ext.measures.label_subsets import parse_label_budgets
from cpc_ext.programs.command_line import Program, refuse_idle
from cpc_ext.training.errors import TrainingError
from cpc_ext.training.run_dir import RunDir

__all__ = ["Command", "main"]

_DESCRIPTION = (
    "Evaluate the encoder of a run with few labels: top-1 and top-5 accuracy on all test images after learning from "
    "random subsets of the labelled training images. The results are printed as a table and saved, with figures, in "
    "evaluation/ in the run's folder; saved results of the same weights, images and settings are not computed again. "
    "Several runs are also compared in one figure. For runs on speech: accuracies of classifiers of phones and "
    "speakers on the frames of the model, of the same model untrained, and of log-mel spectra."
)


# Options for learning from few labels, and options that apply only to runs on speech.
_OF_LABELS = ("labels", "mode", "repeats", "seed", "neighbours", "finetune_epochs", "finetune_steps")
_OF_SPEECH = ("measures", "layer", "alignment", "minutes")


def _check(command: Command) -> None:
    """Raise TrainingError for values that are wrong, or would have no effect for these kinds of runs."""
    if not command.runs:
        raise TrainingError("give at least one RUN")
    if all(RunDir(path).medium == "audio" for path in command.runs):
        refuse_idle(command, _OF_LABELS, "runs on speech are measured by --measures")
        if command.per_module:
            refuse_idle(command, ("layer",), "--per-module looks at every layer")
        else:
            refuse_idle(command, ("out",), "runs on speech are drawn together with --per-module alone")
    else:
        # If a folder is not a run's, skip this check: opening it fails with a better message.
        if all(RunDir(path).config.is_file() for path in command.runs):
            refuse_idle(command, _OF_SPEECH, "it is of runs on speech")
        if command.per_module:
            refuse_idle(command, _OF_LABELS, "--per-module learns from all labels")
    if not command.minutes > 0:
        raise TrainingError(f"--minutes: above 0, got {command.minutes}")
    parse_measures(command.measures)
    if command.per_module:
        return
    parse_modes(command.mode)
    parse_label_budgets(command.labels)
    for name, least in (("repeats", 1), ("neighbours", 1), ("finetune_epochs", 0), ("finetune_steps", 1), ("seed", 0)):
        if getattr(command, name) < least:
            raise TrainingError(f"--{name.replace('_', '-')}: at least {least}, got {getattr(command, name)}")
    if command.seed >= 2**32:
        raise TrainingError(f"--seed: below 2**32, got {command.seed}")
    if command.out is not None and len(command.runs) == 1:
        raise TrainingError("--out is the figure that several runs are compared in; give more than one RUN")


main = Program(
    name="evaluate",
    description=_DESCRIPTION,
    command=Command,
    check=_check,
    work="cpc_ext.evaluation.evaluator:evaluate",
    interrupted="interrupted; results so far are kept",
).main
