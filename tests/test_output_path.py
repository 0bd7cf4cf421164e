# SPDX-License-Identifier: Apache-2.0
import os

import pytest
from conftest import full_disk

from libra_d2.errors import InputError
from libra_d2.utils.output_path import output_path, output_paths


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    """The working directory: a file, links to it, and a folder."""
    (tmp_path / "photo.jpg").write_text("precious")
    (tmp_path / "symbolic.jpg").symlink_to("photo.jpg")
    os.link(tmp_path / "photo.jpg", tmp_path / "hard.jpg")
    (tmp_path / "what?.jpg").touch()
    (tmp_path / "photos").mkdir()
    (tmp_path / "linked").symlink_to("photos")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def content(folder):
    return {str(x.relative_to(folder)) for x in folder.rglob("*")}


@pytest.mark.parametrize(
    ("path", "other"),
    [
        *((x, "photo.jpg") for x in ("photo.jpg", "./photos/../photo.jpg", "{}/photo.jpg")),
        *(("hard.jpg", "photo.jpg"), ("symbolic.jpg", "photo.jpg"), ("symbolic.jpg", "hard.jpg")),
        *(("new.json", "new.json"), ("new.json", "photos/../new.json")),  # two outputs
        *(("photo.jpg", "photo.jpg?matching_heuristics=True"), ("what?.jpg", "what?.jpg")),
    ],
)
def test_same_file(path, other, folder):
    path = path.format(folder)
    same = f"{path} and --input, {other}, are the same file, which would be overwritten"
    for others in ({"--input": other}, {"--a": None, "--input": ["none.jpg", other]}):
        with pytest.raises(InputError) as error:
            output_path("--output", path, others)
        assert str(error.value) == f"--output: {same}: choose another"


def test_several_paths(folder):
    """Folders are made for all; each path is compared with all others."""
    paths = ["new/a/1", "new/b/1", "new/b/2"]
    assert output_paths("--output", paths, {"--input": ["photo.jpg"]}) == paths
    assert (folder / "new/a").is_dir()
    assert (folder / "new/b").is_dir()
    with pytest.raises(InputError, match="--output: hard.jpg and --input, photo.jpg, are the same"):
        output_paths("--output", [*paths, "hard.jpg"], {"--input": ["none.jpg", "photo.jpg"]})
    with pytest.raises(InputError, match="--output: photos is not a file"):
        output_paths("--output", [*paths, "photos"], {})
    with pytest.raises(InputError, match="new/../new/b/1 and --output, new/b/1, are the same file"):
        output_paths("--output", [*paths, "new/../new/b/1"], {})
    with pytest.raises(InputError, match="^--output: new/b/1 would be written twice"):
        output_paths("--output", [*paths, "new/b/1"], {})


def test_same_folder():
    with pytest.raises(InputError, match="linked and --input, photos, are the same folder"):
        output_path("--output", "linked", {"--input": "photos"}, is_folder=True)


@pytest.mark.parametrize(
    ("path", "is_folder", "created"),
    [
        ("photos/a.jpg", False, set()),
        ("symbolic.jpg", False, set()),  # of another file than the inputs
        ("new/deep/a.jpg", False, {"new", "new/deep"}),
        ("photos", True, set()),
        ("linked/", True, set()),
        ("new/deep", True, {"new", "new/deep"}),
    ],
)
def test_usable(path, is_folder, created, folder):
    """The folder is made, and what was there before is as it was."""
    before = content(folder)
    others = {"--a": "https://host/a.pth", "--b": "", "--c": ["none.jpg", "photos/photo.jpg"]}
    assert output_path("--output", path, others, is_folder=is_folder) == path
    assert content(folder) == before | created
    assert (folder / "photo.jpg").read_text() == "precious"


@pytest.mark.parametrize(
    ("path", "is_folder", "message"),
    [
        ("photos", False, "photos is not a file"),
        ("linked", False, "linked is not a file"),
        ("new/", False, "new/ is not a file"),
        ("", False, "'' is not a file"),
        ("", True, "'' is not a folder"),
        ("/dev/null", False, "/dev/null is not a file"),
        ("photo.jpg", True, "photo.jpg is not a folder"),
        ("photo.jpg/a", False, "photo.jpg/a cannot be written: File exists: photo.jpg"),
        ("photo.jpg/a", True, "photo.jpg/a cannot be written: Not a directory"),
        ("a" * 300, False, f"{'a' * 300} cannot be written: File name too long"),
    ],
)
def test_unusable(path, is_folder, message, folder):
    before = content(folder)
    with pytest.raises(InputError) as error:
        output_path("--output", path, {}, is_folder=is_folder)
    assert str(error.value).removesuffix(": choose another") == f"--output: {message}"
    assert content(folder) == before


@pytest.mark.parametrize("is_folder", [False, True])
def test_full_disk(is_folder):
    message = "^--output: out cannot be written: File too large$"
    with full_disk(), pytest.raises(InputError, match=message):
        output_path("--output", "out", {}, is_folder=is_folder)
