# SPDX-License-Identifier: Apache-2.0
import errno
import os
import pickle
import zipfile

import numpy as np
import pytest
import torch
import torchvision
from conftest import ROOT, demo_cfg, load_cfg, reference_config
from hypothesis import given, settings
from hypothesis import strategies as st

from detectron2.checkpoint import DetectionCheckpointer
from detectron2.modeling import build_model

from libra_d2.checkpoint import LibraCheckpointer
from libra_d2.checkpoint.mmdetection import to_mmdetection
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


def save(path, content):
    torch.save(content, path)
    return path


SYSTEMS = ["libra_faster_rcnn_R_50", "libra_fast_rcnn_R_50", "libra_retinanet_R_50"]


@pytest.fixture(scope="module", params=SYSTEMS)
def theirs(request, mmdet, tmp_path_factory):
    """A model of mmdetection's with random weights: our config of it, its state, its folder."""
    from mmdet.registry import MODELS
    from mmdet.utils import register_all_modules

    register_all_modules()
    torch.manual_seed(1)
    name = request.param.replace("_R_50", "").replace("_", "-")
    model = reference_config(mmdet, f"{name}_r50").model
    model.backbone.init_cfg = None
    model = MODELS.build(model)
    model.init_weights()
    state = model.state_dict()
    for value in state.values():
        if value.is_floating_point():
            value.normal_()
        else:
            value.fill_(7)  # batches that a norm has seen
    cfg = load_cfg(ROOT / f"configs/COCO-Detection/{request.param}_FPN_1x.yaml")
    cfg.MODEL.DEVICE = "cpu"
    return cfg, model, tmp_path_factory.mktemp("mmdet")


def rewrite_pickle(path, old, new):
    """Replace text in the pickle inside of a ``.pth`` file, which must occur."""
    with zipfile.ZipFile(path) as file:
        content = {name: file.read(name) for name in file.namelist()}
    with zipfile.ZipFile(path, "w", zipfile.ZIP_STORED) as file:
        for name, data in content.items():
            if name.endswith("data.pkl"):
                assert old in data
                data = data.replace(old, new)
            file.writestr(name, data)


def wrappings(state):
    """Checkpoints of mmdetection as they occur; each must load as the first."""
    from mmengine.logging import MessageHub

    hub = MessageHub.get_instance("test_checkpoint")
    hub.update_scalar("train/loss", 1.0)
    hub.update_info("iter", 3)
    meta = {"mmdet_version": "2.25.0", "CLASSES": ("a", "b"), "time": "today"}
    optimizer = {"state": {0: torch.zeros(1)}, "param_groups": []}
    doubled = {f"ema_{k.replace('.', '_')}": v + 1 for k, v in state.items()}
    return {
        "bare": state,
        "version 2": {"meta": meta, "state_dict": state, "optimizer": optimizer},
        "version 3": {
            "meta": {"mmengine_version": "0.10.0"},
            "state_dict": state,
            "message_hub": hub.state_dict(),
            "ema_state_dict": {"steps": torch.tensor(3)},
            "optimizer": optimizer,
        },
        "ema": {"meta": meta, "state_dict": {**state, **doubled}},
        "data parallel": {"state_dict": {f"module.{k}": v for k, v in state.items()}},
    }


@pytest.mark.parametrize(
    "wrapping", ["bare", "version 2", "version 3", "ema", "data parallel", "NumPy 1"]
)
def test_mmdetection(theirs, wrapping, caplog):
    """Converted while it is loaded; nothing is missing or left."""
    cfg, model, folder = theirs
    contents = wrappings(model.state_dict())
    path = save(folder / f"{wrapping}.pth", contents.get(wrapping, contents["version 3"]))
    if wrapping == "NumPy 1":  # as if saved with it: the pickle names a module that moved
        rewrite_pickle(path, b"numpy._core.multiarray", b"numpy.core.multiarray")
    ours = build_model(cfg)
    extra = LibraCheckpointer(ours, complete=True).load(str(path))
    assert "Weights that were not loaded" not in caplog.text
    assert not {"optimizer", "meta", "message_hub"} & extra.keys()
    converted = to_mmdetection(ours.state_dict())
    assert converted.keys() == model.state_dict().keys()
    for key, value in model.state_dict().items():
        if value.is_floating_point():
            assert torch.equal(converted[key], value), key


def test_mmdetection_1(theirs, tmp_path):
    """By its names, or by what it says."""
    cfg, model, _ = theirs
    state, ours = model.state_dict(), build_model(cfg)
    path = save(tmp_path / "a.pth", {"meta": {"mmdet_version": "1.2.0"}, "state_dict": state})
    with pytest.raises(InputError, match="a.pth: a checkpoint of mmdetection 1.x"):
        LibraCheckpointer(ours).load(str(path))
    if any(key.startswith("roi_head.") for key in state):
        old = {key.replace("roi_head.", ""): value for key, value in state.items()}
        with pytest.raises(InputError, match="b.pth: a checkpoint of mmdetection 1.x"):
            LibraCheckpointer(ours).load(str(save(tmp_path / "b.pth", {"state_dict": old})))


