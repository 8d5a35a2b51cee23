"""Defaults that depend on the model and the data set, one table entry a pair.

An entry holds only what differs from the defaults in config.py, by section. The command line shows the entry's values
as defaults in its help, and options given there replace them one by one.
"""

from __future__ import annotations

from typing import Any

from cpc_ext.training.config import RunConfig, validate_config
from cpc_ext.training.machine import default_device, default_precision

__all__ = ["PRESETS", "preset"]

# Small images: half-overlapping patches of 10 pixels of which a small network sees enough.
_CPC_V1_CIFAR = {
    "view": {"crop": 30, "grid_size": 5, "patch_norm": True},
    "cpc": {"encoder": "resnet14", "norm": "layer", "pred_steps": 3, "neg_samples": "all"},
    "optimization": {"epochs": 100, "batch_size": 64, "schedule": "cosine", "warmup_steps": 500, "clip_grad": 10.0},
}

_CPC_V2_VIEW = {"gray": False, "patch_augmentation": True}
# CPCV2-PyTorch's example: half-overlapping patches of 10 pixels in colour.
_CPC_V2_CIFAR = {
    "view": {"crop": 30, "pad": 2, "grid_size": 5, **_CPC_V2_VIEW},
    "cpc": {"encoder": "wrn-28-2", "pred_steps": 3},
    "optimization": {"epochs": 500, "batch_size": 64, "schedule": "cosine", "warmup_steps": 500, "clip_grad": 10.0},
}

# The number of updates matters more than their size: small batches.
_PIXELCNN_CIFAR = {
    "pixelcnn": {"layers": 15, "hidden_channels": 96, "sample_every": 2000},
    "optimization": {
        "epochs": 50,
        "batch_size": 16,
        "lr": 4e-4,
        "schedule": "cosine",
        "warmup_steps": 500,
        "clip_grad": 1.0,
    },
}
# Whole 96x96 images: a ninth of the batch that small ones allow.
_PIXELCNN_STL10 = {
    "pixelcnn": {"layers": 15, "hidden_channels": 96, "sample_every": 5000},
    "optimization": {**_PIXELCNN_CIFAR["optimization"], "epochs": 5, "batch_size": 4},
}
# Minutes on two CPU cores.
_PIXELCNN_TEXTURES = {
    "data": {"image_size": 32},
    "pixelcnn": {"layers": 5, "hidden_channels": 24, "sample_every": 250},
    "optimization": {
        "steps": 1000,
        "batch_size": 16,
        "lr": 2e-3,
        "schedule": "cosine",
        "warmup_steps": 50,
        "clip_grad": 1.0,
    },
}

# Three fifths of the published channels and blocks: a quarter of the parameters, 12 million.
_PIXELCNNPP_CIFAR = {
    "pixelcnn": {"layers": 3, "hidden_channels": 96, "sample_every": 2000, "ema_decay": 0.9995},
    "optimization": {**_PIXELCNN_CIFAR["optimization"], "lr": 1e-3},
}
_PIXELCNNPP_STL10 = {
    "pixelcnn": {**_PIXELCNNPP_CIFAR["pixelcnn"], "sample_every": 5000},
    "optimization": {**_PIXELCNN_STL10["optimization"], "lr": 1e-3},
}
# Minutes on two CPU cores. Textures without end need no dropout.
_PIXELCNNPP_TEXTURES = {
    "data": {"image_size": 32},
    "pixelcnn": {"layers": 1, "hidden_channels": 24, "dropout": 0.0, "sample_every": 250, "ema_decay": 0.99},
    "optimization": _PIXELCNN_TEXTURES["optimization"],
}

# The tutorial's settings of STL-10: AdamW and a cosine to a fiftieth. Small images bear no blur.
_SIMCLR_OPTIMIZATION = {
    "epochs": 500,
    "batch_size": 256,
    "lr": 5e-4,
    "schedule": "cosine",
    "final_lr": 0.02,
    "weight_decay": 1e-4,
}
_SIMCLR_STL10 = {
    "simclr": {"encoder": "resnet18", "norm": "batch", "view_size": 96},
    "optimization": _SIMCLR_OPTIMIZATION,
}
_SIMCLR_CIFAR = {
    "simclr": {"encoder": "resnet18", "norm": "batch", "view_size": 32, "blur_kernel": 0},
    "optimization": _SIMCLR_OPTIMIZATION,
}

# Minutes on two CPU cores. Grey patches of their own mean and contrast share nothing with their neighbours but the
# structure that runs through both.
_CPC_V1_TEXTURES = {
    "view": {"crop": 56, "grid_size": 6, "patch_norm": True},
    "cpc": {
        "encoder": "resnet-small",
        "norm": "layer",
        "context_layers": 1,
        "pred_steps": 3,
        "pred_directions": 2,
        "neg_samples": "all",
    },
    "optimization": {
        "steps": 1200,
        "batch_size": 16,
        "lr": 1e-3,
        "schedule": "cosine",
        "warmup_steps": 50,
        "clip_grad": 10.0,
    },
}
_CPC_V1_FOLDER = {
    "view": {"crop": 64, "grid_size": 7, "patch_norm": True},
    "cpc": {"encoder": "resnet14", "norm": "layer", "pred_steps": 5, "neg_samples": "all"},
    "optimization": {"epochs": 100, "batch_size": 32, "schedule": "cosine", "warmup_steps": 500, "clip_grad": 10.0},
}

