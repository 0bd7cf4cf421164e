#!/usr/bin/env python
# SPDX-License-Identifier: Apache-2.0
"""
Run Detectron2's own tests twice, first as they are, then with the classes and functions of libra_d2
in the place of those that they extend, and compare the outcomes:

    git clone https://github.com/facebookresearch/detectron2 --branch v0.6
    python tests/reference/run_upstream_tests.py detectron2 [arguments of pytest]

Of the clone, only the tests are used; it has to be of the version that is installed. The exit
status is 1 if a test fails with libra_d2 but not without it, and is not in DIFFERENT.

A subclass has to do what its parent does as long as its own ideas are turned off: random sampling
and the parent's way of training; the balanced feature pyramid is on, where no number depends on it.
"""

import os
import subprocess
import sys
import tempfile
from collections import Counter
from importlib import import_module
from pathlib import Path
from typing import Any, Dict, Iterable, Tuple
from xml.etree import ElementTree

from fvcore.common.registry import Registry
from tabulate import tabulate

from detectron2.config import get_cfg
from detectron2.modeling import build_model

from libra_d2 import add_libra_config
from libra_d2.config import DETECTRON2_RECIPE, DISABLED
from libra_d2.modeling.acceleration import accelerate

NAME = Path(__file__).stem

# In the clone's tests/: all that may touch what libra_d2 extends.
TESTS = (
    *("modeling", "layers", "structures", "data"),
    *("test_engine.py", "test_model_analysis.py", "test_model_zoo.py", "test_visualizer.py"),
)

# What does the same as its parent for the same arguments. Not so LowQualityMatcher, which is
# another rule, nor BestModel, CheckpointHook, Trainer and LibraPredictor, made of other things.
REPLACED = {
    "config.get_cfg": f"{NAME}.get_libra_cfg",
    "modeling.build_model": f"{NAME}.build_accelerated_model",
    **{
        f"modeling.{parent}": f"libra_d2.modeling.{ours}"
        for parent, ours in (
            ("backbone.fpn.build_resnet_fpn_backbone", "build_libra_resnet_fpn_backbone"),
            (
                "backbone.fpn.build_retinanet_resnet_fpn_backbone",
                "build_libra_retinanet_resnet_fpn_backbone",
            ),
            ("meta_arch.RetinaNet", "LibraRetinaNet"),
            ("proposal_generator.RPN", "LibraRPN"),
            ("roi_heads.CascadeROIHeads", "LibraCascadeROIHeads"),
            ("roi_heads.FastRCNNOutputLayers", "LibraFastRCNNOutputLayers"),
            ("roi_heads.Res5ROIHeads", "LibraRes5ROIHeads"),
            ("roi_heads.StandardROIHeads", "LibraROIHeads"),
        )
    },
    "layers.Conv2d": "libra_d2.modeling.folded_conv.FoldedConv2d",
    "layers.FrozenBatchNorm2d": "libra_d2.modeling.AffineBatchNorm2d",
    "layers.ROIAlign": "libra_d2.modeling.roi_align.ParallelROIAlign",
    "data.DatasetMapper": "libra_d2.data.LibraDatasetMapper",
    "data.transforms.ResizeShortestEdge": "libra_d2.data.resize.OpenCVResizeShortestEdge",
    "data.transforms.ResizeTransform": "libra_d2.data.resize.OpenCVResizeTransform",
    "engine.SimpleTrainer": "libra_d2.engine.accumulation.AccumulationTrainer",
    "evaluation.COCOEvaluator": "libra_d2.evaluation.LibraCOCOEvaluator",
    "checkpoint.DetectionCheckpointer": "libra_d2.checkpoint.LibraCheckpointer",
    "utils.visualizer.Visualizer": "libra_d2.evaluation.panel.Panel",
}

_SAMPLER = "a LazyConfig of these ROI heads needs a proposal_sampler, see libra_d2.lazy.balance"
# Tests (file and function) that can only pass with the parents, and why.
DIFFERENT = {
    ("modeling/test_roi_pooler.py", "test_scriptability_cpu"): (
        "scripts use the parent's operator, which adds in another order; the test wants equal bits"
    ),
    ("test_model_analysis.py", "test_param_count"): (
        "the balanced feature pyramid has parameters, and AffineBatchNorm2d's are counted"
    ),
    **{
        ("test_model_zoo.py", f"test_{name}"): _SAMPLER
        for name in ("mask_rcnn_c4", "mask_rcnn_fpn", "panoptic_fpn")
    },
}

# By file and name: "passed", "failed" or "skipped", and the reason.
Outcomes = Dict[Tuple[str, str], Tuple[str, str]]


def get_libra_cfg():
    """Detectron2's default config with the keys of libra_d2, whose ideas are off."""
    cfg = get_cfg()
    add_libra_config(cfg)
    # Most of the tests leave the loss at Detectron2's; one sets another.
    cfg.merge_from_list([*DETECTRON2_RECIPE, *DISABLED["sampling"]])
    return cfg