def test_another_architecture(theirs, tmp_path):
    """The error says what the file is, and what the config's model is."""
    cfg, model, folder = theirs
    path = save(folder / "other.pth", {"state_dict": model.state_dict()})
    is_retinanet = "Retina" in cfg.MODEL.META_ARCHITECTURE
    other = SYSTEMS[0] if is_retinanet else SYSTEMS[2]
    other = load_cfg(ROOT / f"configs/COCO-Detection/{other}_FPN_1x.yaml")
    other.MODEL.DEVICE = "cpu"
    kind = "RetinaNet" if is_retinanet else "Fast(er)? R-CNN"
    wanted = "Libra Faster R-CNN" if is_retinanet else "Libra RetinaNet"
    message = f"weights of a Libra {kind} R-50 with 80 classes, but .* is a {wanted} R-50 with 80"
    with pytest.raises(InputError, match=message):
        LibraCheckpointer(build_model(other), complete=True).load(str(path))


def test_another_number_of_classes(theirs, caplog):
    """Refused for evaluation; to start training from, all but the last layer is used."""
    cfg, model, folder = theirs
    path = save(folder / "other.pth", {"state_dict": model.state_dict()})
    cfg = cfg.clone()
    cfg.MODEL.ROI_HEADS.NUM_CLASSES = cfg.MODEL.RETINANET.NUM_CLASSES = 3
    ours = build_model(cfg)
    with pytest.raises(InputError, match="with 80 classes, but the config's model .* with 3 cl"):
        LibraCheckpointer(ours, complete=True).load(str(path))
    LibraCheckpointer(ours).load(str(path))
    assert "other shape" in caplog.text
    assert "cls_score.weight" in caplog.text


def test_table(plain_file, tmp_path, caplog):
    """One message for all that was not loaded."""
    state = torch.load(plain_file)["model"]
    state["extra.layer.weight"] = torch.zeros(2)
    del state["backbone.fpn_lateral2.weight"]
    path = save(tmp_path / "changed.pth", {"model": state})
    load(path, complete=False, MODEL__ROI_HEADS__NUM_CLASSES=7)
    (table,) = [r.message for r in caplog.records if "not loaded" in r.message]
    lines = table.splitlines()
    assert lines[0] == f"Weights that were not loaded from {path}:"
    assert "(5, 32) in the file, (8, 32) in the model" in table
    status = {line.split("|")[2].strip(): line.split("|")[1].strip() for line in lines[3:]}
    assert status["backbone.fpn_lateral2.*"] == "missing"
    assert status["backbone.bfp.refine.*"] == "missing"
    assert status["extra.layer.*"] == "not used"
    assert "8 weights" in table


@pytest.mark.parametrize("name", ["R_50", "R_101", "X_101_64x4d"])
def test_imagenet(name, tmp_path, caplog):
    """All of the backbone comes from ImageNet weights, classifier included, of the same network."""
    blocks = [3, 4, 6, 3] if name == "R_50" else [3, 4, 23, 3]
    groups = {"groups": 64, "width_per_group": 4} if name.startswith("X") else {}
    resnet = torchvision.models.ResNet(torchvision.models.resnet.Bottleneck, blocks, **groups)
    path = save(tmp_path / "resnet.pth", resnet.state_dict())
    cfg = load_cfg(ROOT / f"configs/COCO-Detection/libra_faster_rcnn_{name}_FPN_1x.yaml")
    cfg.MODEL.DEVICE = "cpu"
    model = build_model(cfg)
    LibraCheckpointer(model).load(str(path))
    assert "bottom_up" not in caplog.text
    with torch.no_grad():
        x = torch.rand(1, 3, 64, 64)
        expected = torch.nn.Sequential(*list(resnet.eval().children())[:-2])(x)
        torch.testing.assert_close(model.backbone.bottom_up(x)["res5"], expected)


@pytest.mark.parametrize("content", [{}, [], {"state_dict": {}}, {"a": "text"}, {"model": None}])
def test_no_weights(tmp_path, content):
    path = save(tmp_path / "empty.pth", content)
    with pytest.raises(InputError, match="empty.pth: not a checkpoint"):
        load(path, complete=False)


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


