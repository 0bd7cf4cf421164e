# SPDX-License-Identifier: Apache-2.0
"""The directory of a run: one program at a time, and no files of earlier runs."""

import os
import subprocess
import sys

import pytest
from conftest import demo_cfg

from libra_d2.config import make_recipe
from libra_d2.engine.output_dir import prepare_output_dir, set_earlier_run_aside
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


def test_one_program(tmp_path):
    """A directory in which another program runs is refused, with its name, until it ends."""
    (tmp_path / f"model_0000001.pth{UNFINISHED}").touch()
    lock = tmp_path / ".lock"
    other = subprocess.Popen(
        [sys.executable, "-c", OTHER, lock], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    )
    try:
        assert other.stdout.readline() == b"locked\n"
        message = f"^OUTPUT_DIR: {tmp_path}: another program writes into it .process 7 on host.: "
        with pytest.raises(InputError, match=message):
            prepare_output_dir(recipe_for(tmp_path))
        assert any(tmp_path.glob(f"*{UNFINISHED}"))  # it may be the other's
    finally:
        other.kill()
        other.communicate()
    for _ in range(2):  # also once more in this process
        prepare_output_dir(recipe_for(tmp_path))
    assert not any(tmp_path.glob(f"*{UNFINISHED}"))
    second = subprocess.run(
        [sys.executable, "-c", OTHER, lock], stdin=subprocess.DEVNULL, capture_output=True
    )
    assert b"BlockingIOError" in second.stderr
    assert f"process {os.getpid()} on " in lock.read_text()  # which ends the lock


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_not_writable(tmp_path):
    tmp_path.chmod(0o500)
    with pytest.raises(InputError, match=f"^OUTPUT_DIR: {tmp_path}/a: .*Permission denied"):
        prepare_output_dir(recipe_for(tmp_path / "a"))


def test_no_directory(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(InputError, match=f"^OUTPUT_DIR: {tmp_path}/file: "):
        prepare_output_dir(recipe_for(tmp_path / "file"))


FILES = ["model_final.pth", "metrics.json", "config.yaml", "last_checkpoint", "inference/a.json"]
OTHERS = ["log.txt", "datasets/own_train.json", "proposals/own_train.pkl", "other.pth"]


def names(folder):
    return {str(p.relative_to(folder)) for p in folder.rglob("*") if p.is_file()}


def test_earlier_run(tmp_path, caplog):
    """Its files are moved aside, each time to another place; inputs and logs stay."""
    set_earlier_run_aside(recipe_for(tmp_path))
    (tmp_path / "config.yaml").touch()  # of a start that failed
    set_earlier_run_aside(recipe_for(tmp_path))
    assert names(tmp_path) == {"config.yaml"}
    expected = set(OTHERS)
    for number in (1, 2):
        for name in FILES + OTHERS:
            (tmp_path / name).parent.mkdir(exist_ok=True)
            (tmp_path / name).write_text(name)
        with caplog.at_level("WARNING"):
            set_earlier_run_aside(recipe_for(tmp_path, MODEL__WEIGHTS=str(tmp_path / "other.pth")))
        aside = f"earlier_runs/{number}"
        assert (
            caplog.messages[-1]
            == f"{tmp_path} held an earlier run, which is in " + str(tmp_path / aside) + " now"
        )
        expected |= {f"{aside}/{name}" for name in FILES}
        assert names(tmp_path) == expected
    assert (tmp_path / "earlier_runs/1/inference/a.json").read_text() == "inference/a.json"


def test_weights_of_the_earlier_run(tmp_path):
    """They would be moved before they are loaded."""
    (tmp_path / "model_final.pth").touch()
    os.symlink(tmp_path / "model_final.pth", tmp_path / "link")
    for path in ("model_final.pth", "link", "model_final.pth?matching_heuristics=True"):
        weights = str(tmp_path / path)
        with pytest.raises(InputError, match="^MODEL.WEIGHTS: .* belongs to the run in OUTPUT_DI"):
            set_earlier_run_aside(recipe_for(tmp_path, MODEL__WEIGHTS=weights))
    assert (tmp_path / "model_final.pth").exists()
