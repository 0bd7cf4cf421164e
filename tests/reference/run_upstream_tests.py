#!/usr/bin/env python
# SPDX-License-Identifier: Apache-2.0
"""
Run Detectron2's own tests of what libra_d2 extends, with the classes of libra_d2 in their parents'
place, from a checkout of the Detectron2 that is installed:

    python tests/reference/run_upstream_tests.py DETECTRON2_CHECKOUT [arguments of pytest]

A subclass has to do what its parent does as long as its own ideas are turned off: random sampling
and the parent's way of training; the balanced feature pyramid is on, where no number depends on it.
"""

import os
import subprocess
import sys
from pathlib import Path

# In the checkout's tests/: feature pyramids, box predictors, matching, whole models, RoIs, RPN.
TESTS = [
    "modeling/test_backbone.py",
    "modeling/test_fast_rcnn.py",
    "modeling/test_matcher.py",
    "modeling/test_model_e2e.py",
    "modeling/test_roi_heads.py",
    "modeling/test_rpn.py",
]


def pytest_configure() -> None:
    """Called by pytest, for which this file is a plugin, before it imports the tests."""
    import detectron2.config
    from detectron2 import model_zoo, modeling
    from detectron2.modeling import (
        BACKBONE_REGISTRY,
        META_ARCH_REGISTRY,
        PROPOSAL_GENERATOR_REGISTRY,
        ROI_HEADS_REGISTRY,
        meta_arch,
        proposal_generator,
        roi_heads,
    )

    from libra_d2 import add_libra_config
    from libra_d2 import modeling as libra
    from libra_d2.config import DETECTRON2_RECIPE, DISABLED

    get_cfg = detectron2.config.get_cfg

    def get_libra_cfg():
        cfg = get_cfg()
        add_libra_config(cfg)
        # Most of the tests leave the loss at Detectron2's; one sets another.
        cfg.merge_from_list([*DETECTRON2_RECIPE, *DISABLED["sampling"]])
        return cfg

    detectron2.config.get_cfg = model_zoo.model_zoo.get_cfg = get_libra_cfg
    registered = [
        (ROI_HEADS_REGISTRY, "StandardROIHeads", libra.LibraROIHeads),
        (ROI_HEADS_REGISTRY, "CascadeROIHeads", libra.LibraCascadeROIHeads),
        (PROPOSAL_GENERATOR_REGISTRY, "RPN", libra.LibraRPN),
        (META_ARCH_REGISTRY, "RetinaNet", libra.LibraRetinaNet),
        (BACKBONE_REGISTRY, "build_resnet_fpn_backbone", libra.build_libra_resnet_fpn_backbone),
        (
            BACKBONE_REGISTRY,
            "build_retinanet_resnet_fpn_backbone",
            libra.build_libra_retinanet_resnet_fpn_backbone,
        ),
    ]
    for registry, name, ours in registered:
        assert name in registry
        registry._obj_map[name] = ours
    named = [
        (modeling, "RetinaNet", libra.LibraRetinaNet),
        (meta_arch.retinanet, "RetinaNet", libra.LibraRetinaNet),
        (proposal_generator, "RPN", libra.LibraRPN),
        (proposal_generator.rpn, "RPN", libra.LibraRPN),
        (roi_heads, "StandardROIHeads", libra.LibraROIHeads),
        (roi_heads, "FastRCNNOutputLayers", libra.LibraFastRCNNOutputLayers),
        (roi_heads.fast_rcnn, "FastRCNNOutputLayers", libra.LibraFastRCNNOutputLayers),
    ]
    for module, name, ours in named:
        # Whoever imports the name from now on has ours; its own parent keeps the one it has.
        assert issubclass(ours, getattr(module, name))
        setattr(module, name, ours)


def main() -> int:
    """Command line entry point; returns pytest's exit status."""
    if len(sys.argv) < 2 or not (Path(sys.argv[1]) / "tests/modeling").is_dir():
        sys.exit(__doc__)
    tests = Path(sys.argv[1]).resolve() / "tests"
    folders = [str(Path(__file__).parent), str(Path(__file__).parents[2])]
    paths = [*folders, *os.environ.get("PYTHONPATH", "").split(os.pathsep)]
    command = [sys.executable, "-m", "pytest", "-p", Path(__file__).stem, "--rootdir", str(tests)]
    # Not from the checkout, in which the package is not built.
    return subprocess.run(
        [*command, *(str(tests / name) for name in TESTS), *sys.argv[2:]],
        env={**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, paths))},
        cwd=folders[0],
    ).returncode


if __name__ == "__main__":
    sys.exit(main())
