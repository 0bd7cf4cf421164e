#!/usr/bin/env python
# SPDX-License-Identifier: Apache-2.0
"""
Convert a checkpoint of mmdetection 2.x or 3.x to Detectron2's format, or the reverse.

    python tools/convert_mmdet.py libra_faster_rcnn_r50_fpn_1x_coco_20200130-3afee3a9.pth d2.pth
    python tools/convert_mmdet.py output/model_final.pth mmdet.pth

The content of the file determines the direction. Converting back and forth preserves the weights
bit for bit. You need this only for other programs: train_net.py and LibraCheckpointer load
mmdetection's files directly.
"""

import argparse
from typing import Any, Dict

import torch

from libra_d2.checkpoint.mmdetection import (
    COUNTER,
    from_mmdetection,
    is_mmdetection,
    to_mmdetection,
    unwrap_mmdetection,
)
from libra_d2.engine import argument_parser, report_errors
from libra_d2.errors import InputError, one_line
from libra_d2.utils.atomic_write import atomic_write
from libra_d2.utils.output_path import output_path
from libra_d2.utils.safe_reading import read_weights, reading_weights


def build_argument_parser() -> argparse.ArgumentParser:
    """The command line arguments."""
    parser = argument_parser(__doc__)
    parser.add_argument("source", help=".pth file of either framework, or .pkl file of Detectron2")
    parser.add_argument("target", help=".pth file to write; an existing file is replaced")
    return parser


def convert(content: Any) -> Dict[str, Any]:
    """
    Convert the content of a checkpoint to that of the other framework.

    Raises:
        InputError: if it is not from a Libra model or its plain counterpart, or its weights are
            broken; see :func:`libra_d2.checkpoint.mmdetection.check_weights`.
    """
    is_detectron2 = isinstance(content, dict) and "model" in content
    state, meta = unwrap_mmdetection(content["model"] if is_detectron2 else content)
    state = {key: torch.as_tensor(value) for key, value in state.items()}
    for key, value in state.items():
        if not (value.is_floating_point() or key.endswith(COUNTER)):
            raise InputError(
                f"{key!r} in it is of type {value.dtype}, not of floating point numbers"
            )
    if is_mmdetection(state):
        model = from_mmdetection(state)
        to_mmdetection(model)  # raises an error for unknown names
        counters = {key: value for key, value in state.items() if key.endswith(COUNTER)}
        return {
            "model": model,
            "__author__": "mmdetection",
            "mmdetection": {"meta": meta, "counters": counters},
        }
    extra = content.get("mmdetection", {"meta": {}, "counters": {}})
    return {"meta": extra["meta"], "state_dict": {**to_mmdetection(state), **extra["counters"]}}


def run(args: argparse.Namespace) -> None:
    """Convert the file ``args.source`` to ``args.target``."""
    target = output_path("target", args.target, {"source": args.source})
    content = read_weights(args.source)
    with reading_weights(args.source):
        converted = convert(content)
    try:
        with atomic_write(target) as f:
            torch.save(converted, f)
    except (OSError, RuntimeError) as e:  # PyTorch's writer raises the latter
        raise InputError(f"{target} cannot be written: {one_line(e)}") from e
    framework = "Detectron2" if "model" in converted else "mmdetection"
    weights = converted.get("model") or converted["state_dict"]
    number = sum(not key.endswith(COUNTER) for key in weights)
    print(f"{target}: {number} weights, for {framework}")


def main(argv=None) -> None:
    """Command line entry point."""
    report_errors(run, build_argument_parser().parse_args(argv))


if __name__ == "__main__":
    main()
