"""Running stages within a time limit, with small programs in place of builds, tests and benchmarks."""

import os
import sys
import time

from stage_runner import Examined, Stage, run_stages


def python(code):
    return [sys.executable, "-S", "-c", code]


def run(folder, *stages, seconds=60.0, report=lambda outcomes: None):
    return run_stages(
        stages, logs=folder / "logs", seconds=seconds, environment=os.environ, folder=folder, report=report
    )


def test_a_failed_stage_does_not_stop_the_rest(tmp_path):
    reported = []
    outcomes = run(
        tmp_path,
        Stage("one", [python("print('hello')"), python("import sys; sys.exit(3)"), python("print('never')")]),
        Stage("two", [python("")]),
        Stage("absent", [["no-such-program"]]),
        Stage("after one", [python("")], needs=["two", "one"]),
        Stage("elsewhere", [python("")], skip="no tool"),
        report=lambda outcomes: reported.append(len(outcomes)),
    )
    assert [outcome.status for outcome in outcomes] == ["failed", "passed", "failed", "skipped", "skipped"]
    assert [outcome.bad for outcome in outcomes] == [True, False, True, False, False]
    assert outcomes[0].note == "exit status 3"
    assert "hello" in outcomes[0].log.read_text()
    assert "\nnever" not in outcomes[0].log.read_text()
    assert outcomes[3].note == "needs one, which did not pass"
    assert outcomes[4].note == "no tool"
    assert reported == [1, 2, 3, 4, 5]


def test_a_stage_ends_at_its_limit_with_what_it_started(tmp_path):
    child = python(f"import time, pathlib; time.sleep(3); pathlib.Path({str(tmp_path / 'outlived')!r}).touch()")
    start = time.monotonic()
    outcomes = run(
        tmp_path,
        Stage("hangs", [python(f"import subprocess; subprocess.run({child!r})")], most=1),
        Stage("next", [python("")]),
    )
    assert [outcome.status for outcome in outcomes] == ["timed out", "passed"]
    assert outcomes[0].bad
    time.sleep(max(0, start + 4 - time.monotonic()))
    assert not (tmp_path / "outlived").exists()


def test_stages_that_no_longer_fit_are_skipped(tmp_path):
    outcomes = run(
        tmp_path,
        Stage("fits", [python("")], least=1),
        Stage("does not fit", [python("")], least=100),
        Stage("still fits", [python("")], least=1),
        seconds=30,
    )
    assert [outcome.status for outcome in outcomes] == ["passed", "skipped", "passed"]
    assert "needs at least 100 s" in outcomes[1].note


def test_an_examination_has_the_last_word(tmp_path):
    outcomes = run(
        tmp_path,
        Stage("warns", [python("import sys; sys.exit(9)")], examine=lambda status, log: Examined(status == 9, "fine")),
        Stage("lies", [python("")], examine=lambda status, log: Examined(False, "nothing ran")),
    )
    assert [(outcome.status, outcome.note) for outcome in outcomes] == [("passed", "fine"), ("failed", "nothing ran")]
