# SPDX-License-Identifier: Apache-2.0
"""Several processes, started by torchrun or with SLURM's variables, on CPUs with gloo."""

import errno
import functools
import io
import json
import locale
import logging
import os
import re
import signal
import socket
import subprocess
import sys
import time
from argparse import Namespace
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from datetime import timedelta
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import ROOT, example, run_processes
from test_train_net import own_data
from torch.distributed import TCPStore
from torch.multiprocessing import ProcessExitedException

from detectron2.utils import comm

from libra_d2.engine.hooks import Aborted
from libra_d2.engine.launch import (
    Process,
    _meet,
    join_processes,
    launch,
    read_environment,
    report_errors,
)
from libra_d2.engine.main import main
from libra_d2.errors import InputError, Interrupted
from libra_d2.evaluation import read_metrics

# Nothing is random or depends on the process of an image: no flips, batch norms or sampling.
EXHAUSTIVE = [
    *("MODEL.FPN.OUT_CHANNELS", "16", "MODEL.ROI_BOX_HEAD.FC_DIM", "32", "SOLVER.MAX_ITER", "1"),
    *("INPUT.MIN_SIZE_TRAIN", "(96,)", "INPUT.MIN_SIZE_TEST", "96", "INPUT.RANDOM_FLIP", "none"),
    *("DATALOADER.NUM_WORKERS", "0", "DATALOADER.ASPECT_RATIO_GROUPING", "False"),
    *("MODEL.RESNETS.NORM", "FrozenBN", "MODEL.FPN.NORM", "", "MODEL.ROI_BOX_HEAD.NORM", ""),
    *("MODEL.RETINANET.NORM", "", "MODEL.RETINANET.SCORE_THRESH_TEST", "0.0"),
    *("SOLVER.BASE_LR", "0.01", "SOLVER.WARMUP_ITERS", "0"),
    *("SOLVER.IMS_PER_BATCH", "4", "SOLVER.LR_SCHEDULER_NAME", "WarmupMultiStepLR"),
    *("MODEL.RPN.BATCH_SIZE_PER_IMAGE", "100000", "MODEL.RPN.POSITIVE_FRACTION", "1.0"),
    *("MODEL.ROI_HEADS.BATCH_SIZE_PER_IMAGE", "4000", "MODEL.ROI_HEADS.POSITIVE_FRACTION", "1.0"),
    *("MODEL.LIBRA.RPN.MAX_NEG_PER_POS", "-1", "MODEL.LIBRA.NUM_PICTURES", "0"),
    *("MODEL.ROI_HEADS.SCORE_THRESH_TEST", "0.0", "TEST.DETECTIONS_PER_IMAGE", "20"),
]
NOT_WRITABLE = ("EACCES", "EPERM", "EROFS", "ENOSPC", "EDQUOT", "ENOTDIR", "EISDIR", "EEXIST")
NOT_WRITABLE += ("EFBIG", "ENAMETOOLONG")


def train(synthetic, system, num_processes, folder, *extra):
    """One iteration of four images, in processes as torchrun starts them."""
    config = ROOT / f"configs/Demo/libra_{system}_R_18_FPN.yaml"
    args = ["--config-file", config, *own_data(synthetic, "train", "val"), "OUTPUT_DIR", folder]
    expected = ["TEST.EXPECTED_RESULTS", [["bbox", "AP", 50.0, 50.0]]]  # in the main process
    args = [str(x) for x in [*args, *EXHAUSTIVE, *expected, *extra]]
    with socket.create_server(("127.0.0.1", 0)) as free:
        address = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free.getsockname()[1])}
    ranks = [torchrun(rank, num_processes, rank, num_processes) for rank in range(num_processes)]
    environments = [{**address, **x} for x in ranks] if num_processes > 1 else [{}]
    run_processes(main, [args], environments, folder)
    return folder


@pytest.fixture(scope="module")
def one(synthetic, tmp_path_factory):
    """The output directory of a single process, by its system."""
    folder = tmp_path_factory.mktemp("launch")
    return functools.lru_cache(lambda system: train(synthetic, system, 1, folder / system))


