# SPDX-License-Identifier: Apache-2.0
"""The schematics show what the code computes."""

import numpy as np
import pytest
from PIL import Image

from libra_d2.tools.draw_ideas import main, plot_loss, plot_pyramid, plot_sampling


def test_sampling():
    """All, 12 at random and 4 from each bin; the counts are those of the circles."""
    (axis,) = plot_sampling().axes
    assert [x.get_text() for x in axis.get_yticklabels()] == [
        *("all", "at random", "equally from\neach bin")
    ]
    borders = [0, 1 / 6, 1 / 3, 1 / 2]
    assert [line.get_xdata()[0] for line in axis.lines] == pytest.approx(borders)
    circles = [np.array(x.get_offsets()) for x in axis.collections]
    filled = [len(x.get_facecolor()) > 0 for x in axis.collections]
    assert filled == [False, True] * 3
    left, drawn = circles[::2], circles[1::2]
    counts = [np.histogram(x[:, 0], borders)[0].tolist() for x in (left[0], *drawn[1:])]
    assert counts == [[60, 14, 6], [9, 2, 1], [4, 4, 4]]
    assert [len(x) for x in (*left, *drawn)] == [80, 68, 68, 0, 12, 12]
    for y, (hollow, full) in enumerate(zip(left, drawn)):
        iou, height = np.concatenate([hollow, full]).T
        assert sorted(iou) == pytest.approx(sorted(left[0][:, 0]))
        assert np.abs(height - y).max() < 0.27
    texts = [x.get_text() for x in axis.texts]
    assert texts[:3] == ["60 negatives", "14 negatives", "6 negatives"]
    assert texts[3:] == [f"{n} drawn" for n in (9, 2, 1, 4, 4, 4)]


def test_pyramid():
    """Each stage follows from the one before it; all have the same color scale."""
    axes = plot_pyramid().axes
    arrays = [np.array(axis.images[0].get_array()) for axis in axes]
    levels, resized, (average, refined) = arrays[:4], arrays[4:8], arrays[8:10]
    back, added = arrays[10:14], arrays[14:]
    assert [len(x) for x in levels + added] == [16, 8, 4, 2] * 2
    for level, at_one_size in zip(levels[1:], resized[1:]):
        assert np.array_equal(
            at_one_size, level.repeat(8 // len(level), 0).repeat(8 // len(level), 1)
        )
    assert np.array_equal(resized[0], levels[0].reshape(8, 2, 8, 2).max(axis=(1, 3)))
    assert average == pytest.approx(sum(resized) / 4)
    x = average.flatten()
    attention = np.exp(np.outer(x, x))
    attention /= attention.sum(axis=1, keepdims=True)
    assert refined.flatten() == pytest.approx(x + attention @ x, rel=1e-5)
    assert back[0] == pytest.approx(refined.repeat(2, 0).repeat(2, 1), abs=1e-6)
    assert back[3] == pytest.approx(refined.reshape(2, 4, 2, 4).max(axis=(1, 3)), abs=1e-6)
    for level, change, result in zip(levels, back, added):
        assert result == pytest.approx(level + change, abs=1e-6)
    largest = max(x.max() for x in arrays)
    assert {axis.images[0].get_clim() for axis in axes} == {(0, largest)}


def test_loss():
    """The gradients of the paper: alpha * ln(b * x + 1) with b = exp(gamma / alpha) - 1."""
    (axis,) = plot_loss().axes
    *curves, border = axis.lines
    curves = {line.get_label(): line.get_xydata().T for line in curves}
    for alpha in (0.5, 0.2):
        x, y = curves.pop(f"balanced L1, alpha {alpha}")
        b = np.exp(1.5 / alpha) - 1
        assert y == pytest.approx(np.where(x < 1, alpha * np.log(b * x + 1), 1.5), rel=1e-4)
    x, y = curves.pop("smooth L1")
    assert y == pytest.approx(np.minimum(x, 1), rel=1e-4)
    assert not curves
    assert list(border.get_xdata()) == [1, 1]
    (gained,) = axis.collections
    assert gained.get_datalim(axis.transData).intervalx.tolist() == pytest.approx([0.01, 1])


def test_files(tmp_path, refused):
    main([str(tmp_path / "a")])
    names = ["balanced_feature_pyramid.png", "balanced_l1_loss.png", "balanced_sampling.png"]
    assert sorted(x.name for x in (tmp_path / "a").iterdir()) == names
    assert {Image.open(tmp_path / "a" / name).width for name in names} == {1200}
    (tmp_path / "b").write_text("a file")
    assert f"folder: {tmp_path}/b" in refused(main, [str(tmp_path / "b")])
