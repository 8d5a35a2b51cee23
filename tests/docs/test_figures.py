"""Measured numbers on pages agree with the committed result files."""

from __future__ import annotations

import json
import re
from collections import defaultdict
from pathlib import Path
from statistics import median
from typing import Any

import pytest

ROOT = Path(__file__).parents[2]
RESULTS = ROOT / "python" / "benchmarks" / "results"
H200 = RESULTS / "2026-11-27-nvidia-h200"


def measured(name: str) -> dict[str, Any]:
    return json.loads((RESULTS / name).read_text())


def text(page: str) -> str:
    return (ROOT / page).read_text(encoding="utf-8")


def table_rows(page: str) -> list[list[str]]:
    """Return the cells of every row of a page's tables, without bold markup."""
    lines = (line for line in text(page).splitlines() if line.startswith("|"))
    return [[cell.strip() for cell in line.replace("**", "").strip("|").split("|")] for line in lines]


def figures(words: str) -> list[float]:
    return [float(number) for number in re.findall(r"\d+(?:\.\d+)?", words)]


def test_what_was_learned_in_minutes_of_a_core():
    runs: dict[tuple[Any, ...], list[dict[str, Any]]] = defaultdict(list)
    for name in ("2026-11-27-cpu-accuracy.json", "2026-11-28-cpu-accuracy.json"):
        for run in measured(name)["results"]:
            if "images_per_second" in run:
                options = re.sub(r"--steps \d+", "", run.get("options", ""))
                view = run.get("config", {}).get("simclr", {}).get("view_size")
                runs[run["method"], run["minutes"] or 10, options, view].append(run)
    rows = table_rows("docs/results.md")
    for key, group in runs.items():
        group.sort(key=lambda run: run["seed"])
        linear, knn = (", ".join(f"{100 * run[name]:.1f}" for run in group) for name in ("linear", "knn"))
        rates = ", ".join(f"{rate_of(run):.0f}" for run in group)
        assert [row for row in rows if {linear, knn, rates} <= set(row)], (key, linear, knn, rates)


def rate_of(run: dict[str, Any]) -> float:
    """Return a run's images per second, by CPU time if it is recorded, since other programs slow down the clock's."""
    if "processor_seconds" not in run:
        return run["images_per_second"]
    return run["steps"] * run["config"]["optimization"]["batch_size"] / run["processor_seconds"]


def test_rate_of_whole_views_on_the_slower_machine():
    run = measured("2026-11-28-cpu-view-sizes.json")["results"][0]
    assert "--view-size 32" in run["options"]
    (told,) = re.findall(r"views of 32\s+pixels: (\d+) images a second", text("docs/results.md"))
    assert float(told) == pytest.approx(run["images"] / run["processor_seconds"], abs=5)


def test_the_first_run_of_speech():
    runs = [run for run in measured("2026-11-28-cpu-speech-ablations.json")["results"] if run["steps"] == 600]
    told = re.findall(r"to ([\d.]+), ([\d.]+) and\s+([\d.]+) %", text("docs/speech.md"))
    assert [figures(" ".join(each)) for each in told] == [
        pytest.approx([100 * run[of] for run in runs]) for of in ("phones", "speakers")
    ]


def test_short_runs_on_recordings():
    runs = {
        run["options"].removeprefix("--norm channel, "): run
        for run in measured("2026-11-28-cpu-speech-files.json")["short"]["runs"]
        if run["options"] == "--norm channel" or run["options"].startswith("--norm channel, ")
    }
    (row,) = (row for row in table_rows("docs/speech.md") if row[0].startswith("channel norm, 1e-3 after 50 steps"))
    assert row[0].endswith("900 steps / 400 with a noise 60 dB below full scale")
    of_each = [runs["--norm channel"], runs["noise of 60 dB below full scale"]]
    assert [run["steps"] for run in of_each] == [900, 400]
    assert figures(row[1]) == pytest.approx([100 * run["knn_accuracy"] for run in of_each])
    assert figures(row[2]) == pytest.approx([100 * run["accuracy"] for run in of_each])


@pytest.mark.parametrize("case", measured("2026-11-28-cpu-speech-steps.json")["results"], ids=lambda case: case["case"])
def test_steps_of_speech(case):
    cells = [
        f"{case['seconds'][name]['median']:.2f} s, {case['peak_extra_bytes'][name] / 2**20:.0f} MiB"
        for name in ("plain", "ours, float32", "tuned", "ours")
    ]
    assert cells in [row[1:] for row in table_rows("docs/speech.md")]


