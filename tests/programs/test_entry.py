"""The entry points of the programs: lazy imports, and exit statuses."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import get_args

import numpy as np
import pytest

import cpc_ext
from cpc_ext._threads import SPIN_COUNT
from cpc_ext.programs.entry import PROGRAMS
from cpc_ext.training.registry import MODELS

ROOT = Path(cpc_ext.__file__).parents[1]
OF_RUNS = [name for name in PROGRAMS if name != "info"]

# Runs the program with every given list of arguments, and prints the outcome of each.
CALLS = """
import contextlib, io, json, sys
from cpc_ext.programs.entry import main
heavy = {"torch", "numpy", "matplotlib", "PIL", "timm", "safetensors", "tensorboard", "cpc_ext._native"}
results = []
for arguments in json.loads(sys.argv[1]):
    out = io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(out):
        try:
            status = main(arguments)
        except SystemExit as ended:
            status = ended.code
    results.append((status, out.getvalue(), sorted(heavy & set(sys.modules))))
print(json.dumps(results))
"""


def python(*arguments: str, cwd: Path | None = None, **environment: str) -> subprocess.CompletedProcess[str]:
    """Run Python with these arguments and environment variables; empty variables are unset."""
    variables = {**os.environ, "OMP_NUM_THREADS": "1", "COLUMNS": "120", "PYTHONPATH": str(ROOT), **environment}
    return subprocess.run(
        [sys.executable, *arguments],
        env={name: value for name, value in variables.items() if value},
        capture_output=True,
        text=True,
        encoding="utf-8",
        check=False,
        cwd=cwd,
    )


def test_warnings_are_told_without_code(tmp_path):
    """What is left out of a data set, for one, before the error that there is no run."""
    np.save(tmp_path / "x.npy", np.zeros((20, 40, 40, 3), np.uint8))
    options = ["--model", "supcon", "--dataset", "npy", "--data-dir", "x.npy", "--logger"]
    done = python("-m", "cpc_ext.train", *options, CPC_EXT_CACHE=str(tmp_path / "cache"), cwd=tmp_path)
    assert done.returncode == 1
    told = "no images to test on: 1 of 20, about a tenth of each class, are held out"
    assert f"warning: x.npy:\n  {told}\nerror: --model supcon" in done.stderr
    assert "UserWarning" not in done.stderr


def outcomes(calls: list[list[str]]) -> list[tuple[int, str, list[str]]]:
    """Return exit status, output, and the heavy packages that are imported after each call, all in one process."""
    done = python("-c", CALLS, json.dumps(calls))
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def test_help_imports_nothing_that_it_does_not_need():
    calls = [["--help"], *([name, "--help"] for name in PROGRAMS)]
    calls += [["train", "--model", model, "--help"] for model in MODELS]
    for call, (status, output, heavy) in zip(calls, outcomes(calls), strict=True):
        assert status == 0, call
        assert f"usage: cpc-ext {call[0] if len(call) > 1 else '['}" in output
        assert "--version" in output
        assert heavy == [], call


WRONG = [
    (["train", "--bogus"], 2, "Unrecognized options: --bogus"),
    (["train", "--lr", "-1"], 2, "--lr: input should be greater than 0, got -1.0"),
    (["train", "--encoder", "vgg"], 2, "--encoder: expected one of resnet-small"),
    (["train", "--crop", "50"], 2, "use a multiple of 7 such as 49"),
    (["train", "--layers", "3"], 2, "cpc-v1 has no such option\nFor full helptext, see cpc-ext train --help"),
    (["train", "--resume"], 1, "--resume needs --out-dir"),
    (["train", "--config", "/nowhere"], 1, "--config: cannot read /nowhere"),
    (["evaluate", "RUN", "--bogus"], 2, "Unrecognized options: --bogus"),
    (["evaluate", "RUN", "--mode", "guess"], 1, "--mode: expected all, or some of linear, knn"),
    (["evaluate", "RUN", "--labels", "0"], 1, "--labels: expected labels per class such as 10"),
    (["evaluate", "RUN", "--repeats", "0"], 1, "--repeats: at least 1, got 0"),
    (["evaluate", "RUN", "--out", "one.png"], 1, "give more than one RUN"),
    (["evaluate"], 1, "give at least one RUN"),
    (["evaluate", "--per-module"], 1, "give at least one RUN"),
    (["sample", "RUN", "--bogus"], 2, "Unrecognized options: --bogus"),
    (["sample", "RUN", "--n", "0"], 1, "--n: at least 1, got 0"),
    (["sample", "RUN", "--temperature", "nan"], 1, "--temperature: at least 0 and finite, got nan"),
    (["sample", "RUN", "--rows", "3"], 1, "--rows needs --complete"),
    (["embed", "RUN", "--bogus"], 2, "Unrecognized options: --bogus"),
    (["embed", "RUN"], 1, "--data-dir: name the folder of images"),
    (["embed", "RUN", "--data-dir", ".", "--out", "a.txt"], 1, "--out: expected a name that ends in .npy or"),
    (["embed", "RUN", "--data-dir", ".", "--image-size", "0"], 1, "--image-size: at least 1, got 0"),
    (
        ["embed", "RUN", "--dataset", "stl10", "--image-size", "9"],
        1,
        "the images of stl10 have a size of their own",
    ),
    (["convert", "FILE", "--out", "RUN", "--bogus"], 2, "Unrecognized options: --bogus"),
    (["convert", "FILE", "--out", "RUN"], 1, "give either --source"),
    (["info", "--bogus"], 2, "unrecognized arguments: --bogus"),
    (["information"], 2, "'train', 'evaluate', 'sample', 'embed', 'convert', 'check', 'info'"),
    ([], 2, "usage: cpc-ext [-h] [--version] {train,evaluate,sample,embed,convert,check,info}"),
]


@pytest.fixture(scope="module")
def refusals() -> list[tuple[int, str, list[str]]]:
    """The outcomes of all wrong calls, run one after another in one process."""
    return outcomes([arguments for arguments, _, _ in WRONG])


@pytest.mark.parametrize("number", range(len(WRONG)), ids=[" ".join(arguments) for arguments, _, _ in WRONG])
def test_wrong_options_are_refused_without_pytorch(refusals, number):
    _, status, message = WRONG[number]
    got, output, heavy = refusals[number]
    assert (got, heavy) == (status, [])
    assert message in " ".join(output.split()) or message in output
    assert "Traceback" not in output


def test_every_program_tells_its_version():
    calls = [["--version"], *([name, "--version"] for name in PROGRAMS), ["sample", "RUN", "--n", "3", "--version"]]
    for call, outcome in zip(calls, outcomes(calls), strict=True):
        assert outcome == [0, f"cpc_ext {cpc_ext.__version__}\n", []], call
    assert python("-m", "cpc_ext.train", "--version").stdout == f"cpc_ext {cpc_ext.__version__}\n"
    assert python("-m", "cpc_ext", "--version").stdout == f"cpc_ext {cpc_ext.__version__}\n"


def test_a_subcommand_of_the_module_is_a_program():
    done = python("-m", "cpc_ext", "train", "--bogus")
    assert done.returncode == 2
    assert "run python -m cpc_ext train --help" in done.stderr
    done = python("-m", "cpc_ext.train", "--bogus")
    assert done.returncode == 2
    assert "run python -m cpc_ext.train --help" in done.stderr


def test_info_is_what_the_module_prints_alone():
    info = python("-c", "from cpc_ext.programs.entry import main; main(['info'])")
    assert info.returncode == 0, info.stderr
    assert "cpc_ext simd" in info.stdout
    assert info.stdout == python("-m", "cpc_ext").stdout


def test_sources_of_checkpoints_are_those_there_are():
    from cpc_ext.interop import SOURCES
    from cpc_ext.programs.convert import Source

    assert get_args(Source) == SOURCES


def test_the_package_imports_its_parts_when_asked():
    code = """
