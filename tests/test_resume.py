# SPDX-License-Identifier: Apache-2.0
"""Trainings that are killed, stopped, or cannot write, and go on."""

import json
import os
import random
import resource
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from conftest import DEMO_CONFIG, ROOT, demo_cfg
from test_train_net import TINY, own_data

from libra_d2.data import register_coco_json
from libra_d2.engine import Trainer
from libra_d2.evaluation import read_metrics

STEPS = 40


def start(synthetic, out, *extra, processes=1, **kwargs):
    """Start or resume a training of 40 steps with a checkpoint every 5."""
    several = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", processes]
    command = [sys.executable, "-W", "ignore", *(several if processes > 1 else [])]
    config, extra = [DEMO_CONFIG], [*extra]
    if extra[:1] == ["--config-file"]:
        config, extra = extra[1:2], extra[2:]
    command += [ROOT / "train_net.py", "--resume", "--config-file"]
    command += [*config, *own_data(synthetic, "train", "val"), "OUTPUT_DIR", out, *TINY]
    command += ["SOLVER.MAX_ITER", STEPS, "SOLVER.CHECKPOINT_PERIOD", 5, "TEST.EVAL_PERIOD", 20]
    command += ["MODEL.LIBRA.NUM_PICTURES", 0, *extra]
    return subprocess.Popen(
        [str(x) for x in command],
        stderr=subprocess.STDOUT,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        **{"stdout": subprocess.PIPE, **kwargs},
    )


def wait_for(condition, process, seconds=120):
    """Wait until ``condition()`` is true, or the process has ended."""
    end = time.monotonic() + seconds
    while process.poll() is None and not condition():
        assert time.monotonic() < end
        time.sleep(0.005)


def last_iteration(out):
    """The iteration of the checkpoint that --resume takes; -1 if there is none."""
    try:
        name = (out / "last_checkpoint").read_text()
    except FileNotFoundError:
        return -1
    return torch.load(out / name)["iteration"]


def wait_for_moment(moment, out, process, rng):
    """Wait for the writing of a checkpoint, an evaluation, or a step."""
    log, before = out / "log.txt", last_iteration(out)

    def num_evaluations():
        return log.read_text().count("Start inference") if log.exists() else 0

    seen, target = num_evaluations(), before + rng.randint(1, 6)
    conditions = {
        "checkpoint": lambda: any(out.glob("model_*.pth.0")),
        "evaluation": lambda: num_evaluations() > seen,
        "step": lambda: last_iteration(out) >= target,
    }
    wait_for(conditions[moment], process)
    time.sleep(rng.choice([0, 0.3]) * rng.random())


def kill_and_resume(synthetic, out, rng, num_kills, num_steps=STEPS):
    """
    Kill a training ``num_kills`` times, at moments that are chosen at random from its steps, the
    writing of its checkpoints and its evaluations, and let it end.

    Returns:
        the moments; and for each run the iteration of the checkpoint it found, and its first one.
    """
    moments, began = [], []
    while True:
        before = last_iteration(out)
        process = start(synthetic, out, "SOLVER.MAX_ITER", num_steps)
        if len(moments) < num_kills:
            moment = rng.choice(["step", "checkpoint", "evaluation"])
            wait_for_moment(moment, out, process, rng)
            if process.poll() is None:
                process.send_signal(signal.SIGKILL)
                moments.append(moment)
        output = process.communicate()[0]
        resumed = [x for x in output.splitlines() if "Starting training from iteration" in x]
        if resumed:
            began.append((before, int(resumed[0].split()[-1])))
        if process.returncode != -signal.SIGKILL:
            assert process.returncode == 0, output
            return moments, began


def check(out, began, num_steps=STEPS):
    """Nothing was lost but the steps since the last checkpoint, and no file is half written."""
    for before, first in began:
        assert first == before + 1
    assert torch.load(out / "model_final.pth")["iteration"] == num_steps - 1
    for path in out.glob("*.pth"):
        assert set(torch.load(path)) == {"model", "trainer", "iteration"}
    metrics = read_metrics(str(out / "metrics.json"))
    assert "bbox/AP" in metrics[-1]


def test_killed(synthetic, tmp_path):
    """Twice; as a script this file does it as often as it is told."""
    moments, began = kill_and_resume(synthetic, tmp_path / "out", random.Random(1), 2)
    assert len(moments) == 2
    check(tmp_path / "out", began)


