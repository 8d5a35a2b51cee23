"""Options that decide nothing in a run, given the others: not shown of it, and refused where they are given."""

from __future__ import annotations

from cpc_ext.tasks.encoder_names import has_own_norm
from cpc_ext.training.config import GreedyConfig, PixelCNNConfig, RunConfig

__all__ = ["idle_options"]


def idle_options(config: RunConfig) -> dict[str, str]:
    """The fields of a config's sections that nothing reads, each with the reason why."""
    idle = {}
    if config.data.dataset == "textures":
        idle |= dict.fromkeys(("data_dir", "download"), "--dataset textures is drawn, and reads no files")
    elif config.data.dataset == "folder":
        idle["download"] = "--dataset folder is of your own images"
    if config.optimization.schedule == "constant":
        idle["final_lr"] = "--schedule constant keeps the learning rate"
    section = getattr(config, "cpc", None) or getattr(config, "simclr", None)
    if section is not None and has_own_norm(section.encoder):
        idle["norm"] = f"--encoder {section.encoder} has a normalisation of its own"
    if isinstance(config, PixelCNNConfig):
        idle["channels_last"] = f"--model {config.model} lays its features out by itself"
    started = config.optimization.resume_from is not None
    if started and config.model == "pixelcnn++":
        idle["data_init"] = "--resume-from brings the weights"
    if isinstance(config, GreedyConfig):
        greedy = config.greedy
        if greedy.split_at is not None:
            idle["modules"] = "--split-at tells how many there are"
        if greedy.cache_outputs is None:
            idle["cache_views"] = "it needs --cache-outputs"
        if greedy.count > 1:
            idle["context_layers"] = "only a single module has a context network"
        if greedy.pipeline:
            idle["gather_negatives"] = "each process of a --pipeline has the whole batch"
        if started:
            idle["init"] = "--resume-from brings the weights"
    return idle
