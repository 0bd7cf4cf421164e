# SPDX-License-Identifier: Apache-2.0
import pickle
import re

import pytest
import torch
from conftest import ROOT, load_cfg
from oracle import SLOW, SYSTEMS, reference_model
from test_checkpoint import save
from test_mmdetection import STATE, equal

from detectron2.modeling import build_model

from libra_d2.checkpoint import LibraCheckpointer
from libra_d2.tools.convert_mmdet import main

_DCN = {"type": "DCNv2", "deform_groups": 1, "fallback_on_stride": False}
_DEFORMABLE = SLOW["libra_mask_rcnn_GN_R_50"]
# The system, and its number of weights without num_batches_tracked. The names of the weights of
# Faster, Fast and Cascade R-CNN are among those of the models with masks.
CASES = {
    "RetinaNet": (SYSTEMS["libra_retinanet_R_50"], 309),
    "Mask R-CNN": (SYSTEMS["libra_mask_rcnn_R_50"], 315),
    "Cascade Mask R-CNN": (SYSTEMS["libra_cascade_mask_rcnn_R_50"], 355),
    "GN, 4 convolutions, deformable": (
        _DEFORMABLE._replace(
            options=(
                *_DEFORMABLE.options,
                *("MODEL.RESNETS.DEFORM_ON_PER_STAGE", [False, True, True, True]),
                *("MODEL.RESNETS.DEFORM_MODULATED", True),
            ),
            their_options={
                **_DEFORMABLE.their_options,
                "model.backbone.dcn": _DCN,
                "model.backbone.stage_with_dcn": (False, True, True, True),
            },
        ),
        363,
    ),
}


@pytest.fixture(scope="module", params=CASES)
def theirs(request, mmdet):
    """A model of mmdetection with random weights, and our model of that config."""
    from mmdet.registry import MODELS
    from mmdet.utils import register_all_modules

    register_all_modules()
    torch.manual_seed(1)
    system, _ = CASES[request.param]
    config = reference_model(mmdet, system).model
    config.backbone.base_channels, config.neck[0].in_channels = 12, [48, 96, 192, 384]
    heads = config.get("roi_head", {}).get("bbox_head", [])
    for head in heads if isinstance(heads, list) else [heads]:
        head.fc_out_channels = 64
    model = MODELS.build(config)
    for value in model.state_dict().values():
        value.normal_() if value.is_floating_point() else value.fill_(7)
    cfg = load_cfg(ROOT / "configs" / system.config)
    options = ["MODEL.DEVICE", "cpu", "MODEL.ROI_BOX_HEAD.FC_DIM", 64]
    options += ["MODEL.RESNETS.STEM_OUT_CHANNELS", 12, "MODEL.RESNETS.WIDTH_PER_GROUP", 12]
    options += ["MODEL.RESNETS.RES2_OUT_CHANNELS", 48]
    cfg.merge_from_list([*options, *system.options])
    return request.param, model, build_model(cfg)


def test_round_trip(theirs, tmp_path, capsys, caplog):
    """From mmdetection and back bit by bit; our checkpointer loads both files."""
    name, model, ours = theirs
    files = [str(tmp_path / f"{x}.pth") for x in ("theirs", "ours", "back")]
    state, meta = model.state_dict(), {"mmdet_version": "2.25.0", "CLASSES": ["a"]}
    save(files[0], {"meta": meta, "state_dict": state, "optimizer": {}})
    main(files[:2])
    main(files[1:])
    what = f"{CASES[name][1]} weights, for"
    printed = [f"{files[1]}: {what} Detectron2", f"{files[2]}: {what} mmdetection"]
    assert capsys.readouterr().out.splitlines() == printed
    converted, back = torch.load(files[1]), torch.load(files[2])
    assert back.keys() == {"meta", "state_dict"}
    assert back["meta"] == meta
    assert equal(back["state_dict"], state)
    assert converted.keys() == {"model", "__author__", "mmdetection"}
    for file in files[:2]:
        ours.load_state_dict({k: torch.zeros_like(v) for k, v in ours.state_dict().items()})
        LibraCheckpointer(ours, complete=True).load(file)
        assert equal(dict(ours.state_dict()), converted["model"])
    assert "Weights that were not loaded" not in caplog.text


def test_from_detectron2(theirs, tmp_path):
    """mmdetection loads a converted model, also from old files of Detectron2."""
    name, model, ours = theirs
    state = {**ours.state_dict(), "pixel_mean": torch.zeros(3, 1, 1)}
    state["proposal_generator.anchor_generator.cell_anchors.0"] = torch.zeros(3, 4)
    source = tmp_path / ("a.pkl" if name == "RetinaNet" else "a.pth")
    if name == "RetinaNet":
        state = {key: value.numpy() for key, value in state.items()}
        source.write_bytes(pickle.dumps({"model": state, "__author__": "a"}))
    else:
        save(source, {"model": state, "iteration": 3})
    main([str(source), str(tmp_path / "theirs.pth")])
    content = torch.load(tmp_path / "theirs.pth")
    assert content["meta"] == {}
    model.load_state_dict(content["state_dict"], strict=True)
    assert {v.item() for k, v in content["state_dict"].items() if "num_batches" in k} == {0}
    main([str(tmp_path / "theirs.pth"), str(tmp_path / "back.pth")])
    assert equal(torch.load(tmp_path / "back.pth")["model"], dict(ours.state_dict()))


ONE = torch.ones(1)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "the weights cannot be read: .*No such file"),
        ({"model": {"a.weight": ONE}}, "'a.weight' has no counterpart"),
        ({"state_dict": {**STATE, "mask": ONE}}, "'.?mask' has no counterpart"),
        ({"state_dict": {**STATE, "mask": ONE.log() / 0}}, "'mask' in it is not finite"),
        ({"state_dict": {**STATE, "mask": ONE.long()}}, "'mask' in it is of type torch.int64"),
    ],
)
def test_bad_source(tmp_path, monkeypatch, refused, content, message):
    """One line is printed, and no file is written."""
    monkeypatch.chdir(tmp_path)
    if content is not None:
        save(tmp_path / "source.pth", content)
    (line,) = refused(main, ["source.pth", "target.pth"]).strip().splitlines()
    assert re.match(f"error: source.pth: {message}", line), line
    assert {p.name for p in tmp_path.iterdir()} <= {"source.pth"}


@pytest.mark.parametrize(
    ("target", "message"),
    [
        ("none.txt/b.pth", "none.txt/b.pth cannot be written: File exists: none.txt"),
        ("link.pth", "link.pth and source, a.pth, are the same file, which would be overwritten"),
    ],
)
def test_bad_target(target, message, tmp_path, monkeypatch, refused):
    """It is refused before the source is read, which stays as it is."""
    monkeypatch.chdir(tmp_path)
    content = save(tmp_path / "a.pth", STATE).read_bytes()
    (tmp_path / "none.txt").touch()
    (tmp_path / "link.pth").symlink_to("a.pth")
    assert f"error: target: {message}" in refused(main, ["a.pth", target])
    assert (tmp_path / "a.pth").read_bytes() == content


def test_full_disk(tmp_path, monkeypatch, refused):
    monkeypatch.chdir(tmp_path)
    save("a.pth", {"state_dict": STATE})
    (tmp_path / "b.pth").write_text("before")

    def fail(content, file):
        raise RuntimeError("unexpected\npos 64")

    monkeypatch.setattr(torch, "save", fail)
    error = refused(main, ["a.pth", "b.pth"])
    assert "error: b.pth cannot be written: unexpected pos 64\n" in error
    assert (tmp_path / "b.pth").read_text() == "before"
