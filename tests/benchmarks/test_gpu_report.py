"""The GPU report, as far as it can be tested without a GPU."""

import os
import subprocess
import sys

import gpu_report
import pytest
from stage_runner import Outcome


def test_without_a_gpu_one_line_and_status_2(tmp_path):
    done = subprocess.run(
        [sys.executable, gpu_report.__file__, "--out", str(tmp_path / "out")],
        env={**os.environ, "CUDA_VISIBLE_DEVICES": ""},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 2
    assert done.stderr.count("\n") == 1
    assert "no CUDA GPU" in done.stderr
    assert not (tmp_path / "out").exists()


def test_stages_are_ordered_by_worth_and_need_the_build(tmp_path):
    stages = gpu_report.make_stages(tmp_path, tmp_path / "build", "90", quick=False)
    names = [stage.name for stage in stages]
    assert names[:4] == ["build", "check", "tests", "kernels quick"]
    tools = ["memcheck", "racecheck", "synccheck", "initcheck"]
    assert names[4:] == ["product", *tools, "kernels", "training", "predictions"]
    assert all(stage.needs == ("build",) for stage in stages[1:-1])
    assert "cmake.define.CMAKE_CUDA_ARCHITECTURES=90" in stages[0].commands[0]


@pytest.mark.parametrize(
    ("device", "machine"), [("NVIDIA H100 80GB HBM3", "H100"), ("NVIDIA GeForce RTX 4090", "RTX 4090"), ("T4", None)]
)
@pytest.mark.parametrize("quick", [False, True])
def test_measurements_are_set_beside_predictions_of_this_gpu(tmp_path, device, machine, quick):
    *_, stage = gpu_report.make_stages(tmp_path, tmp_path / "build", "90", quick=quick, device=device)
    assert (stage.skip is None) == (machine is not None)
    assert stage.needs == ("build", "kernels quick" if quick else "kernels")
    assert stage.commands[0][-1] == str(tmp_path / ("kernels-quick.json" if quick else "kernels.json"))
    if machine is not None:
        assert stage.commands[0][2:4] == ("--machine", machine)


def test_the_comparison_is_printed_and_summed_up(tmp_path, capsys):
    (tmp_path / "log").write_text("op ours 1.0 2.0 0.50\npredicted / measured: ours 0.50\n")
    assert gpu_report.examine_predictions(0, tmp_path / "log") == gpu_report.Examined(
        True, "predicted / measured: ours 0.50"
    )
    assert "op ours 1.0 2.0 0.50" in capsys.readouterr().out
    assert not gpu_report.examine_predictions(1, tmp_path / "log").passed


def junit(folder, cases):
    path = folder / "tests.xml"
    path.write_text(f"<testsuites><testsuite>{cases}</testsuite></testsuites>")
    return path


def test_tests_pass_without_what_the_machine_lacks(tmp_path):
    missing = "<error message='collection failure'>E   ModuleNotFoundError: No module named 'tqdm'</error>"
    cases = f"<testcase name='a'/><testcase name='b'><skipped/></testcase><testcase name='c'>{missing}</testcase>"
    examined = gpu_report.examine_tests(junit(tmp_path, cases), 1, tmp_path / "log")
    assert examined.passed
    assert examined.note == "1 passed, 0 failed, 1 skipped; not run: c (no tqdm)"


@pytest.mark.parametrize(
    "cases",
    [
        "<testcase name='a'/><testcase name='b'><failure/></testcase>",
        "<testcase name='a'/><testcase name='b'><error message='x'>No module named 'tqdm'</error></testcase>",
        "<testcase name='a'/><testcase><error>ModuleNotFoundError: No module named 'cpc_ext.ops'</error></testcase>",
        "<testcase name='a'><skipped/></testcase>",
        "",
    ],
)
def test_tests_fail_for_failures_our_own_modules_and_nothing_run(tmp_path, cases):
    assert not gpu_report.examine_tests(junit(tmp_path, cases), 1, tmp_path / "log").passed


OUR_REPORT = """========= Invalid __global__ read of size 4 bytes
=========     at void cpc::patches::forward<float>(cpc::patches::Arguments)+0x70 in cuda.cu:12
=========     by thread (0,0,0) in block (0,0,0)
"""
TORCH_REPORT = """========= Uninitialized __global__ memory read of size 4 bytes
=========     at void at::native::vectorized_elementwise_kernel<4>(int)+0x1c0
"""


@pytest.mark.parametrize(
    ("log", "status", "passed"),
    [
        ("12 passed, 1 deselected in 3s\n", 0, True),
        (OUR_REPORT + "12 passed in 3s\n", 99, False),
        (TORCH_REPORT + "12 passed in 3s\n", 99, True),
        (TORCH_REPORT + OUR_REPORT + "12 passed in 3s\n", 99, False),
        ("========= Program hit an error\n12 passed in 3s\n", 99, False),
        (TORCH_REPORT + "1 failed, 12 passed in 3s\n", 1, False),
        ("13 deselected in 3s\n", 0, False),
    ],
)
def test_sanitizer_reports_count_where_they_name_our_kernels(tmp_path, log, status, passed):
    (tmp_path / "memcheck.log").write_text(log)
    assert gpu_report.examine_sanitizer(status, tmp_path / "memcheck.log").passed == passed


def test_the_report_lists_every_stage(tmp_path):
    stages = gpu_report.make_stages(tmp_path, tmp_path / "build", "90", quick=True)
    log = tmp_path / "logs" / "build.log"
    outcomes = [Outcome("build", "passed", 61.0, log=log), Outcome("tests", "skipped", note="3 s left")]
    (tmp_path / "training.json").write_text("{}")
    gpu_report.write_report(tmp_path, "a GPU", stages, outcomes)
    text = (tmp_path / "report.md").read_text()
    assert "| build | passed | 61 s | [log](logs/build.log) |" in text
    assert "| tests | skipped | 0 s | 3 s left |" in text
    assert "| training | not reached | | |" in text
    assert "[training.json](training.json)" in text
