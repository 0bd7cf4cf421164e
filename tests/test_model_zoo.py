# SPDX-License-Identifier: Apache-2.0
import hashlib
import http.server
import re
import threading
from functools import partial
from pathlib import Path

import pytest
import torch
from conftest import ROOT, calibrate_norms

from detectron2.utils.file_io import PathManager

from libra_d2 import model_zoo
from libra_d2.checkpoint import LibraCheckpointer
from libra_d2.download import fetch
from libra_d2.errors import InputError
from libra_d2.mmdetection_weights import to_mmdetection

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
        assert model_zoo.get_checkpoint_url(name) == url
        if not name.startswith("ImageNet"):
            assert model_zoo.get_checkpoint_url(f"{name}.yaml") == url
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
    assert cfg.MODEL.WEIGHTS.endswith("libra_retinanet_r50_fpn_1x_coco_20200205-804d94ce.pth")


@pytest.fixture
def published(server, monkeypatch, tmp_path):
    """A Libra RetinaNet in mmdetection's format, served in place of the published one."""
    folder, url = server
    cfg = model_zoo.get_config(f"{RETINANET}.yaml")
    cfg.MODEL.DEVICE = "cpu"
    from detectron2.modeling import build_model

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


def test_libra_url(published):
    """By name, through Detectron2's path manager and in the checkpointer."""
    path = PathManager.get_local_path(f"libra://{RETINANET}")
    assert re.search(r"model-[0-9a-f]{8}\.pth$", path)
    with PathManager.open(f"libra://{RETINANET}", "rb") as f:
        assert f.read() == Path(path).read_bytes()
    cfg = model_zoo.get_config(f"{RETINANET}.yaml")
    assert cfg.MODEL.LIBRA.RETINANET.P7_RELU is False
    other = model_zoo.get_config(f"{RETINANET}.yaml")
    other.MODEL.DEVICE = "cpu"
    from detectron2.modeling import build_model

    model = build_model(other)
    LibraCheckpointer(model, complete=True).load(f"libra://{RETINANET}")
    assert torch.equal(model.head.bbox_pred.weight, published.head.bbox_pred.weight)
