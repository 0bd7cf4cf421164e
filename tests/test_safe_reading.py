# SPDX-License-Identifier: Apache-2.0
import collections
import os
import pickle
import struct
import zipfile

import numpy as np
import pytest
import torch

from detectron2.structures import BoxMode

from libra_d2.checkpoint import LibraCheckpointer
from libra_d2.errors import BrokenFileError, InputError
from libra_d2.utils.safe_reading import check_declared_sizes, read_weights, reading_weights


class Called:
    """Pickled as a call."""

    def __init__(self, *call):
        self.call = call

    def __reduce__(self):
        return self.call[0], self.call[1:]


def run():
    pytest.fail("code of the file was executed")


def check_refused(path, message):
    """With the same line, which names the file, from both functions that load weights."""
    for read in (read_weights, LibraCheckpointer(torch.nn.Linear(2, 2)).load):
        with pytest.raises(BrokenFileError, match=f"^{path}: {message}$") as error:
            read(str(path))
        assert "\n" not in str(error.value)


@pytest.mark.parametrize("numpy", [b"numpy._core", b"numpy.core"])
@pytest.mark.parametrize("protocol", [0, 2, 3])
def test_arrays(protocol, numpy, tmp_path):
    """Everything that Detectron2 writes, with NumPy 1 and 2 and in old protocols."""
    arrays = {"array": np.arange(6, dtype=np.float32).reshape(2, 3), "empty": np.zeros((0, 4))}
    arrays.update({code: np.ones(2, code) for code in ("?", "u1", "i8", "c8", "S3")})
    other = [None, True, 3, 0.5, "text", b"\xe9", (1,), {"a": {}}, np.float64(2.5)]
    content = collections.OrderedDict(arrays, mode=BoxMode.XYWH_ABS, other=other)
    path = tmp_path / "a.pkl"
    path.write_bytes(pickle.dumps(content, protocol).replace(b"numpy._core", numpy))
    found = read_weights(str(path))
    assert (type(found), type(found["mode"])) == (collections.OrderedDict, BoxMode)
    for name, expected in arrays.items():
        array = found.pop(name)
        assert array.dtype == expected.dtype
        assert np.array_equal(array, expected)
    assert found == {"mode": BoxMode.XYWH_ABS, "other": other}


ARRAY = Called(np.zeros(0).__reduce__()[0], np.ndarray, (1,), b"b")


def memo(number):
    """A pickle of an empty dict with the memo keys 0 and ``number``."""
    return b"\x80\x02}q\x00r" + struct.pack("<I", number) + b"."


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (pickle.dumps(Called(run), 2), "it refers to test_safe_reading.run, which may run code"),
        (pickle.dumps(ARRAY), r"it declares an array of shape \(1,\) without content"),
        (memo(1003), "it declares more references than it has"),
        (pickle.dumps(Called(np.ndarray, (9,))), r"it declares an array of shape \(9,\) without.*"),
        (pickle.dumps(np.array([None])), "it holds an array of type object"),
    ],
)
def test_refused(content, message, tmp_path):
    """Nothing is called or allocated."""
    (tmp_path / "a.pkl").write_bytes(content)
    check_refused(tmp_path / "a.pkl", f"not loaded, because .*: {message}")


def test_accepted(tmp_path):
    """Text of Python 2 in Latin-1; up to 1000 missing memo keys, or none at all."""
    text = (b"\x80\x02U\x02\xe9\xffq\x00.", "\xe9\xff")
    for content, value in (text, (memo(1002), {}), (pickle.dumps(3), 3)):
        (tmp_path / "a.pkl").write_bytes(content)
        assert read_weights(str(tmp_path / "a.pkl")) == value


def test_declared_size(tmp_path):
    """Entries that are declared larger than the whole file are refused."""
    size = 30 + 46 + 22 + 2 * len("data") + 50  # of headers, names and content
    for declared in (size, size + 1):
        with zipfile.ZipFile(tmp_path / "a.pth", "w") as file:
            file.writestr("data", b"x" * 50)
            file.infolist()[0].file_size = declared
        if declared == size:
            check_declared_sizes(str(tmp_path / "a.pth"))
    message = f"data in it would take {size + 1} bytes of memory: not written by PyTorch"
    check_refused(tmp_path / "a.pth", message)


NOT_LOADED = (
    "a.pth: not loaded, because a weights file must not hold anything but arrays, numbers and text,"
    " or because it is cut short: "
)
ADVICE = "Re-running `torch.load` with `weights_only` set to `False` will likely succeed"


