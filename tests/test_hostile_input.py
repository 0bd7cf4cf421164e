# SPDX-License-Identifier: Apache-2.0
"""Files from strangers: none runs code, writes outside OUTPUT_DIR, or takes memory by saying so."""

import json
import os
import pickle
import re
import shutil
import struct
import zipfile
import zlib

import numpy as np
import pytest
import torch
from conftest import ROOT
from PIL import Image
from test_train_net import QUICK, fails, run

from libra_d2.checkpoint import LibraCheckpointer
from libra_d2.data import prepare_proposals
from libra_d2.engine import read_config
from libra_d2.errors import InputError

MARK = "executed"


class Exploit:
    """Leaves a directory behind when it is unpickled."""

    def __reduce__(self):
        return os.mkdir, (MARK,)


class HugeArray:
    """800 GB, according to itself."""

    def __reduce__(self):
        return np.zeros(0).__reduce__()[0], (np.ndarray, (10**11,), b"d")


def array_with_wrong_size():
    """A pickled array of 10^12 numbers, of which there are three."""
    pickled = pickle.dumps(np.arange(3.0), protocol=2)
    return pickled.replace(b"K\x03\x85", b"\x8a\x06" + (10**12).to_bytes(6, "little") + b"\x85")


def many_references():
    """Two bytes, kept under the number 2^31 - 2, which is where a list of 16 GB would end."""
    return b"\x80\x02}U\x01ar" + struct.pack("<I", 2**31 - 2) + b"K\x01s."


def write_compressed(path):
    """100 MB of zeros in 100 kB."""
    torch.save({"model": {"x": torch.zeros(25_000_000)}}, path)
    with zipfile.ZipFile(path) as source:
        entries = {info.filename: source.read(info) for info in source.infolist()}
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as target:
        for name, data in entries.items():
            target.writestr(name, data)


def pickled(weight):
    return pickle.dumps({"model": {"x": weight}, "__author__": "a"})


# Bytes, weights or what writes a file, and what is said about it.
CHECKPOINTS = {
    "code.pth": (Exploit(), "must not hold anything but arrays"),
    "compressed.pth": (write_compressed, "would take .* bytes of memory: not written by PyTorch"),
    "expanded.pth": (torch.zeros(1).expand(10**6, 10**6), "these are weights of another model"),
    "code.pkl": (pickled(Exploit()), "refers to .*mkdir, which may run code"),
    "huge.pkl": (pickled(HugeArray()), "declares an array of shape"),
    "size.pkl": (array_with_wrong_size(), "not a checkpoint, or cut short"),
    "references.pkl": (many_references(), "declares more references than it has"),
}


def resident_peak():
    """The most memory that this process has had, in bytes."""
    with open("/proc/self/status") as f:
        return next(int(line.split()[1]) * 1024 for line in f if line.startswith("VmHWM"))


@pytest.fixture(autouse=True)
def harmless(tmp_path, monkeypatch):
    """Nothing is executed, and 200 MB of memory do."""
    monkeypatch.chdir(tmp_path)
    with open("/proc/self/clear_refs", "w") as f:
        f.write("5")
    before = resident_peak()
    yield
    assert not (tmp_path / MARK).exists()
    assert resident_peak() - before < 200e6


@pytest.mark.parametrize("name", [*CHECKPOINTS, "old format code.pth"])
def test_checkpoint(name, tmp_path):
    path, (content, message) = tmp_path / name, CHECKPOINTS[name.split()[-1]]
    if isinstance(content, bytes):
        path.write_bytes(content)
    elif callable(content):
        content(path)
    else:
        new_format = not name.startswith("old")
        torch.save({"model": {"x": content}}, path, _use_new_zipfile_serialization=new_format)
    with pytest.raises(InputError, match=message) as error:
        LibraCheckpointer(torch.nn.Linear(2, 2), complete=True).load(str(path))
    assert str(path) in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("content", [many_references(), pickle.dumps([HugeArray()])])
def test_proposals(content, tmp_path):
    (tmp_path / "evil.pkl").write_bytes(content)
    with pytest.raises(InputError, match=f"^{tmp_path}/evil.pkl: .*declares"):
        prepare_proposals(str(tmp_path / "evil.pkl"), "any", str(tmp_path / "out"))


