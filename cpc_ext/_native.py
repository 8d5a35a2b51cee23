"""Finds and loads the compiled module ``cpc_ext._C``.

Installed, it lies beside this file. In a source checkout it does not: Python then picks up the folder ``cpc_ext/`` of
the checkout while the compiled module lives in the installed package, so it is taken from there, provided both are of
one version. Edits to Python files of the checkout thus take effect at once, and kernels are those last installed.
"""

from __future__ import annotations

import importlib.machinery
import importlib.metadata
import importlib.util
import sys
from pathlib import Path
from types import ModuleType

__all__ = ["KERNEL_DEVICES", "native"]

_NAME = "cpc_ext._C"
_INSTALL = "run `pip install -c constraints.txt .` in the checkout"


def _candidates() -> list[Path]:
    """Folders that may hold the compiled module: beside this file, then every installed cpc_ext."""
    folders = [Path(__file__).parent]
    for distribution in importlib.metadata.distributions(name="cpc_ext"):
        folders.append(Path(str(distribution.locate_file("cpc_ext"))))
    return folders


def _find() -> Path:
    for folder in _candidates():
        for suffix in importlib.machinery.EXTENSION_SUFFIXES:
            path = folder / f"_C{suffix}"
            if path.is_file():
                return path
    raise ImportError(f"cpc_ext has no compiled module for this Python ({sys.version.split()[0]}): {_INSTALL}")


def _load(version: str) -> ModuleType:
    # An editable install resolves the module through an import hook of its own.
    spec = importlib.util.find_spec(_NAME)
    if spec is None:
        path = _find()
        spec = importlib.util.spec_from_file_location(_NAME, path)
        assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    if module.__version__ != version:
        raise ImportError(
            f"the compiled module {module.__file__} is cpc_ext {module.__version__}, the Python code at "
            f"{Path(__file__).parent} is {version}: {_INSTALL}"
        )
    sys.modules[_NAME] = module
    return module


def _version() -> str:
    import cpc_ext

    return cpc_ext.__version__


native = _load(_version())

# Devices that this build has kernels for; elsewhere the ops run their references.
KERNEL_DEVICES = ("cpu", "cuda") if native.build_info()["cuda"] else ("cpu",)
