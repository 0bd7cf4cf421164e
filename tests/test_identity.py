# SPDX-License-Identifier: Apache-2.0
"""What a run is: its config and its data, compared when it is continued or used."""

import hashlib
import json
import shutil

import numpy as np
import pytest
import torch
from conftest import demo_cfg
from PIL import Image
from test_train_net import small_data

from detectron2.config import LazyCall as L
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.data.datasets import register_coco_instances

from libra_d2 import model_zoo
from libra_d2.config import RunIdentity, changed_values, describe, identify, make_recipe
from libra_d2.config.identity import check_classes
from libra_d2.data import register_coco_json
from libra_d2.data.fingerprint import fingerprint
from libra_d2.errors import InputError


@pytest.fixture
def data(tmp_path):
    return small_data(tmp_path / "data")


def register(data, name="identity_train"):
    json_file, images = data / "instances.json", data / "images"
    register_coco_json(name, str(json_file), str(images), str(data / "cache"))
    return name


def edit(data, change):
    path = data / "instances.json"
    content = json.loads(path.read_text())
    change(content)
    path.write_text(json.dumps(content))


def rename(data):
    (data / "images/1.png").rename(data / "images/3.png")
    edit(data, lambda c: c["images"][0].update(file_name="3.png"))


@pytest.mark.parametrize(
    ("change", "differs"),
    [
        (lambda data: shutil.copytree(data, data / "elsewhere"), set()),
        (lambda data: edit(data, lambda c: c["annotations"].pop()), {"annotations"}),
        (lambda data: edit(data, lambda c: c["images"].reverse()), {"annotations"}),
        (lambda data: Image.new("RGB", (64, 48), "red").save(data / "images/1.png"), {"images"}),
        (rename, {"annotations", "images"}),
        (
            lambda data: edit(data, lambda c: c["categories"][1].update(name="z")),
            {"annotations", "classes"},
        ),
    ],
)
def test_fingerprint(data, change, differs):
    """Content of the JSON, names and sizes of images, and classes; not where they are."""
    before = fingerprint(register(data))
    assert before.keys() == {"annotations", "classes", "images"}
    assert before["classes"] == ["a", "b"]
    sizes = [[f"{i}.png", (data / f"images/{i}.png").stat().st_size] for i in (1, 2)]
    contents = (data / "instances.json").read_bytes(), json.dumps(sizes).encode()
    annotations, images = (hashlib.sha256(x).hexdigest()[:16] for x in contents)
    assert (before["annotations"], before["images"]) == (annotations, f"2 ({images})")
    change(data)
    moved = data / "elsewhere"
    after = fingerprint(register(moved if moved.exists() else data))
    assert {name for name in before if before[name] != after[name]} == differs


def test_fingerprint_of_other_datasets(data):
    """Of a JSON that Detectron2 registers, of a function's records, and of none."""
    known, name = fingerprint(register(data)), "identity_coco"
    register_coco_instances(name, {}, str(data / "instances.json"), str(data / "images"))
    assert fingerprint(name) == {k: known[k] for k in ("annotations", "classes")}
    (data / "instances.json").unlink()
    assert fingerprint(name)["annotations"] == "absent"
    records = [{"file_name": "/a/1.png", "image_id": 1, "annotations": [{"bbox": [1, 2, 3, 4]}]}]
    records[0].update(
        {"boxes": np.ones(2), "made_by": object(), (7,): 8, "sem_seg_file_name": "/a/b"},
        pano_seg_file_name=None,
    )
    DatasetCatalog.register("identity_function", lambda: records)
    before = fingerprint("identity_function")
    records[0].update(file_name="/b/1.png", made_by=object(), sem_seg_file_name="/c/b")
    assert fingerprint("identity_function") == before
    records[0]["annotations"][0]["bbox"][3] = 5
    boxed = fingerprint("identity_function")
    records[0]["boxes"][1] = 2
    assert before != boxed != fingerprint("identity_function")
    for other in (name, "identity_function"):
        DatasetCatalog.remove(other)
    MetadataCatalog.remove(name)
    assert fingerprint("identity_function") == {}


def recipe_of(name, lazy=False):
    if not lazy:
        return make_recipe(demo_cfg(DATASETS__TRAIN=(name,), DATASETS__TEST=(name,)))
    config = model_zoo.get_config("COCO-Detection/libra_retinanet_R_50_FPN_1x.py")
    recipe = make_recipe(config)
    recipe.train_datasets = recipe.test_datasets = (name,)
    return recipe


@pytest.mark.parametrize("lazy", [False, True])
def test_identity(data, lazy, tmp_path):
    """Each value of the config, the data and the version; it survives a checkpoint and JSON."""
    recipe = recipe_of(register(data), lazy)
    values = identify(recipe)
    assert values["train.max_iter" if lazy else "SOLVER.MAX_ITER"] == recipe.max_iter
    assert values["training data 'identity_train' classes"] == ["a", "b"]
    assert values["validation data 'identity_train' images"].startswith("2 (")
    about = describe(recipe)
    assert about.items() <= values.items()
    assert [name for name in about if name.startswith("training")] == []
    torch.save(values, tmp_path / "a.pth")
    assert torch.load(tmp_path / "a.pth", weights_only=True) == values
    assert json.loads(json.dumps(values)) == values
    assert changed_values(values, identify(recipe)) == {}
    recipe.output_dir, recipe.weights, recipe.num_workers = "elsewhere", "other.pth", 7
    recipe.check_images = 9
    assert changed_values(values, identify(recipe)) == {}
    recipe.seed = 5
    name, old = ("train.seed", -1) if lazy else ("SEED", 1)
    found = changed_values(values, identify(recipe))
    assert found == {name: f"{name} is 5, but was {old} before"}


