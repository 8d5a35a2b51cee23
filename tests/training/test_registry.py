"""Models and data sets are found by name, and each has everything that the registry requires."""

from __future__ import annotations

from importlib import import_module
from inspect import signature

import pytest

from cpc_ext.data_sets import DATASETS, folder_of, idle_of_dataset, medium, module_of, origin
from cpc_ext.training import registry
from cpc_ext.training.config import RunConfig, options_that_may_change
from cpc_ext.training.task import Task


def test_models_are_called_as_their_packages():
    assert {"cpc-v1", "greedy-infomax", "pixelcnn++"} <= set(registry.MODELS)
    assert registry.config_class("pixelcnn++").__module__ == "cpc_ext.tasks.pixelcnn_plus_plus.options"
    assert (registry.title("cpc-v2"), registry.published("cpc-v2")) == (
        "CPC v2",
        "Hénaff et al. 2019, arXiv 1905.09272.",
    )


@pytest.mark.parametrize("model", registry.MODELS)
def test_a_model_has_all_that_is_asked_of_it(model):
    assert registry.title(model)
    assert registry.published(model)
    assert issubclass(registry.config_class(model), RunConfig)
    assert issubclass(registry.task_class(model), Task)
    presets = registry.model_presets(model)
    assert folder_of(registry.model_medium(model)) in presets
    # Those of the user's own images depend on their size, see test_options.py.
    names = {name.removesuffix("-small") for name in presets}
    assert {medium(dataset) for dataset in names} == {registry.model_medium(model)}
    assert names <= set(DATASETS)


LOADED = {
    "images": {
        "drawn": ["size", "seed"],
        "published": ["data_dir", "download"],
        "folders": ["data_dir", "image_size"],
        "arrays": ["data_dir", "image_size"],
    },
    "audio": {"drawn": ["seed", "utterances"], "published": ["data_dir", "download"], "folders": ["data_dir"]},
}


@pytest.mark.parametrize("name", DATASETS)
def test_a_data_set_is_loaded_by_what_its_origin_has(name):
    assert list(signature(import_module(module_of(name)).load).parameters) == LOADED[medium(name)][origin(name).folder]


def test_where_images_come_from_decides_what_is_idle():
    assert [origin(name).sized for name in ("textures", "stl10", "folder", "npy")] == [True, False, True, True]
    assert [origin(name).own_size for name in ("textures", "stl10", "folder", "npy")] == [False, True, False, True]
    assert set(idle_of_dataset("textures")) == {"data_dir", "download", "utterances"}
    assert idle_of_dataset("folder") == {
        "download": "--dataset folder is of your own files",
        "utterances": "--dataset folder has no drawn voices",
    }
    assert set(idle_of_dataset("cifar10")) == {"utterances"}


def test_what_a_resumed_run_may_have_anew():
    logs = ["checkpoint_every", "evaluate", "log_every", "logger", "probe_every", "probe_images", "sample_every"]
    assert options_that_may_change() == sorted(
        [*logs, "compile", "data_dir", "device", "download", "epochs", "pipeline", "steps", "time_budget"]
    )
