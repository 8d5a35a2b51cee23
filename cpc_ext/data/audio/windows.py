"""Sampling of batches of windows of recordings; a window is given by the sample at which it begins.

Each epoch cuts stretches of sound (all recordings together, those of a speaker, or each one) into windows that do not
overlap, from a random offset on, or takes one window of every recording. The stretches from which a batch takes its
windows determine its negatives.
"""

from __future__ import annotations

from typing import Literal, get_args

import numpy as np

from cpc_ext.data.audio.dataset import LABEL_STEP, WaveformSet
from cpc_ext.data.notice import LeftOut, tell
from cpc_ext.data.sampler import BatchSampler, BatchTooLargeError

WindowKind = Literal["recordings", "uniform", "same-speaker", "same-sequence", "sequential"]
KINDS: tuple[str, ...] = get_args(WindowKind)
WINDOW = 20480


class WindowSampler(BatchSampler):
    """Yields batches of windows as int64 [B], the samples at which they begin; one pass is an epoch.

    waveforms: recordings to cut windows out of. window: samples of a window.
    kind: "recordings" takes one window of every recording in an epoch, beginning at a random multiple of 10 ms, as
        Greedy InfoMax does. The others cut sound into windows, as CPC_audio does. A batch then has windows of all
        recordings ("uniform"), of one speaker or of one recording ("same-speaker", "same-sequence"), or each position
        in the batch walks through its own share of all sound, in order ("sequential").
    cross_borders: cut "uniform" and "sequential" windows out of all recordings end to end, and "same-speaker" windows
        out of all of a speaker's, so that a window may hold the end of a recording and the beginning of the next.
        Otherwise, and for the other kinds, windows lie within recordings, and shorter recordings are left out; a
        warning names them.
    drop_last: make full batches only. Otherwise the remaining windows of a speaker or recording make a smaller batch,
        as in CPC_audio.
    batch_size, seed, rank, world_size: see :class:`BatchSampler`.

    Raises ValueError if no batch can be made.
    """

    def __init__(
        self,
        waveforms: WaveformSet,
        batch_size: int,
        *,
        window: int = WINDOW,
        kind: WindowKind = "recordings",
        cross_borders: bool = True,
        seed: int = 0,
        drop_last: bool = True,
        rank: int = 0,
        world_size: int = 1,
    ) -> None:
        super().__init__(batch_size, seed=seed, drop_last=drop_last, rank=rank, world_size=world_size)
        if window < 1:
            raise ValueError(f"window: expected at least 1 sample, got {window}")
        if kind not in KINDS:
            raise ValueError(f"kind: expected one of {', '.join(KINDS)}, got {kind!r}")
        if kind == "sequential" and not drop_last:
            raise ValueError("drop_last: must be True for sequential windows, each place of a batch having its share")
        self.waveforms = waveforms
        self.window = window
        self.kind = kind
        self.cross_borders = cross_borders
        self._starts, lengths, groups = self._stretches()
        # Half a window stays free, so that every epoch can cut at another offset, unless it would leave no window.
        self._counts = np.maximum((lengths - window // 2) // window, lengths >= window)
        if kind == "recordings":
            self._counts = np.minimum(self._counts, 1)
        self._free = lengths - self._counts * window
        self._groups = np.repeat(groups, self._counts)
        if not len(self._groups):
            raise ValueError(f"window: expected at most {lengths.max(initial=0)} samples, got {window}")
        self._batches, self._sizes = self._plan()
        self._tell(lengths, groups)

    def _stretches(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Return the stretches to cut into windows: starts and lengths in samples, and groups that share no batch."""
        starts = self.waveforms.starts
        groups = np.zeros(len(self.waveforms), np.int64)
        if self.kind == "same-speaker":
            groups = self.waveforms.known_speakers
        elif self.kind == "same-sequence":
            groups = np.arange(len(self.waveforms))
        if self.cross_borders and self.kind in ("uniform", "sequential", "same-speaker"):
            groups, first = np.unique(groups, return_index=True)
            return starts[first], np.diff(np.append(starts[first], starts[-1])), groups
        return starts[:-1], np.diff(starts), groups

    def _plan(self) -> tuple[np.ndarray, np.ndarray]:
        """Return each window's batch (-1 for none), with windows in the order of their groups, and the batch sizes."""
        if self.kind == "sequential":
            share = len(self._groups) // self.batch_size
            batches = np.arange(len(self._groups)) % max(share, 1)
            batches[share * self.batch_size :] = -1
        else:
            _, groups, counts = np.unique(self._groups, return_inverse=True, return_counts=True)
            place = np.arange(len(groups)) - (np.cumsum(counts) - counts)[groups]
            of_group = counts // self.batch_size if self.drop_last else -(-counts // self.batch_size)
            batches = place // self.batch_size
            batches = np.where(batches < of_group[groups], batches + (np.cumsum(of_group) - of_group)[groups], -1)
        if not (batches >= 0).any():
            most = np.unique(self._groups, return_counts=True)[1].max()
            raise BatchTooLargeError(int(most), f"{self.kind} windows", self.batch_size)
        return batches, np.bincount(batches[batches >= 0])

    def __len__(self) -> int:
        return len(self._sizes)

    @property
    def mean_batch(self) -> float:
        return float(self._sizes.mean())

    def _drawn(self, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
        step = LABEL_STEP if self.kind == "recordings" else 1
        begins = self._starts + step * rng.integers(0, self._free // step, endpoint=True)
        before = np.cumsum(self._counts) - self._counts
        number = np.arange(len(self._groups)) - np.repeat(before, self._counts)
        windows = np.repeat(begins, self._counts) + number * self.window
        order = np.arange(len(self))
        if self.kind != "sequential":
            # Shuffle the windows, then sort them by group: a stable sort keeps the random order within groups.
            mixed = rng.permutation(len(windows))
            windows = windows[mixed[np.argsort(self._groups[mixed], kind="stable")]]
            order = rng.permutation(len(self))
        taken = self._batches >= 0
        place = np.empty(len(self), np.int64)
        place[order] = np.arange(len(self))
        windows = windows[taken][np.argsort(place[self._batches[taken]], kind="stable")]
        return windows, np.append(0, np.cumsum(self._sizes[order]))

    def load_state_dict(self, state: dict[str, int]) -> None:
        then = state.get("drop_last", self.drop_last)
        if then != self.drop_last:
            raise ValueError(
                f"a single process takes {self.kind} windows that are too few for a batch, several leave them out: go "
                f"on with {'several' if then else 'one'}, as before"
            )
        super().load_state_dict(state)

    def _order(self) -> dict[str, int]:
        return {
            "count": len(self._groups),
            "samples": len(self.waveforms.samples),
            "batch_size": self.batch_size,
            "window": self.window,
            "kind": KINDS.index(self.kind),
            "cross_borders": int(self.cross_borders),
            "seed": self.seed,
            "drop_last": int(self.drop_last),
        }

    def _tell(self, lengths: np.ndarray, groups: np.ndarray) -> None:
        """Warn once of recordings or speakers that are in no batch."""
        left_out = LeftOut("recordings")
        whole = len(lengths) == len(self.waveforms)
        used = set(self._groups[self._batches >= 0].tolist())
        for number in range(len(lengths)) if whole else ():
            if not self._counts[number]:
                left_out.add(self.waveforms.names[number], f"shorter than a window of {self.window} samples")
            elif int(groups[number]) not in used:
                left_out.add(
                    self.waveforms.names[number], f"too few {self.kind} windows for a batch of {self.batch_size}"
                )
        lines = left_out.lines()
        if not whole and len(used) < len(groups):
            lines.append(
                f"{len(groups) - len(used)} of {len(groups)} speakers have too few windows for a batch of "
                f"{self.batch_size}, and are left out"
            )
        tell(f"{self.kind} windows", lines)
