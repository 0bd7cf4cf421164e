# SPDX-License-Identifier: Apache-2.0
"""Trainings that are killed, stopped, or cannot write, and go on."""

import json
import os
import random
import re
import resource
import shutil
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

from detectron2.utils.events import EventStorage

from libra_d2.engine.main import main
from libra_d2.engine.resuming import _get_histories, _remove_later_metrics, _set_histories
from libra_d2.errors import InputError

MOMENTS = ("step", "checkpoint", "evaluation")
toy_data, whole = toy.toy_data, toy.whole


def start(synthetic, out, *extra, processes=1, **kwargs):
    """Start or resume a training with a checkpoint every 5 steps."""
    several = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", processes]
    command = [sys.executable, "-W", "ignore", *(several if processes > 1 else [])]
    config, extra = [DEMO_CONFIG], [*extra]
    if extra[:1] == ["--config-file"]:
        config, extra = extra[1:2], extra[2:]
    command += [ROOT / "train_net.py", "--resume", "--config-file"]
    command += [*config, *own_data(synthetic, "train", "val"), "OUTPUT_DIR", out, *TINY]
    command += ["SOLVER.CHECKPOINT_PERIOD", 5, "TEST.EVAL_PERIOD", 20]
    command += ["MODEL.LIBRA.NUM_PICTURES", 0, *extra]
    kwargs.update(env={**os.environ, "OMP_NUM_THREADS": "1"})
    # A pipe would stop the training when it is full.
    output = tempfile.TemporaryFile("w+")  # noqa: SIM115
    kwargs.update(stdout=output, stderr=subprocess.STDOUT)
    process = subprocess.Popen([str(x) for x in command], **kwargs)
    process.output = output
    return process


def finish(process, timeout=None):
    """Wait for the end of a training; returns what it has printed."""
    process.wait(timeout)
    with process.output as f:
        f.seek(0)
        return f.read()


def processes_of(out):
    """Those with this folder on their command line: torchrun's ranks have sessions of their own."""
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
def _nobody_is_left(tmp_path):
    yield
    assert kill_all(tmp_path) == 0


def wait_for(condition, process, seconds=300):
    """Wait until ``condition()`` is true, or the process has ended."""
    end = time.monotonic() + seconds
    while process.poll() is None and not condition():
        assert time.monotonic() < end
        time.sleep(0.005)


def last_iteration(out):
    """The iteration of the checkpoint that --resume takes; -1 if there is none."""
    if not (out / "last_checkpoint").exists():
        return -1
    return torch.load(out / (out / "last_checkpoint").read_text())["iteration"]


def kill_and_resume(synthetic, out, moments, *args, processes=1):
    """
    Kill a training at each of ``moments``, and let it end: nothing is lost but the steps since the
    last checkpoint.
    """
    log = out / "log.txt"

    def num_evaluations():
        return log.read_text().count("Start inference") if log.exists() else 0

    def num_saved():
        return len([*out.glob("model_0*.pth")])

    for moment in (*moments, ""):
        before, seen, num = last_iteration(out), num_evaluations(), num_saved()
        process = start(synthetic, out, *args, processes=processes)
        conditions = {
            # The second one at the latest: a short one may be missed.
            "checkpoint": lambda n=num: any(out.glob("model_*.pth.0")) or num_saved() > n + 1,
            "evaluation": lambda seen=seen: num_evaluations() > seen,
            "step": lambda num=num: num_saved() > num,
        }
        if moment:
            wait_for(conditions[moment], process)
            time.sleep(random.choice([0, 0.3]) * random.random())
            assert kill_all(out) >= processes + (processes > 1)
        output = finish(process)
        for first in re.findall(r"Starting training from iteration (\d+)", output):
            assert int(first) == before + 1
        assert process.returncode == (-signal.SIGKILL if moment else 0), output
        assert "restart" not in output
        assert (out / "model_final.pth").exists() == (not moment)


def assert_same(out, whole):
    """Weights and metrics without times, to the last bit, and nothing written twice."""
    weights, expected = (torch.load(x / "model_final.pth")["model"] for x in (out, whole))
    for key, value in expected.items():
        assert torch.equal(weights[key], value), key
    assert toy.lines(out) == toy.lines(whole)
    assert "bbox/AP" in toy.lines(out)[-1]


