# SPDX-License-Identifier: Apache-2.0
import pickle

import numpy as np
import pytest
import torch
from conftest import demo_cfg

from detectron2.checkpoint import DetectionCheckpointer
from detectron2.modeling import build_model

from libra_d2.checkpoint import LibraCheckpointer
from libra_d2.errors import InputError


def plain_cfg(**overrides):
    return demo_cfg(
        MODEL__BACKBONE__NAME="build_resnet_fpn_backbone",
        MODEL__ROI_HEADS__NAME="StandardROIHeads",
        MODEL__ROI_BOX_HEAD__BBOX_REG_LOSS_TYPE="smooth_l1",
        MODEL__PROPOSAL_GENERATOR__NAME="RPN",
        **overrides,
    )


@pytest.fixture(scope="module")
def plain_file(tmp_path_factory):
    """A checkpoint of a plain Detectron2 Faster R-CNN."""
    folder = tmp_path_factory.mktemp("weights")
    torch.manual_seed(3)
    DetectionCheckpointer(build_model(plain_cfg()), str(folder)).save("plain")
    return folder / "plain.pth"


def load(path, complete=True, **overrides):
    model = build_model(demo_cfg(**overrides))
    checkpointer = LibraCheckpointer(model, complete=complete)
    incompatible = []
    log = checkpointer._log_incompatible_keys
    checkpointer._log_incompatible_keys = lambda keys: (incompatible.append(keys), log(keys))
    checkpointer.load(str(path), checkpointables=[])
    return model, incompatible


def test_plain_checkpoint(plain_file):
    """Nothing but the weights of the balanced feature pyramid is missing, nothing is unexpected."""
    model, (incompatible,) = load(plain_file)
    names = ("theta", "phi", "g", "conv_out")
    bfp = {f"backbone.bfp.refine.{n}.{kind}" for n in names for kind in ("weight", "bias")}
    assert set(incompatible.missing_keys) == bfp
    assert not incompatible.unexpected_keys
    assert not incompatible.incorrect_shapes
    for name, value in torch.load(plain_file)["model"].items():
        assert torch.equal(model.state_dict()[name], value)


def test_pkl(plain_file, tmp_path):
    """Detectron2's model zoo has pickled arrays."""
    state = {k: v.numpy() for k, v in torch.load(plain_file)["model"].items()}
    path = tmp_path / "model.pkl"
    path.write_bytes(pickle.dumps({"model": state, "__author__": "someone"}))
    model, _ = load(path)
    assert np.array_equal(
        model.backbone.fpn_lateral2.weight.detach(), state["backbone.fpn_lateral2.weight"]
    )


def test_other_classes(plain_file):
    """Refused for evaluation, accepted to start training from."""
    with pytest.raises(InputError, match=r"4 weights are .* 'roi_heads.box_predictor.*\(shape"):
        load(plain_file, MODEL__ROI_HEADS__NUM_CLASSES=7)
    model, (incompatible,) = load(plain_file, complete=False, MODEL__ROI_HEADS__NUM_CLASSES=7)
    assert len(incompatible.incorrect_shapes) == 4


def test_other_model(tmp_path):
    path = tmp_path / "other.pth"
    torch.save({"model": torch.nn.Linear(2, 2).state_dict()}, path)
    for complete in (True, False):
        with pytest.raises(InputError, match="weights of another model.*the file has 'weight'"):
            load(path, complete=complete)


def test_backbone_only(plain_file, tmp_path):
    """What training starts from is not enough to evaluate."""
    state = torch.load(plain_file)["model"]
    path = tmp_path / "backbone.pth"
    torch.save({k: v for k, v in state.items() if k.startswith("backbone.bottom_up")}, path)
    load(path, complete=False)
    with pytest.raises(InputError, match="the first 'backbone.fpn_lateral2.* \\(missing\\)"):
        load(path)


@pytest.mark.parametrize("size", [0, 100, 0.5, 0.99])
@pytest.mark.parametrize("suffix", [".pth", ".pkl"])
def test_cut_short(plain_file, tmp_path, size, suffix):
    if suffix == ".pth":
        content = plain_file.read_bytes()
    else:
        state = {k: v.numpy() for k, v in torch.load(plain_file)["model"].items()}
        content = pickle.dumps({"model": state, "__author__": "someone"})
    path = tmp_path / f"cut{suffix}"
    path.write_bytes(content[: int(size * len(content)) if size < 1 else size])
    with pytest.raises(InputError, match=f"{path}: not .*cut short") as error:
        load(path)
    assert "\n" not in str(error.value)


def test_missing():
    with pytest.raises(InputError, match="nowhere.pth: no such weights file"):
        load("nowhere.pth")


def test_no_connection():
    with pytest.raises(InputError, match="http://127.0.0.1:9/x.pth: the weights cannot be read: "):
        load("http://127.0.0.1:9/x.pth")


class Exploit:
    def __reduce__(self):
        return (pytest.fail, ("code of the checkpoint was executed",))


@pytest.mark.parametrize("suffix", [".pth", ".pkl"])
def test_runs_no_code(tmp_path, suffix):
    path = tmp_path / f"evil{suffix}"
    content = {"model": {"x": Exploit()}, "__author__": "someone"}
    if suffix == ".pth":
        torch.save(content, path)
    else:
        path.write_bytes(pickle.dumps(content))
    with pytest.raises(InputError, match="must not hold anything but arrays"):
        load(path)
