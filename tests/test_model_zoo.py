# SPDX-License-Identifier: Apache-2.0
import importlib.util
import re
import shutil
from pathlib import Path

import pytest
import torch
import torchvision
from conftest import ROOT, calibrate_norms
from test_download import serve, server, serving  # noqa: F401

from detectron2.checkpoint import DetectionCheckpointer
from detectron2.engine import DefaultPredictor
from detectron2.modeling import build_model
from detectron2.utils.file_io import PathManager

from libra_d2 import model_zoo
from libra_d2.checkpoint import LibraCheckpointer
from libra_d2.checkpoint.mmdetection import to_mmdetection
from libra_d2.errors import InputError

RETINANET = "COCO-Detection/libra_retinanet_R_50_FPN_1x"
IMAGENET = "ImageNetPretrained/torchvision/R-50"


@pytest.mark.parametrize(("name", "url"), model_zoo._URLS.items())
def test_names(name, url):
    """Configs of both languages have the URL of the same architecture."""
    for suffix in ("", ".yaml", ".py"):
        assert model_zoo.get_published_url(name + suffix) == url
        assert model_zoo.get_checkpoint_url(name + suffix) == f"libra://{name}"
        if suffix and not name.startswith("ImageNet"):
            path = model_zoo.get_config_file(name + suffix)
            assert Path(path) == ROOT / f"configs/{name}{suffix}"
    depth = re.search("[RX][_-]([0-9]+)", name)[1]
    assert re.search(f"(_r|_x|resnet|resnext){depth}[_-]", url)
    assert ("64x4d" in name, "retinanet" in name) == ("64x4d" in url, "retinanet" in url)


def test_published_urls(mmdet):
    """They are those of mmdetection and mmengine."""
    files = [Path(mmdet.__file__).parent / ".mim/configs/libra_rcnn/metafile.yml"]
    files += Path(importlib.util.find_spec("mmengine.hub").origin).parent.glob("*.json")
    theirs = "".join(path.read_text() for path in files)
    assert set(re.findall(r"Weights: (\S+)", theirs)) <= set(model_zoo._URLS.values())
    assert set(model_zoo._URLS.values()) <= set(re.findall(r"https://[^\s\"]+", theirs))


def test_unreadable_folder(monkeypatch):
    def refuse(path):
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr(Path, "is_file", refuse)
    with pytest.raises(InputError, match="^locked/a.yaml: Permission denied$"):
        model_zoo.find_config("locked/a.yaml")


def test_unknown_names(tmp_path):
    for name in ("COCO-Detection/libra_fast_rcnn_R_50_FPN_1x.yaml", f"{RETINANET}.pth"):
        with pytest.raises(RuntimeError, match=f"no published weights for '{name}'; there are for"):
            model_zoo.get_checkpoint_url(name)
    with pytest.raises(RuntimeError, match="no published weights"):
        model_zoo.get_config("COCO-Detection/libra_fast_rcnn_R_50_FPN_1x.yaml", trained=True)
    with pytest.raises(RuntimeError, match="'x.yaml' is neither a file nor a config of"):
        model_zoo.get_config_file("x.yaml")
    with pytest.raises(InputError, match="'x.yaml' is neither .* zoo, nor one of Detectron2's$"):
        model_zoo.find_config("x.yaml")
    theirs = "COCO-Detection/faster_rcnn_R_50_FPN_1x.yaml"
    for name, similar in (
        (RETINANET, f"{RETINANET}.yaml"),
        (f"{RETINANET}_.py", f"{RETINANET}.py"),
    ):
        with pytest.raises(RuntimeError, match=rf"model zoo; did you mean {similar}\?$"):
            model_zoo.get_config(name)
    with pytest.raises(InputError, match=rf"nor one of Detectron2's; did you mean {theirs}\?$"):
        model_zoo.find_config(theirs[:-1])
    assert Path(model_zoo.find_config(theirs)).read_text().startswith("_BASE_: ")
    for unchanged in ("", str(tmp_path), "https://x/a.yaml"):
        assert model_zoo.find_config(unchanged) == unchanged
    with pytest.raises(RuntimeError, match="nowhere"):
        model_zoo.get(f"{RETINANET}.py", device="nowhere")
    model = torch.nn.Linear(1, 1)
    with pytest.raises(InputError, match="libra://x: the weights cannot be read: There are no pub"):
        LibraCheckpointer(model).load("libra://x")


