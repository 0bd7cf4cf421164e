# SPDX-License-Identifier: Apache-2.0
import collections
import pickle
import struct
import zipfile

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

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
    """Both doors say the same, in one line that names the file."""
    for read in (read_weights, LibraCheckpointer(torch.nn.Linear(2, 2)).load):
        with pytest.raises(BrokenFileError, match=f"^{path}: {message}$") as error:
            read(str(path))
        assert "\n" not in str(error.value)


@pytest.mark.parametrize("numpy", [b"numpy._core", b"numpy.core"])
@pytest.mark.parametrize("protocol", [0, 2, 3])
def test_arrays(protocol, numpy, tmp_path):
    """All that Detectron2 writes, under the names of NumPy 1 and 2, old protocols included."""
    arrays = {"array": np.arange(6, dtype=np.float32).reshape(2, 3), "empty": np.zeros((0, 4))}
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


def memo(number):
    """An empty dict that a pickle keeps under a number, beside number 0."""
    return b"\x80\x02}q\x00r" + struct.pack("<I", number) + b"."


def array_of(*shape):
    return Called(np.zeros(0).__reduce__()[0], np.ndarray, shape, b"b")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (pickle.dumps(Called(run), 2), "it refers to test_safe_reading.run, which may run code"),
        (
            pickle.dumps(Called(getattr, 1, "real")),
            "it refers to builtins.getattr, which may run .*",
        ),
        (pickle.dumps(array_of(9**9)), r"it declares .* shape \(387420489,\) without content"),
        (pickle.dumps(array_of(1)), r"it declares an array of shape \(1,\) without content"),
        (memo(1003), "it declares more references than it has"),
    ],
)
def test_refused(content, message, tmp_path):
    """Nothing is called, and nothing is allocated, before the line that says why."""
    (tmp_path / "a.pkl").write_bytes(content)
    check_refused(tmp_path / "a.pkl", f"not loaded, because .*: {message}")


def test_accepted(tmp_path):
    """Text of Python 2, which is Latin-1; 1000 numbers of references may be missing."""
    for content, value in ((b"\x80\x02U\x02\xe9\xffq\x00.", "\xe9\xff"), (memo(1002), {})):
        (tmp_path / "a.pkl").write_bytes(content)
        assert read_weights(str(tmp_path / "a.pkl")) == value


@pytest.mark.parametrize(
    ("compression", "size", "message"),
    [
        (zipfile.ZIP_STORED, 10**4, "data in it would take 10000"),
        (8, 50, "version in it .* take 2"),
    ],
)
def test_declared_sizes(compression, size, message, tmp_path):
    """More than the whole file, or anything compressed, is refused, and named."""
    path = tmp_path / "a.pth"
    for how, declared in ((zipfile.ZIP_STORED, 200), (compression, size)):
        check_declared_sizes(str(path)) if path.exists() else None
        with zipfile.ZipFile(path, "w", how) as file:
            file.writestr("version", b"3\n")
            file.writestr("data", b"x" * 50)
            file.infolist()[-1].file_size = declared
    check_refused(path, f"{message} bytes of memory: not written by PyTorch")


NOT_LOADED = (
    "a.pth: not loaded, because a weights file must not hold anything but arrays, numbers and text,"
    " or because it is cut short: "
)
PYTORCHS = """Weights only load failed. In PyTorch 2.6, we changed the default. (1) Do this.
 WeightsUnpickler error: Unsupported global: GLOBAL os.system was not an allowed global by default.
 Please use `torch.serialization.add_safe_globals`. Check the documentation of torch.load"""


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (InputError("no"), "a.pth: no"),
        (BrokenFileError("no"), "a.pth: no"),
        (OSError("gone"), "a.pth: the weights cannot be read: gone"),
        (EOFError("a\nb"), "a.pth: not a checkpoint, or cut short (EOFError: a b)"),
        (pickle.UnpicklingError(PYTORCHS), f"{NOT_LOADED}Unsupported global: GLOBAL os.system"),
        (pickle.UnpicklingError("WeightsUnpickler error: a\nb Check the docs"), f"{NOT_LOADED}a b"),
    ],
)
def test_errors(error, message):
    """One line, and the kind that says whether another file might do."""
    before = set(torch.serialization.get_safe_globals())
    with pytest.raises(InputError) as raised, reading_weights("a.pth"):
        raise error
    assert type(raised.value) is (InputError if type(error) is InputError else BrokenFileError)
    assert str(raised.value) == message
    assert set(torch.serialization.get_safe_globals()) == before


def test_history_is_ignored(tmp_path):
    """Names that checkpoints of mmdetection 3.x refer to are neither called nor looked up."""
    content = {"a": torch.ones(2), "history": Called(getattr, 1, "real"), "scalar": np.float64(3.0)}
    torch.save({**content, "array": np.arange(3)}, tmp_path / "a.pth")
    found = read_weights(str(tmp_path / "a.pth"))
    assert found["a"].tolist() == [1, 1]
    assert not any(isinstance(found[x], (int, float, np.ndarray)) for x in ("history", "scalar"))
    torch.save({"model": {"x": Called(run)}}, tmp_path / "a.pth")
    check_refused(tmp_path / "a.pth", "not loaded, .* must not hold anything but arr.*GLOBAL .*run")


def write(path):
    state = torch.nn.Linear(3, 2).state_dict()
    if path.suffix == ".pth":
        torch.save({"model": state}, path)
    else:
        arrays = {k: v.numpy() for k, v in state.items()}
        path.write_bytes(pickle.dumps({"model": arrays, "__author__": "someone"}))
    return path.read_bytes()


@pytest.mark.parametrize("size", [0, 0.1, 0.5, 0.99])
@pytest.mark.parametrize("suffix", [".pth", ".pkl"])
def test_cut_short(tmp_path, size, suffix):
    path = tmp_path / f"cut{suffix}"
    content = write(path)
    path.write_bytes(content[: int(size * len(content))])
    check_refused(path, "not .*cut short.*")


@settings(max_examples=150, deadline=None)
@given(
    st.lists(st.tuples(st.floats(0, 1), st.integers(0, 255)), min_size=1, max_size=6),
    st.floats(0.5, 1),
    st.sampled_from(["a.pth", "a.pkl"]),
)
def test_mutated_files(tmp_path_factory, changes, length, name):
    """Bytes that were changed or cut off: the weights, or one line; never another exception."""
    path = tmp_path_factory.mktemp("mutated") / name
    content = bytearray(write(path))
    for position, byte in changes:
        content[int(position * (len(content) - 1))] = byte
    path.write_bytes(content[: int(length * len(content))])
    message = ""
    try:
        LibraCheckpointer(torch.nn.Linear(3, 2)).load(str(path))
    except InputError as e:
        message = str(e)
    assert "\n" not in message
