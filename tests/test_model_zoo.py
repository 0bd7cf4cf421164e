# SPDX-License-Identifier: Apache-2.0
import hashlib
import http.server
import re
import threading
from functools import partial
from pathlib import Path

import pytest
import torch
import torchvision
from conftest import ROOT, calibrate_norms

from detectron2.checkpoint import DetectionCheckpointer
from detectron2.engine import DefaultPredictor, DefaultTrainer
from detectron2.modeling import build_model
from detectron2.utils.file_io import PathManager

from libra_d2 import model_zoo
from libra_d2.checkpoint import LibraCheckpointer
from libra_d2.checkpoint.download import fetch
from libra_d2.checkpoint.mmdetection import to_mmdetection
from libra_d2.data import register_coco_json
from libra_d2.errors import InputError

RETINANET = "COCO-Detection/libra_retinanet_R_50_FPN_1x"


@pytest.fixture
def server(tmp_path, monkeypatch):
    """A web server of this machine, of the files in a folder; downloads are cached in another."""
    monkeypatch.setenv("FVCORE_CACHE", str(tmp_path / "cache"))
    folder = tmp_path / "served"
    folder.mkdir()
    handler = partial(http.server.SimpleHTTPRequestHandler, directory=str(folder))
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield folder, f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    server.server_close()


def serve(folder, content, name="model"):
    """Put a file into the folder whose name has the hash of its content; returns the name."""
    name = f"{name}-{hashlib.sha256(content).hexdigest()[:8]}.pth"
    (folder / name).write_bytes(content)
    return name


def test_download(server, tmp_path):
    """Where Detectron2 caches, once."""
    folder, url = server
    name = serve(folder, b"weights")
    path = fetch(f"{url}/{name}")
    assert path == str(tmp_path / "cache" / name)
    assert Path(path).read_bytes() == b"weights"
    (folder / name).unlink()
    assert fetch(f"{url}/{name}") == path


def test_wrong_content_is_not_used(server, tmp_path):
    """Neither a download nor a file in the cache; what was there is removed."""
    folder, url = server
    name = serve(folder, b"weights")
    (folder / name).write_bytes(b"other weights")
    with pytest.raises(OSError, match=f"{name}: what was downloaded \\(13 bytes\\) is not that"):
        fetch(f"{url}/{name}")
    assert not list((tmp_path / "cache").glob("*.pth"))
    (folder / name).write_bytes(b"weights")
    path = Path(fetch(f"{url}/{name}"))
    path.write_bytes(b"wei")
    with pytest.raises(OSError, match="It was removed"):
        fetch(f"{url}/{name}")
    assert not path.exists()


