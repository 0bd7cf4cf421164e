# SPDX-License-Identifier: Apache-2.0
"""The map in docs/architecture.md, and what this project relies on in Detectron2's code."""

import ast
import inspect
import re
from pathlib import Path

import pytest
from conftest import ROOT

from detectron2.utils.registry import locate

PACKAGE = ROOT / "libra_d2"
# Each room, and those that it may import from.
ROOMS = {
    "errors": (),
    "utils": ("errors",),
    "modeling": ("errors",),
    "checkpoint": ("errors", "utils"),
    "data": ("errors", "utils"),
    "evaluation": ("errors", "utils", "modeling", "data"),
    "analysis": ("utils", "modeling"),
    "lazy": ("errors", "modeling"),
    "config": ("errors", "utils", "modeling", "checkpoint", "data", "evaluation", "lazy"),
    "model_zoo": ("errors", "utils", "checkpoint", "config"),
    "engine": (
        *("errors", "utils", "modeling", "checkpoint", "data", "evaluation", "config"),
        "model_zoo",
    ),
}


# What is not public in Detectron2, fvcore, iopath or PyTorch, and used or overridden here.
PRIVATE_NAMES = {
    "detectron2.checkpoint.DetectionCheckpointer": (
        *("_load_file", "_load_model", "_log_incompatible_keys"),
    ),
    "detectron2.data.DatasetMapper": ("_transform_annotations",),
    "detectron2.data.detection_utils": ("_apply_exif_orientation",),
    "detectron2.engine.DefaultTrainer": ("_trainer", "_last_eval_results"),
    "detectron2.engine.TrainerBase": ("_hooks",),
    "detectron2.engine.SimpleTrainer": ("_data_loader_iter",),
    "detectron2.engine.hooks.BestCheckpointer": ("_checkpointer", "_file_prefix", "_val_metric"),
    "detectron2.engine.hooks.PreciseBN": ("_data_iter", "_data_loader"),
    "detectron2.evaluation.COCOEvaluator": (
        *("_coco_api", "_cpu_device", "_derive_coco_results", "_distributed", "_do_evaluation"),
        *("_eval_box_proposals", "_eval_predictions", "_max_dets_per_image", "_metadata"),
        *("_output_dir", "_predictions", "_results", "_tasks"),
    ),
    "detectron2.modeling.FPN": ("_fuse_type", "_out_features"),
    "detectron2.modeling.GeneralizedRCNNWithTTA": (
        *("_batch_inference", "_get_augmented_boxes", "_get_augmented_inputs"),
        *("_inference_one_image", "_merge_detections"),
    ),
    "detectron2.modeling.RetinaNet": (
        *("_decode_multi_level_predictions", "_decode_per_level_predictions", "_ema_update"),
    ),
    "detectron2.modeling.ROIHeads": ("_sample_proposals",),
    "detectron2.modeling.StandardROIHeads": ("_init_box_head", "_init_mask_head", "_forward_mask"),
    "detectron2.modeling.roi_heads.CascadeROIHeads": (
        *("_create_proposals_from_boxes", "_forward_box", "_match_and_label_boxes", "_run_stage"),
    ),
    "detectron2.modeling.box_regression": ("_dense_box_regression_loss",),
    "detectron2.modeling.proposal_generator.RPN": ("_subsample_labels",),
    "detectron2.utils.events.CommonMetricPrinter": ("_get_eta",),
    "detectron2.utils.events.TensorboardXWriter": ("_last_write", "_writer"),
    "detectron2.utils.comm": ("_LOCAL_PROCESS_GROUP", "_get_global_gloo_group"),
    "detectron2.utils.registry": ("_convert_target_to_string",),
    "iopath.common.file_io.PathHandler": ("_get_local_path", "_get_supported_prefixes", "_open"),
    "torch.nn.Conv2d": ("_conv_forward",),
}


def imported_rooms(path):
    """The rooms of this package that a module imports from."""
    package = path.relative_to(ROOT).with_suffix("").parts
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom):
            base = package[: -node.level] if node.level else ()
            module = [*base, *(node.module or "").split(".")]
            if module[0] == "libra_d2":
                names = [x.name for x in node.names if x.name != "__version__"]
                yield from [x for x in module[1:2] if x] or names
        elif isinstance(node, ast.Import):
            yield from (x.name.split(".")[1] for x in node.names if x.name.startswith("libra_d2."))


@pytest.mark.parametrize("room", ROOMS)
def test_imports(room):
    """A room imports only from those below it."""
    assert {x.stem for x in PACKAGE.glob("[!_]*")} - {"versions", "tools", "demo"} == set(ROOMS)
    folder = PACKAGE / room
    for path in folder.rglob("*.py") if folder.is_dir() else [folder.with_suffix(".py")]:
        above = set(imported_rooms(path)) - {room, *ROOMS[room]}
        assert not above, f"{path.relative_to(ROOT)} imports from {above}"


def test_only_config_knows_the_language():
    """Nothing outside the config room depends on the config language."""
    files = [*PACKAGE.rglob("*.py"), *(ROOT / "tools").glob("*.py"), *(ROOT / "demo").glob("*.py")]
    for path in files:
        # These take and return configs of one language.
        if PACKAGE / "config" in path.parents or path.name in ("lazy.py", "model_zoo.py"):
            continue
        asked = r"isinstance\(.*(Lazy|DictConfig|CfgNode)|LazyRecipe|YamlRecipe"
        assert not re.search(asked, path.read_text(encoding="utf-8")), path


def test_map():
    """The page names every room."""
    page = (ROOT / "docs/architecture.md").read_text(encoding="utf-8")
    assert not [room for room in ROOMS if f"`{room}" not in page]


@pytest.mark.parametrize("owner", PRIVATE_NAMES)
def test_private_names(owner):
    """A version of Detectron2 that lacks one is named, before anything fails in an obscure way."""
    place = locate(owner) if not owner.islower() else __import__(owner, fromlist=["_"])
    source = "".join(
        inspect.getsource(x) for x in getattr(place, "__mro__", [place]) if x is not object
    )
    missing = [name for name in PRIVATE_NAMES[owner] if not re.search(rf"\b{name}\b", source)]
    assert not missing, f"{owner} of this version of Detectron2 has no {', '.join(missing)}"


def test_private_names_are_listed():
    """What this package imports, or overrides with super(), of private names is in the table."""
    listed = {name for names in PRIVATE_NAMES.values() for name in names}
    for path in PACKAGE.rglob("*.py"):
        text = path.read_text(encoding="utf-8")
        lines = re.findall(r"^from (?:detectron2|fvcore|iopath).* import (.+)", text, re.MULTILINE)
        used = {name for line in lines for name in re.findall(r"\b_\w+", line)}
        used |= set(re.findall(r"super\(\)\.(_[a-z]\w+)", text))
        assert used <= listed | {"_read", "_read_dataset", "_write", "_apply"}, Path(path).name
