# SPDX-License-Identifier: Apache-2.0
"""The examples of docs/own_project.md and docs/clusters.md."""

import csv
import json
import os
import re
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch
from conftest import DEMO_CONFIG, ROOT, build_model, demo_cfg, example, random_inputs
from test_train_net import QUICK, own_data

from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.utils.events import EventStorage
from detectron2.utils.registry import locate

from libra_d2.engine.main import main

TEXT = (ROOT / "docs/own_project.md").read_text()
BLOCKS = re.findall(r"```python\n(.*?)```", TEXT, re.DOTALL)


@pytest.fixture(scope="session")  # a name is registered once in a process
def registered():
    """Run the examples that register a part. Returns: their names and values."""
    namespace = {}
    for text in BLOCKS:
        if ".register()" in text:
            exec(text, namespace)
    return namespace


@pytest.mark.parametrize(
    ("key", "name"), [("BFP__REFINE_TYPE", "depthwise"), ("SAMPLER__NAME", "HardSampler")]
)
def test_examples(registered, key, name):
    """A model with the part of that name trains."""
    model = build_model(demo_cfg(**{f"MODEL__LIBRA__{key}": name}))
    used = [type(m) for m in model.modules()]
    assert (registered["HardSampler"] in used) == (name == "HardSampler")
    if name == "depthwise":
        assert model.backbone.bfp.refine.groups == 16
    with EventStorage() as storage:
        losses = model(random_inputs(3, 2))
        sum(losses.values()).backward()
        assert "roi_head/num_bg_iou_bin_2" in storage.latest()
    assert all(torch.isfinite(p.grad).all() for p in model.parameters())


def test_own_script(synthetic, tmp_path, monkeypatch):
    """The script reads the boxes of a CSV file, and its program trains on them."""
    content = json.loads((synthetic / "instances.json").read_text())
    labels = {c["id"]: c["name"] for c in content["categories"]}
    files = {image["id"]: image["file_name"] for image in content["images"]}
    boxes = sorted(content["annotations"], key=lambda x: x["image_id"])
    folder = tmp_path / "data"
    folder.mkdir()
    (folder / "images").symlink_to(synthetic / "images")
    for split in ("train", "val"):
        with open(folder / f"{split}.csv", "w", newline="") as f:
            for box in boxes:
                x, y, width, height = box["bbox"]
                label = labels[box["category_id"]]
                csv.writer(f).writerow([files[box["image_id"]], label, x, y, x + width, y + height])
    monkeypatch.chdir(tmp_path)
    namespace = {"__name__": "my_train"}
    exec(example("own_project.md", "# my_train.py"), namespace)
    try:
        first = DatasetCatalog.get("my_val")[0]
        assert os.path.samefile(first["file_name"], synthetic / "images" / first["image_id"])
        assert (first["width"], first["height"]) == (96, 96)
        x, y, width, height = boxes[0]["bbox"]
        assert first["annotations"][0]["bbox"] == [x, y, x + width, y + height]
        label = namespace["CLASSES"][first["annotations"][0]["category_id"]]
        assert label == labels[boxes[0]["category_id"]]
        data = ["DATASETS.TRAIN", "('my_train',)", "DATASETS.TEST", "('my_val',)"]
        data += ["MODEL.ROI_HEADS.NUM_CLASSES", 4, "OUTPUT_DIR", "out"]
        main(["--config-file", str(DEMO_CONFIG), *map(str, [*data, *QUICK])])
        assert (tmp_path / "out/model_final.pth").exists()
    finally:
        for name in ("my_train", "my_val"):
            DatasetCatalog.remove(name)
            MetadataCatalog.remove(name)


def test_own_writer(synthetic, tmp_path, monkeypatch):
    """Each value is logged once, with its iteration, and the run is closed."""
    logged = []
    run = SimpleNamespace(
        log=lambda values, step: logged.append((step, values)), finish=lambda: logged.append("end")
    )
    monkeypatch.setitem(sys.modules, "wandb", SimpleNamespace(init=lambda **kwargs: run))
    namespace = {"__name__": "train_with_wandb"}
    exec(example("own_project.md", "import wandb"), namespace)
    options = [*own_data(synthetic, "train", "val"), "OUTPUT_DIR", tmp_path, *QUICK]
    options += ["TEST.EVAL_PERIOD", 2]
    args = ["--config-file", DEMO_CONFIG, *options]
    namespace["run"](namespace["build_argument_parser"]().parse_args([str(x) for x in args]))
    assert logged.pop() == "end"
    assert [step for step, values in logged if "total_loss" in values] == [1, 3]
    assert (tmp_path / "results.md").exists()


@pytest.mark.parametrize(
    ("status", "requeued"), [(0, False), (138, True), (143, False), (1, False)]
)
def test_batch_script(status, requeued, tmp_path):
    """With stand-ins for SLURM: it requeues after SIGUSR1 only, and passes the status on."""
    (tmp_path / "job.sh").write_text(example("clusters.md", "#!/bin/bash\n"))
    programs = {
        "srun": f'echo "$MASTER_ADDR $SRUN_CPUS_PER_TASK $*" > srun.txt; exit {status}',
        "scontrol": 'echo "$*" >> scontrol.txt; printf "first\\nsecond\\n"',
    }
    for name, line in programs.items():
        (tmp_path / name).write_text(f"#!/bin/bash\n{line}\n")
        (tmp_path / name).chmod(0o755)
    slurm = {"SLURM_JOB_ID": "7", "SLURM_JOB_NODELIST": "n[1-2]", "SLURM_CPUS_PER_TASK": "8"}
    environment = {**os.environ, **slurm, "PATH": f"{tmp_path}:{os.environ['PATH']}"}
    command = ["bash", "job.sh", "--config-file", "a b.yaml"]
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True)
    assert (done.returncode, done.stderr) == (status, b"")
    expected = "first 8 python train_net.py --resume --config-file a b.yaml\n"
    assert (tmp_path / "srun.txt").read_text() == expected
    calls = (tmp_path / "scontrol.txt").read_text().splitlines()
    assert calls == ["show hostnames n[1-2]"] + ["requeue 7"] * requeued


def test_names_exist():
    """Each class and function that the page names exists."""
    names = re.findall(r"`libra_d2\.(\w+\.\w+)`", TEXT)
    parts = re.findall(r"`((?:Balanced|Libra)\w+|balanced_l1_loss)`", TEXT)
    for name in (*names, *(f"modeling.{part}" for part in parts)):
        locate(f"libra_d2.{name}")  # raises if there is none
