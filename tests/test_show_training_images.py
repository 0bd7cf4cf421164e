# SPDX-License-Identifier: Apache-2.0
import numpy as np
import pytest
import torch
from conftest import DEMO_CONFIG
from PIL import Image
from test_train_net import TINY, own_data

from detectron2.data import Metadata
from detectron2.structures import Boxes, Instances

from libra_d2.tools.show_training_images import draw, main


@pytest.mark.parametrize("image_format", ["RGB", "BGR"])
def test_draw(image_format):
    """The colors are right, and a box is drawn in its place in the color of its class."""
    image = torch.zeros(3, 40, 400)
    image[image_format.index("R")] = 200
    instances = Instances((40, 400))
    instances.gt_boxes = Boxes(torch.tensor([[100.0, 10, 200, 30]]))
    instances.gt_classes = torch.tensor([1])
    metadata = Metadata(thing_classes=["", ""], thing_colors=[(0, 255, 0), (0, 0, 255)])
    picture = draw({"image": image, "instances": instances}, image_format, metadata)
    assert picture.shape[:2] == (40, 400)
    assert np.abs(picture[20, 20].astype(int) - [200, 0, 0]).max() < 3
    blue = picture[:, :, 2] > 100
    rows, columns = np.nonzero(blue)
    assert abs(rows.min() - 10) < 3
    assert abs(rows.max() - 30) < 3
    assert abs(columns.min() - 100) < 3
    assert abs(columns.max() - 200) < 3
    assert not blue[15:25, 110:190].any()
    assert picture[:, :, 1].max() < 100


def test_program(tmp_path, synthetic, capsys):
    """Pictures of the training images, in the size that the model gets, and what is in them."""
    args = [*own_data(synthetic, "train"), "--num-images", 3, *TINY, "OUTPUT_DIR", tmp_path]
    main(["--config-file", str(DEMO_CONFIG), *map(str, args)])
    paths = sorted((tmp_path / "training_images").iterdir())
    assert [x.name for x in paths] == ["000.jpg", "001.jpg", "002.jpg"]
    assert all(Image.open(x).width >= 400 for x in paths)
    assert "objects; square roots of their areas: median" in capsys.readouterr().out


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
