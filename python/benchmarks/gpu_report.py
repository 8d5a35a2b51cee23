"""Builds, tests and measures cpc_ext on a machine with a GPU, in one command and within a given time.

Builds cpc_ext for this GPU into a temporary folder, and runs the tests that need a GPU, some of them under
compute-sanitizer, and all benchmarks. Writes report.md, the results and the log of every stage to one folder. The exit
status is 0 if no stage failed, 1 if one did, and 2 without a GPU.
"""

from __future__ import annotations

import argparse
import importlib.util
import os
import re
import shutil
import sys
import tempfile
import xml.etree.ElementTree as ElementTree
from collections.abc import Sequence
from datetime import date
from functools import partial
from pathlib import Path

import torch
from cuda_machines import MACHINES
from stage_runner import Examined, Outcome, Stage, run_stages

REPOSITORY = Path(__file__).resolve().parents[2]
BENCHMARKS = Path(__file__).resolve().parent
SANITIZER_TOOLS = ("memcheck", "racecheck", "synccheck", "initcheck")
OPS = sorted(path.stem for path in (REPOSITORY / "cpc_ext" / "ops").glob("[!_]*.py"))
# Graphs cannot be recorded without the caching allocator; large outputs and finite differences take minutes under a
# sanitizer.
SANITIZER_TESTS = f"({' or '.join(OPS)}) and not graph and not large and not gradcheck and not finite"
SANITIZER_STATUS = 99
# Modules of ours: if one of these is missing, the tests are at fault, not the machine.
OWN_MODULES = ("cpc_ext", "tests", "benchmark")
CHECK_BUILD = """
import sys
from pathlib import Path
import cpc_ext
info = cpc_ext.build_info()
print(info)
module, folder = Path(info["module"]).resolve(), Path(sys.argv[1]).resolve()
if folder not in module.parents:
    sys.exit(f"the imported module is {module}, not the one built in {folder}")
if info["cuda"] is None:
    sys.exit("the build has no CUDA kernels: is nvcc 12.4 or newer installed?")
"""


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--minutes", type=float, default=60, help="time limit in minutes (default 60)")
    parser.add_argument("--quick", action="store_true", help="small sizes, with memcheck as the only sanitizer")
    parser.add_argument("--out", type=Path, metavar="DIR", help="result folder (default results/DATE-DEVICE)")
    arguments = parser.parse_args()
    if not arguments.minutes > 0:
        parser.error(f"--minutes must be positive, got {arguments.minutes:g}")
    return arguments


def make_stages(out: Path, build: Path, architecture: str, *, quick: bool, device: str = "") -> list[Stage]:
    """Return all stages, the most valuable first. device: the GPU's name, to choose its predictions."""
    python = sys.executable
    junit = out / "tests.xml"
    install = (python, "-m", "pip", "install", "-q", "--no-build-isolation", "--no-deps", "--target", str(build))
    # A separate build folder, since CMake would keep the architecture for later builds in the usual one.
    options = (
        *("-C", f"cmake.define.CMAKE_CUDA_ARCHITECTURES={architecture}"),
        *("-C", f"build-dir=build/gpu_report-{architecture}"),
    )
    pytest = (python, "-m", "pytest", "-m", "cuda", "-p", "no:cacheprovider", "tests")

    def benchmark(program: str, result: str, *options: str) -> tuple[str, ...]:
        return (python, str(BENCHMARKS / program), "--device", "cuda", "--out", str(out / result), *options)

    needs = ("build",)
    stages = [
        Stage(
            "build",
            [(*install, *options, "."), (python, "-c", CHECK_BUILD, str(build))],
            least=30,
        ),
        Stage("check", [(python, "-m", "cpc_ext", "check")], least=20, most=300, needs=needs),
        Stage(
            "tests",
            [(*pytest, "-q", "--continue-on-collection-errors", f"--junit-xml={junit}")],
            least=20,
            most=900,
            needs=needs,
            examine=partial(examine_tests, junit),
        ),
        Stage(
            "kernels quick", [benchmark("kernels.py", "kernels-quick.json", "--quick")], least=30, most=600, needs=needs
        ),
        Stage("product", [(python, str(BENCHMARKS / "cuda_product.py"), "--measure")], least=60, most=300, needs=needs),
        *(sanitizer_stage(tool, pytest, needs) for tool in SANITIZER_TOOLS[: 1 if quick else None]),
    ]
    if quick:
        return [
            *stages,
            Stage("training", [benchmark("training.py", "training.json", "--quick")], needs=needs),
            prediction_stage(device, out / "kernels-quick.json", "kernels quick"),
        ]
    dtypes = ("--dtype", "float32", "bfloat16")
    return [
        *stages,
        Stage("kernels", [benchmark("kernels.py", "kernels.json", *dtypes)], least=90, needs=needs),
        Stage("training", [benchmark("training.py", "training.json")], least=20, needs=needs),
        prediction_stage(device, out / "kernels.json", "kernels"),
    ]


def prediction_stage(device: str, result: Path, measured_by: str) -> Stage:
    """Return the stage that compares the predicted times for this GPU with those just measured."""
    names = [name for name in MACHINES if name in device]
    return Stage(
        "predictions",
        [(sys.executable, str(BENCHMARKS / "cuda_model.py"), "--machine", *names, "--against", str(result))],
        needs=("build", measured_by),
        skip=None if names else "cuda_machines.py does not have this GPU",
        examine=examine_predictions,
    )


def examine_predictions(returned: int, log: Path) -> Examined:
    """Print the comparison, and return its last line as the note."""
    text = log.read_text(errors="replace").rstrip()
    print(text, flush=True)
    return Examined(returned == 0, text.rpartition("\n")[2])


