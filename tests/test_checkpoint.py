# SPDX-License-Identifier: Apache-2.0
import errno
import os
import pickle

import numpy as np
import pytest
import torch
from conftest import demo_cfg

from detectron2.checkpoint import DetectionCheckpointer
from detectron2.modeling import build_model

from libra_d2.checkpoint import LibraCheckpointer
from libra_d2.config import BASELINE, make_recipe
from libra_d2.errors import BrokenFileError, InputError


def net(shapes, value=0.0):
    """A model of weights with these names and shapes."""
    model = torch.nn.Module()
    for name, shape in shapes.items():
        *path, leaf = name.split(".")
        module = model
        for part in path:
            if not hasattr(module, part):
                module.add_module(part, torch.nn.Module())
            module = getattr(module, part)
        setattr(module, leaf, torch.nn.Parameter(torch.full(shape, value), requires_grad=False))
    return model


def values(model):
    """The value of each weight, which has one."""
    return {name: x.flatten()[0].item() for name, x in model.state_dict().items()}


def save(path, content):
    torch.save(content, path)
    return path


RPN = {"proposal_generator.rpn_head.conv.weight": (1,)}
BFP = {"backbone.bfp.refine.weight": (1,)}
CLS, FIRST = "roi_heads.box_predictor.cls_score.weight", "backbone.bottom_up.res4.0.conv1.weight"
SMALL = {FIRST: (1,), **RPN, **BFP, CLS: (4, 2)}
OTHER = {**SMALL, CLS: (8, 2)}
LIBRA = {name: shape for name, shape in SMALL.items() if name not in BFP}
LACKING = {name: shape for name, shape in SMALL.items() if name not in RPN}
BUT = " than the config's: {} weights are missing, too many or of another shape, the first "
NONE = ": none of its names or shapes is one of this model's (the model has, e.g., "


@pytest.mark.parametrize(
    ("shapes", "complete", "message"),
    [
        *((SMALL, True, ""), (LIBRA, True, ""), (OTHER, False, ""), (LACKING, False, "")),
        (OTHER, True, f"{BUT.format(1)}'{CLS}' (shape (8, 2), not (4, 2)). Do"),
        ({**LACKING, CLS: (8, 2)}, True, f"{BUT.format(2)}'{[*RPN][0]}' (missing)"),
        ({"x": (1,), "y": (1,)}, False, f"{NONE}'{FIRST}'; the file has 'x')"),
        ({k: (*v, 1) for k, v in SMALL.items()}, False, f"{NONE}'{FIRST}'; the file has 'no"),
    ],
)
def test_what_must_be_there(shapes, complete, message, tmp_path):
    """
    For evaluation all weights but those of the balanced feature pyramid; for training to start
    from, one. What fits is loaded.
    """
    model, path = net(SMALL), str(tmp_path / "a.pth")
    save(path, {"model": net(shapes, 1.0).state_dict(), "iteration": 3})
    checkpointer = LibraCheckpointer(model, complete=complete)
    if not message:
        assert checkpointer.load(path) == {"iteration": 3}
        fits = {name: float(shapes.get(name) == shape) for name, shape in SMALL.items()}
        assert values(model) == fits
        return
    with pytest.raises(InputError) as error:
        checkpointer.load(path)
    assert str(error.value).startswith(f"{path}: these are weights of another model{message}")
    assert type(error.value) is InputError  # another file would do no better
    save(path, {"running_mean": torch.ones(2)})  # buffers alone do not make it this model
    with pytest.raises(InputError, match="weights of another model"):
        LibraCheckpointer(torch.nn.BatchNorm1d(2)).load(path)


def test_table(tmp_path, caplog):
    """One message for all that was not loaded, by the first three parts of the names."""
    state = {"a.b.c.d.weight": (2,), "a.b.c.e.weight": (2,), "a.b.weight": (3, 1), "f.bias": (1,)}
    model = net({**state, "g.h.weight": (1,)})
    state.update({"a.b.weight": (4, 1), "i.j.k.l": (1,), "i.j.k.m": (1,), "i.n": (1,)})
    del state["a.b.c.d.weight"], state["a.b.c.e.weight"]
    path = save(tmp_path / "a.pth", {"model": net(state).state_dict()})
    LibraCheckpointer(model).load(str(path))
    (table,) = [r.message for r in caplog.records if "not loaded" in r.message]
    lines = table.splitlines()
    assert lines[0] == f"Weights that were not loaded from {path}:"
    assert [[x.strip() for x in line.split("|")[1:-1]] for line in lines[3:]] == [
        ["other shape", "a.b.weight", "(4, 1) in the file, (3, 1) in the model"],
        ["missing", "a.b.*", "1 weights"],
        ["missing", "a.b.c.*", "2 weights"],
        ["missing", "g.h.*", "1 weights"],
        ["not used", "i.*", "1 weights"],
        ["not used", "i.j.k.*", "2 weights"],
    ]