def with_advice(reason):
    """What PyTorch raises: a message full of advice instead of its unpickler's."""
    try:
        raise pickle.UnpicklingError(reason)
    except pickle.UnpicklingError as e:
        try:
            raise pickle.UnpicklingError(f"Weights only load failed. {ADVICE}. {e}") from None
        except pickle.UnpicklingError as raised:
            return raised


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (InputError("no"), "a.pth: no"),
        (BrokenFileError("no"), "a.pth: no"),
        (OSError("gone"), "a.pth: the weights cannot be read: gone"),
        (EOFError("a\nb"), "a.pth: not a checkpoint, or cut short (EOFError: a b)"),
        (
            RuntimeError(f"No a. {ADVICE}"),
            "a.pth: not a checkpoint, or cut short (RuntimeError: No a)",
        ),
        (with_advice("GLOBAL os.a is\nno b. Please use x."), f"{NOT_LOADED}GLOBAL os.a is no b"),
        (pickle.UnpicklingError("a\nb."), f"{NOT_LOADED}a b"),
    ],
)
def test_errors(error, message):
    """One line; a BrokenFileError if another file might do."""
    before = set(torch.serialization.get_safe_globals())
    with pytest.raises(InputError) as raised, reading_weights("a.pth"):
        raise error
    assert type(raised.value) is (InputError if type(error) is InputError else BrokenFileError)
    assert str(raised.value) == message
    assert set(torch.serialization.get_safe_globals()) == before


def test_history_is_ignored(tmp_path):
    """The history of losses in checkpoints of mmdetection 3.x is neither called nor loaded."""
    content = {"a": torch.ones(2), "history": Called(getattr, 1, "real")}
    torch.save(content, tmp_path / "a.pth")
    found = read_weights(str(tmp_path / "a.pth"))
    assert found["a"].tolist() == [1, 1]
    assert not isinstance(found["history"], int)


@pytest.mark.parametrize("zipped", [True, False])
def test_arrays_in_files_of_pytorch(tmp_path, zipped, monkeypatch):
    """Arrays of numbers and text, and tensors of a GPU, are loaded, and can be written again."""
    monkeypatch.setattr(torch.serialization, "location_tag", lambda storage: "cuda:0")
    written = [np.arange(6, dtype=">f4").reshape(2, 3).T, np.zeros((0, 4)), np.array(["a", "bc"])]
    arrays = written
    for _ in range(2):
        content = {"arrays": arrays, "number": np.float64(2.5), "tensor": torch.ones(2)}
        torch.save(content, tmp_path / "a.pth", _use_new_zipfile_serialization=zipped)
        found = read_weights(str(tmp_path / "a.pth"))
        assert (found["number"], found["tensor"].device.type) == (2.5, "cpu")
        for array, expected in zip(found["arrays"], written):
            assert array.dtype == expected.dtype.newbyteorder("=")
            assert type(pickle.loads(pickle.dumps(array))) is np.ndarray
            assert np.array_equal(array, expected)
        arrays = found["arrays"]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (Called(run), "GLOBAL test_safe_reading.run was not an allowed global by default"),
        (Called(os.mkdir, "x"), "Trying to load unsupported GLOBAL posix.mkdir whose module posix"),
        (Called(np.ndarray, (1000,)), r"it declares an array of shape \(1000,\) without content"),
        (np.array([None]), "it holds an array of type object"),
        (np.zeros(2, [("a", "i4"), ("b", "O")]), r"it holds an array of type \|?V"),
    ],
)
def test_refused_in_files_of_pytorch(content, message, tmp_path):
    """In one line, without PyTorch's advice to execute what is in the file."""
    torch.save({"model": {"x": content}}, tmp_path / "a.pth")
    check_refused(tmp_path / "a.pth", f"not loaded, [^.]*: (Unsupported global: )?{message}[^.]*")


def test_torchscript(tmp_path):
    torch.jit.script(torch.nn.Linear(2, 2)).save(tmp_path / "a.pth")
    check_refused(tmp_path / "a.pth", "a TorchScript file, which is a program: name the weights .*")


@pytest.mark.parametrize("size", [0, 0.1, 0.99])
@pytest.mark.parametrize("suffix", [".pth", ".pkl"])
def test_cut_short(tmp_path, size, suffix):
    path, state = tmp_path / f"cut{suffix}", {"weight": torch.ones(2, 3)}
    if suffix == ".pth":
        torch.save({"model": state}, path)
    else:
        path.write_bytes(pickle.dumps({"model": {"weight": state["weight"].numpy()}}))
    content = path.read_bytes()
    path.write_bytes(content[: int(size * len(content))])
    check_refused(path, "not .*cut short.*")