@pytest.mark.parametrize(("trained", "weights"), [(False, IMAGENET), (True, RETINANET)])
def test_config(trained, weights):
    """The weights are those that training starts from, or the published ones."""
    cfg = model_zoo.get_config(f"{RETINANET}.yaml", trained)
    assert cfg.MODEL.META_ARCHITECTURE == "LibraRetinaNet"
    assert f"libra://{weights}" == cfg.MODEL.WEIGHTS
    lazy = model_zoo.get_config(f"{RETINANET}.py", trained)
    assert "pixel_mean" in lazy.model
    assert lazy.train.init_checkpoint == f"libra://{weights}"


@pytest.fixture(scope="module")
def published(tmp_path_factory):
    """
    A Libra RetinaNet and a ResNet-50, whose files in the formats of mmdetection and torchvision
    replace the published ones.
    """
    path = tmp_path_factory.mktemp("zoo")
    torch.manual_seed(3)
    model, backbone = build_model(cpu_cfg()), torchvision.models.resnet50(weights=None)
    calibrate_norms(model.backbone, torch.rand(1, 3, 64, 64))
    content = {"meta": {"mmdet_version": "2.0.0"}, "state_dict": to_mmdetection(model.state_dict())}
    with serving(path) as (folder, url), pytest.MonkeyPatch.context() as patch:
        for name, state in ((RETINANET, content), (IMAGENET, backbone.state_dict())):
            torch.save(state, path / "file.pth")
            file = serve(folder, (path / "file.pth").read_bytes())
            patch.setitem(model_zoo._URLS, name, f"{url}/{file}")
        yield model, backbone
    shutil.rmtree(path)


def cpu_cfg(**kwargs):
    cfg = model_zoo.get_config(f"{RETINANET}.yaml", **kwargs)
    cfg.MODEL.DEVICE = "cpu"
    return cfg


def assert_same_weights(model, published):
    assert model.state_dict().keys() == published.state_dict().keys()
    for name, value in published.state_dict().items():
        assert torch.equal(model.state_dict()[name], value), name


def assert_same_backbone(model, backbone):
    """Compares the first and the last layer."""
    bottom_up = model.backbone.bottom_up
    last, theirs = bottom_up.res5[2].conv3, backbone.layer4[2]
    assert torch.equal(bottom_up.stem.conv1.weight, backbone.conv1.weight)
    assert torch.equal(last.weight, theirs.conv3.weight)
    assert torch.equal(last.norm.running_var, theirs.bn3.running_var)


@pytest.mark.parametrize("suffix", [".yaml", ".py"])
def test_get(published, suffix, caplog):
    """Trained or with ImageNet weights, in training mode, and on the CPU if there is no GPU."""
    trained, backbone = published
    model = model_zoo.get(f"{RETINANET}{suffix}", trained=True, device="cpu")
    assert model.training
    assert_same_weights(model, trained)
    assert "Weights that were not loaded" not in caplog.text
    device = "cpu" if torch.cuda.is_available() else None
    model = model_zoo.get(f"{RETINANET}{suffix}", device=device)
    assert (model.training, model.device.type) == (True, "cpu")
    assert_same_backbone(model, backbone)


def test_libra_url(published):
    """The converted file is kept beside the download and written once."""
    path = PathManager.get_local_path(f"libra://{RETINANET}")
    assert re.fullmatch(r"model-[0-9a-f]{8}\.detectron2-1\.pth", Path(path).name)
    written = Path(path).stat().st_mtime_ns
    with PathManager.open(f"libra://{RETINANET}", "rb") as f:
        content = torch.load(f)
    assert Path(path).stat().st_mtime_ns == written
    assert Path(path.replace(".detectron2-1", "")).is_file()
    assert content["__author__"] == "mmdetection"
    for name, value in published[0].state_dict().items():
        assert torch.equal(content["model"][name], value)


def test_detectron2(published):
    """Detectron2's own classes load published weights and ImageNet weights."""
    assert_same_weights(DefaultPredictor(cpu_cfg(trained=True)).model, published[0])
    model = build_model(cpu_cfg())
    DetectionCheckpointer(model).load(cpu_cfg().MODEL.WEIGHTS)
    assert_same_backbone(model, published[1])


def test_broken_published_file(server, monkeypatch):  # noqa: F811
    """A file with the right hash that is no checkpoint is named; no converted file is written."""
    folder, url = server
    name = serve(folder, b"no weights")
    monkeypatch.setitem(model_zoo._URLS, RETINANET, f"{url}/{name}")
    with pytest.raises(InputError, match=f"{name}: not loaded, because"):
        PathManager.get_local_path(f"libra://{RETINANET}")
    assert not list(folder.parent.rglob("*.detectron2-*.pth"))
