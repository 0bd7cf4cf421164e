# SPDX-License-Identifier: Apache-2.0
import pickle
import re

import pytest
import torch
from conftest import ROOT, load_cfg, reference_config
from test_checkpoint import save
from test_mmdetection import STATE, equal

from detectron2.modeling import build_model

from libra_d2.checkpoint import LibraCheckpointer
from libra_d2.tools.convert_mmdet import main

# Numbers of weights without num_batches_tracked.
SYSTEMS = {"Faster R-CNN": 303, "Fast R-CNN": 297, "RetinaNet": 309}


@pytest.fixture(scope="module", params=SYSTEMS)
def theirs(request, mmdet):
    """A model of mmdetection with random weights, and our model of that config."""
    from mmdet.registry import MODELS
    from mmdet.utils import register_all_modules

    register_all_modules()
    torch.manual_seed(1)
    name = "libra_" + request.param.lower().replace(" r-", "_r")
    model = reference_config(mmdet, f"{name.replace('_', '-')}_r50").model
    model.backbone.init_cfg = None
    model = MODELS.build(model)
    for value in model.state_dict().values():
        value.normal_() if value.is_floating_point() else value.fill_(7)
    cfg = load_cfg(ROOT / f"configs/COCO-Detection/{name}_R_50_FPN_1x.yaml")
    cfg.MODEL.DEVICE = "cpu"
    return request.param, model, build_model(cfg)


def test_round_trip(theirs, tmp_path, capsys, caplog):
    """From mmdetection and back bit by bit; our checkpointer loads both files."""
    name, model, ours = theirs
    files = [str(tmp_path / f"{x}.pth") for x in ("theirs", "ours", "back")]
    state, meta = model.state_dict(), {"mmdet_version": "2.25.0", "CLASSES": ["a"]}
    save(files[0], {"meta": meta, "state_dict": state, "optimizer": {}})
    main(files[:2])
    main(files[1:])
    what = f"{SYSTEMS[name]} weights, for"
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
        ({"model": {"a.weight": ONE.cfloat()}}, "'a.weight' in it is of complex numbers"),
    ],
)
def test_bad_source(tmp_path, monkeypatch, capsys, content, message):
    """One line is printed, and no file is written."""
    monkeypatch.chdir(tmp_path)
    if content is not None:
        save(tmp_path / "source.pth", content)
    with pytest.raises(SystemExit, match="2"):
        main(["source.pth", "target.pth"])
    (line,) = capsys.readouterr().err.strip().splitlines()
    assert re.match(f"error: source.pth: {message}", line), line
    assert {p.name for p in tmp_path.iterdir()} <= {"source.pth"}


@pytest.mark.parametrize(
    ("target", "message"),
    [
        ("none.txt/b.pth", "none.txt/b.pth cannot be written: File exists: none.txt"),
        ("link.pth", "link.pth and source, a.pth, are the same file, which would be overwritten"),
    ],
)
def test_bad_target(target, message, tmp_path, monkeypatch, capsys):
    """It is refused before the source is read, which stays as it is."""
    monkeypatch.chdir(tmp_path)
    content = save(tmp_path / "a.pth", STATE).read_bytes()
    (tmp_path / "none.txt").touch()
    (tmp_path / "link.pth").symlink_to("a.pth")
    with pytest.raises(SystemExit, match="2"):
        main(["a.pth", target])
    assert f"error: target: {message}" in capsys.readouterr().err
    assert (tmp_path / "a.pth").read_bytes() == content
