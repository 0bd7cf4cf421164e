# SPDX-License-Identifier: Apache-2.0
import os
import pickle
import zipfile

import numpy as np
import pytest
import torch
from conftest import demo_cfg

from detectron2.modeling import build_model

from libra_d2.checkpoint import LibraCheckpointer, find_checkpoint
from libra_d2.config import BASELINE, make_recipe
from libra_d2.errors import BrokenFileError, InputError


def net(shapes, value=0.0):
    """A model with constant weights of these names and shapes."""
    model = torch.nn.Module()
    for name, shape in shapes.items():
        path, _, leaf = name.rpartition(".")
        module = model
        for part in filter(None, path.split(".")):
            if part not in module._modules:
                module.add_module(part, torch.nn.Module())
            module = module.get_submodule(part)
        module.register_parameter(leaf, torch.nn.Parameter(torch.full(shape, value)))
    return model.requires_grad_(False)


def values(model):
    """The value of each constant weight."""
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
BUT = " than the config's. Missing, unexpected or of another shape: {}, the first "
NONE = ": none of its names or shapes is one of this model's (the model has, e.g., "


@pytest.mark.parametrize(
    ("shapes", "use", "message"),
    [
        *((SMALL, "evaluate", ""), (SMALL, "resume", ""), (LIBRA, "fine-tune", "")),
        *((OTHER, "fine-tune", ""), (LACKING, "fine-tune", "")),
        (OTHER, "evaluate", f"{BUT.format('1 weight')}'{CLS}' (shape (8, 2), not (4, 2)). Do"),
        ({**LACKING, CLS: (8, 2)}, "evaluate", f"{BUT.format('2 weights')}'{[*RPN][0]}' (missing)"),
        ({"x": (1,), "y": (1,)}, "fine-tune", f"{NONE}'{FIRST}'; the file has 'x')"),
        ({k: (*v, 1) for k, v in SMALL.items()}, "fine-tune", f"{NONE}'{FIRST}'; the file has 'no"),
        (LIBRA, "resume", f"{BUT.format('1 weight')}'{[*BFP][0]}' (missing)"),
        (
            {**SMALL, "a.more": (1,)},
            "resume",
            f"{BUT.format('1 weight')}'a.more' (not in the model)",
        ),
    ],
)
def test_required_weights(shapes, use, message, tmp_path, caplog):
    """
    Resuming needs all weights and no others, evaluation all, fine-tuning at least one.
    """
    model, path = net(SMALL), str(tmp_path / "a.pth")
    save(path, {"model": net(shapes, 1.0).state_dict(), "iteration": 3})
    (tmp_path / "last_checkpoint").write_text("a.pth")
    checkpointer = LibraCheckpointer(model, str(tmp_path), complete=use == "evaluate")
    if not message:
        assert checkpointer.resume_or_load(path, resume=use == "resume") == {"iteration": 3}
        fits = {name: float(shapes.get(name) == shape) for name, shape in SMALL.items()}
        assert values(model) == fits
        return
    with pytest.raises(InputError) as error:
        checkpointer.resume_or_load(path, resume=use == "resume")
    assert str(error.value).startswith(f"{path}: these are weights of another model{message}")
    assert not isinstance(error.value, BrokenFileError)
    assert ("not loaded from" in caplog.text) == message.startswith(" than")
    if message.startswith(" than"):
        assert str(error.value).endswith("belong to these weights?")
        config = tmp_path / "config.yaml"
        config.touch()
        with pytest.raises(InputError) as error:
            checkpointer.resume_or_load(path, resume=use == "resume")
        assert str(error.value).endswith(f"these weights? Their own config is {config}.")
    assert "pyramid, which is trained" not in caplog.text


def test_without_pyramid(tmp_path, caplog):
    """
    A plain detector's weights are not those of one with the pyramid: evaluation is refused, and
    before a training one line says so.
    """
    path = str(save(tmp_path / "a.pth", {"model": net(LIBRA, 1.0).state_dict()}))
    checkpointer = LibraCheckpointer(net(SMALL), complete=True)
    with pytest.raises(InputError, match=f"^{path}: these are weights of a model without the bal"):
        checkpointer.load(path)
    LibraCheckpointer(net(SMALL)).load(path)
    assert len([x for x in caplog.messages if "no weights of the balanced feature" in x]) == 1
    caplog.clear()
    LibraCheckpointer(net(LIBRA), complete=True).load(path)
    assert "balanced feature pyramid" not in caplog.text


