"""Contrastive predictive coding of speech in a training loop of your own.

    python python/examples/loop_cpc_audio.py [--steps 300] [--out model.pt]

To use it, replace the generated voices by your recordings, a WaveformSet of int16 samples at 16 kHz.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch

from cpc_ext.data import WaveformFetcher, WindowSampler
from cpc_ext.data.audio.drawn.voices import make_voices
from cpc_ext.models import CPC, RecurrentContext, WaveformEncoder
from cpc_ext.nn import SequenceInfoNCE

# Samples in a window: 1.28 seconds.
WINDOW = 20480


def make_model() -> CPC:
    encoder = WaveformEncoder(128)  # A frame every 10 ms.
    context = RecurrentContext(encoder.out_channels, 128, kind="gru")
    objective = SequenceInfoNCE(encoder.out_channels, context.out_channels, pred_steps=12, neg_samples=10)
    return CPC(encoder, context, objective)


def main(arguments: Sequence[str] | None = None) -> list[float]:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--utterances", type=int, default=11, help="utterances to generate of each of 16 voices (default 11)"
    )
    parser.add_argument("--steps", type=int, default=300, help="number of updates (default 300)")
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--lr", type=float, default=1e-3)
    parser.add_argument("--out", type=Path, help="file to save the model's weights to")
    options = parser.parse_args(arguments)

    torch.manual_seed(0)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    voices = make_voices(options.utterances)
    windows = WindowSampler(voices, options.batch_size, window=WINDOW)
    fetch = WaveformFetcher(voices, device, WINDOW)
    model = make_model().to(device)
    optimizer = torch.optim.Adam(model.parameters(), options.lr)

    losses: list[float] = []
    while len(losses) < options.steps:
        for starts in windows:
            output = model(fetch(starts))
            optimizer.zero_grad()
            output.loss.backward()
            optimizer.step()
            losses.append(output.loss.item())
            if len(losses) % 20 == 0 or len(losses) == options.steps:
                print(f"step {len(losses)}: loss {losses[-1]:.3f}, accuracy {output.accuracy.item():.1%}")
            if len(losses) == options.steps:
                break

    with torch.no_grad():
        recording = torch.from_numpy(np.array(voices.recording(0))).to(device).view(1, 1, -1)
        features = model.contextualize(model.encode(recording))[0].T
    print(f"features of a recording, a row every 10 ms: {list(features.shape)}")
    if options.out is not None:
        torch.save(model.state_dict(), options.out)
    return losses


if __name__ == "__main__":
    main()