import sys
import cpc_ext
before = [name for name in sys.modules if name.startswith("cpc_ext.")]
assert "torch" not in sys.modules and "numpy" not in sys.modules
parts = ["data", "interop", "models", "nn", "ops", "training"]
assert set(parts) <= set(dir(cpc_ext)) and set(parts) <= set(cpc_ext.__all__)
for name in parts:
    assert getattr(cpc_ext, name) is sys.modules["cpc_ext." + name], name
for name in cpc_ext.training.__all__:
    assert name in dir(cpc_ext.training) and callable(getattr(cpc_ext.training, name)), name
assert cpc_ext.training.main is cpc_ext.programs.training.main
assert cpc_ext.build_info()["version"] == cpc_ext.__version__
for module in (cpc_ext, cpc_ext.training):
    try:
        module.nothing
    except AttributeError as error:
        assert f"module '{module.__name__}' has no attribute 'nothing'" in str(error)
    else:
        raise AssertionError(module)
print(before)
"""
    done = python("-c", code)
    assert done.returncode == 0, done.stderr
    assert sorted(eval(done.stdout)) == ["cpc_ext._version", "cpc_ext.build_info"]


# The program gives way to one that tells what it finds.
FINDINGS = """
import os, runpy, sys
import cpc_ext
set_before = "GOMP_SPINCOUNT" in os.environ
def main(arguments, **options):
    with open("/proc/self/maps") as file:
        loaded = "libgomp" in file.read() or "torch" in sys.modules
    print(set_before, os.environ.get("GOMP_SPINCOUNT"), loaded)
    return 0
way, name, *sys.argv[1:] = sys.argv[1:]
module = type(sys)("cpc_ext.programs." + name)
module.main = main
sys.modules[module.__name__] = module
if way == "script":
    from cpc_ext.programs.entry import main as script
    script()
