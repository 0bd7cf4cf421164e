# SPDX-License-Identifier: Apache-2.0
"""Predictions that are not finite, which Detectron2's models leave out of their detections."""

import logging
from contextlib import ExitStack, contextmanager
from typing import Any, Dict, Iterator

import torch
from torch import nn

from detectron2.modeling.meta_arch.retinanet import RetinaNetHead
from detectron2.modeling.proposal_generator.rpn import StandardRPNHead
from detectron2.modeling.roi_heads import FastRCNNOutputLayers

from ..errors import InputError

__all__ = ["finite_predictions"]

logger = logging.getLogger(__name__)

_HEADS = (FastRCNNOutputLayers, RetinaNetHead, StandardRPNHead)


def _is_not_finite(value: Any) -> torch.Tensor:
    """Whether a tensor, or one in nested lists and tuples, is not finite; stays on its device."""
    if isinstance(value, torch.Tensor):
        return ~torch.isfinite(value).all()
    found = [_is_not_finite(x) for x in value if x is not None]
    return torch.stack(found).any() if found else torch.tensor(False)


@contextmanager
def finite_predictions(model: nn.Module, *, required: bool = True) -> Iterator[None]:
    """
    Look at the scores and box deltas that the heads of ``model`` compute in the body. If one is not
    finite, the detections of some images are missing, and their metrics mean nothing.

    Args:
        model: an R-CNN, a RetinaNet or a proposal network, possibly inside of other modules.
        required: whether that is an error; else it is logged.

    Raises:
        InputError: after the body, see ``required``.
    """
    found: Dict[str, torch.Tensor] = {}
    with ExitStack() as hooks:
        for name, module in model.named_modules():
            if isinstance(module, _HEADS):

                def look(module: nn.Module, inputs: Any, outputs: Any, name: str = name) -> None:
                    found[name] = found.get(name, False) | _is_not_finite(outputs)

                hooks.enter_context(module.register_forward_hook(look))
        yield
    names = [name for name, is_bad in found.items() if is_bad]
    if names:
        message = (
            f"predictions of {', '.join(names)} are not finite, so that detections are missing: "
            "these weights are broken, or their activations too large for mixed precision"
        )
        if required:
            raise InputError(message)
        logger.warning(f"Evaluation: {message}")
