# SPDX-License-Identifier: Apache-2.0
import re
import shutil
from pathlib import Path

import pytest
import torch
import torchvision
from conftest import ROOT, calibrate_norms
from test_download import serve, server, serving  # noqa: F401

import detectron2
from detectron2.checkpoint import DetectionCheckpointer
from detectron2.engine import DefaultPredictor, DefaultTrainer
from detectron2.modeling import build_model
from detectron2.utils.file_io import PathManager

from libra_d2 import model_zoo
from libra_d2.checkpoint import LibraCheckpointer
from libra_d2.checkpoint.mmdetection import to_mmdetection
from libra_d2.data import register_coco_json
from libra_d2.engine import read_config
from libra_d2.errors import InputError

RETINANET = "COCO-Detection/libra_retinanet_R_50_FPN_1x"


IMAGENET = "ImageNetPretrained/torchvision/R-50"


def test_names():
    """The published URLs; every name with weights, ImageNet's aside, is a config."""
    for name, url in model_zoo._URLS.items():
        assert re.fullmatch(r"https://\S+-[0-9a-f]{8}\.pth", url)
        for suffix in ("", ".yaml", ".py"):
            assert model_zoo.get_published_url(name + suffix) == url
            assert model_zoo.get_checkpoint_url(name + suffix) == f"libra://{name}"
            if suffix and not name.startswith("ImageNet"):
                path = model_zoo.get_config_file(name + suffix)
                assert Path(path) == ROOT / f"configs/{name}{suffix}"
        backbone = re.search(r"[RX]([_-])([0-9]+)(?:.64x4d)?", name)
        theirs = rf"/(libra_\w+_|res)(r|net|x|next){backbone[2]}{'_64x4d' * ('64' in name)}[_-]"
        assert re.search(theirs, url)
        assert ("retinanet" in name) == ("retinanet" in url)


def test_published_urls(mmdet):
    """They are those in mmdetection's own model zoo."""
    metafile = Path(mmdet.__file__).parent / ".mim/configs/libra_rcnn/metafile.yml"
    theirs = set(re.findall(r"Weights: (\S+)", metafile.read_text()))
    ours = {url for name, url in model_zoo._URLS.items() if name.startswith("COCO")}
    assert ours == theirs
    import mmengine.hub

    hub = "".join(p.read_text() for p in Path(mmengine.hub.__file__).parent.glob("*.json"))
    for name, url in model_zoo._URLS.items():
        if name.startswith("ImageNet"):
            assert f'"{url}"' in hub


def test_unknown_names():
    for name in ("COCO-Detection/libra_fast_rcnn_R_50_FPN_1x.yaml", f"{RETINANET}.pth"):
        with pytest.raises(RuntimeError, match=f"no published weights for '{name}'; there are for"):
            model_zoo.get_checkpoint_url(name)
    with pytest.raises(RuntimeError, match="'x.yaml' is neither a file nor a config of"):
        model_zoo.get_config_file("x.yaml")
    model = torch.nn.Linear(1, 1)
    with pytest.raises(InputError, match="libra://x: the weights cannot be read: There are no pub"):
        LibraCheckpointer(model).load("libra://x")


def test_config():
    """What training starts from, or the published weights; in both config systems."""
    cfg = model_zoo.get_config(f"{RETINANET}.yaml")
    assert cfg.MODEL.META_ARCHITECTURE == "LibraRetinaNet"
    assert f"libra://{IMAGENET}" == cfg.MODEL.WEIGHTS
    cfg = model_zoo.get_config(f"{RETINANET}.yaml", trained=True)
    assert f"libra://{RETINANET}" == cfg.MODEL.WEIGHTS
    for trained, weights in ((False, IMAGENET), (True, RETINANET)):
        lazy = model_zoo.get_config(f"{RETINANET}.py", trained)
        assert lazy.train.init_checkpoint == f"libra://{weights}"
        assert "pixel_mean" in lazy.model
    with pytest.raises(RuntimeError, match="no published weights"):
        model_zoo.get_config("COCO-Detection/libra_fast_rcnn_R_50_FPN_1x.yaml", trained=True)


@pytest.fixture(scope="module")
def published(tmp_path_factory):
    """
    A Libra RetinaNet in mmdetection's format, and a ResNet-50 in torchvision's, served in place of
    the published ones; both models.
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
    """The first and the last layer's, the norm's statistics included."""
    bottom_up = model.backbone.bottom_up
    last, theirs = bottom_up.res5[2].conv3, backbone.layer4[2]
    assert torch.equal(bottom_up.stem.conv1.weight, backbone.conv1.weight)
    assert torch.equal(last.weight, theirs.conv3.weight)
    assert torch.equal(last.norm.running_var, theirs.bn3.running_var)


@pytest.mark.parametrize("suffix", [".yaml", ".py"])
def test_get(published, suffix, caplog):
    """Trained, or with the backbone's weights, in training mode; on the CPU if there is no GPU."""
    trained, backbone = published
    model = model_zoo.get(f"{RETINANET}{suffix}", trained=True, device="cpu")
    assert model.training
    assert_same_weights(model, trained)
    assert "Weights that were not loaded" not in caplog.text
    device = "cuda" if torch.cuda.is_available() else "cpu"
    model = model_zoo.get(f"{RETINANET}{suffix}", device=None if device == "cpu" else "cpu")
    assert model.training
    assert model.device.type == "cpu"
    assert_same_backbone(model, backbone)


