# SPDX-License-Identifier: Apache-2.0
"""Several processes, started by torchrun or with SLURM's variables, on CPUs with gloo."""

import json
import os
import subprocess
import sys

import numpy as np
import pytest
import torch
from conftest import ROOT
from test_train_net import own_data

from libra_d2.engine.launch import (
    Process,
    join_processes,
    read_environment,
    report_errors,
)
from libra_d2.errors import InputError, Interrupted
from libra_d2.evaluation import read_metrics

# Nothing depends on chance or on which process an image is in: no flips, batch norms or sampling.
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
TORCHRUN = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node"]


def train(synthetic, system, num_processes, folder, *extra):
    """One iteration of four images; returns the finished process."""
    start = [sys.executable, "-W", "ignore", *([*TORCHRUN, num_processes] if num_processes else [])]
    config = ROOT / f"configs/Demo/libra_{system}_R_18_FPN.yaml"
    command = [*start, ROOT / "train_net.py", "--config-file", config]
    command += [*own_data(synthetic, "train", "val"), "OUTPUT_DIR", folder, *EXHAUSTIVE, *extra]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.run(
        [str(x) for x in command], capture_output=True, text=True, env=environment
    )


@pytest.mark.parametrize(
    ("system", "num_processes", "num_parts"),
    [("faster_rcnn", 4, 1), ("retinanet", 2, 1), ("faster_rcnn", 2, 2)],
)
def test_as_one_process(synthetic, tmp_path, system, num_processes, num_parts):
    """
    The same losses, and the same weights after a step, which are the sum of the gradients; the same
    detections in each image, once; also where each process computes its images in parts. Float32
    sums in another order make the difference: a ten-thousandth of the step, whose size is 1e-3.
    """
    folders = [tmp_path / "one", tmp_path / "several"]
    in_parts = ["MODEL.LIBRA.TRAINER.ACCUMULATION_STEPS", num_parts]
    for n, folder, extra in zip((0, num_processes), folders, ([], in_parts)):
        result = train(synthetic, system, n, folder, *extra)
        assert result.returncode == 0, result.stderr
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


def test_bad_batch_size(synthetic, tmp_path):
    """Each process says what cannot be."""
    result = train(synthetic, "retinanet", 2, tmp_path, "SOLVER.IMS_PER_BATCH", 3)
    assert result.returncode != 0
    assert "SOLVER.IMS_PER_BATCH is 3, which 2 processes cannot share" in result.stderr
    assert not (tmp_path / "model_final.pth").exists()


def slurm(rank, tasks_per_node, num_tasks=4, local_rank=1):
    return {
        "SLURM_PROCID": str(rank),
        "SLURM_LOCALID": str(local_rank),
        "SLURM_STEP_NUM_TASKS": str(num_tasks),
        "SLURM_STEP_TASKS_PER_NODE": tasks_per_node,
    }


@pytest.mark.parametrize(
    ("environment", "expected"),
    [
        ({}, None),
        ({"SLURM_PROCID": "0", "SLURM_NTASKS": "8"}, None),  # a batch script outside of srun
        (slurm(3, "2(x2)"), Process(3, 4, 1, 2)),
        (slurm(1, "4"), Process(1, 4, 1, 4)),
        (
            {"RANK": "5", "WORLD_SIZE": "8", "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "4"},
            Process(5, 8, 1, 4),
        ),
        # torchrun within a step of SLURM's, one for each machine
        (
            {
                **slurm(1, "1(x2)", 2),
                "RANK": "3",
                "WORLD_SIZE": "4",
                "LOCAL_RANK": "1",
                "LOCAL_WORLD_SIZE": "2",
            },
            Process(3, 4, 1, 2),
        ),
    ],
)
def test_read_environment(environment, expected):
    assert read_environment(environment) == expected


def test_uneven_machines():
    with pytest.raises(InputError, match=r"SLURM_STEP_TASKS_PER_NODE is 3,1: use as many tasks"):
        read_environment(slurm(0, "3,1"))


JOIN = """
import torch
from detectron2.utils import comm
import os
from libra_d2.engine import join_processes, read_environment
from libra_d2.modeling.reference_recipe.normalizer import mean_over_batch
join_processes(read_environment(os.environ))
mean = mean_over_batch(torch.tensor(comm.get_rank()))
print(comm.get_rank(), comm.get_local_rank(), comm.get_local_size(), mean.item())
"""


def test_slurm_processes(tmp_path):
    """Two processes on as many machines find each other, and know that they are alone on theirs."""
    environment = {**os.environ, "MASTER_ADDR": "127.0.0.1", "SLURM_JOB_ID": str(os.getpid())}
    processes = [
        subprocess.Popen(
            [sys.executable, "-W", "ignore", "-c", JOIN],
            env={**environment, **slurm(rank, "1(x2)", 2, 0)},
            stdout=subprocess.PIPE,
            text=True,
            cwd=ROOT,
        )
        for rank in range(2)
    ]
    lines = [process.communicate(timeout=120)[0].strip() for process in processes]
    assert lines == ["0 0 1 0.5", "1 0 1 0.5"]


def test_several_machines_need_an_address(monkeypatch):
    for name, value in slurm(0, "2(x2)").items():
        monkeypatch.setenv(name, value)
    monkeypatch.delenv("MASTER_ADDR", raising=False)
    with pytest.raises(InputError, match="MASTER_ADDR is not set"):
        join_processes(read_environment(os.environ))


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (InputError("a.json: broken"), "error: a.json: broken"),
        (
            PermissionError(13, "Permission denied", "out/a.jpg"),
            "error: out/a.jpg cannot be written",
        ),
        (OSError(28, "No space left on device", "out"), "error: out cannot be written: No space"),
        (KeyboardInterrupt(), "interrupted."),
        (Interrupted("There is no earlier checkpoint"), "interrupted. There is no earlier"),
    ],
)
def test_errors_in_one_line(error, message, capsys):
    def main():
        raise error

    with pytest.raises(SystemExit) as exit:
        report_errors(main)
    assert exit.value.code == (130 if "interrupted" in message else 2)
    assert capsys.readouterr().err.startswith(message)


@pytest.mark.parametrize("error", [KeyError("x"), ValueError("x"), FileNotFoundError(2, "x", "y")])
def test_defects_keep_their_traceback(error):
    def main():
        raise error

    with pytest.raises(type(error)):
        report_errors(main)
