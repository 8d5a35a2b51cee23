"""The build: its choice of nvcc, the messages about an unusable one, and the folders of compiled files."""

from __future__ import annotations

import importlib.util
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).parents[1]
SEARCH = os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", "")])
CMAKE = shutil.which("cmake", path=SEARCH)
WITHOUT = "-C cmake.define.CPC_EXT_CUDA=OFF"

pytestmark = pytest.mark.skipif(CMAKE is None, reason="needs cmake of cpc_ext[test]")

# A program that stands for an nvcc of some release: it "compiles" anything.
NVCC = '#!/bin/sh\necho "$0 $@" >> {log}\ncase "$1" in\n--version) {version} ;;\n*) {compile} ;;\nesac\n'


def nvcc(folder: Path, release: str = "12.9", *, version: str | None = None, compile: str = "true") -> Path:
    """Make a stub of nvcc in ``folder``/bin, with the given version and behaviour, which logs its calls."""
    path = folder / "bin" / "nvcc"
    path.parent.mkdir(parents=True)
    answer = version or f'echo "Cuda compilation tools, release {release}, V{release}.1"'
    path.write_text(NVCC.format(log=folder / "calls", version=answer, compile=compile))
    path.chmod(0o755)
    return path


@pytest.fixture
def find(tmp_path):
    """A function that runs find_nvcc of csrc/nvcc.cmake for each setting of variables, and returns its output."""

    def run(*settings: dict[str, str], path: Path | None = None, seconds: int = 60) -> list[str]:
        lines = [f"include({REPOSITORY}/csrc/nvcc.cmake)", f"set(CPC_EXT_NVCC_SECONDS {seconds})"]
        for setting in settings:
            for name in ("CUDACXX", "CUDA_HOME", "CUDA_PATH"):
                lines.append(f'set(ENV{{{name}}} "{setting.get(name, "")}")')
            if "CMAKE_CUDA_COMPILER" in setting:
                lines.append(f'set(CMAKE_CUDA_COMPILER "{setting["CMAKE_CUDA_COMPILER"]}")')
            lines.append("find_nvcc(nvcc version reason)")
            lines.append(
                'message("found=${nvcc} version=${version} reason=${reason} compiler=${CMAKE_CUDA_COMPILER}|")'
            )
            if "CMAKE_CUDA_COMPILER" in setting:
                lines.append("unset(CMAKE_CUDA_COMPILER)")
        script = tmp_path / "find.cmake"
        script.write_text("\n".join(lines))
        clean = {name: value for name, value in os.environ.items() if name != "CUDAHOSTCXX"}
        clean["PATH"] = f"{path}:/usr/bin:/bin" if path else "/usr/bin:/bin"
        done = subprocess.run(
            [CMAKE, "-P", script], cwd=tmp_path, env=clean, capture_output=True, text=True, timeout=200
        )
        return " ".join((done.stdout + done.stderr).split()).split("|")

    return run


def test_the_nvcc_that_is_named_wins(find, tmp_path):
    """CMAKE_CUDA_COMPILER, then CUDACXX, CUDA_HOME, CUDA_PATH, then PATH, each before all after it."""
    names = ["CMAKE_CUDA_COMPILER", "CUDACXX", "CUDA_HOME", "CUDA_PATH", "PATH"]
    paths = {name: nvcc(tmp_path / name) for name in names}
    values = {
        name: str(path.parents[1] if name in ("CUDA_HOME", "CUDA_PATH") else path) for name, path in paths.items()
    }
    # Each time the first is left out. A build folder that was configured with one takes another when it is named.
    settings = [{name: values[name] for name in names[first:-1]} for first in range(len(names))]
    for name, said in zip([*names, "CUDA_PATH"], find(*settings, settings[3], path=paths["PATH"].parent), strict=False):
        assert f"found={paths[name]} version=12.9" in said
        assert f"compiler={paths[name]}" in said