@pytest.mark.parametrize("author", [None, "someone"], ids=["Caffe2", "Detectron2"])
def test_pickled_arrays(author, tmp_path, monkeypatch):
    """Files of Detectron2's model zoo, by its names for them, under its names or older ones."""
    monkeypatch.setenv("FVCORE_CACHE", str(tmp_path))
    path = tmp_path / "detectron2/ImageNetPretrained/model.pkl"
    path.parent.mkdir(parents=True)
    name = "backbone.bottom_up.stem.conv1.weight"
    weight = np.arange(3, dtype=np.float32)
    content = {"model": {name: weight}, "__author__": author} if author else {"conv1_w": weight}
    path.write_bytes(pickle.dumps(content))
    model = net({name: (3,), "backbone.bottom_up.res2.0.conv1.weight": (3,)})
    for address in (str(path), "detectron2://ImageNetPretrained/model.pkl"):
        model.backbone.bottom_up.stem.conv1.weight.zero_()
        LibraCheckpointer(model).load(address)
        assert model.backbone.bottom_up.stem.conv1.weight.tolist() == [0, 1, 2]


def test_matching_heuristics(tmp_path):
    """With the suffix that upstream has for them, names may be ends of the model's."""
    model = net({"bottom_up.layer.weight": (2,), "a.b": (1,)})
    path = save(tmp_path / "a.pth", {"model": net({"layer.weight": (2,)}, 3.0).state_dict()})
    checkpointer = LibraCheckpointer(model)
    checkpointer.load(f"{path}?matching_heuristics=True")
    assert values(model) == {"bottom_up.layer.weight": 3, "a.b": 0}
    for suffix, message in (("?other=True", "no such weights file"), ("", "another model")):
        with pytest.raises(InputError, match=message):
            checkpointer.load(f"{path}{suffix}")


def test_addresses(tmp_path):
    """Of a file; of none, with the reason; no address leaves the model alone."""
    path = save(tmp_path / "a.pth", {"model": net(SMALL, 2.0).state_dict()})
    model = net(SMALL)
    checkpointer = LibraCheckpointer(model, complete=True)
    assert checkpointer.load("") == {}
    assert set(values(model).values()) == {0}
    checkpointer.load(f"file://{path}")
    assert set(values(model).values()) == {2}
    for address in ("nowhere.pth", "s3://bucket/a.pth", "file:///none.pth", "x://y"):
        with pytest.raises(BrokenFileError, match=f"^{address}: no such weights file"):
            checkpointer.load(address)
    for address in ("http://127.0.0.1:9/x.pth", "https://127.0.0.1:9/x.pth"):
        with pytest.raises(BrokenFileError, match=f"^{address}: the weights cannot be .* put it "):
            checkpointer.load(address)


def checkpoints(folder, *names, **kwargs):
    """A checkpointer and its model, with checkpoints whose weights are 1, 2, ..., oldest first."""
    model = torch.nn.Linear(3, 2)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    checkpointer = LibraCheckpointer(model, str(folder), optimizer=optimizer, **kwargs)
    for i, name in enumerate(names, start=1):
        torch.nn.init.constant_(model.weight, i)
        optimizer.param_groups[0]["lr"] = float(i)
        checkpointer.save(name, iteration=10 * i)
        os.utime(folder / f"{name}.pth", (i, i))
    torch.nn.init.zeros_(model.weight)
    optimizer.param_groups[0]["lr"] = 0.0
    return checkpointer, model, optimizer


def test_resume(tmp_path):
    """The one that was tagged, with its optimizer; other weights come without their optimizer."""
    checkpointer, model, optimizer = checkpoints(tmp_path, "c", "b", "a")
    (tmp_path / "last_checkpoint").write_text("b.pth")
    assert checkpointer.resume_or_load(str(tmp_path / "a.pth"))["iteration"] == 20
    assert model.weight[0, 0] == optimizer.param_groups[0]["lr"] == 2
    checkpointer.resume_or_load(str(tmp_path / "a.pth"), resume=False)
    assert (model.weight[0, 0], optimizer.param_groups[0]["lr"]) == (3, 2)
    (tmp_path / "last_checkpoint").unlink()
    checkpointer.resume_or_load(str(tmp_path / "c.pth"), resume=True)
    assert (model.weight[0, 0], optimizer.param_groups[0]["lr"]) == (1, 2)


