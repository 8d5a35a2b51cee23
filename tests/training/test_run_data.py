"""The data of a run when it is resumed or evaluated."""

from __future__ import annotations

import numpy as np
import pytest
from PIL import Image

from cpc_ext.data.splits import drawn_tenths
from cpc_ext.programs.train_options import parse
from cpc_ext.training.data_record import data_record
from cpc_ext.training.run_data import changed_data, load_data


def images(folder, numbers):
    for number in numbers:
        path = folder / "ab"[number % 2] / f"{number:03}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (64, 64), (number, 0, 0)).save(path)


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_a_run_keeps_what_the_first_version_held_out(tmp_path, monkeypatch):
    monkeypatch.setenv("CPC_EXT_CACHE", str(tmp_path / "cache"))
    images(tmp_path / "photos", range(60))
    config = parse(["--dataset", "folder", "--data-dir", str(tmp_path / "photos"), "--steps", "1"]).run
    with drawn_tenths():
        before = load_data(config)
    # A tenth of each class exactly.
    assert np.bincount(before.test.labels).tolist() == [3, 3]
    now = load_data(config)
    assert now.test.paths != before.test.paths
    for dataset in (before, now):
        found = load_data(config, data_record(dataset.pretrain))
        assert (found.pretrain.paths, found.test.paths) == (dataset.pretrain.paths, dataset.test.paths)
    # Other files are other data, by either rule.
    images(tmp_path / "photos", range(60, 80))
    found = load_data(config, data_record(before.pretrain))
    assert found.test.paths == load_data(config).test.paths
    assert changed_data(data_record(before.pretrain), found) == [f"54 images then, {len(found.pretrain)} now"]
    assert not set(now.pretrain.paths) & set(found.test.paths)
