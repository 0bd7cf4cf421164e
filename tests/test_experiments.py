# SPDX-License-Identifier: Apache-2.0
"""The commands in docs/experiments.md, at a small size."""

import math
import re
import subprocess

import pytest
import torch
from conftest import ROOT, random_inputs

from detectron2.engine import default_argument_parser
from detectron2.structures import Instances
from detectron2.utils.events import EventStorage

from libra_d2.engine import read_config

PAGE = (ROOT / "docs/experiments.md").read_text()
VARIABLES = re.search(r"^```bash\n(TRAIN=.+?)```$", PAGE, re.M | re.S)[1]
COMMANDS = {
    heading: dict(re.findall(r"^\| ([^|]+?) \|.+\| `(.+)` \|$", section, re.M))
    for heading, section in re.findall(r"^## Table (.+?)\n(.+?)(?=^##|\Z)", PAGE, re.M | re.S)
}
TINY = [
    *("MODEL.DEVICE", "cpu", "MODEL.WEIGHTS", "", "MODEL.RESNETS.DEPTH", "18"),
    *("MODEL.RESNETS.RES2_OUT_CHANNELS", "64", "MODEL.RESNETS.NUM_GROUPS", "1"),
    *("MODEL.FPN.OUT_CHANNELS", "16", "MODEL.ROI_BOX_HEAD.FC_DIM", "16"),
    *("MODEL.ROI_HEADS.BATCH_SIZE_PER_IMAGE", "16", "MODEL.BACKBONE.FREEZE_AT", "4"),
]


def read(command):
    """The recipe of a command, as a shell understands it."""
    words = ["bash", "-c", f"{VARIABLES}\nprintf '%s\\n' {command}"]
    _, script, *args = subprocess.check_output(words, text=True).splitlines()
    args = default_argument_parser().parse_args(args)
    assert (script, args.num_gpus) == ("train_net.py", 8)
    return read_config(args.config_file, args.opts)


@pytest.mark.parametrize("table", COMMANDS)
def test_table(table):
    """Each command can be trained, with other losses or another size than the others."""
    seen = {}
    for name, command in COMMANDS[table].items():
        recipe = read(command).copy()
        cfg = recipe.config
        size = (cfg.SOLVER.MAX_ITER, cfg.MODEL.RESNETS.DEPTH, cfg.MODEL.RESNETS.NUM_GROUPS)
        cfg.merge_from_list(TINY)
        torch.manual_seed(0)
        model = recipe.build_model()
        record, other = random_inputs(12, 300, size=(64, 96))
        record["instances"].remove("gt_masks")
        record["proposals"] = Instances((64, 96), proposal_boxes=other["instances"].gt_boxes)
        record["proposals"].objectness_logits = torch.zeros(300)
        with EventStorage():
            losses = model([record])
        sum(losses.values()).backward()
        losses = [loss.item() for loss in losses.values()]
        norms = [p.grad.norm().item() for p in model.parameters() if p.grad is not None]
        assert all(map(math.isfinite, losses + norms)), name
        effect = (*size, len(norms), *losses)
        assert effect not in seen, f"{name} does what {seen[effect]} does"
        seen[effect] = name


def test_every_table():
    """What the page promises is found in it."""
    assert [len(COMMANDS[table]) for table in COMMANDS] == [10, 4, 4, 5, 3, 11]
