# SPDX-License-Identifier: Apache-2.0
"""Unusual but legal images and annotations, on which training goes on; and one that diverges."""

import json
import math
import shutil

import numpy as np
import pytest
import torch
from conftest import ROOT, demo_cfg
from PIL import Image
from test_train_net import TINY, own_data

from detectron2.data import DatasetCatalog, build_detection_train_loader
from detectron2.data.samplers import TrainingSampler
from detectron2.modeling import build_model
from detectron2.utils.events import EventStorage

from libra_d2.data import LibraDatasetMapper, register_coco_json
from libra_d2.engine import main as script


def noise(*shape, dtype=np.uint8, seed=0):
    high = np.iinfo(dtype).max
    return np.random.default_rng(seed).integers(0, high, shape, dtype=dtype, endpoint=True)


@pytest.fixture(scope="module")
def unusual(tmp_path_factory):
    """A COCO dataset of what users' data has and COCO has not."""
    folder = tmp_path_factory.mktemp("unusual")
    rotated = Image.Exif()
    rotated[0x0112] = 6  # turn by 90 degrees
    box, colors = [4, 4, 30, 30], noise(64, 80, 3)
    images = {  # file, stored as, boxes
        "gray16.png": (noise(64, 80, dtype=np.uint16), [box]),
        "cmyk.jpg": (Image.fromarray(noise(64, 80, 4), mode="CMYK"), [box]),
        "turned.jpg": (colors, [[4, 4, 30, 60]]),
        "empty.png": (colors, []),
        "pixels.png": (colors, [[i, i, 1, 1] for i in range(20)]),
        "tiny.png": (colors, [[3, 3, 0.1, 0.1], [70.5, 2, 0.01, 9]]),
        "many.png": (colors, [[i % 25 * 3, i // 25 * 3, 2 + i % 7, 2 + i % 5] for i in range(500)]),
        "the_same.png": (colors, [box] * 9),
        "whole.png": (colors, [[0, 0, 80, 64]]),
        "wide.png": (noise(8, 640, 3), [[0, 0, 640, 8], [5, 2, 3, 3]]),
        "high.png": (noise(640, 8, 3), [[0, 0, 8, 640]]),
        "crowd_only.png": (colors, [box]),
        "with_crowd.png": (colors, [box, [0, 0, 80, 64]]),
        "uniform.png": (np.full_like(colors, 255), [box]),
    }
    dataset = {"images": [], "annotations": [], "categories": [{"id": 1, "name": "a"}]}
    (folder / "images").mkdir()
    for i, (name, (image, boxes)) in enumerate(images.items(), 1):
        image = image if name == "cmyk.jpg" else Image.fromarray(image)
        width, height = image.size[::-1] if name == "turned.jpg" else image.size
        image.save(folder / "images" / name, **({"exif": rotated} if name == "turned.jpg" else {}))
        dataset["images"].append({"id": i, "file_name": name, "width": width, "height": height})
        for k, box in enumerate(boxes):
            crowd = "crowd" in name and k == len(boxes) - 1
            ids = {"id": len(dataset["annotations"]) + 1, "image_id": i, "category_id": 1}
            shape = {"bbox": box, "area": box[2] * box[3], "iscrowd": int(crowd)}
            dataset["annotations"].append({**ids, **shape})
    (folder / "instances.json").write_text(json.dumps(dataset))
    return folder


SYSTEMS = ["libra_faster_rcnn", "libra_retinanet", "libra_cascade_rcnn"]


@pytest.mark.parametrize("system", SYSTEMS)
def test_trains_on(unusual, tmp_path, system):
    """All of them, two at a time: finite losses, gradients and weights."""
    cfg = demo_cfg(ROOT / f"configs/Demo/{system}_R_18_FPN.yaml")
    cfg.INPUT.MIN_SIZE_TRAIN, cfg.INPUT.MAX_SIZE_TRAIN = (64,), 256
    cfg.MODEL.ROI_HEADS.NUM_CLASSES = cfg.MODEL.RETINANET.NUM_CLASSES = 1
    paths = (str(unusual / "instances.json"), str(unusual / "images"), str(tmp_path))
    register_coco_json("test_unusual", *paths)
    records = DatasetCatalog.get("test_unusual")
    loader = build_detection_train_loader(
        records,
        mapper=LibraDatasetMapper(cfg, is_train=True),
        sampler=TrainingSampler(len(records), shuffle=False),
        total_batch_size=2,
        aspect_ratio_grouping=False,
        num_workers=0,
    )
    model = build_model(cfg)
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)
    files = []
    with EventStorage():
        for _, batch in zip(range(len(records) // 2), loader):
            files += [image["file_name"].split("/")[-1] for image in batch]
            losses = model(batch)
            assert all(torch.isfinite(loss) for loss in losses.values()), (files[-2:], losses)
            optimizer.zero_grad()
            sum(losses.values()).backward()
            for name, parameter in model.named_parameters():
                if parameter.grad is not None:
                    assert torch.isfinite(parameter.grad).all(), (files[-2:], name)
            optimizer.step()
    assert len(set(files)) == len(records) == 14


def fails(capsys, system, *args):
    """What the training script says in its only line on an error."""
    args = ["--config-file", ROOT / f"configs/Demo/{system}_R_18_FPN.yaml", *args]
    with pytest.raises(SystemExit, match="2"):
        script.main([str(a) for a in args])
    (line,) = [x for x in capsys.readouterr().err.splitlines() if x.startswith("error:")]
    return line


@pytest.mark.parametrize("system", SYSTEMS[:2])
def test_divergence(synthetic, tmp_path, system, capsys):
    """A loss that is not finite ends the training; what is written before is finite."""
    args = [*TINY, "SOLVER.BASE_LR", "1e18", "SOLVER.WARMUP_ITERS", "0", "SOLVER.MAX_ITER", "20"]
    args += ["SOLVER.CHECKPOINT_PERIOD", "1", "OUTPUT_DIR", tmp_path]
    line = fails(capsys, system, *own_data(synthetic, "train"), *args)
    # Either the loss of the next step is not finite, or the weights are already.
    assert ("a loss is not finite at" in line) != ("is not finite: the training has div" in line)
    for path in tmp_path.glob("model*.pth"):
        for name, weight in torch.load(path)["model"].items():
            assert torch.isfinite(weight.float()).all(), (path, name)


def test_divergence_names_images(synthetic, tmp_path, monkeypatch, capsys):
    """The loss terms, the images of that step, and the last good checkpoint."""
    real = script.Trainer.build_model

    def build_model_that_fails(cfg):
        model, calls = real(cfg), []

        def spoil(module, inputs, losses):
            calls.append(None)
            return {**losses, "loss_cls": losses["loss_cls"] * (math.nan if len(calls) > 3 else 1)}

        model.register_forward_hook(spoil)
        return model

    monkeypatch.setattr(script.Trainer, "build_model", staticmethod(build_model_that_fails))
    args = [*own_data(synthetic, "train"), *TINY, "SOLVER.MAX_ITER", 9, "OUTPUT_DIR", tmp_path]
    line = fails(capsys, SYSTEMS[0], *args)
    assert "a loss is not finite at iteration 3 (" in line
    assert "loss_cls nan" in line
    assert line.count(f"{synthetic}/images/") == 2
    assert f"Training can be resumed from {tmp_path}/model_0000001.pth" in line


@pytest.mark.parametrize("num_workers", [0, 2])
def test_image_that_breaks_later(synthetic, tmp_path, num_workers, monkeypatch, capfd):
    """After the checks: one line, without a traceback in front of it."""
    shutil.copytree(synthetic, tmp_path / "data")
    monkeypatch.setattr("libra_d2.data.coco_json.check_images", lambda *args: None)
    for image in (tmp_path / "data/images").iterdir():
        image.write_bytes(b"\xff\xd8 no image")
    args = ["--config-file", ROOT / f"configs/Demo/{SYSTEMS[0]}_R_18_FPN.yaml"]
    args += [*own_data(tmp_path / "data", "train"), "OUTPUT_DIR", tmp_path / "out", *TINY]
    with pytest.raises(SystemExit, match="2"):
        script.main([str(a) for a in [*args, "DATALOADER.NUM_WORKERS", num_workers]])
    out, err = capfd.readouterr()
    assert "Traceback" not in out + err
    line = err.splitlines()[-1]
    assert line.startswith(f"error: {tmp_path}/data/images/")
    assert "the image cannot be used" in line