@pytest.mark.parametrize(
    ("system", "num_processes", "num_workers", "moments"),
    [
        ("retinanet", 1, 0, ["evaluation", "step"]),
        ("faster_rcnn", 2, 2, ["step", "checkpoint"]),
    ],
)
def test_killed(synthetic, tmp_path, system, num_processes, num_workers, moments):
    """Twice, it is the uninterrupted training; as a script this file does it as often as told."""
    config = ROOT / f"configs/Demo/libra_{system}_R_18_FPN.yaml"
    args = ["--config-file", config, "SOLVER.MAX_ITER", 17, "TEST.EVAL_PERIOD", 6, "SEED", 5]
    args += ["DATALOADER.NUM_WORKERS", num_workers, "SOLVER.CHECKPOINT_PERIOD", 4]
    for name, chosen in (("whole", []), ("out", moments)):
        kill_and_resume(synthetic, tmp_path / name, chosen, *args, processes=num_processes)
    assert_same(tmp_path / "out", tmp_path / "whole")


@pytest.mark.parametrize(
    ("number", "num_processes"),
    [(signal.SIGINT, 1), (signal.SIGTERM, 2)],
)
def test_signals(synthetic, tmp_path, number, num_processes):
    """
    Sent to all processes, data loading workers included, as schedulers and terminals do it: the
    iteration is finished and saved, the next run goes on behind it, and nobody is left.
    """
    out = tmp_path / "out"
    args = ["SOLVER.CHECKPOINT_PERIOD", 1000, "DATALOADER.NUM_WORKERS", 2, "SOLVER.MAX_ITER", 2000]
    args += ["TEST.EVAL_PERIOD", 0]
    process = start(synthetic, out, *args, processes=num_processes, start_new_session=True)
    log = out / "log.txt"
    wait_for(lambda: log.exists() and "iter: 19" in log.read_text(), process)
    os.killpg(process.pid, number)
    output = finish(process, timeout=90)
    saved = last_iteration(out)
    assert saved >= 19, output
    name = signal.Signals(number).name
    assert f"{name}: stopped after iteration {saved}; --resume continues" in output
    if num_processes == 1:
        assert process.returncode == 128 + number, output
        assert "Traceback" not in output
    state = torch.load(out / f"model_{saved:07d}.pth", weights_only=False)["trainer"]
    assert state["iteration"] == saved
    assert state["hooks"]["LRScheduler"]["last_epoch"] == saved + 1  # it has seen this iteration
    assert len(state["hooks"]["ExactResume"]["processes"]) == num_processes
    assert not processes_of(out)


def test_later_metrics(tmp_path):
    """Lines of iterations to come, and those that are cut short, go; the file stays the same."""
    path = tmp_path / "metrics.json"
    _remove_later_metrics(str(path), 0)
    assert not path.exists()
    lines = [f'{{"x": {i}.50, "iteration": {i}}}\n' for i in (3, 8, 9, 10, 9, 8, 11)]
    text = "".join([*lines[:2], '{"x": 1}\n', "[1]\n", "7\n", *lines[2:], '{"iteration": 3'])
    path.write_text(text)
    with path.open("a") as already_open:
        _remove_later_metrics(str(path), 9)
        assert path.read_text() == lines[0] + lines[1] + lines[5]
        already_open.write("next\n")
    assert path.read_text() == lines[0] + lines[1] + lines[5] + "next\n"


def test_histories():
    """The last twenty values behind each median, but for times, with their iterations."""
    storages = [EventStorage(0), EventStorage(30)]
    for i in range(30):
        storages[0].iter = i
        storages[0].put_scalars(loss=i * i, data_time=i)
        storages[0].put_scalar("bbox/AP", i, smoothing_hint=False)
    histories = json.loads(json.dumps(_get_histories(storages[0])))
    assert histories == {"loss": [[i * i, i] for i in range(10, 30)]}
    _set_histories(storages[1], histories)
    assert storages[1].iter == 30
    medians = [storage.latest_with_smoothing_hint(20)["loss"] for storage in storages]
    assert medians == [((19**2 + 20**2) / 2, 29)] * 2


