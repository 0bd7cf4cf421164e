# SPDX-License-Identifier: Apache-2.0
"""The directory of a run: one program at a time, and no files of earlier runs."""

import errno
import logging
import os
import socket
import subprocess
import sys

import pytest
from conftest import demo_cfg, full_disk

from libra_d2.config import make_recipe
from libra_d2.engine.output_dir import (
    config_kept,
    prepare_output_dir,
    set_earlier_run_aside,
    title_of,
)
from libra_d2.errors import InputError
from libra_d2.utils.atomic_write import UNFINISHED

OTHER = """
import fcntl, sys
file = open(sys.argv[1], "a+")
fcntl.lockf(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
file.write("process 7 on host")
file.flush()
print("locked", flush=True)
sys.stdin.read()
"""


def recipe_for(folder, **overrides):
    return make_recipe(demo_cfg(OUTPUT_DIR=str(folder), **overrides))


@pytest.mark.parametrize(
    ("path", "title"), [("a.c.yaml", "a.c"), ("config.yaml", "run"), ("../config.yaml", "config")]
)
def test_title(path, title, tmp_path, monkeypatch):
    (tmp_path / "run").mkdir()
    (tmp_path / "run/metrics.json").touch()
    monkeypatch.chdir(tmp_path / "run")
    assert title_of(path) == title


def test_one_program(tmp_path):
    """A directory in which another program runs is refused, with its name, until it ends."""
    unfinished, own = (tmp_path / f"{x}{UNFINISHED}" for x in ("model_0000001.pth.0-1", "chapter"))
    unfinished.touch(), own.touch()
    lock = tmp_path / ".lock"
    other = subprocess.Popen(
        [sys.executable, "-c", OTHER, lock], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    )
    try:
        assert other.stdout.readline() == b"locked\n"
        message = f"^OUTPUT_DIR: {tmp_path}: another program writes into it .process 7 on host.: "
        with pytest.raises(InputError, match=message):
            prepare_output_dir(recipe_for(tmp_path))
        assert unfinished.exists()  # it may be the other's
    finally:
        other.kill()
        other.communicate()
    for _ in range(2):  # also once more in this process
        prepare_output_dir(recipe_for(tmp_path))
    assert [*tmp_path.glob(f"*{UNFINISHED}")] == [own]
    second = subprocess.run(
        [sys.executable, "-c", OTHER, lock], stdin=subprocess.DEVNULL, capture_output=True
    )
    assert b"BlockingIOError" in second.stderr
    # Reading it ends the lock.
    assert lock.read_text() == f"process {os.getpid()} on {socket.gethostname()}"


@pytest.mark.parametrize(("rank", "file"), [(0, "log.txt"), (2, "log.txt.rank2")])
def test_log(tmp_path, monkeypatch, rank, file):
    """Each process has one; the main process claims the directory."""
    monkeypatch.setattr("detectron2.utils.comm.get_rank", lambda: rank)
    prepare_output_dir(recipe_for(tmp_path))
    logging.getLogger("libra_d2.a").warning("here")
    assert "here" in (tmp_path / file).read_text()
    assert (tmp_path / ".lock").exists() == (rank == 0)


def test_no_locks(tmp_path, monkeypatch, caplog):
    def fail(*args):
        raise OSError(errno.ENOLCK, "No locks")

    monkeypatch.setattr("fcntl.lockf", fail)
    prepare_output_dir(recipe_for(tmp_path))
    assert f"{tmp_path}: this file system has no locks (" in caplog.text


def test_full_disk(tmp_path):
    message = f"^OUTPUT_DIR: {tmp_path} cannot be written: File too"
    with full_disk(), pytest.raises(InputError, match=message):
        prepare_output_dir(recipe_for(tmp_path))


