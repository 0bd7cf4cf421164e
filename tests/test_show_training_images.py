# SPDX-License-Identifier: Apache-2.0
import json

import numpy as np
import pytest
import torch
from conftest import DEMO_CONFIG
from PIL import Image
from test_train_net import TINY, own_data, small_data

from detectron2.data import DatasetCatalog, Metadata
from detectron2.structures import BitMasks, Boxes, Instances
from detectron2.utils.visualizer import Visualizer

from libra_d2.tools.show_training_images import draw, main


@pytest.mark.parametrize("image_format", ["RGB", "BGR"])
def test_draw(image_format, monkeypatch):
    """The colors are right; a box and a mask are in their place, in the color of their class."""
    texts = []
    monkeypatch.setattr(Visualizer, "draw_text", lambda *args, **kwargs: texts.append(args[1]))
    image = torch.zeros(3, 40, 400)
    image[image_format.index("R")] = 200
    instances = Instances((40, 400))
    instances.gt_boxes = Boxes(torch.tensor([[100.0, 10, 200, 30]]))
    instances.gt_classes = torch.tensor([1])
    instances.gt_masks = BitMasks(torch.zeros(1, 40, 400))
    instances.gt_masks.tensor[0, 15:25, 180:190] = True
    metadata = Metadata(thing_classes=["a", "b"], thing_colors=[(0, 255, 0), (0, 0, 255)])
    picture = draw({"image": image, "instances": instances}, image_format, metadata)
    assert picture.shape[:2] == (40, 400)
    assert np.abs(picture[20, 20].astype(int) - [200, 0, 0]).max() < 3
    blue = picture[:, :, 2] > 100
    rows, columns = np.nonzero(blue)
    assert abs(rows.min() - 10) < 3
    assert abs(rows.max() - 30) < 3
    assert abs(columns.min() - 100) < 3
    assert abs(columns.max() - 200) < 3
    assert not blue[15:25, 110:170].any()
    assert blue[17:23, 182:188].all()
    assert texts == ["b"]
    assert picture[:, :, 1].max() < 100


def test_program(tmp_path, capsys, refused):
    """
    Pictures of the training images, twice as large for the model, in the order of the seed, and the
    sizes of the objects in them: the root of 64 x 48 and, in the second image, of 16 x 12.
    """
    data, orders = small_data(tmp_path / "data"), set()
    for i, color in ((1, (200, 0, 0)), (2, (200, 90, 0))):
        Image.new("RGB", (64, 48), color).save(data / f"images/{i}.png")
    content = json.loads((data / "instances.json").read_text())
    content["annotations"][1]["bbox"] = [8, 8, 8, 6]
    (data / "instances.json").write_text(json.dumps(content))
    args = [*own_data(data, "train"), "--num-images", 2, *TINY, "OUTPUT_DIR", tmp_path]
    for seed in range(5):
        opts = [*args, "INPUT.FORMAT", "BGR", "SEED", seed]
        main(["--config-file", str(DEMO_CONFIG), *map(str, opts)])
        paths = sorted((tmp_path / "training_images").iterdir())
        assert [x.name for x in paths] == ["000.jpg", "001.jpg"]
        corners = [np.array(Image.open(x))[-1, -1].astype(int) for x in paths]
        orders.add(tuple(corner[1] > 45 for corner in corners))
        assert all(corner[0] > 190 > 10 > corner[2] for corner in corners)
        assert all(Image.open(x).width >= 400 for x in paths)
        text = "median 35 pixels, 90% of them between 16 and 53"
        assert f"2 objects; square roots of their areas: {text}" in capsys.readouterr().out
    assert orders == {(False, True), (True, False)}
    command = ["--config-file", str(DEMO_CONFIG), *map(str, args), "MODEL.LOAD_PROPOSALS", "True"]
    assert "DATASETS.PROPOSAL_FILES_TRAIN" in refused(main, command)


def test_images_stay(tmp_path, refused, monkeypatch):
    """Pictures are not written over the images that they are of, be it of the second dataset."""
    data, images = small_data(tmp_path / "data"), tmp_path / "training_images"
    (data / "images").rename(images)
    (images / "1.png").rename(images / "000.jpg")
    text = (data / "instances.json").read_text().replace("1.png", "000.jpg")
    (data / "instances.json").write_text(text)
    own = ["--train-json", data / "instances.json", "--train-images", images]
    monkeypatch.setitem(DatasetCatalog.data, "test_show_empty", list)
    before = (images / "000.jpg").read_bytes()
    for options in (own, ["DATASETS.TRAIN", "('test_show_empty', 'own_train')"]):
        args = ["--config-file", DEMO_CONFIG, *options, *TINY, "OUTPUT_DIR", tmp_path]
        error = refused(main, [str(x) for x in args])
        message = f"{images}/000.jpg and an image of own_train, {images}/000.jpg, are the same"
        assert message in error
        assert (images / "000.jpg").read_bytes() == before


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["--num-images", "0"], "--num-images is 0"),
        (["DATASETS.TRAIN", "()"], "no images: use --train-json"),
        (["DATASETS.TRAIN", "('none',)"], "'none' is not a registered dataset"),
    ],
)
def test_bad_arguments(args, message, tmp_path, refused, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert message in refused(main, ["--config-file", str(DEMO_CONFIG), "--num-images", "1", *args])