@pytest.mark.parametrize(
    ("number", "num_processes"),
    [(signal.SIGTERM, 1), (signal.SIGINT, 1), (signal.SIGUSR1, 1), (signal.SIGTERM, 2)],
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
    output = process.communicate(timeout=90)[0]
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
    assert len(state["processes"]) == num_processes
    with pytest.raises(ProcessLookupError):
        os.killpg(process.pid, 0)


def test_signal_during_evaluation(synthetic, tmp_path):
    """What was trained before it is saved at once; the next run goes on behind it."""
    out = tmp_path / "out"
    args = ["SOLVER.CHECKPOINT_PERIOD", 1000, "TEST.EVAL_PERIOD", 3, "SOLVER.MAX_ITER", 9]
    process = start(synthetic, out, *args)
    log = out / "log.txt"
    wait_for(lambda: log.exists() and "Start inference" in log.read_text(), process)
    process.send_signal(signal.SIGTERM)
    output = process.communicate(timeout=60)[0]
    assert process.returncode == 143, output
    assert last_iteration(out) in (2, 3), output


def final(out):
    """Weights at the end, and metrics without times."""
    weights = torch.load(out / "model_final.pth")["model"]
    lines = read_metrics(str(out / "metrics.json"))
    lines = [{k: v for k, v in x.items() if "time" not in k and "eta" not in k} for x in lines]
    return weights, lines


@pytest.mark.parametrize(
    ("system", "num_processes", "num_workers"),
    [("faster_rcnn", 1, 2), ("retinanet", 1, 0), ("faster_rcnn", 2, 2)],
)
def test_same_as_uninterrupted(synthetic, tmp_path, system, num_processes, num_workers):
    """Killed twice, the second time with other workers: weights and metrics to the last bit."""
    config = ROOT / f"configs/Demo/libra_{system}_R_18_FPN.yaml"
    args = ["--config-file", config, "SOLVER.MAX_ITER", 17, "TEST.EVAL_PERIOD", 6, "SEED", 5]
    args += ["DATALOADER.NUM_WORKERS", num_workers, "SOLVER.CHECKPOINT_PERIOD", 4]
    whole = tmp_path / "whole"
    process = start(synthetic, whole, *args, processes=num_processes)
    output = process.communicate()[0]
    assert process.returncode == 0, output
    out = tmp_path / "out"
    for iteration in (3, 11):
        quiet = {"start_new_session": True, "stdout": subprocess.DEVNULL}
        process = start(synthetic, out, *args, processes=num_processes, **quiet)
        wait_for(lambda least=iteration: last_iteration(out) >= least, process)
        os.killpg(process.pid, signal.SIGKILL)
        process.communicate()
    process = start(synthetic, out, *args, processes=num_processes)
    output = process.communicate()[0]
    assert process.returncode == 0, output
    assert "start anew" not in output
    weights, metrics = final(out)
    expected_weights, expected_metrics = final(whole)
    for key, value in expected_weights.items():
        assert torch.equal(weights[key], value), key
    assert metrics == expected_metrics
    iterations = [json.loads(x)["iteration"] for x in (out / "metrics.json").open()]
    assert sorted(set(iterations)) == [x["iteration"] for x in metrics]


@pytest.fixture(scope="module")
def trained(synthetic, tmp_path_factory):
    """Output of a training with checkpoints after 5 and 10 steps, stopped there."""
    out = tmp_path_factory.mktemp("trained") / "out"
    process = start(synthetic, out, "SOLVER.MAX_ITER", 10, "TEST.EVAL_PERIOD", 0)
    output = process.communicate()[0]
    assert process.returncode == 0, output
    (out / "model_final.pth").unlink()
    (out / "last_checkpoint").write_text("model_0000009.pth")
    return out


@pytest.fixture
def resumable(trained, tmp_path):
    return shutil.copytree(trained, tmp_path / "out")


def test_broken_checkpoint(synthetic, resumable):
    """The one before it is taken, and said so."""
    cut_short(resumable / "model_0000009.pth")
    process = start(synthetic, resumable, "SOLVER.MAX_ITER", 11, "TEST.EVAL_PERIOD", 0)
    output = process.communicate()[0]
    assert process.returncode == 0, output
    assert "This checkpoint is broken, trying the one before" in output
    assert "model_0000009.pth" in output
    assert "Starting training from iteration 5" in output


def cut_short(path):
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


@pytest.mark.parametrize("with_optimizer", [True, False])
def test_optimizer_and_schedule_are_resumed(synthetic, resumable, with_optimizer, caplog):
    """Momentum, learning rate and iteration are those of the checkpoint."""
    path = resumable / "model_0000009.pth"
    state = torch.load(path)
    momentum = state["trainer"]["_trainer"]["optimizer"]["state"]
    assert len(momentum) > 20
    assert sum(x["momentum_buffer"].abs().sum() for x in momentum.values()) > 0
    if not with_optimizer:  # as Detectron2 0.6 writes it
        del state["trainer"]["_trainer"]
        for name in ("processes", "normalizers", "histories"):  # which only this project has
            del state["trainer"][name]
        torch.save(state, path)
    cfg = demo_cfg(DEMO_CONFIG)
    cfg.merge_from_list([*TINY, "MODEL.DEVICE", "cpu", "OUTPUT_DIR", str(resumable)])
    register_coco_json(
        "test_resume", str(synthetic / "instances.json"), str(synthetic / "images"), str(resumable)
    )
    cfg.DATASETS.TRAIN, cfg.DATASETS.TEST = ("test_resume",), ()
    trainer = Trainer(cfg)
    trainer.resume_or_load(resume=True)
    assert trainer.start_iter == 10
    assert trainer.scheduler.last_epoch == 10
    resumed = trainer._trainer.optimizer.state_dict()["state"]
    if not with_optimizer:
        assert "The checkpoint lacks the optimizer's state" in caplog.text
        assert "random numbers start anew" in caplog.text
        return
    assert resumed.keys() == momentum.keys()
    for key, value in momentum.items():
        assert torch.equal(resumed[key]["momentum_buffer"], value["momentum_buffer"])


def test_other_settings(synthetic, resumable):
    """What differs from the training that is resumed is said, value by value."""
    args = ["SOLVER.MAX_ITER", 11, "TEST.EVAL_PERIOD", 0, "SOLVER.BASE_LR", 0.01]
    process = start(synthetic, resumable, *args)
    output = process.communicate()[0]
    assert process.returncode == 0, output
    assert "--resume: SOLVER.BASE_LR is 0.01, but was 0.04 before" in output
    assert "--resume: SOLVER.MAX_ITER is 11, but was 10 before" in output
    assert output.count("but was") == 2


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["MODEL.ROI_BOX_HEAD.FC_DIM", 64], "the first 'roi_heads.box_head.fc1."),
        (["MODEL.LIBRA.BFP.ENABLED", False], "the first 'backbone.bfp.refine.* (not in the model)"),
        (["MODEL.LIBRA.BFP.REFINE_TYPE", "conv"], "the first 'backbone.bfp.refine."),
    ],
)
def test_another_model_is_not_resumed(synthetic, resumable, args, message):
    process = start(synthetic, resumable, *args)
    output = process.communicate()[0]
    assert process.returncode == 2, output
    line = output.splitlines()[-1]
    assert "model_0000009.pth: these are weights of a" in line
    for part in message.split("*"):
        assert part in line