def cut_short(path):
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def test_broken_checkpoints(whole, tmp_path, caplog):
    """The one before is taken, and not the best model, and said so; if there is none, that."""
    out = shutil.copytree(whole, tmp_path / "out")
    (out / "last_checkpoint").write_text("model_0000009.pth")
    cut_short(out / "model_0000009.pth")
    (out / "model_final.pth").unlink()
    (out / "model_best.pth").touch()
    assert toy.run(out).start_iter == 8
    assert "This checkpoint is broken, trying the one before" in caplog.text
    assert "model_0000009.pth" in caplog.text
    toy.assert_same(out, whole)
    for path in out.glob("*.pth"):
        cut_short(path)
    with pytest.raises(InputError, match="none of the 6 checkpoints in"):
        toy.run(out)


def test_full_disk(toy_data, tmp_path):
    """
    A checkpoint for which there is no room (here: beyond the largest file that the process may
    write) ends the training with one line. What was there stays, and serves to resume.
    """
    toy.run(tmp_path, until=6)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    size = (tmp_path / "model_0000005.pth").stat().st_size // 2
    for name in ("metrics.json", *(p.name for p in tmp_path.glob("events*"))):
        assert (tmp_path / name).stat().st_size < size
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (size, limits[1]))
        match = "model_0000007.pth: cannot be written.*Is the disk full. Training can be resumed"
        with pytest.raises(InputError, match=match):
            toy.run(tmp_path)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert sorted(p.name for p in tmp_path.glob("model_0*")) == [
        f"model_{i:07d}.pth" for i in (1, 3, 5)
    ]
    assert last_iteration(tmp_path) == 5


def resume(synthetic, out, *args, json_file="instances.json"):
    """Train one more step than none, in this process."""
    data = ["--train-json", synthetic / json_file, "--train-images", synthetic / "images"]
    command = ["--resume", "--config-file", DEMO_CONFIG, *data, *TINY, "OUTPUT_DIR", out, *args]
    main([str(x) for x in [*command, "SOLVER.MAX_ITER", 1, "MODEL.DEVICE", "cpu"]])


@pytest.fixture(scope="module")
def trained(synthetic, tmp_path_factory):
    out = tmp_path_factory.mktemp("trained") / "out"
    resume(synthetic, out)
    return out


def test_other_settings(synthetic, trained, tmp_path):
    """What differs from the training that is resumed is said, value by value."""
    out = shutil.copytree(trained, tmp_path / "out")
    resume(synthetic, out, "SOLVER.BASE_LR", 0.01, "SOLVER.CHECKPOINT_PERIOD", 7)
    log = (out / "log.txt").read_text()
    assert "--resume: SOLVER.BASE_LR is 0.01, but was 0.04 before" in log
    assert "--resume: SOLVER.CHECKPOINT_PERIOD is 7, but was 2 before" in log
    assert log.count("but was") == 2


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["MODEL.ROI_BOX_HEAD.FC_DIM", 64], "the first 'roi_heads.box_head.fc1."),
        (["MODEL.LIBRA.BFP.ENABLED", False], "the first 'backbone.bfp.refine.* (not in the model)"),
        (["MODEL.LIBRA.BFP.REFINE_TYPE", "conv"], "the first 'backbone.bfp.refine."),
        ([], "weights of another model than the config's"),
    ],
)
def test_another_model_is_not_resumed(synthetic, trained, tmp_path, capsys, args, message):
    dataset = json.loads((synthetic / "instances.json").read_text())
    dataset["categories"].append({"id": 99, "name": "another"})
    (tmp_path / "five.json").write_text(json.dumps(dataset))
    json_file = "instances.json" if args else tmp_path / "five.json"
    with pytest.raises(SystemExit, match="2"):
        resume(synthetic, trained, *args, json_file=json_file)
    line = capsys.readouterr().err.splitlines()[-1]
    assert "model_final.pth: these are weights of another model" in line
    for part in message.split("*"):
        assert part in line


if __name__ == "__main__":
    # python tests/test_resume.py DATASET OUTPUT NUM_KILLS
    dataset, output, num = Path(sys.argv[1]), Path(sys.argv[2]), int(sys.argv[3])
    chosen = random.choices(MOMENTS, k=num)
    steps = ["SOLVER.MAX_ITER", 10 * num]
    kill_and_resume(dataset, output / "whole", [], *steps)
    kill_and_resume(dataset, output / "out", chosen, *steps)
    assert_same(output / "out", output / "whole")
    print(f"killed {len(chosen)} times: {', '.join(chosen)}")