def test_proposals(data, tmp_path):
    """Those of a model without an RPN are a part of its data."""
    recipe = recipe_of(register(data))
    path = tmp_path / "p.pkl"
    path.write_bytes(b"one")
    recipe.train_proposals = (str(path),)
    assert not any("proposals" in name for name in identify(recipe) if " " in name)
    recipe.needs_proposals = True
    before = identify(recipe)
    path.write_bytes(b"two")
    after = identify(recipe)
    for what, place in (("proposals", ""), ("images", f" ({data}/images)")):
        name = f"training data 'identity_train' {what}"
        changed = changed_values({**after, name: before[name] if not place else "0"}, after)
        assert list(changed) == [name]
        assert f"{name}{place} have changed, from '" in changed[name]


BEFORE = {
    "libra_d2": "0.1",
    "MODEL.ROI_HEADS.NAME": "LibraROIHeads",
    "SOLVER.MAX_ITER": 5,
    "model.backbone._target_": "a.B",
    "training data 'a' classes": ["x"],
    "training data 'a' images": "2 (0)",
    "validation data 'a' annotations": "0",
    "validation data 'a' classes": ["x"],
}


@pytest.mark.parametrize(
    ("name", "value", "is_fixed"),
    [
        ("libra_d2", "0.2", False),
        ("SOLVER.MAX_ITER", 7, False),
        ("validation data 'a' annotations", "1", False),
        ("validation data 'a' classes", ["y"], False),
        ("training data 'a' classes", ["y"], True),
        ("training data 'a' images", "3 (1)", True),
        ("MODEL.ROI_HEADS.NAME", "StandardROIHeads", True),
        ("MODEL.META_ARCHITECTURE", "B", True),
        ("DATASETS.TRAIN", ["b"], True),
        ("model.backbone._target_", "a.C", True),
        ("optimizer._target_", "a.SGD", True),
        ("optimizer.lr", 2.0, False),
        ("dataloader.train.dataset.path", "b", True),
    ],
)
def test_resuming(name, value, is_fixed, caplog):
    """What cannot be meant is refused, the rest is logged."""
    identity = RunIdentity({**BEFORE, name: value})
    before = repr(BEFORE[name]) if name in BEFORE else "absent"
    clause = f"{name} is {value!r}, but was {before} before"
    if name.endswith(("annotations", "images")):
        clause = f"{name} have changed, from {before} to {value!r} (digests of the content)"
    if is_fixed:
        with pytest.raises(InputError, match="cannot be resumed: .*another output dir") as error:
            identity.load_state_dict(BEFORE)
        assert clause in str(error.value)
    else:
        identity.load_state_dict(BEFORE)
        assert caplog.messages == [f"Resuming: {clause}"]
    caplog.clear()
    identity.load_state_dict(identity.state_dict())
    assert caplog.messages == []


@pytest.mark.parametrize(
    "name",
    [
        *("VERSION", "DATASETS.PROPOSAL_FILES_TEST", "dataloader.test.num_workers"),
        "dataloader.test.dataset.proposal_files.0",
    ],
)
def test_what_may_differ(name):
    """Places, and what changes no number."""
    assert changed_values({name: 1}, {name: 2}) == {}


def test_order_and_comparison():
    assert [*changed_values(dict.fromkeys("cabfed"), {})] == [*"abcdef"]
    identity = RunIdentity({})
    assert identity.is_compared is False
    identity.load_state_dict({})
    assert identity.is_compared is True


def test_other_data():
    """Data under another name, or missing, is other data."""
    now = {k: v for k, v in BEFORE.items() if "training" not in k}
    with pytest.raises(
        InputError, match=r"data 'a' images have changed, from '2 .0.' to absent .*t.\. To"
    ):
        RunIdentity(now).load_state_dict(BEFORE)


def test_classes(data):
    """A model is evaluated on the classes that it has learned, in their order."""
    name, key = register(data), "training data 'other' classes"
    validation = {"validation data 'other' classes": ["b", "a"]}
    for run in ({}, {key: ["a", "b"]}, {key: []}, validation):
        check_classes(run, [name])
    check_classes({key: ["b", "a"]}, [])
    check_classes({key: ["b", "a"]}, ["identity_without_classes"])
    for learned in (["b", "a"], ["a"], ["a", "b", "c"]):
        with pytest.raises(InputError, match=f"dataset '{name}' has .'a', 'b'."):
            check_classes({key: learned}, [name])


def test_objects_in_a_config():
    """What a LazyConfig refers to is compared by its name, and not executed."""
    config = model_zoo.get_config("COCO-Detection/libra_retinanet_R_50_FPN_1x.py")
    before = identify(make_recipe(config))
    config.model.head.num_convs = 2
    config.dataloader.train.dataset = L(list)()
    found = changed_values(before, identify(make_recipe(config)))
    assert found["model.head.num_convs"] == "model.head.num_convs is 2, but was absent before"
    assert "dataloader.train.dataset._target_" in found
