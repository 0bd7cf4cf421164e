# SPDX-License-Identifier: Apache-2.0
import hashlib
import http.server
import threading
from contextlib import contextmanager
from functools import partial
from pathlib import Path

import pytest

from libra_d2.checkpoint.download import fetch


@contextmanager
def serving(path, handler=None):
    """A local web server: its folder and URL. Downloads are cached in ``path``/cache."""
    folder = path / "served"
    folder.mkdir()
    of_folder = partial(http.server.SimpleHTTPRequestHandler, directory=str(folder))
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler or of_folder)
    threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("FVCORE_CACHE", str(path / "cache"))
        yield folder, f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    server.server_close()


@pytest.fixture
def server(tmp_path):
    with serving(tmp_path) as server:
        yield server


def serve(folder, content, name="model"):
    """Write a file whose name ends in the hash of its content; returns the name."""
    name = f"{name}-{hashlib.sha256(content).hexdigest()[:8]}.pth"
    (folder / name).write_bytes(content)
    return name


def test_download(server, tmp_path):
    """A file is downloaded to Detectron2's cache, once."""
    folder, url = server
    name = serve(folder, b"weights")
    path = fetch(f"{url}/{name}")
    assert path == str(tmp_path / "cache" / name)
    assert Path(path).read_bytes() == b"weights"
    (folder / name).unlink()
    assert fetch(f"{url}/{name}") == path


def test_broken_download(tmp_path):
    """If the connection is lost, no part of the file is left in the cache."""

    class Cutting(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            self.send_response(200)
            self.send_header("Content-Length", "7000")
            self.end_headers()
            self.wfile.write(b"weights" * 100)

    message = "/model.pth could not be downloaded"
    with serving(tmp_path, Cutting) as (_, url), pytest.raises(OSError, match=f"{url}{message}"):
        fetch(f"{url}/model.pth")
    assert not [x for x in (tmp_path / "cache").iterdir() if x.suffix != ".lock"]


def test_no_connection(tmp_path, monkeypatch):
    """The error names the URL and where to put the file by hand."""
    monkeypatch.setenv("FVCORE_CACHE", str(tmp_path))
    name = f"x-{hashlib.sha256(b'weights').hexdigest()[:8]}.pth"
    url = f"http://127.0.0.1:9/folder/{name}"
    with pytest.raises(OSError, match=f"{url} could not be downloaded .* put it at ") as error:
        fetch(url)
    path = Path(str(error.value).rpartition(" ")[2])
    assert path == tmp_path / "folder" / name
    path.write_bytes(b"weights")
    assert fetch(url) == str(path)


@pytest.mark.parametrize("digits", [8, 64])
def test_hash(server, digits, tmp_path):
    """The hash of the whole file must agree in all digits of the name."""
    folder, url = server
    content = bytearray(b"0" * (5 << 19))  # 2.5 chunks
    digest = hashlib.sha256(content).hexdigest()[:digits]
    other = digest[:-1] + f"{(int(digest[-1], 16) + 1) % 16:x}"
    for name, end in ((digest, 48), (other, 48), (digest, 49)):
        content[-1] = end
        file = f"{end}-{name}.pth"
        (folder / file).write_bytes(content)
        if (name, end) == (digest, 48):
            assert Path(fetch(f"{url}/{file}")).read_bytes() == content
            continue
        found = hashlib.sha256(content).hexdigest()
        message = f"is {found}, but must start with {name}. It was removed from .*/{file}; try"
        with pytest.raises(OSError, match=message):
            fetch(f"{url}/{file}")
        assert not (tmp_path / "cache" / file).exists()


@pytest.mark.parametrize(
    "name",
    [
        "model_final_280758.pkl",
        "a-1234567.pth",
        "a-12345678-b.pth",
        "a-1234567g.pth",
        "a-20241231.pth",
    ],
)
def test_names_without_hash(server, name):
    """Such files are not checked."""
    folder, url = server
    (folder / name).write_bytes(b"any")
    assert Path(fetch(f"{url}/{name}")).read_bytes() == b"any"