def test_a_name_in_path_and_flags(find, tmp_path):
    path = nvcc(tmp_path / "tools")
    renamed = path.rename(path.with_name("nvcc-12.9"))
    (said, _) = find({"CUDACXX": "nvcc-12.9 -allow-unsupported-compiler"}, path=renamed.parent)
    assert f"found={renamed}" in said
    assert f"compiler={renamed};-allow-unsupported-compiler" in said
    assert "-allow-unsupported-compiler -std=c++20 -c" in (tmp_path / "tools" / "calls").read_text()


def test_a_named_one_is_never_passed_over(find, tmp_path):
    """One that is not there, or too old, is the reason that there is none, whatever else lies about."""
    settings, expected = [], []
    for folder, says in (
        (tmp_path / "nowhere", "is not there, or not a program"),
        (nvcc(tmp_path / "old", "12.3").parents[1], "is release 12.3, older than 12.4"),
    ):
        path = folder / "bin" / "nvcc"
        for who in ("CMAKE_CUDA_COMPILER", "CUDACXX", "CUDA_HOME", "CUDA_PATH"):
            settings.append({who: str(folder if who in ("CUDA_HOME", "CUDA_PATH") else path)})
            expected.append(f"found= version= reason=the nvcc that {who} names, {path}, {says}")
    for said, words in zip(find(*settings, path=nvcc(tmp_path / "good").parent), expected, strict=False):
        assert words in said


@pytest.mark.parametrize(
    ("gpus", "architectures"),
    [
        (None, "80-real;90-real;100-real;120"),
        ("9.0\n", "90"),
        ("12.0\n8.6\n8.6\n", "86-real;120"),
        # One that the kernels, or this nvcc, do not know: whoever builds there builds for elsewhere.
        ("7.5\n9.0\n", "80-real;90-real;100-real;120"),
        ("20.0\n", "80-real;90-real;100-real;120"),
        ("[N/A]\n", "80-real;90-real;100-real;120"),
        ("fails", "80-real;90-real;100-real;120"),
    ],
)
def test_architectures_are_those_of_the_machines_gpus(tmp_path, gpus, architectures):
    if gpus is not None:
        smi = tmp_path / "nvidia-smi"
        smi.write_text("#!/bin/sh\nexit 9\n" if gpus == "fails" else f"#!/bin/sh\nprintf '{gpus}'\n")
        smi.chmod(0o755)
    known = "".join(f"compute_{arch}\n" for arch in (75, 80, 86, 87, 90, 100, 103, 120, 121))
    script = tmp_path / "choose.cmake"
    script.write_text(
        f'include({REPOSITORY}/csrc/nvcc.cmake)\nchoose_architectures(chosen "{known}")\nmessage("chosen=${{chosen}}|")'
    )
    done = subprocess.run(
        [CMAKE, "-P", script], env={"PATH": f"{tmp_path}:/usr/bin:/bin"}, capture_output=True, text=True, timeout=100
    )
    assert f"chosen={architectures}|" in done.stderr


@pytest.mark.parametrize(
    ("fault", "words"),
    [
        ({"version": "sleep 600"}, ["did not answer within 1 seconds", "--version"]),
        ({"version": "echo broken >&2; exit 3"}, ["does not work (3)", "broken"]),
        ({"version": "echo nonsense"}, ["does not tell its release", "nonsense"]),
        ({"version": "kill -SEGV $$"}, ["does not work ("]),
        (
            {"compile": "echo '#error -- unsupported GNU version!' >&2; exit 1"},
            ["does not work (1)", "unsupported GNU version", "kernel.cu"],
        ),
        ({"compile": "sleep 600"}, ["did not answer within 1 seconds", "kernel.cu"]),
    ],
    ids=["hangs", "fails", "nonsense", "crashes", "host compiler", "hangs compiling"],
)
def test_one_that_does_not_work_stops_and_says_how_to_go_on(find, tmp_path, fault, words):
    path = nvcc(tmp_path / "broken", **fault)
    (said,) = find({"CUDACXX": str(path)}, seconds=1 if "sleep" in str(fault) else 60)
    assert "found=" not in said
    for word in [*words, str(path), "CUDACXX=", WITHOUT]:
        assert word in said