PRESETS: dict[tuple[str, str], dict[str, Any]] = {
    ("cpc-v1", "textures"): _CPC_V1_TEXTURES,
    # The example settings of CPCV2-PyTorch, which keeps colours unless it is told not to.
    ("cpc-v1", "stl10"): {
        "view": {"crop": 64, "grid_size": 7, "gray": False},
        "cpc": {"encoder": "resnet14", "pred_steps": 5, "neg_samples": 16},
        "optimization": {"epochs": 300, "batch_size": 16},
    },
    ("cpc-v1", "cifar10"): _CPC_V1_CIFAR,
    ("cpc-v1", "cifar100"): _CPC_V1_CIFAR,
    ("cpc-v1", "folder"): _CPC_V1_FOLDER,
    # Minutes on two CPU cores, with larger logits than published, which a short run learns from sooner.
    ("cpc-v2", "textures"): {
        "view": {"crop": 56, "grid_size": 6, **_CPC_V2_VIEW},
        "cpc": {
            "encoder": "resnet-small",
            "context_layers": 1,
            "context_channels": 64,
            "pred_steps": 3,
            "prediction_scale": 1.0,
        },
        "optimization": {
            "steps": 1000,
            "batch_size": 16,
            "lr": 1e-3,
            "schedule": "cosine",
            "warmup_steps": 50,
            "clip_grad": 10.0,
        },
    },
    ("cpc-v2", "stl10"): {
        "view": {"crop": 64, "grid_size": 7, **_CPC_V2_VIEW},
        "cpc": {"encoder": "resnet28", "pred_steps": 5},
        "optimization": {"epochs": 300, "batch_size": 32, "schedule": "cosine", "warmup_steps": 500, "clip_grad": 10.0},
    },
    ("cpc-v2", "cifar10"): _CPC_V2_CIFAR,
    ("cpc-v2", "cifar100"): _CPC_V2_CIFAR,
    # As published for ImageNet.
    ("cpc-v2", "folder"): {
        "data": {"image_size": 300},
        "view": {"crop": 260, "grid_size": 6, "patch_size": 80, **_CPC_V2_VIEW},
        "cpc": {"encoder": "resnet161", "pred_steps": 3},
        "optimization": {"epochs": 200, "batch_size": 16, "schedule": "cosine", "warmup_steps": 500, "clip_grad": 10.0},
    },
    ("greedy-infomax", "textures"): _CPC_V1_TEXTURES,
    # The published settings: ResNet-50 v2 without its last stack and without norm.
    ("greedy-infomax", "stl10"): {
        "view": {"crop": 64, "grid_size": 7},
        "cpc": {"encoder": "resnet41", "pred_steps": 5, "neg_samples": 16},
        "optimization": {"epochs": 300, "batch_size": 32, "lr": 1.5e-4},
    },
    ("greedy-infomax", "cifar10"): _CPC_V1_CIFAR,
    ("greedy-infomax", "cifar100"): _CPC_V1_CIFAR,
    ("greedy-infomax", "folder"): _CPC_V1_FOLDER,
    # About the computing time of CPC on the same images.
    ("simclr", "textures"): {
        "simclr": {
            "encoder": "resnet-small",
            "norm": "batch",
            "view_size": 48,
            "min_crop_area": 0.2,
            "blur_kernel": 5,
            "temperature": 0.2,
        },
        "optimization": {
            "steps": 850,
            "batch_size": 64,
            "lr": 2e-3,
            "schedule": "cosine",
            "final_lr": 0.02,
            "warmup_steps": 20,
            "weight_decay": 1e-4,
        },
    },
    ("simclr", "stl10"): _SIMCLR_STL10,
    ("simclr", "cifar10"): _SIMCLR_CIFAR,
    ("simclr", "cifar100"): _SIMCLR_CIFAR,
    ("simclr", "folder"): {**_SIMCLR_STL10, "data": {"image_size": 96}},
    ("pixelcnn++", "textures"): _PIXELCNNPP_TEXTURES,
    ("pixelcnn++", "stl10"): _PIXELCNNPP_STL10,
    ("pixelcnn++", "cifar10"): _PIXELCNNPP_CIFAR,
    ("pixelcnn++", "cifar100"): _PIXELCNNPP_CIFAR,
    ("pixelcnn++", "folder"): {**_PIXELCNNPP_CIFAR, "data": {"image_size": 32}},
    **{
        (model, dataset): entry
        for model in ("pixelcnn", "gated-pixelcnn")
        for dataset, entry in (
            ("textures", _PIXELCNN_TEXTURES),
            ("stl10", _PIXELCNN_STL10),
            ("cifar10", _PIXELCNN_CIFAR),
            ("cifar100", _PIXELCNN_CIFAR),
            ("folder", {**_PIXELCNN_CIFAR, "data": {"image_size": 32}}),
        )
    },
}


def preset(model: str, dataset: str, *, device: str | None = None) -> RunConfig:
    """The config of a run without further options.

    device: the one it is going to run on, if not the accelerator of this machine; it decides the precision.
    KeyError for a model that cannot be trained on that data set.
    """
    entry = PRESETS[model, dataset]
    compute = {"device": default_device(), "precision": default_precision(device or default_device())}
    data = {"dataset": dataset, **entry.get("data", {})}
    return validate_config({"model": model, **entry, "data": data, "compute": compute})
