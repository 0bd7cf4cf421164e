# SPDX-License-Identifier: Apache-2.0
import hashlib
import http.server
import re
import threading
from contextlib import contextmanager
from functools import partial
from pathlib import Path

import pytest

from libra_d2.checkpoint.download import fetch


@contextmanager
def serving(path):
    """A web server of this machine, of the files in a folder; downloads are cached in another."""
    folder = path / "served"
    folder.mkdir()
    handler = partial(http.server.SimpleHTTPRequestHandler, directory=str(folder))
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
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
    with pytest.raises(OSError, match=f"^{url}/{name}: what was downloaded \\(13 bytes\\) is not"):
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


@pytest.mark.parametrize("digits", [8, 64])
def test_hash(server, digits):
    """Of the whole file, to its last byte; all digits in the name count."""
    folder, url = server
    content = bytearray(b"0" * (5 << 19))  # 2.5 blocks of what is read at a time
    digest = hashlib.sha256(content).hexdigest()[:digits]
    other = digest[:-1] + f"{(int(digest[-1], 16) + 1) % 16:x}"
    for name, end in ((digest, 48), (other, 48), (digest, 49)):
        content[-1] = end
        path = folder / f"{len(list(folder.iterdir()))}-{name}.pth"
        path.write_bytes(content)
        if (name, end) == (digest, 48):
            assert Path(fetch(f"{url}/{path.name}")).read_bytes() == content
            continue
        is_, where = hashlib.sha256(content).hexdigest(), f"It was removed from .*/{path.name}; try"
        with pytest.raises(OSError, match=f"is {is_}, but must start with {name}. {where} again"):
            fetch(f"{url}/{path.name}")


@pytest.mark.parametrize(
    "name", ["model_final_280758.pkl", "a-1234567.pth", "a-12345678-b.pth", "a-1234567g.pth"]
)
def test_other_names_are_not_checked(server, name):
    folder, url = server
    (folder / name).write_bytes(b"any")
    assert Path(fetch(f"{url}/{name}")).read_bytes() == b"any"