def configure(folder: Path, *definitions: str, **environment: str) -> str:
    """Configure the whole project, and return the status and the output."""
    ninja = shutil.which("ninja", path=SEARCH)
    pybind11 = importlib.util.find_spec("pybind11")
    if ninja is None or pybind11 is None:
        pytest.skip("needs ninja and pybind11 of cpc_ext[test]")
    command = [
        *(CMAKE, "-S", REPOSITORY, "-B", folder, "-G", "Ninja", f"-DCMAKE_MAKE_PROGRAM={ninja}"),
        *("-DSKBUILD_PROJECT_VERSION=0", f"-DPython_EXECUTABLE={sys.executable}", *definitions),
        f"-Dpybind11_DIR={Path(pybind11.origin).parent / 'share' / 'cmake' / 'pybind11'}",
    ]
    done = subprocess.run(command, env=os.environ | environment, capture_output=True, text=True, timeout=300)
    return f"status {done.returncode} " + " ".join((done.stdout + done.stderr).split())


def test_an_old_nvcc_is_a_notice_and_an_error_where_cuda_was_asked_for(tmp_path):
    """AUTO builds for the CPU, ON does not; and the kernels' commands know nothing of Python."""
    old = str(nvcc(tmp_path / "old", "11.8"))
    said = configure(tmp_path / "build", "-DCPC_EXT_CUDA=AUTO", CUDACXX=old)
    assert f"building for the CPU only (CUDA: the nvcc that CUDACXX names, {old}, is release 11.8" in said
    assert "it compiles for two to three minutes on two cores" in said
    assert said.startswith("status 0")
    # Each of pip's builds has pybind11, cmake and ninja in a new folder.
    commands = (tmp_path / "build" / "build.ninja").read_text().split("build ")
    kernels = [text for text in commands if text.startswith("csrc/CMakeFiles/") and ".o: CXX_COMPILER" in text]
    assert len(kernels) > 10
    assert not [text for text in kernels if "pybind11" in text or "Python" in text or CMAKE in text]
    said = configure(tmp_path / "build", "-DCPC_EXT_CUDA=ON", CUDACXX=old)
    assert not said.startswith("status 0")
    assert "CPC_EXT_CUDA=ON, but the nvcc that CUDACXX names" in said


# --- Where a build goes ---


@pytest.fixture
def backend(tmp_path, monkeypatch):
    """The build_backend of a source tree in tmp_path, with a stub of scikit-build-core that returns the settings."""
    shutil.copy(REPOSITORY / "build_backend.py", tmp_path)
    package, build = tmp_path / "scikit_build_core", tmp_path / "scikit_build_core" / "build.py"
    package.mkdir()
    (package / "__init__.py").touch()
    build.write_text("def build_wheel(folder, settings=None, metadata=None):\n    return settings\n")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delenv("SKBUILD_BUILD_DIR", raising=False)
    for name in ("scikit_build_core", "scikit_build_core.build"):
        monkeypatch.delitem(sys.modules, name, raising=False)
    spec = importlib.util.spec_from_file_location("build_backend", tmp_path / "build_backend.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    yield module
    for name in ("scikit_build_core", "scikit_build_core.build"):
        sys.modules.pop(name, None)


def test_builds_go_to_the_source_tree_where_it_can_be_written_to(backend, tmp_path, monkeypatch):
    assert backend.build_wheel("wheels", {"cmake.define.A": "1"}) == {"cmake.define.A": "1"}
    (tmp_path / "build" / "cp311-cp311-linux_x86_64").mkdir(parents=True)
    assert backend.build_wheel("wheels") == {}
    # Tests may run as root, who may write anywhere but where the file system says no.
    for closed in (tmp_path / "build", tmp_path / "build" / "cp311-cp311-linux_x86_64"):
        monkeypatch.setattr(backend.os, "access", lambda path, mode, closed=closed: path != closed)
        assert backend.build_wheel("wheels", {"cmake.define.A": "1"}) == {"cmake.define.A": "1", "build-dir": ""}
        assert backend.build_wheel("wheels", {"build-dir": "/elsewhere"}) == {"build-dir": "/elsewhere"}
