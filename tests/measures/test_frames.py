"""Frames and labels, paired by their centres and as the published programs do."""

from __future__ import annotations

import pytest
import torch

from cpc_ext.measures.frames import align_frames, label_centers, one_frame_a_label

# The sample that the first frame of Greedy InfoMax's encoder is centred at, and that of CPC_audio's.
GREEDY, CPC_AUDIO = 20.0, 79.0


def frame_centers(count, first, hop=160):
    return first + hop * torch.arange(count, dtype=torch.float64)


def pairs(*arguments):
    frames, labels = align_frames(*arguments)
    assert frames.dtype == labels.dtype == torch.int64
    return frames.tolist(), labels.tolist()


def test_labels_lie_on_kaldis_grid():
    centers = label_centers(3)
    assert centers.tolist() == [200, 360, 520]
    assert centers.dtype == torch.float64


@pytest.mark.parametrize(("first", "shift"), [(GREEDY, 1), (CPC_AUDIO, 1), (150.0, 0), (199.0, 0), (281.0, -1)])
def test_frames_get_the_nearest_label(first, shift):
    """Frame i is nearest to label i - 1: of Greedy InfoMax 20 samples before its centre, of CPC_audio 39 after it."""
    frames, labels = pairs(frame_centers(12, first), label_centers(10))
    assert labels == [frame - shift for frame in frames]
    assert frames == [frame for frame in range(12) if 0 <= frame - shift < 10]


def test_a_frame_in_the_middle_gets_the_earlier_label_and_the_edges_are_half_a_hop_away():
    assert pairs(torch.tensor([119, 120, 280, 440, 600, 601]), label_centers(3)) == ([1, 2, 3, 4], [0, 0, 1, 2])


def test_several_frames_may_have_one_label_and_a_label_none():
    """An encoder's first layer has a frame every 5 samples; another one every 400."""
    frames, labels = pairs(frame_centers(100, 122, hop=5), label_centers(3))
    assert frames == list(range(96))
    assert torch.tensor(labels).bincount().tolist() == [32, 32, 32]
    assert pairs(frame_centers(3, 200, hop=400), label_centers(6)) == ([0, 1, 2], [0, 2, 5])


def test_one_frame_a_label_is_the_nearest():
    centers, at = torch.tensor([118.0, 121, 199, 202, 358, 362, 440, 700]), label_centers(3)
    frames, labels = one_frame_a_label(align_frames(centers, at), centers, at)
    assert (frames.tolist(), labels.tolist()) == ([2, 4], [0, 1])
    centers = frame_centers(10, GREEDY)
    pairs = align_frames(centers, label_centers(8))
    for kept, every in zip(one_frame_a_label(pairs, centers, label_centers(8)), pairs, strict=True):
        assert torch.equal(kept, every)
    none = one_frame_a_label(align_frames(torch.empty(0), label_centers(3)), torch.empty(0), label_centers(3))
    assert [len(each) for each in none] == [0, 0]


def test_one_label_reaches_half_a_hop_and_none_has_no_frames():
    assert pairs(torch.tensor([100.0, 130, 270, 290]), label_centers(1)) == ([1, 2], [0, 0])
    for how in ("centers", "front", "same-index"):
        assert pairs(torch.tensor([100.0, 130]), label_centers(0), how) == ([], [])
        assert pairs(torch.empty(0), label_centers(3), how) == ([], [])


def test_the_programs_alignments():
    """1121 and 1120 frames of 1119 labels, as of the first labelled file in CPC_audio's test data."""
    frames, labels = pairs(frame_centers(1121, GREEDY), label_centers(1119), "front")
    assert frames == list(range(2, 1121))
    assert labels == list(range(1119))
    # The frame lies 140 samples after its label's centre.
    assert (frame_centers(1121, GREEDY)[frames] - label_centers(1119)[labels]).unique().tolist() == [140]
    frames, labels = pairs(frame_centers(1120, CPC_AUDIO), label_centers(1119), "same-index")
    assert frames == labels == list(range(1119))
    assert (frame_centers(1120, CPC_AUDIO)[frames] - label_centers(1119)[labels]).unique().tolist() == [-121]


@pytest.mark.parametrize("how", ["front", "same-index"])
def test_fewer_frames_than_labels_leave_labels_out(how):
    assert pairs(frame_centers(3, 0), label_centers(5), how) == ([0, 1, 2], [0, 1, 2])


def test_wrong_arguments():
    with pytest.raises(ValueError, match="how: expected one of centers, front, same-index, got 'nearest'"):
        align_frames(frame_centers(3, 0), label_centers(5), "nearest")
    with pytest.raises(ValueError, match="frame_centers: expected ascending samples"):
        align_frames(frame_centers(3, 0).flip(0), label_centers(5))
    with pytest.raises(ValueError, match="label_centers: expected ascending samples"):
        align_frames(frame_centers(3, 0), torch.tensor([1.0, 1.0]))