@pytest.mark.parametrize(
    ("value", "message"),
    [
        (torch.tensor([[1.0, -torch.inf]]), f"{CLS!r} in it is not finite"),
        (torch.ones(4, 2, dtype=torch.int64), f"{CLS!r} in it is of type torch.int64, not of fl"),
        (torch.ones(4, 2, dtype=torch.float16), ""),
    ],
)
def test_numbers(tmp_path, value, message):
    """Only finite floating point numbers are loaded; the first other tensor is named."""
    state = {**net(SMALL, 1.0).state_dict(), CLS: value, "unused": torch.ones(1, dtype=torch.int64)}
    path = str(save(tmp_path / "a.pth", {"model": state}))
    model = net(SMALL)
    if not message:
        LibraCheckpointer(model).load(path)
        assert set(values(model).values()) == {1}
        return
    with pytest.raises(InputError, match=f"^{path}: {message}"):
        LibraCheckpointer(model).load(path)
    assert set(values(model).values()) == {0}


def test_buffers_alone(tmp_path):
    """They do not count as weights of the same model."""
    path = save(tmp_path / "a.pth", {"running_mean": torch.ones(2)})
    with pytest.raises(InputError, match="weights of another model"):
        LibraCheckpointer(torch.nn.BatchNorm1d(2)).load(str(path))


def test_table(tmp_path, caplog):
    """One message for all weights not loaded, grouped by the first three parts of their names."""
    state = {"a.b.c.d.weight": (2,), "a.b.c.e.weight": (2,), "a.b.weight": (3, 1), "f.bias": (1,)}
    model = net({**state, "g.h.weight": (1,)})
    state.update({"a.b.weight": (4, 1), "i.j.k.l": (1,), "i.j.k.m": (1,), "i.n": (1,)})
    del state["a.b.c.d.weight"], state["a.b.c.e.weight"]
    path = save(tmp_path / "a.pth", {"model": net(state).state_dict()})
    LibraCheckpointer(model).load(str(path))
    (table,) = [record.message for record in caplog.records if record.levelname == "WARNING"]
    lines = table.splitlines()
    assert lines[0] == f"Weights that were not loaded from {path}:"
    assert [[x.strip() for x in line.split("|")[1:-1]] for line in lines[3:]] == [
        ["other shape", "a.b.weight", "(4, 1) in the file, (3, 1) in the model"],
        ["missing", "a.b.*", "1 weight"],
        ["missing", "a.b.c.*", "2 weights"],
        ["missing", "g.h.*", "1 weight"],
        ["not used", "i.*", "1 weight"],
        ["not used", "i.j.k.*", "2 weights"],
    ]


@pytest.mark.parametrize("author", [None, "someone"], ids=["Caffe2", "Detectron2"])
def test_pickled_arrays(author, tmp_path, monkeypatch):
    """Files of Detectron2's model zoo, with its names or Caffe2's, and their addresses."""
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
    """With the suffix of Detectron2's main branch, names may be ends of the model's."""
    model = net({"bottom_up.layer.weight": (2,), "a.b": (1,)})
    path = save(tmp_path / "a.pth", {"model": net({"layer.weight": (2,)}, 3.0).state_dict()})
    checkpointer = LibraCheckpointer(model)
    checkpointer.load(f"{path}?matching_heuristics=True")
    assert values(model) == {"bottom_up.layer.weight": 3, "a.b": 0}
    for suffix, message in (("?other=True", "no such weights file"), ("", "another model")):
        with pytest.raises(InputError, match=message):
            checkpointer.load(f"{path}{suffix}")


def test_addresses(tmp_path):
    """Local paths and URLs are loaded or refused with the reason; "" loads nothing."""
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
    with zipfile.ZipFile(tmp_path / "b.pth", "w") as file:
        file.writestr("b/constants.pkl", b"")
    with pytest.raises(BrokenFileError, match="b.pth: a TorchScript file, which is a program"):
        checkpointer.load(str(tmp_path / "b.pth"))