@pytest.mark.parametrize(
    ("system", "num_processes", "num_parts"),
    [("faster_rcnn", 2, 2), ("retinanet", 4, 1)],
)
def test_as_one_process(one, synthetic, tmp_path, system, num_processes, num_parts):
    """
    The same losses, the same weights after a step and the same detections, also with gradient
    accumulation in each process. The order of float32 sums makes a difference of a ten-thousandth
    of the step, whose size is 1e-3.
    """
    in_parts = ["MODEL.LIBRA.TRAINER.ACCUMULATION_STEPS", num_parts]
    several = train(synthetic, system, num_processes, tmp_path / "several", *in_parts)
    folders = [one(system), several]
    one, several = (torch.load(folder / "model_final.pth")["model"] for folder in folders)
    for key, weight in one.items():
        assert torch.allclose(several[key], weight, rtol=0, atol=2e-6), key
    one, several = (read_metrics(str(folder / "metrics.json")) for folder in folders)
    losses = [name for name in one[0] if "loss" in name]
    assert len(losses) >= 3
    for name in losses:
        assert several[0][name] == pytest.approx(one[0][name], rel=1e-4), name
    one, several = (
        json.loads((folder / "inference/coco_instances_results.json").read_text())
        for folder in folders
    )
    assert len(one) > 12
    for found in (one, several):
        found.sort(key=lambda x: (x["image_id"], -x["score"]))
    assert [x["image_id"] for x in several] == [x["image_id"] for x in one]
    scores = [[x["score"] for x in found] for found in (one, several)]
    assert np.allclose(*scores, atol=1e-4)
    # The main process writes, the others only their log.
    files = [{p.name for p in folder.rglob("*") if p.is_file()} for folder in folders]
    logs = {f"log.txt.rank{i}" for i in range(1, num_processes)}
    events = {name for found in files for name in found if name.startswith("events.")}
    assert len([name for name in files[1] if name.startswith("events.")]) == 1
    assert files[1] - events - logs == files[0] - events


def test_submitit(synthetic, tmp_path):
    """The example of docs/clusters.md, on this machine: it is preempted, and continues."""
    (tmp_path / "submit.py").write_text(example("clusters.md", "import submitit"))
    command = [sys.executable, "submit.py", "local", 2]
    command += ["--config-file", ROOT / "configs/Demo/libra_retinanet_R_18_FPN.yaml"]
    command += [*own_data(synthetic, "train"), "OUTPUT_DIR", tmp_path / "out", *EXHAUSTIVE]
    command += ["SOLVER.MAX_ITER", 10, "SOLVER.CHECKPOINT_PERIOD", 2, "SOLVER.IMS_PER_BATCH", 2]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    with (tmp_path / "job").open("w+") as f:
        options = {"cwd": tmp_path, "env": environment, "stdout": f, "check": True}
        subprocess.run([str(x) for x in command], **options)
        f.seek(0)
        job = int(f.read())
    end = time.monotonic() + 300

    def wait(name):
        while not (tmp_path / name).exists():
            assert time.monotonic() < end, (folder / f"{job}_0_log.err").read_text()
            time.sleep(0.05)

    folder = tmp_path / "output/jobs"
    wait("out/model_0000001.pth")
    for task in Path(f"/proc/{job}/task/{job}/children").read_text().split():
        os.kill(int(task), signal.SIGUSR1)
    for rank in range(2):
        wait(folder / f"{job}_{rank}_result.pkl")
    errors = (folder / f"{job}_0_log.err").read_text()
    (stopped,) = re.findall(r"SIGUSR1: stopped after iteration (\d+); --resume", errors)
    log = (tmp_path / "out/log.txt").read_text()
    first = [int(x) for x in re.findall(r"Starting training from iteration (\d+)", log)]
    assert first == [0, int(stopped) + 1]
    assert torch.load(tmp_path / "out/model_final.pth")["iteration"] == 9


def slurm(rank, tasks_per_node, num_tasks=4, local_rank=1):
    return {
        "SLURM_PROCID": str(rank),
        "SLURM_LOCALID": str(local_rank),
        "SLURM_STEP_NUM_TASKS": str(num_tasks),
        "SLURM_STEP_TASKS_PER_NODE": tasks_per_node,
    }


def torchrun(*numbers):
    names = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE")
    return {name: str(number) for name, number in zip(names, numbers)}


@pytest.mark.parametrize(
    ("environment", "expected"),
    [
        ({}, None),
        ({"SLURM_PROCID": "0", "SLURM_NTASKS": "8"}, None),  # a batch script outside of srun
        (slurm(3, "2(x2)"), Process(3, 4, 1, 2)),
        (slurm(1, "4"), Process(1, 4, 1, 4)),
        (slurm(0, "1", 1), None),
        (torchrun(5, 8, 1, 4), Process(5, 8, 1, 4)),
        # Within a step of SLURM's, one for each machine.
        ({**slurm(1, "1(x2)", 2), **torchrun(3, 4, 1, 2)}, Process(3, 4, 1, 2)),
    ],
)
def test_read_environment(environment, expected):
    assert read_environment(environment) == expected


def test_bad_environment(monkeypatch):
    """Machines with unequal numbers of processes, or without a common address."""
    for tasks in ("3,1", "3(x2),1"):
        match = re.escape(f"SLURM_STEP_TASKS_PER_NODE is {tasks}: use as many tasks")
        with pytest.raises(InputError, match=match):
            read_environment(slurm(0, tasks))
    monkeypatch.delenv("MASTER_ADDR", raising=False)
    with pytest.raises(InputError, match="MASTER_ADDR is not set"):
        join_processes(read_environment(slurm(0, "2(x2)")))


