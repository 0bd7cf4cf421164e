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
from test_train_net import TINY, own_data, train_net

from detectron2.data import DatasetCatalog, build_detection_train_loader, detection_utils
from detectron2.data.samplers import TrainingSampler
from detectron2.modeling import build_model
from detectron2.utils.events import EventStorage

from libra_d2.data import LibraDatasetMapper, read_image, register_coco_json
from libra_d2.engine import main as script
from libra_d2.errors import InputError


def noise(*shape, dtype=np.uint8, seed=0):
    high = np.iinfo(dtype).max
    return np.random.default_rng(seed).integers(0, high, shape, dtype=dtype, endpoint=True)


@pytest.fixture(scope="module")
def unusual(tmp_path_factory):
    """A COCO dataset of what users' data has and COCO has not."""
    folder = tmp_path_factory.mktemp("unusual")
    rotated = Image.Exif()
    rotated[0x0112] = 6  # turn by 90 degrees
    images = {  # file, stored as, boxes
        "gray.png": (Image.fromarray(noise(64, 80)), [[4, 4, 30, 30]]),
        "gray16.png": (Image.fromarray(noise(64, 80, dtype=np.uint16)), [[4, 4, 30, 30]]),
        "cmyk.jpg": (Image.fromarray(noise(64, 80, 4), mode="CMYK"), [[4, 4, 30, 30]]),
        "palette.png": (Image.fromarray(noise(64, 80, 3)).quantize(16), [[4, 4, 30, 30]]),
        "transparent.png": (Image.fromarray(noise(64, 80, 4)), [[4, 4, 30, 30]]),
        "black_and_white.png": (Image.fromarray(noise(64, 80) > 128), [[4, 4, 30, 30]]),
        "turned.jpg": (Image.fromarray(noise(64, 80, 3)), [[4, 4, 30, 60]]),
        "empty.png": (Image.fromarray(noise(64, 80, 3)), []),
        "pixels.png": (Image.fromarray(noise(64, 80, 3)), [[i, i, 1, 1] for i in range(20)]),
        "tiny.png": (Image.fromarray(noise(64, 80, 3)), [[3, 3, 0.1, 0.1], [70.5, 2, 0.01, 9]]),
        "crowded.png": (
            Image.fromarray(noise(64, 80, 3)),
            [[x % 25 * 3, x // 25 * 3, 2 + x % 7, 2 + x % 5] for x in range(500)],
        ),
        "the_same.png": (Image.fromarray(noise(64, 80, 3)), [[4, 4, 30, 30]] * 9),
        "whole.png": (Image.fromarray(noise(64, 80, 3)), [[0, 0, 80, 64]]),
        "wide.png": (Image.fromarray(noise(8, 640, 3)), [[0, 0, 640, 8], [5, 2, 3, 3]]),
        "high.png": (Image.fromarray(noise(640, 8, 3)), [[0, 0, 8, 640]]),
        "crowd_only.png": (Image.fromarray(noise(64, 80, 3)), [[4, 4, 30, 30]]),
        "with_crowd.png": (Image.fromarray(noise(64, 80, 3)), [[4, 4, 30, 30], [0, 0, 80, 64]]),
        "uniform.png": (Image.new("RGB", (80, 64), (255, 255, 255)), [[4, 4, 30, 30]]),
    }
    dataset = {"images": [], "annotations": [], "categories": [{"id": 1, "name": "a"}]}
    (folder / "images").mkdir()
    for i, (name, (image, boxes)) in enumerate(images.items(), 1):
        width, height = image.size[::-1] if name == "turned.jpg" else image.size
        image.save(folder / "images" / name, **({"exif": rotated} if name == "turned.jpg" else {}))
        dataset["images"].append({"id": i, "file_name": name, "width": width, "height": height})
        for k, box in enumerate(boxes):
            crowd = "crowd" in name and "crowded" not in name and k == len(boxes) - 1
            dataset["annotations"].append(
                {
                    "id": len(dataset["annotations"]) + 1,
                    "image_id": i,
                    "category_id": 1,
                    "bbox": box,
                    "area": box[2] * box[3],
                    "iscrowd": int(crowd),
                }
            )
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
    assert len(set(files)) == len(records) == 18


def test_read_image(unusual, tmp_path):
    """16 bits are scaled, the camera's orientation applied, others read as Detectron2 does."""
    images = unusual / "images"
    gray = noise(64, 80, dtype=np.uint16)
    assert np.array_equal(
        read_image(str(images / "gray16.png"), "BGR"),
        np.repeat((gray / 257).round().astype(np.uint8)[:, :, None], 3, axis=2),
    )
    assert read_image(str(images / "turned.jpg"), "RGB").shape == (80, 64, 3)
    for path in sorted(images.iterdir()):
        if path.name != "gray16.png":
            expected = detection_utils.read_image(str(path), "BGR")
            assert np.array_equal(read_image(str(path), "BGR"), expected), path
    Image.new("F", (4, 4)).save(tmp_path / "f.tif")
    with pytest.raises(InputError, match=r"f\.tif: floating point pixels: save it with 8 bits"):
        read_image(str(tmp_path / "f.tif"))


@pytest.mark.parametrize("system", SYSTEMS[:2])
def test_divergence(synthetic, tmp_path, system):
    """A loss that is not finite ends the training; what to know is in one line."""
    config = ROOT / f"configs/Demo/{system}_R_18_FPN.yaml"
    args = [*TINY, "SOLVER.BASE_LR", "1e18", "SOLVER.WARMUP_ITERS", "0", "SOLVER.MAX_ITER", "20"]
    args += ["SOLVER.CHECKPOINT_PERIOD", "1", "OUTPUT_DIR", tmp_path]
    result = train_net(*own_data(synthetic, "train"), *args, config=config)
    assert result.returncode == 2, result.stderr
    (line,) = [x for x in result.stderr.splitlines() if x.startswith("error:")]
    # Either the loss of the next step is not finite, or the weights are already.
    if "a loss is not finite at iteration" in line:
        assert "loss_cls" in line
        assert line.count(f"{synthetic}/images/") == 2
    else:
        assert "is not finite: the training has diverged" in line
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
    args = ["--config-file", ROOT / f"configs/Demo/{SYSTEMS[0]}_R_18_FPN.yaml"]
    args += [*own_data(synthetic, "train"), *TINY, "SOLVER.MAX_ITER", 9, "OUTPUT_DIR", tmp_path]
    with pytest.raises(SystemExit, match="2"):
        script.main([str(a) for a in args])
    (line,) = [x for x in capsys.readouterr().err.splitlines() if x.startswith("error:")]
    assert "a loss is not finite at iteration 3 (" in line
    assert "loss_cls nan" in line
    assert line.count(f"{synthetic}/images/") == 2
    assert f"The last checkpoint is {tmp_path}/model_0000001.pth: --resume continues" in line


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