@pytest.mark.parametrize(
    "text",
    [
        "MODEL: !!python/object/apply:os.mkdir ['executed']\n",
        "OUTPUT_DIR: !!python/object/new:os.mkdir ['executed']\n",
        "_BASE_: other.yaml\n",
        "a: &a [x, x, x, x, x, x, x, x, x]\n"
        + "".join(
            f"{b}: &{b} [{', '.join([f'*{a}'] * 9)}]\n" for a, b in zip("abcdefgh", "bcdefghi")
        ),
    ],
    ids=["call", "new", "base", "billion laughs"],
)
def test_config(text, tmp_path):
    """Tags that would call something are refused, in base files as well."""
    (tmp_path / "evil.yaml").write_text(text)
    (tmp_path / "other.yaml").write_text("MODEL: !!python/object/apply:os.mkdir ['executed']\n")
    with pytest.raises(InputError, match=f"^{tmp_path}/evil.yaml: "):
        read_config(str(tmp_path / "evil.yaml"), [])


def annotations(synthetic, folder, change):
    """The synthetic dataset with a change, and its images."""
    dataset = json.loads((synthetic / "instances.json").read_text())
    shutil.copytree(synthetic / "images", folder / "images")
    change(dataset, folder)
    (folder / "evil.json").write_text(json.dumps(dataset))
    return ["--train-json", folder / "evil.json", "--train-images", folder / "images"]


def bomb(dataset, folder):
    """An image of 60000 x 60000 pixels in a small file."""
    header = Image.new("1", (60000, 1))
    header.save(folder / "images/bomb.png")
    data = bytearray((folder / "images/bomb.png").read_bytes())
    data[20:24] = struct.pack(">I", 60000)
    data[29:33] = struct.pack(">I", zlib.crc32(data[12:29]))
    (folder / "images/bomb.png").write_bytes(data)
    dataset["images"][0].update(file_name="bomb.png", width=60000, height=60000)


def rename(dataset, folder):
    dataset["images"][0]["file_name"] = "../evil.json"


def large_mask(dataset, folder):
    """A mask of 10^10 pixels in 20 bytes."""
    counts = {"size": [100_000, 100_000], "counts": [0, 10**10]}
    dataset["annotations"][0]["segmentation"] = counts


@pytest.mark.parametrize(
    ("change", "message", "config"),
    [
        (bomb, "bomb.png: not a readable image", "faster"),
        (large_mask, "annotation id 1: its run-length mask", "mask"),
        (rename, "evil.json: .* names an image outside of the image directory", "faster"),
    ],
)
def test_annotations(change, message, config, synthetic, tmp_path, capsys):
    args = annotations(synthetic, tmp_path, change)
    path = ROOT / f"configs/Demo/libra_{config}_rcnn_R_18_FPN.yaml"
    line = fails(capsys, *args, "OUTPUT_DIR", tmp_path / "out", config=path)
    assert line.startswith(f"error: {tmp_path}")
    assert re.search(message, line), line


def test_pictures_stay_in_the_output_directory(synthetic, tmp_path):
    """Whatever the path in the annotations is; paths of anywhere have to be asked for."""
    shutil.copytree(synthetic / "images", tmp_path / "elsewhere/images")
    (tmp_path / "data").mkdir()

    def change(dataset, folder):
        for image in dataset["images"]:
            image["file_name"] = str(tmp_path / "elsewhere/images" / image["file_name"])

    annotations(synthetic, tmp_path / "data", change)
    weights = tmp_path / "data/weights.pth"
    torch.save({"model": {"number": torch.ones(())}}, weights)
    before = {p for p in tmp_path.rglob("*") if p.is_file()}
    data = ["--val-json", tmp_path / "data/evil.json", "--val-images", "/"]
    opts = ["MODEL.WEIGHTS", weights, "MODEL.LIBRA.NUM_PICTURES", 2, "OUTPUT_DIR", tmp_path / "out"]
    run("--eval-only", *data, *QUICK, *opts, config="")
    written = {p for p in tmp_path.rglob("*") if p.is_file()} - before
    assert len([p for p in written if p.suffix == ".jpg"]) == 2
    assert all((tmp_path / "out") in p.parents for p in written)