@pytest.mark.parametrize(
    ("given", "num_gpus", "place"),
    [
        *(({}, 0, ["127.0.0.1", "20000"]), ({"SLURM_JOB_ID": "135246"}, 0, ["127.0.0.1", "35246"])),
        ({"SLURM_JOB_ID": "1", "MASTER_ADDR": "host", "MASTER_PORT": "7"}, 3, ["host", "7"]),
        ({"MASTER_ADDR": "host"}, 2, []),
    ],
)
def test_meeting_place(monkeypatch, given, num_gpus, place):
    """Default address and port of a job; a GPU for each process; which share a machine."""
    joined, names = [], ("MASTER_ADDR", "MASTER_PORT")
    for name in (*names, "SLURM_JOB_ID"):
        monkeypatch.setenv(name, ""), monkeypatch.delenv(name)  # restored after the test
    for name, value in given.items():
        monkeypatch.setenv(name, value)
    init = lambda *args, **kwargs: joined.append((*args, *kwargs.items()))  # noqa: E731
    monkeypatch.setattr(torch.cuda, "is_available", lambda: num_gpus > 0)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: num_gpus)
    monkeypatch.setattr(torch.cuda, "set_device", joined.append)
    monkeypatch.setattr(torch.distributed, "init_process_group", init)
    module = sys.modules["libra_d2.engine.launch"]
    monkeypatch.setattr(module, "_meet", lambda process: "met")
    # Of Detectron2's main branch.
    monkeypatch.setattr(comm, "create_local_process_group", joined.append, raising=False)
    monkeypatch.setattr(comm, "synchronize", lambda: joined.append("wait"))
    too_few = pytest.raises(InputError, match="are 3 processes on this machine, but only 2 GPUs")
    with nullcontext() if place else too_few:
        join_processes(Process(2, 6 if num_gpus else 3, 1, 3))
    if place:
        assert [os.environ[name] for name in names] == place
        met = ("store", "met"), ("rank", 2)
        one, several = ("gloo", *met, ("world_size", 3)), ("nccl", *met, ("world_size", 6))
        assert joined == [*([1, several] if num_gpus else [one]), 3, "wait"]


def test_attempts(monkeypatch):
    """
    Each attempt with the same store has a name space of its own: after a complete one, after one in
    which a process did not come, with another number of processes, whoever comes first.
    """
    server = TCPStore("127.0.0.1", 0, is_master=True)
    monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
    monkeypatch.setenv("MASTER_PORT", str(server.port))

    def connect(url, rank, world_size):
        yield TCPStore("127.0.0.1", server.port, timeout=timedelta(seconds=1)), rank, world_size

    monkeypatch.setattr(torch.distributed, "rendezvous", connect)

    def meet(rank, size):
        store = _meet(Process(rank, size, rank, size))
        before = store.check([str(rank)])
        store.set(str(rank), "")
        store.wait([str(other) for other in range(size)])
        return before

    attempts = [(2, [0, 1]), (2, [1, 0]), (2, [0]), (2, [1]), (2, [1, 0]), (3, [1, 2, 0])]
    for size, ranks in attempts:
        with ThreadPoolExecutor(size) as pool:
            found = []
            for rank in ranks:
                found.append(pool.submit(meet, rank, size))
                time.sleep(0.2)
        if len(ranks) < size:
            message = f"^only some of the 2 processes have come to 127.0.0.1:{server.port}$"
            with pytest.raises(InputError, match=message):
                found[0].result()
        else:
            assert [future.result() for future in found] == [False] * size


def arguments(num_gpus, num_machines=1):
    machine = {"machine_rank": num_machines - 1, "dist_url": "tcp://x:1"}
    return Namespace(num_gpus=num_gpus, num_machines=num_machines, **machine)


def test_launch(monkeypatch, capsys):
    """In this process or by Detectron2's launcher; errors of --num-gpus."""
    called, spawned = [], []
    for number in (1, 0):
        launch(called.append, arguments(number))
    assert called == [arguments(1), arguments(0)]
    for args in (arguments(2), arguments(1, 2)):
        with pytest.raises(SystemExit, match="^2$"):
            launch(fail, args)
        assert capsys.readouterr().err.startswith("error: --num-gpus: this machine has no GPU")
    with monkeypatch.context() as m:
        for name, value in torchrun(1, 2, 1, 2).items():
            m.setenv(name, value)
        with pytest.raises(SystemExit, match="^2$"):
            launch(fail, arguments(2))
        assert capsys.readouterr().err.startswith("error: --num-gpus: torchrun or SLURM has")

    def spawn(function, nprocs, args, **kwargs):
        main, *numbers, given, _ = args
        spawned.append((nprocs, *numbers))
        if len(spawned) == 2:
            raise ProcessExitedException("x", 0, 0, exit_code=3)
        main(*given)

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    for name in ("spawn", "start_processes"):  # of Detectron2 0.6, and of its main branch
        monkeypatch.setattr(torch.multiprocessing, name, spawn)
    launch(called.append, arguments(2, 3))
    assert called[2:] == [arguments(2, 3)]
    with pytest.raises(SystemExit, match="^3$"):
        launch(fail, arguments(2, 3))
    assert spawned == [(2, 6, 2, 2, "tcp://x:1")] * 2