def checkpoints(folder, *names, **kwargs):
    """A checkpointer with checkpoints from old to new, whose weights and rates are 1, 2, ..."""
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
    """The tagged checkpoint is loaded with its optimizer, other weights without."""
    checkpointer, model, optimizer = checkpoints(tmp_path, "c", "b", "a")
    (tmp_path / "last_checkpoint").write_text("b.pth")
    assert checkpointer.resume_or_load(str(tmp_path / "a.pth"))["iteration"] == 20
    assert model.weight[0, 0] == optimizer.param_groups[0]["lr"] == 2
    checkpointer.resume_or_load(str(tmp_path / "a.pth"), resume=False)
    assert (model.weight[0, 0], optimizer.param_groups[0]["lr"]) == (3, 2)
    (tmp_path / "last_checkpoint").unlink()
    checkpointer.resume_or_load(str(tmp_path / "c.pth"), resume=True)
    assert (model.weight[0, 0], optimizer.param_groups[0]["lr"]) == (1, 2)
    part = save(tmp_path / "part.pth", {"model": {"weight": torch.full((2, 3), 9.0)}})
    checkpointer.resume_or_load(str(part), resume=False)
    assert model.weight[0, 0] == 9


def test_weights_only(tmp_path, caplog):
    """A file without the state of a training is none that a training resumes from."""
    checkpointer, model, _ = checkpoints(tmp_path, "model_0000003", "model_best")
    state = torch.optim.SGD(model.parameters(), lr=5.0)
    checkpointer.add_checkpointable("trainer", state)
    checkpointer.save("model_0000005", iteration=5)
    (tmp_path / "last_checkpoint").write_text("model_best.pth")
    assert checkpointer.resume_or_load("")["iteration"] == 5
    assert "model_best.pth: it has weights only" in caplog.text
    LibraCheckpointer(model, str(tmp_path)).resume_or_load("")  # to evaluate it


@pytest.mark.parametrize(
    ("tag", "found"),
    [
        (b"model_0000003.pth", "model_0000003.pth"),
        (b"gone.pth\n", "gone.pth"),
        *((tag, "model_0000009.pth") for tag in (None, b"", b"\xff\x00", b"../x.pth", b"a\nb")),
    ],
)
def test_last_checkpoint(tmp_path, tag, found, caplog, monkeypatch):
    """That of ``last_checkpoint``; if it is broken, of the last iteration, or a newer final one."""
    numbered = (f"model_000000{i}" for i in (9, 1, 3))  # the last iteration, however old
    names = ("model_final", *numbered, "model_best", "model_final_ema", "other")
    checkpointer = checkpoints(tmp_path, *names)[0]
    if tag is None:
        (tmp_path / "last_checkpoint").unlink()
    else:
        (tmp_path / "last_checkpoint").write_bytes(tag)
    assert checkpointer.get_checkpoint_file() == str(tmp_path / found)
    assert checkpointer.has_checkpoint()
    if found != "gone.pth":
        number = {"model_0000003.pth": 40, "model_0000009.pth": 20}[found]
        assert checkpointer.resume_or_load("")["iteration"] == number
    assert ("is taken for the last one" in caplog.text) == (found == "model_0000009.pth")
    os.utime(tmp_path / "model_final.pth", (99, 99))
    newest = "model_final.pth" if found == "model_0000009.pth" else found
    assert find_checkpoint(str(tmp_path)) == str(tmp_path / newest)
    monkeypatch.chdir(tmp_path)
    for name in ("", str(tmp_path / "none")):
        assert not LibraCheckpointer(torch.nn.Linear(1, 1), name).has_checkpoint()


@pytest.mark.parametrize("missing", [True, False])
def test_resume_past_a_broken_file(tmp_path, missing, caplog):
    """The newest of the others is loaded, and the broken one is named."""
    ema = ["model_final_ema"]
    checkpointer, model, optimizer = checkpoints(tmp_path, "c", "d", "a", "model_best", *ema, "b")
    broken = tmp_path / "b.pth"
    broken.unlink() if missing else broken.write_bytes(broken.read_bytes()[:800])
    assert checkpointer.resume_or_load("", resume=True)["iteration"] == 30
    assert model.weight[0, 0] == optimizer.param_groups[0]["lr"] == 3
    assert caplog.text.count(f"trying the one before: {broken}: ") == 1
    assert caplog.text.count("trying the one before") == 1
    (tmp_path / "a.pth").write_bytes(b"")
    assert checkpointer.resume_or_load("", resume=True)["iteration"] == 20
    for name in "cd":
        (tmp_path / f"{name}.pth").write_bytes(b"")
    message = f"none of the 4 checkpoints in {tmp_path} can be read, the last one because: {broken}"
    with pytest.raises(InputError, match=message):
        checkpointer.resume_or_load("", resume=True)


