# SPDX-License-Identifier: Apache-2.0
"""Pictures of an evaluation, and of two detectors side by side."""

import io

import numpy as np
import pytest
import torch
from PIL import ExifTags, Image

from detectron2.data import DatasetCatalog, Metadata, MetadataCatalog
from detectron2.structures import Boxes, BoxMode, Instances
from detectron2.utils.events import EventStorage
from detectron2.utils.visualizer import VisImage

from libra_d2.evaluation import PredictionPictures
from libra_d2.evaluation.panel import join_panels
from libra_d2.evaluation.pictures import picture_scale
from libra_d2.evaluation.side_by_side import draw_side_by_side, match_detections

SAME, OTHER = (0.15, 0.35, 0.75), (1.0, 0.45, 0.0)  # RGB: blue, orange


@pytest.fixture
def halves(monkeypatch):
    """Collects the boxes with their colors, the texts and the pixels of each half picture."""
    found, get_image = [], VisImage.get_image

    def record(self):
        boxes = {tuple(p.get_bbox().extents): p.get_edgecolor()[:3] for p in self.ax.patches}
        found.append((boxes, [t for t in self.ax.texts if t.get_text()], get_image(self)))
        return found[-1][-1]

    monkeypatch.setattr(VisImage, "get_image", record)
    return found


def detections(*rows):
    """Instances of (x0, y0, x1, y1, class, score=0.875)."""
    instances = Instances((100, 100), pred_boxes=Boxes(torch.tensor([r[:4] for r in rows]) * 1.0))
    instances.pred_classes = torch.tensor([r[4] for r in rows])
    instances.scores = torch.tensor([(*r, 0.875)[5] for r in rows])
    return instances


def test_evaluation(tmp_path, halves, monkeypatch):
    """Detections above the threshold and ground truth, in the colors of the classes."""
    shown, records, exif = [], [], Image.Exif()
    exif[ExifTags.Base.Orientation] = 6  # the rows of the file are columns
    monkeypatch.setattr(EventStorage, "put_image", lambda self, *a: shown.append(a))
    for i in range(3):
        path = tmp_path / f"a.{i}.png"
        image = Image.fromarray(np.full((80, 60, 3), (200, 50 * i, 20), np.uint8))
        image.save(path, exif=exif)
        truth = {"bbox": [5.0, 6, 20 + i, 30], "bbox_mode": BoxMode.XYXY_ABS, "category_id": i}
        records.append({"image_id": 9 - i, "file_name": str(path), "annotations": [truth]})
    DatasetCatalog.register("test_pictures", lambda: records)
    colors, classes = [(250, 0, 0), (0, 250, 0), (0, 0, 250)], ["a$b$", "dog", "cow"]
    MetadataCatalog.get("test_pictures").set(thing_classes=classes, thing_colors=colors)
    arguments = ("test_pictures", str(tmp_path / "p"))
    pictures = PredictionPictures(*arguments, num_images=2, min_size=80)
    found = detections((9, 9, 60, 50, 0), (20, 5, 30, 50, 1, 0.5), (40, 9, 70, 50, 2, 0.4375))
    outputs = [{"instances": found}, {"instances": found[2:]}]
    pictures.process(records, 3 * [{"proposals": None}])
    assert not (tmp_path / "p").exists()
    pictures.process(records[:2], outputs)
    pictures.process(records[2:], outputs)  # not drawn: it is the third
    assert len(halves) == 4
    with EventStorage():
        pictures.reset()
        pictures.process(records[2:], outputs)
    assert (pictures.num_drawn, pictures.evaluate()) == (1, None)
    assert sorted(x.name for x in (tmp_path / "p").iterdir()) == [f"a.{i}.jpg" for i in range(3)]
    ((name, image),) = shown
    assert name == "validation/a.2"
    captions = ["detections", "ground truth"]
    last = join_panels([halves[4][2], halves[5][2]], captions)
    assert np.array_equal(image, last.transpose(2, 0, 1))
    drawn = ({(9, 9, 60, 50): 0, (20, 5, 30, 50): 1}, ["a\\$b\\$ 88%", "dog 50%"])
    for i, expected in enumerate((drawn, ({}, []), drawn)):
        truth = ({(5, 6, 20 + i, 30): i}, [["a\\$b\\$", "dog", "cow"][i]])
        for (boxes, texts, _), (ids, labels) in zip(halves[2 * i :], (expected, truth)):
            assert [t.get_text() for t in texts] == labels
            assert boxes.keys() == ids.keys()
            for box, color in boxes.items():
                assert color == pytest.approx(np.divide(colors[ids[box]], 255))
        file = io.BytesIO()
        picture = join_panels([halves[2 * i][2], halves[2 * i + 1][2]], captions)
        Image.fromarray(picture).save(file, "JPEG", quality=92)
        assert (tmp_path / f"p/a.{i}.jpg").read_bytes() == file.getvalue()
    assert (halves[2][2] == (200, 50, 20)).all()
    PredictionPictures(*arguments, num_images=1).process(records[:1], outputs)
    assert Image.open(tmp_path / "p/a.0.jpg").size == (812, 328)
    for root, name in (
        (str(tmp_path.parent), f"{tmp_path.name}-a.1"),
        ("/elsewhere", "a.1"),
        ("/", "a.1"),
    ):
        pictures = PredictionPictures(*arguments, num_images=1)
        pictures.image_root = root
        for path in (tmp_path / "p").iterdir():
            path.unlink()
        pictures.process(records[1:2], outputs)
        assert [x.name for x in (tmp_path / "p").iterdir()] == [f"{name}.jpg"]


