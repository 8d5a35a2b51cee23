"""Find and load the compiled module ``cpc_ext._C``.

In an installed package it lies beside this file. In a source checkout it does not: Python imports the checkout's folder
``cpc_ext/``, and the compiled module is taken from the installed package, provided both have the same version. Edits to
Python files of the checkout thus take effect at once, while the kernels are those last installed.

The environment variable CPC_EXT_NATIVE names another compiled module to load, such as one built for sanitizers.
"""

from __future__ import annotations

import importlib.machinery
import importlib.metadata
import importlib.util
import os
import sys
from pathlib import Path
from types import ModuleType

from cpc_ext._version import __version__

__all__ = ["KERNEL_DEVICES", "native"]

_NAME = "cpc_ext._C"
_INSTALL = "run `pip install -c constraints.txt .` in the checkout"


def _find_installed() -> Path:
    """Return the compiled module of an installed cpc_ext whose Python files a checkout shadows."""
    for distribution in importlib.metadata.distributions(name="cpc_ext"):
        for suffix in importlib.machinery.EXTENSION_SUFFIXES:
            path = Path(str(distribution.locate_file(f"cpc_ext/_C{suffix}")))
            if path.is_file():
                return path
    raise ImportError(f"cpc_ext has no compiled module for Python {sys.version.split()[0]}: {_INSTALL}")


def _load() -> ModuleType:
    named = os.environ.get("CPC_EXT_NATIVE")
    if named:
        spec = importlib.util.spec_from_file_location(_NAME, named)
    else:
        # Beside this file, or where the import hook of an editable install says.
        spec = importlib.util.find_spec(_NAME) or importlib.util.spec_from_file_location(_NAME, _find_installed())
    if spec is None or spec.loader is None:
        raise ImportError(f"CPC_EXT_NATIVE={named} is no compiled module of Python's")
    importlib.import_module("torch")  # It loads the OpenMP runtime that both share; our wheels contain none.
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    if module.__version__ != __version__:
        raise ImportError(
            f"the compiled module {module.__file__} is cpc_ext {module.__version__}, the Python code at "
            f"{Path(__file__).parent} is {__version__}: {_INSTALL}"
        )
    sys.modules[_NAME] = module
    return module


native = _load()

# Devices that this build has kernels for; on all others the ops run their references.
KERNEL_DEVICES = ("cpu", "cuda") if native.build_info()["cuda"] else ("cpu",)
