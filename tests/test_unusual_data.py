# SPDX-License-Identifier: Apache-2.0
"""Unusual but legal images and annotations, and images that break during training."""

import shutil

import pytest
import torch
from conftest import DEMO_CONFIG, ROOT, build_model, demo_cfg
from test_train_net import TINY, fails, own_data

from detectron2.structures import Boxes, Instances
from detectron2.utils.events import EventStorage

BOX = [4.0, 4, 34, 34]
UNUSUAL = {  # height and width of an image, and its boxes
    "no objects, or nothing but crowds": ((64, 80), []),
    "single pixels": ((64, 80), [[i, i, i + 1, i + 1] for i in range(20)]),
    "less than a pixel": ((64, 80), [[3, 3, 3.1, 3.1], [70.5, 2, 70.51, 11]]),
    "many objects": ((64, 80), [[i % 75, i % 59, i % 75 + 5, i % 59 + 3] for i in range(500)]),
    "the same box": ((64, 80), [BOX] * 9),
    "the whole image": ((64, 80), [[0, 0, 80, 64]]),
    "wide": ((8, 640), [[0, 0, 640, 8], [5, 2, 8, 5]]),
    "high": ((640, 8), [[0, 0, 8, 640]]),
}


@pytest.mark.parametrize("system", ["libra_faster_rcnn", "libra_retinanet"])
def test_finite_losses(system):
    """Losses and gradients are finite for all images, each in a batch with an ordinary one."""
    model = build_model(demo_cfg(ROOT / f"configs/Demo/{system}_R_18_FPN.yaml"))
    for name, unusual in UNUSUAL.items():
        batch = []
        for (height, width), boxes in (unusual, ((64, 80), [BOX])):
            instances = Instances((height, width))
            instances.gt_boxes = Boxes(torch.tensor(boxes).view(-1, 4))
            instances.gt_classes = torch.zeros(len(boxes), dtype=torch.long)
            batch.append({"image": 255 * torch.rand(3, height, width), "instances": instances})
        with EventStorage():
            losses = model(batch)
        model.zero_grad()
        sum(losses.values()).backward()
        gradients = [x.grad for x in model.parameters() if x.grad is not None]
        assert all(torch.isfinite(x).all() for x in (*losses.values(), *gradients)), name


@pytest.mark.parametrize("num_workers", [0, 2])
def test_image_that_breaks_later(synthetic, tmp_path, num_workers, capfd):
    """An unreadable image that was not checked gives one line without a traceback."""
    shutil.copytree(synthetic, tmp_path / "data")
    for image in (tmp_path / "data/images").iterdir():
        image.write_bytes(b"\xff\xd8 no image")
    args = [*own_data(tmp_path / "data", "train"), "OUTPUT_DIR", tmp_path / "out", *TINY]
    args += ["MODEL.LIBRA.INPUT.CHECK_IMAGES", 0]
    line = fails(capfd, *args, "DATALOADER.NUM_WORKERS", num_workers, config=DEMO_CONFIG)
    assert line.startswith(f"error: {tmp_path}/data/images/")
    assert "the image cannot be used" in line
