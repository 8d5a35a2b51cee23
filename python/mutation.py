"""Mutation testing of a room, a part of the package with its tests: do the tests find small changes of the code?

Prints the survivors of a random sample of the room's mutants as diffs, and the share of mutants that the tests killed.
mutmut makes the mutants and records which tests run which function. For each mutant it forks a process in which all
modules are already imported, and runs those tests, the quickest first. CONTRIBUTING.md explains how to run the program
and how to interpret survivors.
"""

from __future__ import annotations

import argparse
import importlib
import json
import os
import random
from itertools import accumulate
from pathlib import Path
from typing import Any, NamedTuple

ROOT = Path(__file__).parents[1]
_TRAINING = "cpc_ext/training"


def _named(folder: str, *names: str) -> tuple[str, ...]:
    return tuple(f"{folder}/{name}.py" for name in names)


# Tests that are not run on mutants: those of the emulation check kernels. Others start processes, whose code mutmut
# does not see; or need a single graph from torch.compile, which cannot trace mutmut's choice among mutants; or need
# several threads, which a forked process does not inherit although libgomp waits for them.
_DESELECTED = (
    "not emulated and not processes and not dead_process and not pipeline and not entry_point"
    " and not compiles_ and not compiled_functions and not threads"
)
# Lines with the text of messages are not mutated, because tests may quote only a part of a message.
_MESSAGES = (r"^\s*raise ", r"^\s*warn\(", r"^\s*print\(")


class Room(NamedTuple):
    """A part of the package with its tests.

    files: patterns of the files to mutate. tests: test files to run; direct tests only, as whole runs take seconds per
    mutant.
    """

    files: tuple[str, ...]
    tests: tuple[str, ...]


