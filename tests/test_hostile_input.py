# SPDX-License-Identifier: Apache-2.0
"""Malicious files do not run code, write outside OUTPUT_DIR or exhaust the memory."""

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
from test_train_net import QUICK, fails, run, small_data

from libra_d2.checkpoint import LibraCheckpointer
from libra_d2.engine import read_config
from libra_d2.errors import InputError

MARK = "executed"


class Exploit:
    """Creates a directory when it is unpickled."""

    def __reduce__(self):
        return os.mkdir, (MARK,)


def array_with_wrong_size():
    """A pickled array that declares 10^12 numbers and holds three."""
    pickled = pickle.dumps(np.arange(3.0), protocol=2)
    return pickled.replace(b"K\x03\x85", b"\x8a\x06" + (10**12).to_bytes(6, "little") + b"\x85")


def many_references():
    """A pickle with memo index 2^31 - 2, for which C unpicklers allocate 16 GB."""
    return b"\x80\x02}U\x01ar" + struct.pack("<I", 2**31 - 2) + b"K\x01s."


def write_compressed(path):
    """A zip bomb: 10 MB of zeros in 10 kB."""
    torch.save({"model": {"x": torch.zeros(2_500_000)}}, path)
    with zipfile.ZipFile(path) as source:
        entries = {info.filename: source.read(info) for info in source.infolist()}
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as target:
        for name, data in entries.items():
            target.writestr(name, data)


# Bytes, a weight or a function that writes the file; and the message.
CHECKPOINTS = {
    "old format.pth": (Exploit(), "must not hold anything but arrays"),
    "compressed.pth": (write_compressed, "would take .* bytes of memory: not written by PyTorch"),
    "expanded.pth": (torch.zeros(1).expand(10**6, 10**6), "quantized, expanded or empty"),
    "size.pkl": (array_with_wrong_size(), "not a checkpoint, or cut short"),
    "references.pkl": (many_references(), "declares more references than it has"),
}


def resident_peak():
    """Peak memory of this process in bytes."""
    with open("/proc/self/status") as f:
        return next(int(line.split()[1]) * 1024 for line in f if line.startswith("VmHWM"))


@pytest.fixture(autouse=True)
def harmless(tmp_path, monkeypatch):
    """Checks that nothing was executed, and that less than 200 MB of memory were used."""
    monkeypatch.chdir(tmp_path)
    with open("/proc/self/clear_refs", "w") as f:
        f.write("5")
    before = resident_peak()
    yield
    assert not (tmp_path / MARK).exists()
    assert resident_peak() - before < 200e6


@pytest.mark.parametrize("name", CHECKPOINTS)
def test_checkpoint(name, tmp_path):
    path, (content, message) = tmp_path / name, CHECKPOINTS[name]
    if isinstance(content, bytes):
        path.write_bytes(content)
    elif callable(content):
        content(path)
    else:
        zipped = name != "old format.pth"
        torch.save({"model": {"x": content}}, path, _use_new_zipfile_serialization=zipped)
    with pytest.raises(InputError, match=message) as error:
        LibraCheckpointer(torch.nn.Linear(2, 2), complete=True).load(str(path))
    assert str(path) in str(error.value)
    assert "\n" not in str(error.value)


CALL = "MODEL: !!python/object/apply:os.mkdir ['executed']\n"
BILLION_LAUGHS = "a: &a [x, x, x, x, x, x, x, x, x]\n" + "".join(
    f"{b}: &{b} [{', '.join([f'*{a}'] * 9)}]\n" for a, b in zip("abcdefgh", "bcdefghi")
)


@pytest.mark.parametrize(
    "text", [CALL, "_BASE_: other.yaml\n", BILLION_LAUGHS], ids=["call", "base", "laughs"]
)
def test_config(text, tmp_path):
    """YAML tags that call a function are refused, also in base files."""
    (tmp_path / "evil.yaml").write_text(text)
    (tmp_path / "other.yaml").write_text(CALL)
    with pytest.raises(InputError, match=f"^{tmp_path}/evil.yaml: "):
        read_config(str(tmp_path / "evil.yaml"), [])


def annotations(synthetic, folder, change):
    """Arguments for a changed copy of the synthetic dataset."""
    dataset = json.loads((synthetic / "instances.json").read_text())
    shutil.copytree(synthetic / "images", folder / "images")
    change(dataset, folder)
    (folder / "evil.json").write_text(json.dumps(dataset))
    return ["--train-json", folder / "evil.json", "--train-images", folder / "images"]


def bomb(dataset, folder):
    """An image of 60000 x 60000 pixels in a small file."""
    path = folder / "images/bomb.png"
    Image.new("1", (60000, 1)).save(path)
    data = bytearray(path.read_bytes())
    data[20:24] = struct.pack(">I", 60000)
    data[29:33] = struct.pack(">I", zlib.crc32(data[12:29]))
    path.write_bytes(data)
    dataset["images"][0].update(file_name="bomb.png", width=60000, height=60000)


def large_mask(dataset, folder):
    """A mask of 10^10 pixels in 20 bytes."""
    counts = {"size": [100_000, 100_000], "counts": [0, 10**10]}
    dataset["annotations"][0]["segmentation"] = counts


@pytest.mark.parametrize(
    ("change", "message", "config"),
    [
        (bomb, "bomb.png: not a readable image", "faster"),
        (large_mask, "annotation id 1: its run-length mask", "mask"),
    ],
)
def test_annotations(change, message, config, synthetic, tmp_path, capsys):
    args = annotations(synthetic, tmp_path, change)
    path = ROOT / f"configs/Demo/libra_{config}_rcnn_R_18_FPN.yaml"
    line = fails(capsys, *args, "OUTPUT_DIR", tmp_path / "out", config=path)
    assert line.startswith(f"error: {tmp_path}")
    assert re.search(message, line), line


def test_pictures_stay_in_the_output_directory(tmp_path):
    """Also those of images with absolute paths."""
    folder = small_data(tmp_path / "data")
    dataset = json.loads((folder / "instances.json").read_text())
    for image in dataset["images"]:
        image["file_name"] = str(folder / "images" / image["file_name"])
    (folder / "instances.json").write_text(json.dumps(dataset))
    torch.save({"model": {"number": torch.ones(())}}, folder / "weights.pth")
    before = {p for p in tmp_path.rglob("*") if p.is_file()}
    data = ["--val-json", folder / "instances.json", "--val-images", "/"]
    opts = ["MODEL.LIBRA.NUM_PICTURES", 2, "MODEL.WEIGHTS", folder / "weights.pth"]
    opts += ["OUTPUT_DIR", tmp_path / "out"]
    run("--eval-only", *data, *QUICK, *opts, config="")
    written = {p for p in tmp_path.rglob("*") if p.is_file()} - before
    assert len([p for p in written if p.suffix == ".jpg"]) == 2
    assert all((tmp_path / "out") in p.parents for p in written)
