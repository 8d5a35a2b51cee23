"""The notebooks of docs/notebooks, run from top to bottom as a reader's Jupyter would."""

from __future__ import annotations

import os
import re
from pathlib import Path

import pytest

nbclient = pytest.importorskip("nbclient", reason="needs cpc_ext[docs]")
nbformat = pytest.importorskip("nbformat", reason="needs cpc_ext[docs]")
pytest.importorskip("sklearn", reason="needs cpc_ext[docs]")

ROOT = Path(__file__).parents[2]
NOTEBOOKS = sorted((ROOT / "docs" / "notebooks").glob("*.ipynb"))
FIGURES = {"textures": 4, "scikit_learn": 1}


@pytest.fixture
def executed(tmp_path, monkeypatch):
    """A function: executed(path) runs a notebook, and returns the output of its cells and the number of figures."""
    paths = [str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(paths))
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    monkeypatch.setenv("CPC_EXT_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("TMPDIR", str(tmp_path))

    def execute(path: Path) -> tuple[str, int]:
        notebook = nbformat.read(path, as_version=4)
        resources = {"metadata": {"path": str(tmp_path)}}
        nbclient.NotebookClient(notebook, timeout=300, kernel_name="python3", resources=resources).execute()
        outputs = [output for cell in notebook.cells for output in cell.get("outputs", [])]
        printed = "".join(output.text for output in outputs if output.output_type == "stream")
        return printed, sum("image/png" in output.get("data", {}) for output in outputs)

    return execute


def shares(printed: str, pattern: str) -> list[float]:
    return [float(share) for share in re.search(pattern, printed).groups()]


def test_every_notebook_is_run():
    assert [path.stem for path in NOTEBOOKS] == sorted(FIGURES)


def test_textures(executed):
    printed, figures = executed(ROOT / "docs" / "notebooks" / "textures.ipynb")
    trained, untrained = shares(printed, r"linear classifier: ([\d.]+)%, untrained ([\d.]+)%")
    assert trained > untrained + 5
    assert figures == FIGURES["textures"]


def test_scikit_learn(executed):
    printed, figures = executed(ROOT / "docs" / "notebooks" / "scikit_learn.ipynb")
    accuracies = shares(printed, r"(?s)scikit-learn: ([\d.]+)% of 200 test images.*nearest neighbours: ([\d.]+)%")
    assert min(accuracies) > 20  # Of ten classes.
    assert figures == FIGURES["scikit_learn"]


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_notebooks_are_kept_without_what_they_put_out(path):
    cells = nbformat.read(path, as_version=4).cells
    assert not any(cell.get("outputs") or cell.get("execution_count") for cell in cells)