def test_save(tmp_path):
    """Weights, optimizer and extra values are saved; ``tag`` marks the one to resume from."""
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
    torch.nn.init.constant_(model.bias, torch.nan)  # reported by the process that saves
    LibraCheckpointer(model, str(tmp_path / "other"), save_to_disk=False).save("c")
    LibraCheckpointer(model).save("c")
    assert not list((tmp_path / "other").iterdir())
    assert not list(tmp_path.rglob("c.pth*"))


@pytest.mark.parametrize(
    ("error", "reason"), [(OSError("Disk\nfull"), "Disk full"), (RuntimeError("no"), "no")]
)
def test_failed_save(tmp_path, monkeypatch, error, reason):
    """When writing fails, earlier checkpoints and the tag are unchanged."""
    checkpointer = checkpoints(tmp_path, "model_4")[0]
    before = {p.name: p.read_bytes() for p in tmp_path.iterdir()}

    def fail(data, f):
        f.write(b"half of it")
        raise error

    monkeypatch.setattr(torch, "save", fail)
    for name in ("model_4", "model_9"):
        message = f"^{tmp_path}/{name}.pth: cannot be written: {reason}. Is the disk full"
        with pytest.raises(InputError, match=f"{message}.*resumed from {tmp_path}/model_4.pth$"):
            checkpointer.save(name)
        assert {p.name: p.read_bytes() for p in tmp_path.iterdir()} == before


@pytest.mark.parametrize(
    ("value", "names"), [(-torch.inf, ["1.running_var"]), (torch.nan, ["0.weight", "1.bias"])]
)
def test_non_finite_weights(tmp_path, value, names):
    """They are not saved. The first is named, and the checkpoint to resume from."""
    model, path = torch.nn.Sequential(torch.nn.Linear(3, 2), torch.nn.BatchNorm1d(2)), str(tmp_path)
    checkpointer = LibraCheckpointer(model, path)
    assert checkpointer.advice() == "There is no earlier checkpoint"
    checkpointer.save("before")
    for name in names:
        model.state_dict()[name].view(-1)[-1] = value
    files = set(tmp_path.iterdir())
    with pytest.raises(InputError) as error:
        checkpointer.save("a")
    assert str(error.value) == (
        f"{path}/a.pth: not written, because {names[0]} is not finite: the training has diverged. "
        f"Training can be resumed from {path}/before.pth"
    )
    assert set(tmp_path.iterdir()) == files


def test_trained_model(tmp_path):
    """
    A plain detector is the one without the three ideas. A folder's last checkpoint takes precedence
    over the weights in the config.
    """
    plain = demo_cfg()
    plain.merge_from_list([*BASELINE, "MODEL.BACKBONE.NAME", "build_resnet_fpn_backbone"])
    plain.MODEL.ROI_HEADS.NAME, plain.MODEL.PROPOSAL_GENERATOR.NAME = "StandardROIHeads", "RPN"
    state = build_model(plain).state_dict()
    path = str(save(tmp_path / "plain.pth", {"model": state}))
    with pytest.raises(InputError, match="^MODEL.WEIGHTS: name the weights of a trained model$"):
        make_recipe(demo_cfg(MODEL__WEIGHTS="")).build_trained_model(str(tmp_path))
    recipe = make_recipe(demo_cfg(MODEL__WEIGHTS=path))
    with pytest.raises(InputError, match="as they are, add MODEL.LIBRA.BFP.ENABLED False$"):
        recipe.build_trained_model(str(tmp_path))
    recipe.config.MODEL.LIBRA.BFP.ENABLED = False
    model = recipe.build_trained_model(str(tmp_path))
    assert not model.training
    assert all(torch.equal(model.state_dict()[name], value) for name, value in state.items())
    torch.nn.init.constant_(model.roi_heads.box_predictor.bbox_pred.bias, 5)
    LibraCheckpointer(model, str(tmp_path)).save("model_5")
    for recipe.weights, folder, bias in (("", str(tmp_path), 5), (path, "", 0)):
        found = recipe.build_trained_model(folder)
        assert (found.roi_heads.box_predictor.bbox_pred.bias == bias).all()
    recipe.num_classes = 7
    with pytest.raises(InputError, match=r"weights\? This one has MODEL\S*NUM_CLASSES 7\.$"):
        recipe.build_trained_model()