def test_libra_url(published):
    """A file in Detectron2's format beside the download, made once."""
    path = PathManager.get_local_path(f"libra://{RETINANET}")
    assert re.fullmatch(r"model-[0-9a-f]{8}\.detectron2-1\.pth", Path(path).name)
    made = Path(path).stat().st_mtime_ns
    content = torch.load(path)
    assert set(content) == {"model", "__author__"}
    with PathManager.open(f"libra://{RETINANET}", "rb") as f:
        assert f.read() == Path(path).read_bytes()
    assert Path(path).stat().st_mtime_ns == made
    download = Path(str(path).replace(".detectron2-1", ""))
    assert {p.suffix for p in Path(path).parent.glob(f"{download.stem}*")} <= {".pth", ".lock"}
    assert download.is_file()
    for name, value in published[0].state_dict().items():
        assert torch.equal(content["model"][name], value)


def test_detectron2(published):
    """Detectron2's own classes load a name of the zoo, with nothing missing."""
    model = build_model(cpu_cfg())
    DetectionCheckpointer(model).load(model_zoo.get_checkpoint_url(f"{RETINANET}.yaml"))
    assert_same_weights(model, published[0])
    assert_same_weights(DefaultPredictor(cpu_cfg(trained=True)).model, published[0])


@pytest.mark.parametrize("kind", ["detector", "ImageNet"])
def test_default_trainer(published, synthetic, tmp_path, kind):
    """Detectron2's trainer starts from a published detector, or from ImageNet weights."""
    cfg = cpu_cfg(trained=kind == "detector")
    paths = (str(synthetic / "instances.json"), str(synthetic / "images"), str(tmp_path))
    register_coco_json("test_zoo", *paths)
    cfg.DATASETS.TRAIN, cfg.DATASETS.TEST = ("test_zoo",), ()
    cfg.SOLVER.IMS_PER_BATCH, cfg.DATALOADER.NUM_WORKERS = 1, 0
    cfg.OUTPUT_DIR = str(tmp_path)
    trainer = DefaultTrainer(cfg)
    trainer.resume_or_load(resume=False)
    if kind == "detector":
        assert_same_weights(trainer.model, published[0])
    else:
        assert_same_backbone(trainer.model, published[1])


def test_broken_published_file(server, monkeypatch):  # noqa: F811
    """A file with the right hash that is no checkpoint: the error names it, nothing is cached."""
    folder, url = server
    torch.save({"state_dict": {}}, folder / "a.pth")
    for content, message in (
        (b"no weights", "not loaded, because"),
        ((folder / "a.pth").read_bytes(), "not a checkpoint: there are no weights in it"),
    ):
        name = serve(folder, content)
        monkeypatch.setitem(model_zoo._URLS, RETINANET, f"{url}/{name}")
        with pytest.raises(InputError, match=f"{name}: {message}"):
            PathManager.get_local_path(f"libra://{RETINANET}")
    assert not list(folder.parent.rglob("*.detectron2-*.pth"))


def test_linked_configs(tmp_path, monkeypatch):
    """
    A build of Detectron2 in its source folder links to the configs beside the package. They are
    its own, by either name, and may have an expression in their YAML; a copy is a stranger's.
    """
    package, name = tmp_path / "source/detectron2", "COCO-Detection/retinanet_R_50_FPN_1x.yaml"
    configs = Path(detectron2.__path__[0]) / "model_zoo/configs"
    for folder in ("source/configs", "source/configs-of-a-stranger"):
        (tmp_path / folder / "COCO-Detection").mkdir(parents=True)
        for file in (name, "Base-RetinaNet.yaml"):
            (tmp_path / folder / file).write_bytes((configs / file).read_bytes())
    (package / "model_zoo").mkdir(parents=True)
    (package / "model_zoo/configs").symlink_to(tmp_path / "source/configs")
    (tmp_path / "linked").symlink_to(tmp_path / "source")
    monkeypatch.setattr(detectron2, "__path__", [str(package), *detectron2.__path__])
    inside = "detectron2/model_zoo/configs"
    for path in (
        *(name, tmp_path / "source" / inside / name, tmp_path / "source/configs" / name),
        *(tmp_path / "linked" / inside / name, tmp_path / "linked/configs" / name),
    ):
        cfg = read_config(str(path), []).config
        assert cfg.MODEL.ANCHOR_GENERATOR.SIZES[0] == pytest.approx([32, 40.3, 50.8], abs=0.1)
    stranger = tmp_path / "source/configs-of-a-stranger" / name
    monkeypatch.chdir(tmp_path / "source/configs")
    for path in (stranger, f"../configs-of-a-stranger/{name}"):
        with pytest.raises(InputError, match="could not determine a constructor for the tag"):
            read_config(str(path), [])
