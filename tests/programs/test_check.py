"""`cpc-ext check`: a table and exit status 0 if the ops agree with their references, else the differences."""

from __future__ import annotations

import re
import subprocess
import sys

import pytest
import torch

from cpc_ext.op_checks.agreement import Problem, all_problems
from cpc_ext.programs import checking
from cpc_ext.programs.check import main


def test_the_program_finds_that_all_ops_agree():
    command = [sys.executable, "-m", "cpc_ext", "check", "--device", "cpu"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.startswith("cpu: kernels; the largest error")
    for problem in all_problems():
        row = re.search(rf"^{re.escape(f'{problem.op}: {problem.label}')}(.*)$", done.stdout, re.MULTILINE)
        assert len(row[1].split()) == len(set(problem.kinds) - {"tf32"})
        assert "FAILED" not in row[1]
    assert re.search(r"^cpc_ext module  ", done.stdout, re.MULTILINE)
    assert re.search(r"^all ops agree with their references \(\d+ s\)\n\Z", done.stdout, re.MULTILINE)


def test_a_fault_is_told_with_the_rest_and_the_exit_status_is_1(monkeypatch, capsys):
    values = {"value": torch.tensor([1.0, 2.0], dtype=torch.float64)}

    def raises(value):
        raise RuntimeError("no such kernel")

    def problem(label, call):
        return Problem(op="op", label=label, call=call, reference=lambda value: value * 2, differentiable=values)

    def wrong_in_halves(value):
        return value * (2.5 if value.dtype == torch.float16 else 2)

    calls = {"raises": raises, "is wrong": wrong_in_halves, "is right": lambda value: value * 2}
    monkeypatch.setattr(checking, "all_problems", lambda: [problem(*one) for one in calls.items()])
    assert main(["--device", "cpu"]) == 1
    output = capsys.readouterr()
    table = [line.split() for line in output.out.splitlines()[1:5]]
    assert table[1][-4:] == ["FAILED"] * 4
    assert table[2][-4:] == ["0.00"] * 3 + ["FAILED"]
    assert table[3][-4:] == ["0.00"] * 4
    assert re.search(r"op: raises, float64 on cpu: RuntimeError: no such kernel \(.*test_check.py:\d+\)", output.out)
    assert "op: is wrong, float16 on cpu: result 0 is off by 0.25 of the largest value, 0.002 is allowed; at [1]" in (
        output.out
    )
    assert "cpc_ext module" in output.out
    assert "error: 6 of the ops' results are wrong here" in output.err


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_a_device_that_is_not_there_is_an_error(capsys):
    assert main(["--device", "cuda"]) == 1
    assert capsys.readouterr().err == "error: --device cuda: PyTorch finds no CUDA device\n"
