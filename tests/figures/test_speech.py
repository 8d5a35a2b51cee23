"""Figures of speech: content and positions."""

from __future__ import annotations

import numpy as np
import pytest

from cpc_ext.figures import DepthPanel, accuracy_by_depth, save, speech_by_depth, spoken_frames

NAMES = ["SIL", "AA", "B"]


def drawn(frames, **changed):
    """Five frames of a spectrum, centred from 0.1 s on every 0.02 s."""
    given = {
        "spectrum": np.arange(15.0).reshape(5, 3),
        "labels": np.array([0, 2, 2, 1, 1]),
        "names": NAMES,
        "label_centers": 0.1 + 0.02 * np.arange(5),
        "frame_centers": 0.11 + 0.04 * np.arange(len(frames)),
        "title": "an utterance",
    }
    return spoken_frames(frames=frames, **given | changed)


def at(degrees):
    return np.stack([np.cos(np.radians(degrees)), np.sin(np.radians(degrees))], axis=1)


def test_panels_share_their_time():
    figure = drawn(at(np.array([0.0, 30, 50])))
    spectrum, named, colored, line = figure.axes
    for axes in figure.axes:
        assert axes.get_xlim() == pytest.approx((0.09, 0.19))
    (image,) = spectrum.images
    assert image.get_extent() == pytest.approx([0.09, 0.19, 0, 3])
    np.testing.assert_array_equal(image.get_array(), np.arange(15).reshape(5, 3).T)
    assert image.origin == "lower"
    assert spectrum.get_title() == "an utterance"
    assert [axes.get_ylabel().split()[0] for axes in figure.axes] == ["mel", "phones", "frames", "angle"]
    assert line.get_xlabel() == "seconds"
    # Phones begin and end half a frame from the centres at which they change.
    spans = [(patch.get_x(), patch.get_x() + patch.get_width()) for patch in named.patches]
    np.testing.assert_allclose(spans, [(0.09, 0.11), (0.11, 0.15), (0.15, 0.19)])
    assert [(text.get_text(), round(text.get_position()[0], 3)) for text in named.texts] == [
        ("SIL", 0.1),
        ("B", 0.13),
        ("AA", 0.17),
    ]
    assert len({patch.get_facecolor() for patch in named.patches}) == 2
    assert named.patches[0].get_facecolor() != named.patches[1].get_facecolor()
    assert colored.images[0].get_extent() == pytest.approx([0.09, 0.21, 0, 1])
    np.testing.assert_allclose(line.lines[0].get_xydata(), [(0.15, 30), (0.19, 20)])


def colors(frames):
    """Return the colours of the band, [F, 3]."""
    return np.array(drawn(frames).axes[2].images[0].get_array())[0]


def test_colours_are_principal_components_in_their_order():
    """Frames that vary most along one axis, less along another, least along a third."""
    first, second, third = [9, -9, 0, 0, 0, 0], [0, 0, 4, -4, 0, 0], [0, 0, 0, 0, 1, -1]
    frames = np.stack([third, second, np.zeros(6), first], axis=1) + 7.0
    shown = colors(frames)
    for channel, values in enumerate((first, second, third)):
        low, high = np.quantile(values, [0.02, 0.98])
        np.testing.assert_allclose(shown[:, channel], ((np.array(values) - low) / (high - low)).clip(0, 1), atol=1e-9)
    # Whichever way an eigenvector points, the largest of its entries is positive.
    np.testing.assert_allclose(colors(frames - 2 * (frames - 7)), 1 - shown, atol=1e-9)


def test_frames_of_fewer_directions_than_colours():
    assert colors(np.array([[0.0], [1], [3]]))[:, 1:].tolist() == [[0, 0]] * 3
    assert colors(np.ones((4, 5))).tolist() == [[0, 0, 0]] * 4
    assert drawn(np.zeros((3, 2))).axes[3].lines[0].get_ydata().tolist() == [90, 90]


def test_a_figure_becomes_a_file(tmp_path):
    save(tmp_path / "frames.png", drawn(at(np.arange(4.0))))
    assert (tmp_path / "frames.png").read_bytes()[:4] == b"\x89PNG"


def test_depths_of_phones_and_speakers():
    phones = DepthPanel(
        "phones", {"one": [0.2, 0.5], "two": [0.3, 0.4]}, [0.1, 0.15], {"log-mel": 0.45, "chance": 0.05}
    )
    speakers = DepthPanel("speakers", {"one": [0.6, 0.9]}, [0.5, 0.5], {"chance": 0.01})
    left, right = speech_by_depth([phones, speakers]).axes
    assert (left.get_title(), right.get_title()) == ("phones", "speakers")
    lines = {line.get_label(): line.get_xydata().tolist() for line in left.lines}
    assert lines["one: 50.0%"] == [[1, 0.2], [2, 0.5]]
    assert lines["two: 40.0%"] == [[1, 0.3], [2, 0.4]]
    assert lines["untrained: 15.0%"] == [[1, 0.1], [2, 0.15]]
    assert [y for _, y in lines["log-mel: 45.0%"]] == [0.45, 0.45]
    assert [y for _, y in lines["chance: 5.0%"]] == [0.05, 0.05]
    assert len({(line.get_linestyle(), line.get_color()) for line in left.lines}) == 5
    assert [text.get_text() for text in left.get_legend().get_texts()] == list(lines)
    assert len(right.lines) == 3
    assert left.get_ylim() == right.get_ylim() == (0, 1.02)


def test_depths_of_images_have_a_line_of_chance():
    (axes,) = accuracy_by_depth({"run": [0.2, 0.5]}, [0.1, 0.15], 0.05, "textures").axes
    assert [line.get_label() for line in axes.lines] == ["run: 50.0%", "untrained: 15.0%", "chance: 5.0%"]
    assert axes.lines[-1].get_linestyle() == "--"
    assert "textures" in axes.get_title()