_TASKS = ("cpc_ext/tasks/*.py", "cpc_ext/tasks/*/*.py")
ROOMS = {
    # A training step and its schedule.
    "steps": Room(
        _named(
            _TRAINING,
            *("learner", "schedule", "weight_average", "precision", "meter", "random_streams"),
        ),
        _named("tests/training", "test_learner", "test_steps", "test_parts"),
    ),
    # Options, tasks and the training loop.
    "training": Room(
        (
            *_named(_TRAINING, "config", "presets", "registry", "task", "loop", "parts", "learner", "schedule"),
            *_named(_TRAINING, "weight_average", "precision", "meter", "random_streams"),
            *_named("cpc_ext/programs", "train_options"),
            *_TASKS,
        ),
        (
            *_named("tests/tasks", "test_every_option", "test_tasks", "test_idle_options", "test_encoder_names"),
            *_named("tests/training", "test_learner", "test_loop", "test_parts", "test_steps"),
            *_named("tests/programs", "test_options"),
        ),
    ),
    "evaluation": Room(
        ("cpc_ext/evaluation/*.py", "cpc_ext/measures/*.py"),
        (
            *_named("tests/evaluation", "test_evaluator", "test_evaluation", "test_finetuning", "test_per_module"),
            *_named("tests/evaluation", "test_encoder_run"),
            *_named("tests/measures", "test_probe", "test_judges", "test_pixel_histogram"),
            *_named("tests/measures", "test_abx", "test_frames", "test_frame_probe", "test_log_mel"),
            *_named("tests/programs", "test_every_program_option"),
        ),
    ),
    "judges": Room(
        _named("cpc_ext/measures", "probe", "knn", "label_subsets"),
        _named("tests/measures", "test_probe", "test_judges"),
    ),
    "speech": Room(
        (
            *_named("cpc_ext/measures", "abx", "frames", "frame_probe", "log_mel"),
            *_named("cpc_ext/figures", "speech"),
        ),
        (
            *_named("tests/measures", "test_abx", "test_frames", "test_frame_probe", "test_log_mel"),
            *_named("tests/figures", "test_speech"),
        ),
    ),
    "nn": Room(("cpc_ext/nn/*.py",), ("tests/nn", *_named("tests/golden", "test_losses"))),
    "sound": Room(
        (
            *_named("cpc_ext/nn", "sequence_info_nce", "sequence_negatives", "step_predictors"),
            *_named("cpc_ext/nn", "causal_attention", "channel_norm"),
            *_named("cpc_ext/models/contexts", "recurrent_context", "causal_transformer_context"),
            *_named("cpc_ext/models/encoders", "waveform_encoder"),
            *_named("cpc_ext/interop/sources", "cpc_audio", "greedy_infomax_audio"),
        ),
        (
            *_named("tests/nn", "test_sequence_info_nce", "test_printed"),
            *_named("tests/models/contexts", "test_recurrent_context", "test_causal_transformer_context"),
            *_named("tests/models/encoders", "test_waveform_encoder"),
            *_named("tests/models", "test_greedy_sequences"),
            *_named("tests/interop", "test_sound"),
        ),
    ),
    "ops": Room(("cpc_ext/ops/*.py",), ("tests/ops",)),
    "models": Room(("cpc_ext/models/*.py", "cpc_ext/models/*/*.py"), ("tests/models",)),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("room", choices=ROOMS)
    parser.add_argument("--sample", type=int, default=300, help="number of mutants to try (default 300)")
    parser.add_argument("--seed", type=int, default=0, help="seed of the sample (default 0)")
    parser.add_argument("--processes", type=int, default=1, help="number of mutants tried at a time (default 1)")
    parser.add_argument(
        "--seconds", type=float, default=30, help="total duration of a mutant's tests, quickest first (default 30)"
    )
    parser.add_argument("--survivors", action="store_true", help="try only the mutants that survived the last run")
    options = parser.parse_args()
    os.environ["OMP_NUM_THREADS"] = "1"  # No thread survives a fork.
    _enter(options.room)
    # PyTorch imports this lazily, which takes ten seconds; otherwise every fork that needs it would do so.
    importlib.import_module("torch._dynamo")
    # mutmut reads its configuration from the current folder when it is imported.
    from mutmut import __main__ as mutmut
    from mutmut.state import state
    from mutmut.workers.isolation import ForkRunner

    submit = ForkRunner.submit

    def submit_quick(runner: ForkRunner, name: str, tests: list[str], limit: int, estimated: float) -> None:
        durations = state().duration_by_test
        tests = sorted(tests, key=durations.__getitem__)
        ends = accumulate(map(durations.__getitem__, tests))
        quick = [test for test, end in zip(tests, ends, strict=True) if end <= options.seconds]
        submit(runner, name, quick or tests[:1], limit, estimated)

    ForkRunner.submit = submit_quick
    # The run that collected the tests has already shown that they pass.
    ForkRunner.run_clean_tests = lambda runner, tests: 0
    mutmut.run_forced_fail_test = lambda runner: None

    Path("mutants").mkdir(exist_ok=True)
    # mutmut updates the statistics of an earlier run for new tests, but not for new functions.
    Path("mutants/mutmut-stats.json").unlink(missing_ok=True)
    mutmut.copy_src_dir()
    mutmut.copy_also_copy_files()
    mutmut.setup_source_paths()
    mutmut.create_mutants(options.processes)
    statuses = _statuses(mutmut)
    sample = sorted(random.Random(options.seed).sample(sorted(statuses), min(options.sample, len(statuses))))
    alive = [name for name in sample if statuses[name] in _ALIVE]
    mutmut._run(alive if options.survivors else sample, options.processes)
    _report(mutmut, sample)


# Outcomes of mutants that no test noticed.
_ALIVE = ("survived", "no tests", "not checked")


def _enter(room: str) -> None:
    """Change to the room's folder, build/mutation/ROOM, with mutmut's configuration and links to the repository."""
    folder = ROOT / "build" / "mutation" / room
    folder.mkdir(parents=True, exist_ok=True)
    os.chdir(folder)
    for name in ("cpc_ext", "docs", "tests", "python"):
        if not Path(name).is_symlink():
            Path(name).symlink_to(ROOT / name)
    settings = {
        "source_paths": ["cpc_ext"],
        "also_copy": ["docs", "python"],
        "only_mutate": list(ROOMS[room].files),
        "do_not_mutate_patterns": list(_MESSAGES),
        "pytest_add_cli_args": ["-p", "no:cacheprovider", "--import-mode=importlib", "-k", _DESELECTED],
        "pytest_add_cli_args_test_selection": list(ROOMS[room].tests),
        "use_git_change_detection": False,
        "track_dependencies": False,
        # The mutant before may still keep the machine busy.
        "timeout_constant": 5.0,
    }
    # TOML writes lists and strings as JSON does.
    lines = [f"{name} = {json.dumps(value)}" for name, value in settings.items()]
    Path("pyproject.toml").write_text("\n".join(["[tool.mutmut]", *lines, ""]))


def _statuses(mutmut: Any) -> dict[str, str]:
    """Return the status of every mutant, by name."""
    found = {}
    for path in mutmut.walk_mutatable_files():
        data = mutmut.SourceFileMutationData(path=path)
        data.load()
        found |= {name: mutmut.status_by_exit_code[code] for name, code in data.exit_code_by_key.items()}
    return found


def _report(mutmut: Any, sample: list[str]) -> None:
    statuses = _statuses(mutmut)
    alive = [name for name in sample if statuses[name] in _ALIVE]
    for name in alive:
        print(f"# {name}: {statuses[name]}\n{mutmut.get_diff_for_mutant(name)}")
    killed = len(sample) - len(alive)
    print(f"{killed} of {len(sample)} mutants were killed ({killed / len(sample):.1%}), of {len(statuses)} in the room")


if __name__ == "__main__":
    main()
