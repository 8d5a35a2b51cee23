"""Fixtures of all tests: the devices on which kernels are tested, real and emulated."""

import importlib.util
import os
import pkgutil
import shutil
import subprocess
import sys
from pathlib import Path

import filelock
import pytest
import torch
import torch._functorch.config

import cpc_ext.ops
from cpc_ext._native import native
from cpc_ext._version import __version__

REPOSITORY = Path(__file__).parents[1]

if "PYTEST_XDIST_WORKER" in os.environ:
    # Side by side, threads that wait awake keep the other workers from their work.
    torch.set_num_threads(1)

# PyTorch only warns of an op's results that share memory, except where the environment names a CI.
torch._functorch.config.error_on_custom_op_aliasing = True


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--sweep-step", type=int, default=1, help="of a test with many parameters run every n-th choice (default: all)"
    )


@pytest.hookimpl(trylast=True)  # After -k has chosen.
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Skip combinations of parameters according to ``--sweep-step``, the same ones in every run.

    If the step divides none of the numbers of values, every value still occurs. Sweeps of up to sixteen combinations,
    such as those of sizes at the edges of blocks, run completely. Each device has a sweep of its own.
    """
    step = config.getoption("--sweep-step")
    sweeps: dict[tuple, list[pytest.Item]] = {}
    for item in items:
        device = item.callspec.params.get("device") if hasattr(item, "callspec") else None
        sweeps.setdefault((item.path, getattr(item, "originalname", item.name), device), []).append(item)
    left_out = {item for sweep in sweeps.values() if len(sweep) > 16 for n, item in enumerate(sweep) if n % step}
    if left_out:
        config.hook.pytest_deselected(items=[item for item in items if item in left_out])
        items[:] = [item for item in items if item not in left_out]


def pytest_runtest_setup(item: pytest.Item) -> None:
    if item.get_closest_marker("cuda") and not torch.cuda.is_available():
        pytest.skip("no CUDA device")


def built(name: str, *options: str) -> Path:
    """Build the CUDA kernels for the host, with options of CMakeLists.txt, and return the folder."""
    search = os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", "")])
    cmake, ninja = (shutil.which(name, path=search) for name in ("cmake", "ninja"))
    if not (cmake and ninja and importlib.util.find_spec("pybind11") and shutil.which("c++")):
        pytest.skip("the emulation needs a C++ compiler, and cmake, ninja and pybind11 of cpc_ext[test]")
    folder = REPOSITORY / "build" / f"{name}-{sys.implementation.cache_tag}"
    folder.mkdir(parents=True, exist_ok=True)
    configure = [
        *(cmake, "-S", REPOSITORY, "-B", folder, "-G", "Ninja", f"-DCMAKE_MAKE_PROGRAM={ninja}"),
        # Quick to build, and fast enough for small problems.
        *(*options, "-DCMAKE_BUILD_TYPE=None", "-DCMAKE_CXX_FLAGS=-O1"),
        f"-DSKBUILD_PROJECT_VERSION={__version__}",
        f"-DPython_EXECUTABLE={sys.executable}",
        f"-Dpybind11_DIR={Path(importlib.util.find_spec('pybind11').origin).parent / 'share' / 'cmake' / 'pybind11'}",
    ]
    with filelock.FileLock(folder / "lock"):  # Of pytest-xdist's workers, one builds.
        for command in (configure, [cmake, "--build", folder]):
            done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=False)
            assert done.returncode == 0, done.stdout
    return folder


def module_in(folder: Path, name: str):
    """Load the compiled module in a folder. pybind11 keeps one module for each name, so no name may be used twice."""
    (path,) = folder.glob("_C.*.so")
    spec = importlib.util.spec_from_file_location(f"{name}._C", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def use_emulation(module, monkeypatch: pytest.MonkeyPatch) -> None:
    """Make the ops call a module's CUDA kernels with CPU tensors, after `module.emulate_cuda(True)`."""
    for info in pkgutil.iter_modules(cpc_ext.ops.__path__, "cpc_ext.ops."):
        op = importlib.import_module(info.name)
        if hasattr(op, "native"):
            monkeypatch.setattr(op, "native", module)


@pytest.fixture(scope="session")
def emulation() -> Path:
    return built("emulation", "-DCPC_EXT_EMULATION=ON")


@pytest.fixture(scope="session")
def emulated_native(request: pytest.FixtureRequest):
    """A compiled module whose CUDA kernels take CPU tensors."""
    if hasattr(native, "emulate_cuda"):  # CPC_EXT_NATIVE names one already.
        return native
    return module_in(request.getfixturevalue("emulation"), "emulation")


@pytest.fixture(scope="session")
def trace() -> Path:
    """A build in which observers see the kernels' memory accesses: csrc/core/cuda/emulation/trace.h."""
    return built("trace", "-DCPC_EXT_TRACE=ON")


@pytest.fixture(scope="session")
def traced_native(request: pytest.FixtureRequest):
    """A compiled module like `emulated_native`, with `begin_trace` and `end_trace`."""
    if hasattr(native, "begin_trace"):
        return native
    return module_in(request.getfixturevalue("trace"), "trace")


@pytest.fixture(
    params=["cpu", "emulated", pytest.param("cuda", marks=[pytest.mark.cuda])],
)
def device(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch):
    """Every device with kernels; a test that takes this runs once on each.

    On the emulated device tensors are on the CPU, and the ops call the CUDA kernels: see csrc/core/cuda/emulation.
    Convolutions of float32 are not rounded to TF32, which PyTorch allows by default.
    """
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)
    if request.param != "emulated":
        yield torch.device(request.param)
        return
    emulated = request.getfixturevalue("emulated_native")
    use_emulation(emulated, monkeypatch)
    emulated.emulate_cuda(True)
    yield torch.device("cpu")
    emulated.emulate_cuda(False)
