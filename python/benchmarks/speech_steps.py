"""Time and memory of training steps on speech: the formulations of CPC_audio and Greedy InfoMax, compared with ours.

The models are CPC_audio's default (256 channels, channel norm, LSTM, linear predictors, 128 negatives), Greedy
InfoMax's CPC, and its six modules with ``--subsample`` (512 channels, GRU of 256, 10 negatives). A step is forward,
backward and Adam, with batch 8 of 20480 samples. The rivals are in ``speech_rivals.py``. "tuned" is a rival with fused
Adam and, if the processor has instructions for it, bfloat16, as ours, and with optimisations that PyTorch offers: one
batched product scores the negatives of all steps of CPC_audio, and a module's activations are freed before the next one
runs. Prints seconds per step and peak memory.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from dataclasses import asdict

import torch
from machine import add_common_arguments, at_least, describe, result_file, write_json
from memory import peak_extra_bytes
from speech_rivals import BatchedCPCAudioRival, CPCAudioRival, GreedyRival
from timing import interleaved
from torch import Tensor, nn
from training import native_dtype

from cpc_ext.models import CPC, GreedyInfoMax, RecurrentContext, WaveformEncoder
from cpc_ext.nn import SequenceInfoNCE

WINDOW = 20480


def our_cpc_audio() -> nn.Module:
    encoder, context = WaveformEncoder(256, norm="channel", padding="cpc-audio"), RecurrentContext(256, kind="lstm")
    settings = {"sampling": "shifted", "neg_samples": 128, "common_positions": True, "reduction": "sum"}
    return CPC(encoder, context, SequenceInfoNCE(256, 256, score="mean", **settings))


def our_greedy_cpc() -> nn.Module:
    return CPC(WaveformEncoder(512), RecurrentContext(512), SequenceInfoNCE(512, 256))


def our_greedy() -> nn.Module:
    return GreedyInfoMax(
        WaveformEncoder(512),
        5,
        context=RecurrentContext(512),
        context_module=True,
        objective=SequenceInfoNCE,
        subsample=128,
    )


def greedy_cpc_rival() -> nn.Module:
    return GreedyRival(end_to_end=True, subsample=None)


def greedy_rival() -> nn.Module:
    return GreedyRival(end_to_end=False, subsample=128)


Make = Callable[[], nn.Module]
# By name: the rival's model, the tuned rival's, and ours.
CASES: dict[str, tuple[Make, Make, Make]] = {
    "CPC_audio, default": (CPCAudioRival, BatchedCPCAudioRival, our_cpc_audio),
    "Greedy InfoMax, CPC": (greedy_cpc_rival, greedy_cpc_rival, our_greedy_cpc),
    "Greedy InfoMax, six modules": (greedy_rival, greedy_rival, our_greedy),
}


def step_of(model: nn.Module, waveforms: Tensor, *, tuned: bool, dtype: torch.dtype) -> Callable[[], None]:
    optimizer = torch.optim.Adam(model.parameters(), lr=2e-4, fused=tuned)

    def step() -> None:
        optimizer.zero_grad(set_to_none=True)
        with torch.autocast(waveforms.device.type, dtype=dtype, enabled=dtype != torch.float32):
            if isinstance(model, GreedyInfoMax):
                for output in model.outputs(waveforms):  # A module's activations are freed before the next one runs.
                    output.loss.backward()
            elif isinstance(model, GreedyRival) and tuned:
                for loss in model.each_loss(waveforms):
                    loss.backward()
            else:
                made = model(waveforms)
                (made if isinstance(made, Tensor) else made.loss).backward()
        optimizer.step()

    return step


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--batch-size", type=at_least(1), metavar="B", help="windows per step (default 8, 2 with --quick)"
    )
    parser.add_argument(
        "--repeats", type=at_least(2), metavar="N", help="timed steps of each program (default 3, 2 with --quick)"
    )
    parser.add_argument("--bf16", action="store_true", help="use bfloat16 even without native instructions")
    add_common_arguments(parser)
    arguments = parser.parse_args()
    if arguments.batch_size is None:
        arguments.batch_size = 2 if arguments.quick else 8
    if arguments.repeats is None:
        arguments.repeats = 2 if arguments.quick else 3
    return arguments


def main(arguments: argparse.Namespace) -> None:
    device = torch.device(arguments.device)
    native = torch.bfloat16 if arguments.bf16 else native_dtype(device)
    torch.manual_seed(0)
    waveforms = torch.randn(arguments.batch_size, 1, WINDOW, device=device) / 10
    results = []
    for name, (plain, tuned, ours) in CASES.items():
        models = {"plain": plain(), "tuned": tuned(), "ours": ours(), "ours, float32": ours()}
        if native == torch.float32:
            del models["ours, float32"]
        steps = {
            each: step_of(
                model.to(device),
                waveforms,
                tuned=each != "plain",
                dtype=torch.float32 if each in ("plain", "ours, float32") else native,
            )
            for each, model in models.items()
        }
        times = interleaved(steps, repeats=arguments.repeats, device=device, warmup=1, untimed=0)
        peaks = {each: peak_extra_bytes(call, device) for each, call in steps.items()}
        print(name)
        for each, time in times.items():
            ratio = time.median / times["ours"].median
            print(f"  {each:<15}{time}  {ratio:5.2f} x ours  {peaks[each] / 2**20:8.1f} MiB at the peak", flush=True)
        results.append(
            {"case": name, "seconds": {each: asdict(time) for each, time in times.items()}, "peak_extra_bytes": peaks}
        )
    if arguments.out is not None:
        out = result_file(arguments.out, arguments.device, "speech_steps")
        document = {
            "machine": describe(arguments.device),
            "batch_size": arguments.batch_size,
            "precision": str(native).removeprefix("torch."),
            "complete": True,
            "results": results,
        }
        write_json(out, document)
        print(f"written: {out}")


if __name__ == "__main__":
    main(parse_arguments())