def test_other_classes_are_not_resumed(synthetic, resumable, tmp_path):
    dataset = json.loads((synthetic / "instances.json").read_text())
    dataset["categories"].append({"id": 99, "name": "another"})
    (tmp_path / "five.json").write_text(json.dumps(dataset))
    data = ["--train-json", tmp_path / "five.json", "--train-images", synthetic / "images"]
    command = [sys.executable, "-W", "ignore", ROOT / "train_net.py", "--resume", "--config-file"]
    command += [DEMO_CONFIG, *data, "OUTPUT_DIR", resumable, *TINY]
    result = subprocess.run([str(x) for x in command], capture_output=True, text=True)
    assert result.returncode == 2, result.stderr
    assert "with 4 classes, but the config's model is a" in result.stderr.splitlines()[-1]


def test_number_of_checkpoints(synthetic, resumable):
    """The last two, those from before the training was resumed included."""
    args = ["SOLVER.MAX_ITER", 17, "TEST.EVAL_PERIOD", 0]
    process = start(synthetic, resumable, *args, "MODEL.LIBRA.TRAINER.MAX_CHECKPOINTS", 2)
    output = process.communicate()[0]
    assert process.returncode == 0, output
    assert sorted(p.name for p in resumable.glob("model*")) == [
        "model_0000009.pth",
        "model_0000014.pth",
        "model_final.pth",
    ]


def test_all_checkpoints_broken(synthetic, resumable):
    for path in resumable.glob("*.pth"):
        cut_short(path)
    process = start(synthetic, resumable)
    output = process.communicate()[0]
    assert process.returncode == 2, output
    assert "error: --resume: none of the 2 checkpoints in" in output.splitlines()[-1]


def test_full_disk(synthetic, resumable):
    """
    A checkpoint for which there is no room (here: beyond the largest file that the process may
    write) ends the training with one line. What was there stays, and serves to resume.
    """
    limit = (resumable / "model_0000009.pth").stat().st_size // 2

    def limit_files():
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))

    process = start(
        synthetic, resumable, "SOLVER.MAX_ITER", 20, "TEST.EVAL_PERIOD", 0, preexec_fn=limit_files
    )
    output = process.communicate()[0]
    assert process.returncode == 2, output
    line = output.splitlines()[-1]
    assert "model_0000014.pth: cannot be written" in line
    assert "Is the disk full? The last checkpoint is" in line
    assert sorted(p.name for p in resumable.glob("model*")) == [
        "model_0000004.pth",
        "model_0000009.pth",
    ]
    assert last_iteration(resumable) == 9


if __name__ == "__main__":
    # python tests/test_resume.py DATASET OUTPUT NUM_KILLS
    dataset, output, num = Path(sys.argv[1]), Path(sys.argv[2]), int(sys.argv[3])
    steps = 10 * num
    all_moments, all_began = kill_and_resume(dataset, output, random.Random(0), num, steps)
    check(output, all_began, steps)
    print(f"killed {len(all_moments)} times: {', '.join(all_moments)}")
    print(f"(checkpoint, first iteration): {all_began}")
