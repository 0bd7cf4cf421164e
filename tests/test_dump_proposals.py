# SPDX-License-Identifier: Apache-2.0
"""From the proposals of an RPN to a Fast R-CNN that is trained and evaluated on them."""

import pickle
import re

import numpy as np
import pytest
import torch
from conftest import ROOT
from test_train_net import TINY, own_data, run

from detectron2.data import DatasetCatalog

from libra_d2.data.fingerprint import record_fingerprint
from libra_d2.engine import read_config
from libra_d2.tools.dump_proposals import main

DEMO = ROOT / "configs/Demo"


def dump(*args, config="rpn"):
    main(["--config-file", str(DEMO / f"{config}_R_18_FPN.yaml"), *map(str, args)])


@pytest.fixture(scope="module")
def rpn(synthetic, tmp_path_factory):
    """Options for a trained RPN, and its recipe."""
    out, config = tmp_path_factory.mktemp("rpn"), DEMO / "rpn_R_18_FPN.yaml"
    args = [*own_data(synthetic, "train", "val"), "OUTPUT_DIR", out, *TINY, "SOLVER.MAX_ITER", 1]
    (line,) = [x for x in run(*args, config=config) if x.startswith("box_proposals")]
    assert re.fullmatch(r"box_proposals: AR@100 [\d.]+, AR@1000 [\d.]+", line)
    opts = [*TINY, "INPUT.MIN_SIZE_TEST", "144", "MODEL.WEIGHTS", str(out / "model_final.pth")]
    return opts, read_config(str(config), opts)


@pytest.fixture(scope="module")
def dumped(rpn, synthetic, tmp_path_factory):
    """Directory of the proposals for "own_train" and "own_val"."""
    out = tmp_path_factory.mktemp("dumped")
    dump(*own_data(synthetic, "train", "val"), *rpn[0], "OUTPUT_DIR", out)
    return out / "proposals"


def test_proposals_are_those_of_the_model(rpn, dumped):
    assert sorted(p.name for p in dumped.iterdir()) == ["own_train.pkl", "own_val.pkl"]
    content = pickle.loads((dumped / "own_val.pkl").read_bytes())
    assert content["ids"] == list(range(1, 13))
    assert content["images"] == record_fingerprint(DatasetCatalog.get("own_val"))
    model = rpn[1].build_trained_model()
    for i, (record,) in zip(range(3), rpn[1].build_test_loader("own_val")):
        with torch.no_grad():
            expected = model([record])[0]["proposals"]
        assert len(expected) > 20
        boxes, logits = expected.proposal_boxes.tensor, expected.objectness_logits
        np.testing.assert_allclose(content["boxes"][i], boxes, atol=1e-3)
        np.testing.assert_allclose(content["objectness_logits"][i], logits, atol=1e-4)


def test_which_datasets(rpn, synthetic, dumped, tmp_path):
    """
    Those of --dataset, or else one's own, or else the config's, each of them once; by the RPN of a
    Faster R-CNN, too.
    """
    sets = ["DATASETS.TRAIN", "('own_train',)", "DATASETS.TEST", "('own_val', 'own_train')"]
    sets += ["MODEL.ROI_HEADS.NUM_CLASSES", 4, "OUTPUT_DIR", tmp_path]
    dump(*rpn[0], *sets, config="libra_faster_rcnn")
    for name in ("own_train", "own_val"):
        path = tmp_path / f"proposals/{name}.pkl"
        assert path.read_bytes() == (dumped / path.name).read_bytes()
        assert (tmp_path / "log.txt").read_text().count(f"Proposals: {path}") == 1
    own = own_data(synthetic, "train", "val")
    dump("--dataset", "own_val", *own, *rpn[0], "OUTPUT_DIR", tmp_path / "val")
    assert [p.name for p in (tmp_path / "val/proposals").iterdir()] == ["own_val.pkl"]


def test_fast_rcnn(dumped, synthetic, tmp_path):
    args = ["--train-proposals", dumped / "own_train.pkl"]
    args += ["--val-proposals", dumped / "own_val.pkl", "OUTPUT_DIR", tmp_path, *TINY]
    config = DEMO / "libra_fast_rcnn_R_18_FPN.yaml"
    printed = run(*own_data(synthetic, "train", "val"), *args, config=config)
    assert any(x.startswith("bbox: AP") for x in printed)
    flags = ["--eval-only", "--val-proposals", dumped / "own_val.pkl", "OUTPUT_DIR", tmp_path]
    weights = ["MODEL.WEIGHTS", tmp_path / "model_final.pth"]
    printed = run(*own_data(synthetic, "val"), *flags, *TINY, *weights, config=config)
    assert any(x.startswith("bbox: AP") for x in printed)


def test_no_rpn(synthetic, tmp_path, refused):
    for config in ("libra_retinanet", "libra_fast_rcnn"):
        path = str(DEMO / f"{config}_R_18_FPN.yaml")
        data = map(str, own_data(synthetic, "val"))
        error = refused(main, ["--config-file", path, *data, "OUTPUT_DIR", str(tmp_path)])
        assert f"{path}: this model has no RPN, which makes" in error


@pytest.mark.parametrize(
    ("args", "message"),
    [
        ([], "MODEL.WEIGHTS: name the weights of a trained model"),
        (["MODEL.WEIGHTS", __file__], "test_dump_proposals.py: not loaded"),
        (["--dataset", "none", "MODEL.WEIGHTS", "x"], "'none' is not a registered dataset"),
    ],
)
def test_bad_arguments(args, message, tmp_path, synthetic, refused):
    error = refused(dump, *own_data(synthetic, "train"), *args, "OUTPUT_DIR", tmp_path)
    assert re.match(f"error: .*{message}", error.splitlines()[-1])