@pytest.mark.parametrize("how", ["cut short", "empty", "missing", "other content"])
def test_resume_past_a_broken_file(tmp_path, how, caplog):
    """The youngest of the others is loaded, all of it, and the broken one is named."""
    checkpointer, model, optimizer = checkpoints(tmp_path, "c", "d", "a", "b")
    broken = tmp_path / "b.pth"
    if how == "missing":
        broken.unlink()
    else:
        content = {"cut short": broken.read_bytes()[:800], "empty": b"", "other content": b"abc"}
        broken.write_bytes(content[how])
    extra = checkpointer.resume_or_load("", resume=True)
    assert extra["iteration"] == 30
    assert (model.weight == 3).all()
    assert optimizer.param_groups[0]["lr"] == 3
    assert caplog.text.count(f"trying the one before: {broken}: ") == 1
    assert caplog.text.count("trying the one before") == 1
    (tmp_path / "a.pth").write_bytes(b"")
    assert checkpointer.resume_or_load("", resume=True)["iteration"] == 20
    for name in "cd":
        (tmp_path / f"{name}.pth").write_bytes(b"")
    message = f"none of the 4 checkpoints in {tmp_path} can be read, the last one because: {broken}"
    with pytest.raises(InputError, match=message):
        checkpointer.resume_or_load("", resume=True)


@pytest.mark.parametrize(
    ("shapes", "detail"),
    [
        ({**LIBRA}, f"the first '{[*BFP][0]}' (missing)"),
        ({**SMALL, "a.more": (1,)}, "the first 'a.more' (not in the model)"),
        (OTHER, f"the first '{CLS}' (shape (8, 2), not (4, 2))"),
    ],
)
def test_resume_needs_all_weights(shapes, detail, tmp_path):
    """And no other ones; what does for a start of training does so after it was refused."""
    for name, content in (("before", SMALL), ("last", shapes)):
        LibraCheckpointer(net(content, 1.0), str(tmp_path)).save(name)
    model = net(SMALL)
    checkpointer = LibraCheckpointer(model, str(tmp_path))
    with pytest.raises(InputError, match="1 weights are missing, too many or of ano") as error:
        checkpointer.resume_or_load("")
    assert detail in str(error.value)
    checkpointer.load(str(tmp_path / "last.pth"))


def test_what_is_saved(tmp_path):
    """Weights, optimizer and what else is given; it is the one to resume from, unless not so."""
    checkpointer, model, optimizer = checkpoints(tmp_path, "a", "b")
    assert {p.name for p in tmp_path.iterdir()} == {"a.pth", "b.pth", "last_checkpoint"}
    assert (tmp_path / "last_checkpoint").read_text() == "b.pth"
    content = torch.load(tmp_path / "b.pth")
    assert content.keys() == {"model", "optimizer", "iteration"}
    assert (content["model"]["weight"] == 2).all()
    assert content["optimizer"]["param_groups"][0]["lr"] == 2
    checkpoints(tmp_path, "best", tag=False)
    assert (tmp_path / "last_checkpoint").read_text() == "b.pth"
    (tmp_path / "other").mkdir()
    torch.nn.init.constant_(model.bias, torch.nan)  # which another process says
    LibraCheckpointer(model, str(tmp_path / "other"), save_to_disk=False).save("c")
    LibraCheckpointer(model).save("c")
    assert not list((tmp_path / "other").iterdir())
    assert not list(tmp_path.rglob("c.pth*"))


@pytest.mark.parametrize("error", [OSError(errno.ENOSPC, "No space left"), RuntimeError("no\nwr")])
def test_files_are_written_whole(tmp_path, monkeypatch, error):
    """When writing fails, the checkpoint before and the record of it stay as they were."""
    checkpointer = checkpoints(tmp_path, "model_4")[0]
    before = {p.name: p.read_bytes() for p in tmp_path.iterdir()}

    def fail(data, f):
        f.write(b"half of it")
        raise error

    monkeypatch.setattr(torch, "save", fail)
    path, reason = tmp_path / "model_4.pth", "no wr" if error.args == ("no\nwr",) else str(error)
    for name in ("model_4", "model_9"):
        with pytest.raises(InputError) as raised:
            checkpointer.save(name)
        assert str(raised.value) == (
            f"{tmp_path}/{name}.pth: cannot be written: {reason}. Is the disk full? "
            f"Training can be resumed from {path}"
        )
        assert {p.name: p.read_bytes() for p in tmp_path.iterdir()} == before