@pytest.mark.parametrize("how", ["cut short", "empty", "missing", "other content"])
def test_resume_past_a_broken_file(tmp_path, how, caplog):
    """The checkpoint before it is loaded, all of it, and the broken one is named."""
    model = torch.nn.Linear(3, 2)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    checkpointer = LibraCheckpointer(model, str(tmp_path), optimizer=optimizer)
    for iteration in (4, 9):
        torch.nn.init.constant_(model.weight, iteration)
        checkpointer.save(f"model_{iteration:07d}", iteration=iteration)
        os.utime(tmp_path / f"model_{iteration:07d}.pth", (iteration, iteration))
    broken = tmp_path / "model_0000009.pth"
    if how == "missing":
        broken.unlink()
    else:
        content = {"cut short": broken.read_bytes()[:800], "empty": b"", "other content": b"abc"}
        broken.write_bytes(content[how])
    extra = checkpointer.resume_or_load("", resume=True)
    assert extra["iteration"] == 4
    assert (model.weight == 4).all()
    assert f"trying the one before: {broken}: " in caplog.text
    (tmp_path / "model_0000004.pth").write_bytes(b"")
    with pytest.raises(InputError, match="--resume: none of the . checkpoints in .* can be read"):
        checkpointer.resume_or_load("", resume=True)


def test_files_are_written_whole(tmp_path, monkeypatch):
    """When writing fails, the checkpoint before and the record of it stay as they were."""
    model = torch.nn.Linear(3, 2)
    checkpointer = LibraCheckpointer(model, str(tmp_path))
    checkpointer.save("model_0000004")
    before = {p.name: p.read_bytes() for p in tmp_path.iterdir()}

    def fail(data, f):
        f.write(b"half of it")
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(torch, "save", fail)
    with pytest.raises(InputError, match=r"model_9.pth: cannot be written: .*No space left"):
        checkpointer.save("model_9")
    assert {p.name: p.read_bytes() for p in tmp_path.iterdir()} == before


def test_weights_that_are_not_finite_are_not_saved(tmp_path):
    model = torch.nn.Linear(3, 2)
    checkpointer = LibraCheckpointer(model, str(tmp_path))
    with torch.no_grad():
        model.bias[1] = float("nan")
    with pytest.raises(InputError, match="not written, because bias is not finite.*no earlier"):
        checkpointer.save("model_1")
    assert not list(tmp_path.iterdir())


class Small(torch.nn.Module):
    """A model with few weights."""

    def __init__(self):
        super().__init__()
        self.layer = torch.nn.Linear(3, 2)


def test_address_of_a_file(tmp_path):
    torch.save({"model": Small().state_dict()}, tmp_path / "a.pth")
    model = Small()
    LibraCheckpointer(model, complete=True).load(f"file://{tmp_path}/a.pth")
    expected = torch.load(tmp_path / "a.pth")["model"]["layer.weight"]
    assert torch.equal(model.layer.weight, expected)


@pytest.mark.parametrize("path", ["s3://bucket/a.pth", "file:///none.pth", "x://y"])
def test_address_of_nothing(path):
    with pytest.raises(InputError, match=f"{path}: no such weights file"):
        LibraCheckpointer(Small()).load(path)


@pytest.mark.parametrize(
    "weight",
    [
        torch.eye(3)[:2].to_sparse(),
        torch.zeros(2, 3, device="meta"),
        torch.quantize_per_tensor(torch.ones(2, 3), 0.1, 0, torch.qint8),
    ],
    ids=["sparse", "meta", "quantized"],
)
def test_other_tensors(weight, tmp_path):
    state = {**Small().state_dict(), "layer.weight": weight}
    torch.save({"model": state}, tmp_path / "a.pth")
    with pytest.raises(InputError, match=r"a.pth: .*(plain tensors|cut short)"):
        LibraCheckpointer(Small()).load(str(tmp_path / "a.pth"))


@settings(max_examples=150, deadline=None)
@given(
    st.lists(st.tuples(st.floats(0, 1), st.integers(0, 255)), min_size=1, max_size=6),
    st.floats(0.5, 1),
    st.sampled_from(["a.pth", "a.pkl"]),
)
def test_mutated_files(tmp_path_factory, changes, length, name):
    """Bytes that were changed or cut off: the weights, or one line; never another exception."""
    path = tmp_path_factory.mktemp("mutated") / name
    state = {"model": {k: v.numpy() for k, v in Small().state_dict().items()}, "__author__": "x"}
    if name.endswith(".pkl"):
        path.write_bytes(pickle.dumps(state))
    else:
        torch.save({"model": Small().state_dict()}, path)
    content = bytearray(path.read_bytes())
    for position, byte in changes:
        content[int(position * (len(content) - 1))] = byte
    path.write_bytes(content[: int(length * len(content))])
    message = ""
    try:
        LibraCheckpointer(Small()).load(str(path))
    except InputError as e:
        message = str(e)
    assert "\n" not in message