def build_accelerated_model(cfg):
    """The model of a config, made fast as :meth:`libra_d2.config.Recipe.build_model` does."""
    model = build_model(cfg)
    accelerate(model)
    return model


def locate(name: str) -> Any:
    """The object of a dotted name."""
    module, _, attribute = name.rpartition(".")
    return getattr(import_module(module), attribute)


def replace(modules: Iterable[Any], parent: Any, ours: Any) -> None:
    """Let every name of ``parent`` in modules, and in their registries, be one of ``ours``."""
    for module in modules:
        registries = [x for x in vars(module).values() if isinstance(x, Registry)]
        for objects in (vars(module), *(registry._obj_map for registry in registries)):
            objects.update({name: ours for name, x in objects.items() if x is parent})


def pytest_addoption(parser) -> None:
    """Called by pytest, for which this file is a plugin."""
    parser.addoption("--replaced", action="store_true", help="test the classes of libra_d2")


def pytest_configure(config) -> None:
    """Called by pytest before it imports the tests, which find what is put in place here."""
    for package in ("checkpoint", "engine", "evaluation", "export", "projects.point_rend"):
        import_module(f"detectron2.{package}")
    modules = [x for name, x in list(sys.modules.items()) if name.startswith("detectron2")]
    if config.getoption("replaced"):
        for parent, ours in REPLACED.items():
            replace(modules, locate(f"detectron2.{parent}"), locate(ours))


def run_tests(tests: Path, *arguments: str) -> Outcomes:
    """
    Run the tests in a folder; returns the outcome of each, by its file and its name.

    Args:
        tests: the folder ``tests`` of a clone.
        arguments: of pytest.
    """
    folders = [str(Path(__file__).parent), str(Path(__file__).parents[2])]
    path = os.pathsep.join(filter(None, [*folders, os.environ.get("PYTHONPATH")]))
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder) / "report.xml"
        subprocess.run(
            [
                *(sys.executable, "-m", "pytest", "-p", NAME, "--rootdir", str(tests)),
                *("-q", "-p", "no:cacheprovider", "-o", "junit_family=xunit1", "--tb=no", "-rN"),
                *(f"--junitxml={report}", "--continue-on-collection-errors"),
                *(str(tests / name) for name in TESTS),
                *arguments,
            ],
            env={**os.environ, "PYTHONPATH": path, "CI": "1"},  # CI: without COCO
            cwd=folder,  # not the clone, in which the package is not built
        )
        cases = list(ElementTree.parse(report).iter("testcase"))
    outcomes = {}
    for case in cases:
        status, reason = "passed", ""
        for child in case:
            if child.tag in ("failure", "error", "skipped"):
                status = "skipped" if child.tag == "skipped" else "failed"
                lines = [child.get("message", "")]
                if not case.get("classname"):  # a file that cannot be imported
                    lines = child.text.strip().splitlines()
                reason = " ".join(lines[-1].split())[:140]
        file = case.get("file") or case.get("name").replace(".", "/") + ".py"
        class_name = case.get("classname").rpartition(".")[2]
        outcomes[file, f"{class_name}::{case.get('name')}"] = (status, reason)
    return outcomes


def main() -> int:
    """Command line entry point; returns the exit status."""
    if len(sys.argv) < 2 or not (Path(sys.argv[1]) / "tests/modeling").is_dir():
        sys.exit(__doc__)
    tests = Path(sys.argv[1]).resolve() / "tests"
    theirs = run_tests(tests, *sys.argv[2:])
    ours = run_tests(tests, "--replaced", *sys.argv[2:])
    kinds = ("passed", "failed", "skipped")
    rows = []
    for file in dict.fromkeys(file for file, _ in theirs):
        before, after = (
            Counter(status for (x, _), (status, _) in outcomes.items() if x == file)
            for outcomes in (theirs, ours)
        )
        rows.append((file, *(f"{before[kind]} / {after[kind]}" for kind in kinds)))
    print(tabulate(rows, headers=("Detectron2 / libra_d2", *kinds)))
    num_broken = 0
    for test, (status, reason) in sorted(ours.items()):
        if status != "failed":
            continue
        if theirs.get(test, ("passed",))[0] != "passed":
            which = "without libra_d2, too"
        elif (test[0], test[1].rpartition("::")[2]) in DIFFERENT:
            which = "with libra_d2 on purpose"
            reason = DIFFERENT[test[0], test[1].rpartition("::")[2]]
        else:
            which = "WITH LIBRA_D2 ONLY"
            num_broken += 1
        print(f"{'::'.join(test)} fails {which}: {reason}")
    print(f"{num_broken} tests fail with libra_d2 only, unexpectedly")
    return int(num_broken > 0 or not ours)


if __name__ == "__main__":
    sys.exit(main())