else:
    runpy.run_module(way, run_name="__main__", alter_sys=True)
"""


def findings(way: str, name: str, *arguments: str, **environment: str) -> str:
    done = python("-c", FINDINGS, way, name, *arguments, **{"GOMP_SPINCOUNT": "", "OMP_WAIT_POLICY": "", **environment})
    return done.stdout.strip() or done.stderr


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
@pytest.mark.parametrize(
    ("way", "name", "arguments"),
    [
        *((f"cpc_ext.{name}", name, []) for name in OF_RUNS),
        ("script", "train", ["train"]),
        ("script", "info", ["info"]),
        ("cpc_ext", "info", []),
        ("cpc_ext", "sample", ["sample"]),
    ],
)
def test_programs_set_how_threads_wait_before_libgomp_reads_it(way, name, arguments):
    assert findings(way, name, *arguments) == f"False {SPIN_COUNT} False"


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
@pytest.mark.parametrize(
    ("environment", "found"),
    [({"GOMP_SPINCOUNT": "77"}, "True 77 False"), ({"OMP_WAIT_POLICY": "passive"}, "False None False")],
)
def test_programs_leave_a_policy_of_the_users(environment, found):
    assert findings("cpc_ext.train", "train", **environment) == found


@pytest.mark.parametrize("during", ["tyro", "torch"])
def test_ctrl_c_while_importing(during):
    code = f"""
import os, signal, sys
class Finder:
    def find_spec(name, path=None, target=None):
        if name == "{during}":
            os.kill(os.getpid(), signal.SIGINT)
sys.meta_path.insert(0, Finder)
signal.signal(signal.SIGINT, signal.default_int_handler)  # Shells have background jobs ignore it.
from cpc_ext.programs.entry import main
sys.exit(main(["sample", "RUN", "--device", "cpu"]))
"""
    done = python("-c", code)
    assert (done.returncode, done.stdout, done.stderr) == (128 + signal.SIGINT, "", "interrupted\n")


def into(output: int, arguments: list[str], unbuffered: str) -> tuple[int, bytes]:
    """Run a program that prints to this file descriptor, and return its exit status and stderr."""
    environment = {**os.environ, "PYTHONUNBUFFERED": unbuffered}
    done = subprocess.run(
        [sys.executable, "-m", "cpc_ext", *arguments],
        cwd=ROOT,
        env=environment,
        stdout=output,
        stderr=subprocess.PIPE,
        check=False,
    )
    return done.returncode, done.stderr


@pytest.mark.parametrize("unbuffered", ["", "1"])
@pytest.mark.parametrize("arguments", [["info"], ["evaluate", "--help"]])
def test_a_reader_that_leaves_is_no_error(arguments, unbuffered):
    reading, writing = os.pipe()
    os.close(reading)
    try:
        assert into(writing, arguments, unbuffered) == (128 + signal.SIGPIPE, b"")
    finally:
        os.close(writing)


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")
@pytest.mark.parametrize("unbuffered", ["", "1"])
def test_a_full_disk_behind_the_output_is_said(unbuffered):
    with open("/dev/full", "wb") as full:
        told = into(full.fileno(), ["evaluate", "--help"], unbuffered)
    assert told == (1, b"error: cannot write the output: No space left on device\n")


def test_names_that_are_no_text_are_printed_as_they_are():
    code = "import os; from cpc_ext.programs.entry import _settled; _settled(lambda: print(os.fsdecode(b'a\\xff')))"
    environment = {"PYTHONIOENCODING": "utf-8:strict", "PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, "-c", code], env=os.environ | environment, capture_output=True, check=True)
    assert done.stdout == b"a\xff\n"


@pytest.mark.parametrize("encoding", ["ascii", "latin-1", "utf-8"])
def test_any_encoding_of_the_output(encoding):
    code = "import sys; from cpc_ext.programs.entry import main; sys.exit(main(sys.argv[1:]))"
    environment = {"PYTHONIOENCODING": encoding, "LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}
    done = subprocess.run(
        [sys.executable, "-c", code, "train", "--help"],
        env=os.environ | environment | {"PYTHONPATH": str(ROOT)},
        capture_output=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    text = done.stdout.decode(encoding)
    assert {"ascii": "H?naff", "latin-1": "Hénaff", "utf-8": "Hénaff"}[encoding] in text
    assert ("│" in text) == (encoding == "utf-8")
    assert not any(line.startswith("??") for line in text.splitlines())
    done = subprocess.run(
        [sys.executable, "-c", code, "train", "--encoder", "Hénaff"],
        env=os.environ | environment | {"PYTHONPATH": str(ROOT)},
        capture_output=True,
        check=False,
    )
    assert done.returncode == 2
    assert b"Traceback" not in done.stderr
