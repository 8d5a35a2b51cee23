"""Fixtures that compile the C++ and CUDA test programs; makes the tools in python/ importable."""

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

FOLDER = Path(__file__).parent
PYTHON = Path(__file__).parents[2] / "python"
sys.path += [str(PYTHON), str(PYTHON / "benchmarks")]


@pytest.fixture(scope="session")
def compiled(tmp_path_factory) -> Callable[..., Path]:
    """Return a function that compiles a C++ file of this folder, given its name and compiler options."""

    def compile_program(name: str, *options: str) -> Path:
        program = tmp_path_factory.mktemp(name) / name
        source = [f"-I{FOLDER.parents[1] / 'csrc'}", FOLDER / f"{name}.cpp"]
        subprocess.run(["c++", "-std=c++20", "-O2", *options, *source, "-o", program], check=True)
        return program

    return compile_program


@pytest.fixture
def compiled_for_gpu(tmp_path) -> Callable[[str], Path]:
    """Return a function that compiles a CUDA file of this folder with nvcc, for the GPU of this machine."""
    from cuda_product import compile_for_gpu

    return lambda name: compile_for_gpu(FOLDER / f"{name}.cu", tmp_path)
