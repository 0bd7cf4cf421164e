# SPDX-License-Identifier: Apache-2.0
"""Killed and stopped trainings resume exactly."""

import os
import random
import re
import signal
import subprocess
import sys
import tempfile
import time
from contextlib import suppress
from pathlib import Path

import pytest
import test_trainer as toy
import torch
from conftest import DEMO_CONFIG, ROOT
from test_train_net import TINY, own_data

MOMENTS = ("step", "checkpoint", "evaluation")


def start(synthetic, out, *opts, processes=1, config=DEMO_CONFIG, **kwargs):
    """Start or resume a training with a checkpoint every 5 iterations."""
    several = ["-m", "torch.distributed.run", "--standalone", "--max-restarts", 1]
    several += ["--nproc-per-node", processes]
    command = [sys.executable, "-W", "ignore", *(several if processes > 1 else [])]
    command += [ROOT / "train_net.py", "--resume", "--config-file", config]
    command += [*own_data(synthetic, "train", "val"), "OUTPUT_DIR", out, *TINY]
    command += ["SOLVER.CHECKPOINT_PERIOD", 5, "TEST.EVAL_PERIOD", 20]
    command += ["MODEL.LIBRA.NUM_PICTURES", 0, *opts]
    # A full pipe would block the training.
    output = tempfile.TemporaryFile("w+")  # noqa: SIM115
    kwargs.update(env={**os.environ, "OMP_NUM_THREADS": "1"}, stdout=output)
    process = subprocess.Popen([*map(str, command)], stderr=subprocess.STDOUT, **kwargs)
    process.output = output
    return process


def finish(process, timeout=None):
    """Wait for the end of a training; returns what it has printed."""
    process.wait(timeout)
    with process.output as f:
        f.seek(0)
        return f.read()


def processes_of(out):
    """Processes with this folder on their command line; torchrun's ranks have own sessions."""
    found = []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        with suppress(OSError):  # it may have ended meanwhile
            if f"OUTPUT_DIR\0{out}".encode() in path.read_bytes():
                found.append(int(path.parent.name))
    return found


def kill_all(out):
    """Kill the processes of a training and wait until they are gone; returns how many."""
    killed, end = set(), time.monotonic() + 60
    while found := processes_of(out):
        assert time.monotonic() < end, found
        for pid in found:
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        killed.update(found)
        time.sleep(0.01)
    return len(killed)


@pytest.fixture(autouse=True)
def _no_process_is_left(tmp_path):
    yield
    assert kill_all(tmp_path) == 0


def wait_for(condition, process, seconds=300):
    """Wait until ``condition()`` is true, or the process has ended."""
    end = time.monotonic() + seconds
    while process.poll() is None and not condition():
        assert time.monotonic() < end
        time.sleep(0.005)


def last_iteration(out):
    """The iteration of the checkpoint to resume from; -1 if there is none."""
    if not (out / "last_checkpoint").exists():
        return -1
    return torch.load(out / (out / "last_checkpoint").read_text())["iteration"]


def kill_and_resume(synthetic, out, moments, *args, restarted=False, **kwargs):
    """
    Kill a training at each of ``moments``, then let it finish: each run continues from the last
    checkpoint. With ``restarted``, one of several processes is killed in the last run, and torchrun
    starts them again.
    """
    log = out / "log.txt"

    def num_evaluations():
        return log.read_text().count("Start inference") if log.exists() else 0

    def num_saved():
        return len([*out.glob("model_0*.pth")])

    for moment in (*moments, ""):
        before, seen, num = last_iteration(out), num_evaluations(), num_saved()
        process = start(synthetic, out, *args, **kwargs)
        conditions = {
            # Or a later one: a short write may be missed.
            "checkpoint": lambda n=num: any(out.glob("model_*.pth?*")) or num_saved() > n + 1,
            "evaluation": lambda seen=seen: num_evaluations() > seen,
            "step": lambda num=num: num_saved() > num,
        }
        if moment:
            wait_for(conditions[moment], process)
            time.sleep(random.choice([0, 0.3]) * random.random())
            assert kill_all(out) > 0
        elif restarted:
            wait_for(conditions["step"], process)
            workers = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
            os.kill(int(random.choice(workers)), signal.SIGKILL)
        output = finish(process)
        first = re.findall(r"Starting training from iteration (\d+)", output)[:1]
        assert first == [str(before + 1)] or (moment and not first)
        assert process.returncode == (-signal.SIGKILL if moment else 0), output
        assert "restart" not in output
        assert (out / "model_final.pth").exists() == (not moment)


def assert_same(out, whole):
    """Weights, metrics and TensorBoard's values, to the last bit, and nothing written twice."""
    weights, expected = (torch.load(x / "model_final.pth")["model"] for x in (out, whole))
    for key, value in expected.items():
        assert torch.equal(weights[key], value), key
    assert toy.lines(out) == toy.lines(whole)
    assert toy.scalars(out) == toy.scalars(whole)
    assert "bbox/AP" in toy.lines(out)[-1]


@pytest.mark.parametrize(
    ("system", "num_processes", "num_workers", "moments"),
    [("retinanet", 1, 0, ["evaluation", "checkpoint"]), ("faster_rcnn", 2, 2, [])],
)
def test_killed(synthetic, tmp_path, system, num_processes, num_workers, moments):
    """
    A training that is killed twice, or restarted by torchrun, equals the uninterrupted one; this
    file, as a script, kills more.
    """
    config = ROOT / f"configs/Demo/libra_{system}_R_18_FPN.yaml"
    kwargs = {"processes": num_processes, "config": config}
    args = ["SOLVER.MAX_ITER", 11, "TEST.EVAL_PERIOD", 5, "SOLVER.CHECKPOINT_PERIOD", 3]
    args += ["SEED", 5, "DATALOADER.NUM_WORKERS", num_workers]
    kill_and_resume(synthetic, tmp_path / "whole", [], *args, **kwargs)
    kwargs["restarted"] = num_processes > 1
    kill_and_resume(synthetic, tmp_path / "out", moments, *args, **kwargs)
    assert_same(tmp_path / "out", tmp_path / "whole")


def test_interrupted(synthetic, tmp_path):
    """Ctrl-C, which data loading workers receive as well: one line, and no process is left."""
    out = tmp_path / "out"
    opts = ["SOLVER.MAX_ITER", 2000, "TEST.EVAL_PERIOD", 0, "DATALOADER.NUM_WORKERS", 2]
    process = start(synthetic, out, *opts, start_new_session=True)
    wait_for(lambda: any(out.glob("model_0*.pth")), process)
    os.killpg(process.pid, signal.SIGINT)
    output = finish(process, timeout=90)
    assert process.returncode == 128 + signal.SIGINT, output
    assert f"SIGINT: stopped after iteration {last_iteration(out)}; --resume continues" in output
    assert "Traceback" not in output
    assert not processes_of(out)


if __name__ == "__main__":
    # python tests/test_resume.py DATASET OUTPUT NUM_KILLS
    dataset, output, num = Path(sys.argv[1]), Path(sys.argv[2]), int(sys.argv[3])
    chosen = random.choices(MOMENTS, k=num)
    steps = ["SOLVER.MAX_ITER", 10 * num]
    kill_and_resume(dataset, output / "whole", [], *steps)
    kill_and_resume(dataset, output / "out", chosen, *steps)
    assert_same(output / "out", output / "whole")
    print(f"killed {len(chosen)} times: {', '.join(chosen)}")
