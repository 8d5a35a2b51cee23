"""Time and memory of our ops, compared with eager PyTorch, torch.compile and the ceilings of this machine.

Prints a table; with ``--out`` writes it as JSON and as a chart. README.md in this folder says how numbers are taken.
"""

from __future__ import annotations

import argparse
from dataclasses import replace
from typing import Any

import torch
from benchmark import COMPILED, Case, Op, measure
from charts import draw_kernels
from machine import add_common_arguments, at_least, describe, result_file, write_json
from ops import all_ops

DTYPES = ("float32", "bfloat16", "float16")
RATES = {"memory": "GB/s", "compute": "GFLOP/s"}
CEILINGS = {"memory": "copy", "compute": "product"}


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    names = list(all_ops())
    parser.add_argument("--op", nargs="+", default=names, choices=names, metavar="NAME", help=", ".join(names))
    parser.add_argument(
        "--dtype", nargs="+", choices=DTYPES, help="dtypes to run every case in (default: the case's own)"
    )
    parser.add_argument("--no-compile", action="store_true", help="skip torch.compile, which takes seconds per case")
    parser.add_argument(
        "--repeats", type=at_least(2), default=20, help="maximum number of rounds over all alternatives (default 20)"
    )
    add_common_arguments(parser)
    return parser.parse_args()


def chosen_cases(op: Op, dtypes: list[str] | None, quick: bool) -> list[Case]:
    """Return the op's cases in their own dtypes, or in each of the given ones, without duplicates."""
    cases = [case for case in op.cases if case.quick or not quick]
    if dtypes is None:
        return cases
    in_dtypes = [replace(case, dtype=dtype) for dtype in dtypes for case in cases]
    # Cases that now coincide were one case in several dtypes; the first of them is kept, as it may be part of a sweep.
    by_content = {(case.label, case.dtype, case.backward): case for case in reversed(in_dtypes)}
    return list(by_content.values())[::-1]


def print_row(row: dict[str, Any]) -> None:
    rate, ceiling = RATES[row["bound"]], CEILINGS[row["bound"]]
    print(
        f"\n{row['op']}  {row['label']}  {row['dtype']}  {row['passes']}"
        f"  ({ceiling}: {row['ceiling_per_second'] / 1e9:.1f} {rate})"
    )
    for name, figures in row["alternatives"].items():
        seconds, speed_up = figures["seconds"], figures["against_eager"]
        quartiles = f"({seconds['low'] * 1e3:.3f} to {seconds['high'] * 1e3:.3f})"
        print(
            f"  {name:<26}{seconds['median'] * 1e3:>10.3f} ms {quartiles:<22}"
            f"{'-' if speed_up is None else f'{speed_up:.2f}x':>9}"
            f"{figures['per_second'] / 1e9:>9.1f} {rate:<8}{figures['share_of_ceiling']:>5.0%}"
            f"{figures['peak_extra_bytes'] / 2**20:>10.1f} MiB",
            flush=True,
        )
    print(f"  {row['compared']} is {row['against_fair']:.2f} times as fast as {row['fair']}")
    for name, reason in row["failed"].items():
        print(f"  {name:<26}not measured: {reason}", flush=True)


def main(arguments: argparse.Namespace) -> None:
    torch.manual_seed(0)
    ops = all_ops()
    document: dict[str, Any] = {"machine": describe(arguments.device), "complete": False, "results": []}
    out = None if arguments.out is None else result_file(arguments.out, arguments.device, "kernels")
    repeats = min(arguments.repeats, 5) if arguments.quick else arguments.repeats
    without = (COMPILED,) if arguments.no_compile else ()
    for name in arguments.op:
        for case in chosen_cases(ops[name], arguments.dtype, arguments.quick):
            row = measure(ops[name], case, arguments.device, repeats, without)
            print_row(row)
            document["results"].append(row)
            if out is not None:
                write_json(out, document)
    print(
        "\nmedians with quartiles; x: times as fast as eager; rates count the least work, as a share of a copy's or a"
        "\nmatrix product's rate in this run; MiB: peak memory beyond the inputs"
    )
    if out is not None:
        document["complete"] = True
        write_json(out, document)
        print(f"written: {out}")
        sizes = {name: op.size for name, op in ops.items()}
        draw_kernels(document["results"], sizes, document["machine"], out.with_suffix(".png"))


if __name__ == "__main__":
    main(parse_arguments())