def test_broken_download(server, tmp_path):
    """The connection ends before the file does: nothing is left that could be taken for it."""
    folder, _ = server
    name = serve(folder, b"weights" * 1000)

    class Cutting(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            self.send_response(200)
            self.send_header("Content-Length", "7000")
            self.end_headers()
            self.wfile.write(b"weights" * 100)

    cutting = http.server.HTTPServer(("127.0.0.1", 0), Cutting)
    threading.Thread(target=cutting.serve_forever, daemon=True).start()
    url = f"http://127.0.0.1:{cutting.server_port}/{name}"
    with pytest.raises(OSError, match=f"{re.escape(url)} could not be downloaded"):
        fetch(url)
    cutting.shutdown()
    cutting.server_close()
    assert not list((tmp_path / "cache").glob("*.pth*[!k]"))


def test_no_connection(tmp_path, monkeypatch):
    """The error says what to fetch by hand and where to put it, and that works."""
    monkeypatch.setenv("FVCORE_CACHE", str(tmp_path))
    name = f"x-{hashlib.sha256(b'weights').hexdigest()[:8]}.pth"
    url = f"http://127.0.0.1:9/folder/{name}"
    with pytest.raises(OSError, match=f"{url} could not be downloaded .* put it at ") as error:
        fetch(url)
    path = Path(str(error.value).rpartition(" ")[2])
    assert path == tmp_path / "folder" / name
    path.write_bytes(b"weights")
    assert fetch(url) == str(path)


def test_other_names_are_not_checked(server):
    folder, url = server
    (folder / "model_final_280758.pkl").write_bytes(b"any")
    assert Path(fetch(f"{url}/model_final_280758.pkl")).read_bytes() == b"any"


def test_names():
    """The published URLs; every name with weights, ImageNet's aside, is a config."""
    for name, url in model_zoo._URLS.items():
        assert re.fullmatch(r"https://\S+-[0-9a-f]{8}\.pth", url)
        assert model_zoo.get_published_url(name) == url
        assert model_zoo.get_checkpoint_url(name) == f"libra://{name}"
        if not name.startswith("ImageNet"):
            assert model_zoo.get_checkpoint_url(f"{name}.yaml") == f"libra://{name}"
            path = model_zoo.get_config_file(f"{name}.yaml")
            assert Path(path) == ROOT / f"configs/{name}.yaml"


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
    with pytest.raises(RuntimeError, match="no published weights for '.*fast_rcnn_R_50_FPN_1x"):
        model_zoo.get_checkpoint_url("COCO-Detection/libra_fast_rcnn_R_50_FPN_1x.yaml")
    with pytest.raises(RuntimeError, match="'x.yaml' is neither a file nor a config of"):
        model_zoo.get_config_file("x.yaml")
    model = torch.nn.Linear(1, 1)
    with pytest.raises(InputError, match="libra://x: the weights cannot be read: There are no pub"):
        LibraCheckpointer(model).load("libra://x")


def test_config():
    cfg = model_zoo.get_config(f"{RETINANET}.yaml")
    assert cfg.MODEL.META_ARCHITECTURE == "LibraRetinaNet"
    assert cfg.MODEL.WEIGHTS == "libra://ImageNetPretrained/torchvision/R-50"
    cfg = model_zoo.get_config(f"{RETINANET}.yaml", trained=True)
    assert f"libra://{RETINANET}" == cfg.MODEL.WEIGHTS
    url = model_zoo.get_published_url(RETINANET)
    assert url.endswith("libra_retinanet_r50_fpn_1x_coco_20200205-804d94ce.pth")


@pytest.fixture
def published(server, monkeypatch, tmp_path):
    """A Libra RetinaNet in mmdetection's format, served in place of the published one."""
    folder, url = server
    cfg = model_zoo.get_config(f"{RETINANET}.yaml")
    cfg.MODEL.DEVICE = "cpu"
    torch.manual_seed(3)
    model = build_model(cfg)
    calibrate_norms(model.backbone, torch.rand(1, 3, 64, 64))
    content = {"meta": {"mmdet_version": "2.0.0"}, "state_dict": to_mmdetection(model.state_dict())}
    torch.save(content, tmp_path / "published.pth")
    name = serve(folder, (tmp_path / "published.pth").read_bytes())
    monkeypatch.setitem(model_zoo._URLS, RETINANET, f"{url}/{name}")
    return model


def test_get_trained(published):
    """Downloaded, verified, converted: each weight in its place."""
    model = model_zoo.get(f"{RETINANET}.yaml", trained=True, device="cpu")
    assert model.training
    for name, value in published.state_dict().items():
        assert torch.equal(model.state_dict()[name], value), name


def test_libra_url(published, tmp_path):
    """A file in Detectron2's format beside the download, made once."""
    path = PathManager.get_local_path(f"libra://{RETINANET}")
    assert re.fullmatch(r"model-[0-9a-f]{8}\.detectron2-1\.pth", Path(path).name)
    made = Path(path).stat().st_mtime_ns
    assert set(torch.load(path)) == {"model", "__author__"}
    with PathManager.open(f"libra://{RETINANET}", "rb") as f:
        assert f.read() == Path(path).read_bytes()
    assert Path(path).stat().st_mtime_ns == made
    assert (
        sorted(p.suffix for p in Path(path).parent.iterdir() if p.suffix != ".lock") == [".pth"] * 2
    )
    model = build_model(cpu_cfg())
    LibraCheckpointer(model, complete=True).load(f"libra://{RETINANET}")
    assert torch.equal(model.head.bbox_pred.weight, published.head.bbox_pred.weight)


def cpu_cfg(**kwargs):
    cfg = model_zoo.get_config(f"{RETINANET}.yaml", **kwargs)
    cfg.MODEL.DEVICE = "cpu"
    return cfg


def assert_same_weights(model, published):
    for name, value in published.state_dict().items():
        assert torch.equal(model.state_dict()[name], value), name


def test_detectron2_checkpointer(published):
    """Detectron2's own class loads a name of the zoo, with nothing missing."""
    model = build_model(cpu_cfg())
    checkpointer = DetectionCheckpointer(model)
    checkpointer.load(model_zoo.get_checkpoint_url(f"{RETINANET}.yaml"))
    assert_same_weights(model, published)


def test_default_predictor(published):
    model = DefaultPredictor(cpu_cfg(trained=True)).model
    assert_same_weights(model, published)


@pytest.mark.parametrize("kind", ["detector", "ImageNet"])
def test_default_trainer(published, synthetic, tmp_path, kind, server, monkeypatch):
    """Detectron2's trainer starts from a published detector, or from ImageNet weights."""
    if kind == "ImageNet":
        folder, url = server
        backbone = torchvision.models.resnet50(weights=None)
        torch.save(backbone.state_dict(), tmp_path / "resnet.pth")
        name = serve(folder, (tmp_path / "resnet.pth").read_bytes(), "resnet")
        key = "ImageNetPretrained/torchvision/R-50"
        monkeypatch.setitem(model_zoo._URLS, key, f"{url}/{name}")
    cfg = cpu_cfg(trained=kind == "detector")
    paths = (str(synthetic / "instances.json"), str(synthetic / "images"), str(tmp_path))
    register_coco_json("test_zoo", *paths)
    cfg.DATASETS.TRAIN, cfg.DATASETS.TEST = ("test_zoo",), ()
    cfg.SOLVER.IMS_PER_BATCH, cfg.DATALOADER.NUM_WORKERS = 1, 0
    cfg.OUTPUT_DIR = str(tmp_path)
    trainer = DefaultTrainer(cfg)
    trainer.resume_or_load(resume=False)
    if kind == "detector":
        assert_same_weights(trainer.model, published)
        return
    stem = trainer.model.backbone.bottom_up.stem.conv1
    assert torch.equal(stem.weight, backbone.conv1.weight)
    last = trainer.model.backbone.bottom_up.res5[2].conv3
    assert torch.equal(last.weight, backbone.layer4[2].conv3.weight)
    assert torch.equal(last.norm.running_var, backbone.layer4[2].bn3.running_var)


def test_broken_published_file(server, monkeypatch):
    """A file with the right hash that is no checkpoint: the error names it, nothing is cached."""
    folder, url = server
    name = serve(folder, b"no weights")
    monkeypatch.setitem(model_zoo._URLS, RETINANET, f"{url}/{name}")
    with pytest.raises(InputError, match=f"{name}: not"):
        PathManager.get_local_path(f"libra://{RETINANET}")
    assert not list(folder.parent.rglob("*.detectron2-*.pth"))
