"""Our ops against eager PyTorch and torch.compile, and against what this machine can copy.

``python python/benchmarks/kernels.py`` prints a table and, with ``--out FILE``, writes it as JSON.
"""

from __future__ import annotations

import json
import platform
from collections.abc import Callable
from dataclasses import asdict, dataclass
from datetime import date
from pathlib import Path

import torch
import tyro
from timing import interleaved
from torch import Tensor

import cpc_ext
from cpc_ext._native import native
from cpc_ext.ops import extract_patches
from cpc_ext.ops.extract_patches import _affine

MEAN, STD = (0.4313, 0.4156, 0.3663), (0.2683, 0.2610, 0.2687)


def eager_patches(images: Tensor, patch: int, stride: int, dtype: torch.dtype) -> Tensor:
    """What one writes without us: scale and normalise the batch, unfold, make the patches contiguous."""
    mean = torch.tensor(MEAN, device=images.device).view(1, 3, 1, 1)
    std = torch.tensor(STD, device=images.device).view(1, 3, 1, 1)
    normalised = ((images.float() / 255 - mean) / std).to(dtype)
    return normalised.unfold(2, patch, stride).unfold(3, patch, stride).permute(0, 2, 3, 1, 4, 5).contiguous()


@dataclass(frozen=True)
class PatchCase:
    """A batch of square colour images cut into overlapping patches."""

    batch: int
    size: int
    patch: int
    stride: int
    dtype: str = "float32"


PATCH_CASES = (
    PatchCase(64, 64, 16, 8),
    PatchCase(64, 64, 16, 8, "bfloat16"),
    PatchCase(64, 30, 10, 5),
    PatchCase(16, 256, 64, 32),
    PatchCase(8, 260, 80, 36),
    PatchCase(1024, 64, 16, 8),
    PatchCase(1024, 64, 16, 8, "bfloat16"),
)


def bench_patches(case: PatchCase, device: str, repeats: int) -> dict:
    images = torch.randint(0, 256, (case.batch, 3, case.size, case.size), dtype=torch.uint8, device=device)
    dtype = getattr(torch, case.dtype)

    def ours() -> Tensor:
        return extract_patches(images, case.patch, case.stride, mean=MEAN, std=STD, dtype=dtype)

    def eager() -> Tensor:
        return eager_patches(images, case.patch, case.stride, dtype)

    compiled_patches = torch.compile(eager_patches, dynamic=False)
    patches = ours()
    scale, shift = _affine(images.dtype, 3, MEAN, STD)

    def into_existing() -> None:
        """Without allocating the result, whose fresh pages can cost more than writing them."""
        window = case.patch, case.stride, case.size, case.size
        native.extract_patches(images, patches, *window, None, None, False, False, False, scale, shift)

    copied = torch.empty_like(patches)
    alternatives: dict[str, Callable[[], object]] = {
        "eager": eager,
        "compiled": lambda: compiled_patches(images, case.patch, case.stride, dtype),
        "ours": ours,
        "ours into existing memory": into_existing,
        "copy into existing memory": lambda: copied.copy_(patches),
    }
    torch.testing.assert_close(ours(), eager(), rtol=2e-2, atol=2e-2)
    times = interleaved(alternatives, repeats=repeats, device=device)
    result_bytes = patches.numel() * patches.element_size()
    bandwidth = (images.numel() + result_bytes) / times["ours into existing memory"].median
    ceiling = 2 * result_bytes / times["copy into existing memory"].median
    return {
        "op": "extract_patches",
        "case": asdict(case),
        "seconds": {name: asdict(value) for name, value in times.items()},
        "against_eager": times["eager"].median / times["ours"].median,
        "against_compiled": times["compiled"].median / times["ours"].median,
        "gigabytes_per_second": bandwidth / 1e9,
        "share_of_copy_bandwidth": bandwidth / ceiling,
    }


# Headings and widths of the numbers in the table.
COLUMNS = (
    ("eager", 10),
    ("compiled", 10),
    ("ours", 10),
    ("x eager", 10),
    ("x compiled", 11),
    ("GB/s", 7),
    ("of copy", 9),
)


@dataclass
class Options:
    device: str = "cuda" if torch.cuda.is_available() else "cpu"
    """Where to run."""
    repeats: int = 20
    """Rounds over all alternatives."""
    out: Path | None = None
    """Write the results to this JSON file."""


def main(options: Options) -> None:
    heads = "".join(f"{head:>{width}}" for head, width in COLUMNS)
    print(f"{'op':<17}{'case':<34}{heads}")
    rows = []
    for case in PATCH_CASES:
        row = bench_patches(case, options.device, options.repeats)
        rows.append(row)
        label = f"[{case.batch},3,{case.size},{case.size}] {case.patch}/{case.stride} {case.dtype}"
        milliseconds = "".join(
            f"{row['seconds'][name]['median'] * 1e3:>10.2f}" for name in ("eager", "compiled", "ours")
        )
        print(
            f"{row['op']:<17}{label:<34}{milliseconds}{row['against_eager']:>10.1f}{row['against_compiled']:>11.1f}"
            f"{row['gigabytes_per_second']:>7.1f}{row['share_of_copy_bandwidth']:>9.0%}",
            flush=True,
        )
    print("milliseconds are medians; GB/s count bytes read and written into existing memory, as a share of a copy's")
    if options.out is not None:
        machine = {"device": device_name(options.device), "torch": torch.__version__, "date": str(date.today())}
        document = {"machine": machine | cpc_ext.build_info(), "results": rows}
        del document["machine"]["module"]
        options.out.parent.mkdir(parents=True, exist_ok=True)
        options.out.write_text(json.dumps(document, indent=1) + "\n")


def device_name(device: str) -> str:
    if device.startswith("cuda"):
        return torch.cuda.get_device_name(device)
    return f"{torch.get_num_threads()} threads of {platform.processor() or platform.machine()}"


if __name__ == "__main__":
    main(tyro.cli(Options, description=__doc__))