def test_no_directory(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(InputError, match=f"^OUTPUT_DIR: {tmp_path}/file is not a folder"):
        prepare_output_dir(recipe_for(tmp_path / "file"))


FILES = [
    *("model_final.pth", "metrics.json", "config.yaml", "last_checkpoint", "inference/a.json"),
    *("EMA/a.json", "evaluation/a.json", "events.out.tfevents.1", "curves.png", "results.md"),
    *("inference_TTA/a.json", "pictures/1.jpg", "model_best.pth"),
]
OTHERS = ["log.txt", "datasets/own_train.json", "proposals/own_train.pkl", "other.pth"]


def names(folder):
    return {str(p.relative_to(folder)) for p in folder.rglob("*") if p.is_file()}


def test_brackets(tmp_path):
    """In the name of the directory they stand for themselves."""
    folder = tmp_path / "lr[0.1]"
    folder.mkdir()
    for name in ("metrics.json", f"model_0000001.pth.0-1{UNFINISHED}"):
        (folder / name).touch()
    prepare_output_dir(recipe_for(folder))
    assert names(folder) == {".lock", "log.txt", "metrics.json"}
    (folder / "metrics.json").write_text("m")
    set_earlier_run_aside(recipe_for(folder), {}, False)
    assert names(folder) == {".lock", "log.txt", "earlier_runs/1/metrics.json"}


def test_checkpoint_without_metrics(tmp_path):
    """A run that was killed early is one, too."""
    for name in ("last_checkpoint", "model_0000001.pth"):
        (tmp_path / name).write_text("x")
    set_earlier_run_aside(recipe_for(tmp_path), {}, False)
    moved = {f"earlier_runs/1/{name}" for name in ("last_checkpoint", "model_0000001.pth")}
    assert names(tmp_path) == moved


def test_earlier_run(tmp_path, caplog):
    """Its files are moved aside, each time to another place; inputs and logs stay."""
    # Without a run: a start that failed, or somebody's own files, which a run may not replace.
    others = {"config.yaml", "model_r18.pth", "chapter.unfinished", "pictures/a.jpg"}
    (tmp_path / "pictures").mkdir()
    replaced = ("model_final.pth", "model_final_ema.pth", "model_best.pth", "curves.png")
    for name in (*others, "metrics.json", "results.md", *replaced):
        (tmp_path / name).touch()
    given = {"--train-json": str(tmp_path / "results.md")}
    with pytest.raises(InputError, match="^--train-json: .*results.md belongs to the run"):
        set_earlier_run_aside(recipe_for(tmp_path), given, False)
    set_earlier_run_aside(recipe_for(tmp_path), {}, False)
    moved = {f"earlier_runs/1/{name}" for name in ("results.md", *replaced)}
    assert names(tmp_path) == {*others, *moved, "metrics.json"}
    for name in names(tmp_path):
        (tmp_path / name).unlink()
    (tmp_path / "earlier_runs/1").rename(tmp_path / "earlier_runs/9")  # those before were deleted
    expected = set(OTHERS)
    for number, files in ((10, FILES), (11, FILES[:3]), (12, FILES)):
        for name in files + OTHERS:
            (tmp_path / name).parent.mkdir(exist_ok=True)
            (tmp_path / name).write_text(name[0])
        with caplog.at_level("WARNING"):
            given = {"MODEL.WEIGHTS": str(tmp_path / "other.pth")}
            given["--train-json"] = str(tmp_path / "pictures_of_mine/a.json")
            set_earlier_run_aside(recipe_for(tmp_path), given, False)
        aside = f"earlier_runs/{number}"
        message = f"{tmp_path} held an earlier run, which is in {tmp_path / aside} now"
        assert caplog.messages[-1] == message
        expected |= {f"{aside}/{name}" for name in files}
        assert names(tmp_path) == expected
    assert (tmp_path / "earlier_runs/10/inference/a.json").read_text() == "i"


def test_inputs_in_the_earlier_run(tmp_path):
    """They would be moved before they are read; a config is used once more."""
    for name in FILES:
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(name)
    os.symlink(tmp_path / "model_final.pth", tmp_path / "link")
    before = names(tmp_path)
    weights = ("model_final.pth", "link", "model_final.pth?matching_heuristics=True")
    given = [f"{tmp_path}/{name}" for name in (*weights, "inference/a.json")]
    for path in (*given, f"file://{given[0]}"):
        message = "^NAME: .* belongs to the run in OUTPUT_DIR, "
        with pytest.raises(InputError, match=message):
            set_earlier_run_aside(recipe_for(tmp_path), {"NAME": path}, False)
        assert names(tmp_path) == before
    given = {"--config-file": str(tmp_path / "config.yaml"), "MODEL.WEIGHTS": "libra://a"}
    set_earlier_run_aside(recipe_for(tmp_path), given, False)
    assert (tmp_path / "config.yaml").exists()
    assert not (tmp_path / "model_final.pth").exists()


def test_nothing_to_resume(tmp_path, caplog):
    """The earlier run that could be meant is named."""
    for _ in range(2):
        set_earlier_run_aside(recipe_for(tmp_path), {}, True)
        for number in (3, 12, 15, 20):
            (tmp_path / f"earlier_runs/{number}").mkdir(parents=True, exist_ok=True)
            (tmp_path / "earlier_runs/notes.txt").touch()
        for number in (3, 12, 15):
            (tmp_path / f"earlier_runs/{number}/model_final.pth").touch()
    assert caplog.messages[0] == f"There is no checkpoint to resume from in {tmp_path}"
    hint = f". The last run that has one is in {tmp_path}/earlier_runs/15, and is resumed with that"
    assert caplog.messages[1] == f"{caplog.messages[0]}{hint} as OUTPUT_DIR"


@pytest.mark.parametrize("is_main", [True, False])
@pytest.mark.parametrize("existed", [True, False])
def test_config(tmp_path, monkeypatch, existed, is_main):
    """What was there before is kept, by the main process alone."""
    monkeypatch.setattr("detectron2.utils.comm.is_main_process", lambda: is_main)
    path, recipe = tmp_path / "config.yaml", recipe_for(tmp_path)
    if existed:
        path.write_text("before")
    with config_kept(recipe):
        path.write_text("after")
    assert path.read_text() == ("before" if existed and is_main else "after")