def test_folders_elsewhere():
    """Addresses are left to Detectron2's path manager, which knows none of them here."""
    checkpointer = LibraCheckpointer(torch.nn.Linear(1, 1), "nowhere://folder")
    with pytest.raises(InputError, match="cannot be written: .*: 'nowhere:/+folder/a.pth'. Is the"):
        checkpointer.save("a")


@pytest.mark.parametrize("value", [torch.inf, -torch.inf, torch.nan])
@pytest.mark.parametrize("names", [["0.bias"], ["1.running_var"], ["0.weight", "0.bias", "1.bias"]])
def test_weights_that_are_not_finite_are_not_saved(tmp_path, value, names):
    """Not one number of them; the first weight with such a number is named, and what is left."""
    model, path = torch.nn.Sequential(torch.nn.Linear(3, 2), torch.nn.BatchNorm1d(2)), str(tmp_path)
    left = f"Training can be resumed from {path}/before.pth"
    for advice in ("There is no earlier checkpoint", left):
        files = set(tmp_path.iterdir())
        for name in names:
            model.state_dict()[name].view(-1)[-1] = value
        reason = f"{names[0]} is not finite: the training has diverged"
        with pytest.raises(InputError) as error:
            LibraCheckpointer(model, path).save("a")
        assert str(error.value) == f"{path}/a.pth: not written, because {reason}. {advice}"
        assert set(tmp_path.iterdir()) == files
        LibraCheckpointer(torch.nn.Linear(1, 1), path).save("before")


def test_trained_model(tmp_path, caplog):
    """
    A plain detector has all but the balanced feature pyramid. With ``resume`` the last checkpoint
    is loaded, without it the weights that are named.
    """
    cfg, plain, none = demo_cfg(), demo_cfg(), demo_cfg(MODEL__WEIGHTS="")
    plain.merge_from_list([*BASELINE, "MODEL.BACKBONE.NAME", "build_resnet_fpn_backbone"])
    plain.MODEL.ROI_HEADS.NAME, plain.MODEL.PROPOSAL_GENERATOR.NAME = "StandardROIHeads", "RPN"
    (tmp_path / "plain").mkdir()
    DetectionCheckpointer(build_model(plain), str(tmp_path / "plain")).save("plain")
    cfg.MODEL.WEIGHTS = str(tmp_path / "plain/plain.pth")
    model = make_recipe(cfg).build_trained_model()
    assert not model.training
    (table,) = [r.message for r in caplog.records if "not loaded" in r.message]
    rows = [[x.strip() for x in line.split("|")[1:-1]] for line in table.splitlines()[3:]]
    assert rows == [["missing", "backbone.bfp.refine.*", "8 weights"]]
    state = torch.load(cfg.MODEL.WEIGHTS)["model"]
    for name, value in state.items():
        assert torch.equal(model.state_dict()[name], value)
    with pytest.raises(InputError, match="MODEL.WEIGHTS: name the weights of a trained model"):
        make_recipe(none).build_trained_model(str(tmp_path))
    with torch.no_grad():
        model.roi_heads.box_predictor.bbox_pred.bias.fill_(5)
    LibraCheckpointer(model, str(tmp_path)).save("model_5")
    with pytest.raises(InputError, match="MODEL.WEIGHTS: name the weights"):
        make_recipe(none).build_trained_model()
    for x, resume, bias in ((none, True, 5), (cfg, False, 0)):
        found = make_recipe(x).build_trained_model(str(tmp_path) if resume else "")
        assert (found.roi_heads.box_predictor.bbox_pred.bias == bias).all()
    backbone = {k: v for k, v in state.items() if k.startswith("backbone.bottom_up")}
    cfg.MODEL.WEIGHTS = str(save(tmp_path / "backbone.pth", backbone))
    with pytest.raises(InputError, match="the first 'backbone.fpn_lateral2.*' \\(missing\\)"):
        make_recipe(cfg).build_trained_model()