@pytest.mark.parametrize(
    ("height", "width", "expected"),
    [(100, 200, 2.0), (100, 800, 1.0), (2000, 100, 2.0), (900, 100, 4.0), (5000, 6000, 1.0)],
)
def test_scale(height, width, expected):
    """At least 400 pixels wide, but no side is enlarged beyond 4000."""
    assert picture_scale(np.zeros((height, width, 3), np.uint8), 400) == expected


def test_match_detections():
    """Same class, enough overlap, and greedy one-to-one matching."""
    theirs = detections((0, 0, 10, 10, 1), (50, 50, 60, 60, 2))
    ours = detections((0, 0, 10, 9, 1), (0, 1, 10, 10, 1), (50, 50, 60, 60, 1), (50, 50, 60, 55, 2))
    assert match_detections(ours, theirs).tolist() == [True, False, False, True]
    assert match_detections(ours, theirs, 0.51).tolist() == [True, False, False, False]
    assert match_detections(ours, theirs[:0]).tolist() == [False] * 4
    assert match_detections(ours[:0], theirs).tolist() == []
    theirs = detections((0, 0, 10, 8, 1), (0, 0, 10, 10, 1))
    ours = detections((0, 0, 10, 9.5, 1), (0, 0, 10, 10, 1), (0, 0, 10, 10, 1))
    assert match_detections(ours, theirs).tolist() == [True, True, False]


@pytest.mark.parametrize("names", [["cat", "dog", "cow"], ["0", "1", "2"]])
def test_side_by_side(halves, names):
    """Common detections are blue and without label; captions count the others."""
    image = np.full((48, 64, 3), 60, np.uint8)
    metadata = Metadata(thing_classes=names) if "cat" in names else Metadata()
    left = detections((2, 10, 20, 40, 1, 0.75), (30, 20, 40, 30, 2, 0.5), (50, 9, 60, 18, 0, 0.25))
    right = detections((2, 10, 20, 39, 1, 0.5), (30, 20, 50, 44, 2, 0.125))
    picture = draw_side_by_side(image, metadata, (left, right))
    captions = ["plain: 3 objects, 2 only here", "Libra: 2 objects, 1 only here"]
    assert np.array_equal(picture, join_panels([half[-1] for half in halves], captions))
    assert picture.shape == (42 + 480, 640 + 12 + 640, 3)
    expected = [
        (left, (SAME, OTHER, OTHER), [f"{names[2]} 50%", f"{names[0]} 25%"]),
        (right, (SAME, OTHER), [f"{names[2]} 12%"]),
    ]
    for (boxes, texts, _), (found, colors, labels) in zip(halves, expected):
        assert boxes == dict(zip(map(tuple, found.pred_boxes.tensor.tolist()), colors))
        assert [t.get_text() for t in texts] == labels