def test_memory_of_greedy_infomax():
    sizes = {run["name"]: run for run in measured("2026-11-28-cpu-greedy-memory.json")["results"]}
    rows = [row[1:] for row in table_rows("docs/greedy_infomax.md")]
    parts = ("weights_and_moments", "step_peak", "total")
    fair, at_once = "the same without context network, blocks run again", "3 modules at once"
    for name in ("CPC, end to end", "the same without context network", fair, at_once):
        assert [f"{sizes[name][part] / 2**20:.0f}" for part in parts] in rows
    saved = {part: 1 - sizes[at_once][part] / sizes[fair][part] for part in parts}
    assert saved["step_peak"] == pytest.approx(1 / 10, abs=0.015)
    assert saved["total"] == pytest.approx(1 / 20, abs=0.015)
    words = " ".join(text("docs/greedy_infomax.md").split())
    assert "all modules at once save a tenth of the activations and gradients, a twentieth of all" in words


def test_memory_of_losses():
    cases = {
        (case["op"], case["case"]["rows"]): case
        for case in measured("2026-11-28-cpu-contrastive-losses.json")["results"]
    }
    told = {row[0]: row[1] for row in table_rows("docs/losses.md") if row[1:] and row[1].endswith(" MiB")}
    for (loss, of_file), (pairs, of) in {  # Losses of two views have a row for each.
        ("CLIPLoss", 4096): (4096, 512),
        ("SigLIPLoss", 4096): (4096, 512),
        ("NTXentLoss", 2048): (1024, 128),
        ("NTXentLoss", 8192): (4096, 128),
        ("DecoupledContrastiveLoss", 2048): (1024, 128),
    }.items():
        size = cases[loss, of_file]["alternatives"]["ours"]["peak_extra_bytes"]
        assert told[f"`{loss}`, {pairs} pairs of {of}"] == f"{size / 2**20:.0f} MiB"


def test_sampling():
    rows = [row[1:] for row in table_rows("docs/pixel_models.md")]
    for run in measured("2026-11-24-cpu-sampling.json")["results"]:
        kept, whole = run["kept_features_seconds"], run["whole_network_seconds"]
        assert [f"{kept:.2f} s", f"{whole:.0f} s", f"{run['ratio']:.0f}x"] in rows


def test_patches_augmented_in_a_second():
    (case,) = (
        result
        for result in measured("2026-11-28-cpu-kernels-augment_patches.json")["results"]
        if result["label"] == "[64,3,64,64] 16/8 two transforms"
    )
    page = " ".join(text("docs/cpc_v2.md").split())
    told = re.search(r"core augments about ([\d ]+) images a second, Pillow's loop over patches about (\d+)", page)
    assert told is not None
    for number, name in zip(told.groups(), ("ours, one core", "Pillow, patch by patch"), strict=True):
        rate = 64 / case["alternatives"][name]["seconds"]["median"]
        assert float(number.replace(" ", "")) == pytest.approx(rate, rel=0.01)


def test_masked_convolutions_beside_the_visible_rows():
    ratios: dict[bool, list[float]] = {True: [], False: []}  # Whether there are 16 images or more.
    for result in measured("2026-11-28-cpu-kernels-masked_conv2d.json")["results"]:
        if result["case"]["kernel"] == 3:
            ratios[result["case"]["batch"] >= 16].append(result["against_fair"])
    page = " ".join(text("docs/benchmarks.md").split())
    many, few = (
        r"it is ([\d.]+) to ([\d.]+) times as fast from 16 images on",
        r"([\d.]+) to ([\d.]+) times with 1 to 4 images",
    )
    told = re.search(f"{many}.* {few}", page)
    assert told is not None
    extremes = [extreme(ratios[enough]) for enough in (True, False) for extreme in (min, max)]
    assert figures(" ".join(told.groups())) == [round(ratio, 1) for ratio in extremes]


def test_kernels_of_an_h200_against_the_fastest_others():
    ratios: dict[tuple[str, str], list[float]] = defaultdict(list)
    for result in json.loads((H200 / "kernels.json").read_text())["results"]:
        seconds = {name: each["seconds"]["median"] for name, each in result["alternatives"].items()}
        others = min(value for name, value in seconds.items() if not name.startswith("ours"))
        ratios[result["op"], result["dtype"]].append(others / seconds[result["compared"]])
    report = (H200 / "report.md").read_text()
    (paragraph,) = re.findall(r"Against the fastest, least, median and most.*?\n\n", report, re.DOTALL)
    told = re.findall(r"(\d+\.\d+), (\d+\.\d+)\s+and\s+(\d+\.\d+)", paragraph)
    cases = [
        ("info_nce_all", "float32"),
        ("info_nce_all", "bfloat16"),
        ("info_nce_sampled", "float32"),
        ("masked_conv2d", "float32"),
        ("masked_conv2d", "bfloat16"),
        ("shifted_conv2d", "float32"),
        ("extract_patches", "float32"),
        ("predict_and_contrast", "float32"),
        ("logistic_mixture_nll", "float32"),
    ]
    for case, words in zip(cases, told, strict=True):
        for word, value in zip(words, (min(ratios[case]), median(ratios[case]), max(ratios[case])), strict=True):
            digits = len(word.partition(".")[2])
            assert float(word) == pytest.approx(value, abs=0.505 * 10**-digits), (case, word, value)