@pytest.mark.parametrize(
    ("error", "expected"),
    [
        *((None, ["wait", "destroy"]), (SystemExit(143), ["wait", "destroy"])),
        *((Aborted(143), ["destroy"]), (ZeroDivisionError(), [])),
    ],
)
def test_leaving(monkeypatch, error, expected):
    """A process that aborts does not wait for the others."""
    calls, module = [], sys.modules["libra_d2.engine.launch"]
    monkeypatch.setattr(module, "join_processes", lambda process: None)
    monkeypatch.setattr(comm, "synchronize", lambda: calls.append("wait"))
    leave = lambda: calls.append("destroy")  # noqa: E731
    monkeypatch.setattr(torch.distributed, "destroy_process_group", leave)
    for name, value in torchrun(1, 2, 1, 2).items():
        monkeypatch.setenv(name, value)

    def main(args):
        if error:
            raise error

    with pytest.raises(type(error)) if error else nullcontext():
        launch(main, arguments(1))
    assert calls == expected


def test_log_on_a_full_disk(capsys, monkeypatch):
    """No traceback for each line."""
    monkeypatch.setattr(logging, "raiseExceptions", True)
    report_errors(lambda: None)
    logging.StreamHandler(SimpleNamespace(write=fail)).handle(logging.makeLogRecord({}))
    assert capsys.readouterr().err == ""


def fail(*args):
    raise InputError("MODEL.DEVICE: broken")


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (InputError("a.json: broken"), "error: a.json: broken"),
        *(
            (OSError(getattr(errno, x), x, "a.jpg"), f"error: a.jpg cannot be written: {x}")
            for x in NOT_WRITABLE
        ),
        (OSError(errno.ENOSPC, "No space"), "error: a file cannot be written: No space"),
        (KeyboardInterrupt(), "interrupted."),
        (Interrupted("There is none"), "interrupted. There is none"),
        (
            UnicodeEncodeError("ascii", "é", 0, 1, "ordinal not in range"),
            "error: 'ascii' codec can't encode character '\\xe9' in position 0: ordinal not in "
            "range: this environment's encoding is ANSI_X3.4-1968, set PYTHONUTF8=1",
        ),
    ],
)
@pytest.mark.parametrize("processes", [1, 2])
def test_errors_in_one_line(error, message, processes, capsys, monkeypatch):
    """With the rank if there are several processes."""

    def raise_it():
        raise error

    monkeypatch.setattr(comm, "get_world_size", lambda: processes)
    monkeypatch.setattr(comm, "get_rank", lambda: 1)
    monkeypatch.setattr(locale, "getpreferredencoding", lambda do: {False: "ANSI_X3.4-1968"}[do])
    with pytest.raises(SystemExit) as exit:
        report_errors(raise_it)
    assert exit.value.code == (130 if "interrupted" in message else 2)
    assert capsys.readouterr().err == f"[process 1] {message}\n"[0 if processes > 1 else 12 :]


def test_file_names(monkeypatch):
    """Names that a console cannot show do not stop a program."""
    console = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(console, encoding="ascii"))
    report_errors(print, "\xe9\udcff")
    sys.stdout.flush()
    assert console.getvalue() == b"\\xe9\\udcff\n"


DEFECTS = [KeyError("x"), ValueError("x"), FileNotFoundError(2, "x", "y")]
DEFECTS.append(UnicodeDecodeError("utf-8", b"\xff", 0, 1, "x"))


@pytest.mark.parametrize("error", DEFECTS)
def test_defects_keep_their_traceback(error, caplog, monkeypatch):
    """Also in the log, where an InputError has no traceback."""

    def main():
        for e in (error, InputError("y")):
            logging.getLogger("detectron2.engine.train_loop").error("y", exc_info=e)
        logging.getLogger("detectron2.engine.train_loop").error("z")
        raise error

    monkeypatch.setattr(locale, "getpreferredencoding", lambda *_: "UTF-8")
    with pytest.raises(type(error)) as raised:
        report_errors(main)
    assert raised.value is error
    assert [record.message for record in caplog.records] == ["y", "z"]
    assert caplog.records[0].exc_info[1] is error
