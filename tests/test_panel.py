# SPDX-License-Identifier: Apache-2.0
import numpy as np
import pytest

from detectron2.data import Metadata
from detectron2.utils.visualizer import ColorMode

from libra_d2.evaluation.panel import Panel, join_panels

GRAY = 128


def draw(boxes, labels, height=200, width=300, scale=2.0):
    """A panel with labeled boxes, and the areas of its labels: x0, y0, x1, y1, y downwards."""
    panel = Panel(np.full((height, width, 3), GRAY, np.uint8), Metadata(), scale)
    panel.overlay_instances(boxes=np.array(boxes, float), labels=labels)
    renderer = panel.output.canvas.get_renderer()
    areas = [text.get_window_extent(renderer).extents for text in panel.output.ax.texts]
    bottom = height * scale
    return panel, [(x0, bottom - y1, x1, bottom - y0) for x0, y0, x1, y1 in areas]


@pytest.mark.parametrize(
    ("height", "width", "scale", "pixels"),
    [(350, 350, 1.0, 11), (700, 700, 1.0, 20), (700, 700, 2.0, 40), (350, 1400, 1.0, 20)],
)
def test_size_of_labels(height, width, scale, pixels):
    """It is that of the picture by 35, at least 11 pixels, whatever the size of the box."""
    boxes = [(10, 40, 40, 50), (100, 100, 300, 300)]
    panel, _ = draw(boxes, ["a", "b"], height, width, scale)
    points = [text.get_fontsize() for text in panel.output.ax.texts]
    assert points == pytest.approx([pixels * 72 / 100] * 2)  # at 100 dots per inch


@pytest.mark.parametrize(
    ("box", "edges"),
    [
        *(((280, 50, 299, 150), {2: 598}), ((5, 180, 295, 199), {2: 598})),
        *(((-30, -30, 60, 60), {0: 2, 1: 2}), ((100, 180, 110, 194), {3: 398})),
    ],
)
def test_labels_lie_within_the_picture(box, edges):
    """Those that would not are two pixels away from its edge."""
    ((x0, y0, x1, y1),) = draw([box], ["a long label"])[1]
    assert min(x0, y0, 600 - x1, 400 - y1) >= 0
    found = {i: (x0, y0, x1, y1)[i] for i in edges}
    assert found == pytest.approx(edges, abs=0.1)  # the figure is 0.01 pixels larger


def test_labels_avoid_each_other():
    """Labels at the same place are put above and below; where none is free, they stay in place."""
    areas = draw([(100, 80, 200, 150)] * 6, [*"aaaaaa"])[1]
    assert areas[5] == pytest.approx(areas[0])
    rows = np.array([0, -1, 1, -2, 2]) * (areas[0][3] - areas[0][1] + 4)  # 2 pixels around each
    assert [a[1] for a in areas[:5]] == pytest.approx(areas[0][1] + rows)
    panel, _ = draw([(10, 50, 90, 150), (110, 50, 190, 150)], ["a", "a"])
    places = np.array([text.get_position() for text in panel.output.ax.texts])
    assert places == pytest.approx(np.array([(10, 50), (110, 50)]))
    assert draw([(10, 40, 90, 150)], [""])[1] == []


@pytest.mark.parametrize("box", [(5, 0, 295, 150), (100, 180, 110, 194)])
def test_labels_avoid_each_other_at_an_edge(box):
    """They stay in the picture."""
    areas = draw([box] * 3, [*"aaa"])[1]
    assert min(y0 for _, y0, _, _ in areas) >= 0
    assert max(y1 for *_, y1 in areas) <= 400


def test_one_color_for_a_class():
    """Of three objects, of the second class the last two."""
    metadata = Metadata(thing_classes=["a", "b"], thing_colors=[(255, 0, 0), (0, 51, 255)])
    panel = Panel(np.full((90, 90, 3), GRAY, np.uint8), metadata, 1.0, ColorMode.SEGMENTATION)
    boxes = [(5, 5, 85, 85), (5, 5, 65, 65), (5, 5, 45, 45)]
    objects = [{"bbox": b, "bbox_mode": 0, "category_id": i > 0} for i, b in enumerate(boxes)]
    panel.draw_dataset_dict({"annotations": objects})
    colors = [patch.get_edgecolor() for patch in panel.output.ax.patches]
    assert np.array(colors) == pytest.approx(np.array([(1, 0, 0, 0.9), *[(0, 0.2, 1, 0.9)] * 2]))


def strip_of(picture):
    """Where light pixels are in the captions above panels of 60 rows: columns, and rows."""
    light = picture[:-60].max(axis=2) > 150
    return light.any(axis=0).nonzero()[0], light.any(axis=1).nonzero()[0]


def test_join():
    """Captions, each over the middle of its panel, and a light divider between dark lines."""
    panels = [np.full((60, 90, 3), value, np.uint8) for value in (100, 130)]
    picture = join_panels(panels, ["left", ""])
    assert picture.shape == (28 + 60, 90 + 12 + 90, 3)
    assert np.array_equal(picture[28:, :90], panels[0])
    assert np.array_equal(picture[28:, 102:], panels[1])
    assert (picture[28:, 90:102, 0] == [32] * 4 + [255] * 4 + [32] * 4).all()
    columns, rows = strip_of(picture)
    assert (columns[0] + columns[-1]) / 2 == pytest.approx(45, abs=2)
    assert (rows[0] + rows[-1]) / 2 == pytest.approx(14, abs=3)
    columns, _ = strip_of(join_panels(panels, ["", "right"]))
    assert (columns[0] + columns[-1]) / 2 == pytest.approx(102 + 45, abs=2)


def test_long_captions_are_smaller():
    panels = [np.zeros((60, 90, 3), np.uint8)] * 2
    columns, rows = strip_of(join_panels(panels, ["a caption which is long", ""]))
    assert columns[-1] < 90
    assert np.ptp(rows) < np.ptp(strip_of(join_panels(panels, ["a capt", ""]))[1])
    assert join_panels([np.zeros((60, 900, 3), np.uint8)] * 2, ["a", "b"]).shape[0] == 120