def sanitizer_stage(tool: str, pytest: Sequence[str], needs: Sequence[str]) -> Stage:
    found = shutil.which("compute-sanitizer", path=f"{os.environ.get('PATH', '')}:/usr/local/cuda/bin")
    options = ("--tool", tool, "--target-processes", "all", "--error-exitcode", str(SANITIZER_STATUS))
    return Stage(
        tool,
        # Without PyTorch's cache every tensor is a separate allocation, whose bounds and writes the tool checks.
        [
            (
                "env",
                "PYTORCH_NO_CUDA_MEMORY_CACHING=1",
                found or "compute-sanitizer",
                *options,
                *pytest,
                *("-k", SANITIZER_TESTS, "-x", "-q", "--continue-on-collection-errors"),
            )
        ],
        least=30,
        most=300,
        needs=needs,
        skip=None if found else "no compute-sanitizer on this machine",
        examine=examine_sanitizer,
    )


def examine_tests(junit: Path, returned: int, log: Path) -> Examined:
    """Return counts from pytest's XML; test files that need a library this machine lacks are listed, not failed."""
    if not junit.exists():
        return Examined(False, f"pytest ended with status {returned} before it reported")
    counts = dict.fromkeys(("passed", "failed", "skipped"), 0)
    not_run = []
    for case in ElementTree.parse(junit).iter("testcase"):
        error = case.find("error")
        if error is not None and (module := _missing_module(error)):
            not_run.append(f"{case.get('name') or case.get('classname')} (no {module})")
        elif error is not None or case.find("failure") is not None:
            counts["failed"] += 1
        else:
            counts["skipped" if case.find("skipped") is not None else "passed"] += 1
    note = ", ".join(f"{count} {name}" for name, count in counts.items())
    if not_run:
        note += f"; not run: {', '.join(not_run)}"
    return Examined(counts["failed"] == 0 and counts["passed"] > 0, note)


def _missing_module(error: ElementTree.Element) -> str | None:
    found = re.search(r"ModuleNotFoundError: No module named '([\w.]+)'", f"{error.get('message')} {error.text}")
    if found is None or found[1].partition(".")[0] in OWN_MODULES:
        return None
    return found[1]


def examine_sanitizer(returned: int, log: Path) -> Examined:
    """Return failure if a report names one of our kernels or cannot be attributed; PyTorch's are only counted."""
    text = log.read_text(errors="replace")
    located = re.findall(r"^=+ .*\bat (.+?)\+0x[0-9a-f]+", text, re.MULTILINE)
    ours = sum("cpc::" in kernel for kernel in located)
    tests = re.search(r"^\d+ passed.*$", text, re.MULTILINE)
    note = f"{tests[0] if tests else 'no test passed'}; {ours} reports in our kernels, {len(located) - ours} elsewhere"
    if returned == 0:
        return Examined(tests is not None, note)
    if returned == SANITIZER_STATUS and located and ours == 0 and tests is not None and "failed" not in tests[0]:
        return Examined(True, note)
    return Examined(False, f"{note}; exit status {returned}")


def write_report(out: Path, title: str, planned: Sequence[Stage], outcomes: Sequence[Outcome]) -> None:
    lines = [f"# {title}", "", "| stage | outcome | time | |", "|---|---|---|---|"]
    for outcome in outcomes:
        log = "" if outcome.log is None else f"[log]({outcome.log.relative_to(out)})"
        note = " ".join(part for part in (outcome.note.replace("|", "/"), log) if part)
        lines.append(f"| {outcome.name} | {outcome.status} | {outcome.seconds:.0f} s | {note} |")
    lines += [f"| {stage.name} | not reached | | |" for stage in planned[len(outcomes) :]]
    results = sorted(path.name for path in out.iterdir() if path.suffix in (".json", ".png"))
    if results:
        lines += ["", "Results: " + ", ".join(f"[{name}]({name})" for name in results)]
    (out / "report.md").write_text("\n".join(lines) + "\n")
    if outcomes:
        last = outcomes[-1]
        print(f"{last.name:<14}{last.status:<10}{last.seconds:>6.0f} s  {last.note}", flush=True)


def main(arguments: argparse.Namespace) -> int:
    if not torch.cuda.is_available():
        print(f"gpu_report: no CUDA GPU for torch {torch.__version__} here, so nothing was run", file=sys.stderr)
        return 2
    # cpc_ext is not built yet, so machine.py, which imports it, cannot be used here.
    name = torch.cuda.get_device_name()
    slug = re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")
    out = (arguments.out or BENCHMARKS / "results" / f"{date.today()}-{slug}").resolve()
    out.mkdir(parents=True, exist_ok=True)
    architecture = "".join(map(str, torch.cuda.get_device_capability()))
    title = f"{name} (compute capability {architecture}), torch {torch.__version__}, {date.today()}"
    print(title)
    if importlib.util.find_spec("matplotlib") is None:
        print("matplotlib is not installed, so there will be no charts")
    with tempfile.TemporaryDirectory(prefix="cpc_ext-") as build:
        stages = make_stages(out, Path(build), architecture, quick=arguments.quick, device=name)
        search_path = [build, *filter(None, [os.environ.get("PYTHONPATH")])]
        outcomes = run_stages(
            stages,
            logs=out / "logs",
            seconds=arguments.minutes * 60,
            environment={**os.environ, "PYTHONPATH": os.pathsep.join(search_path)},
            folder=REPOSITORY,
            report=partial(write_report, out, title, stages),
        )
    print(f"written: {out / 'report.md'}")
    return 1 if any(outcome.bad for outcome in outcomes) else 0


if __name__ == "__main__":
    sys.exit(main(parse_arguments()))
