# SPDX-License-Identifier: Apache-2.0
"""Look into a model while it computes its losses."""

from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any, Dict, Iterator, List, NamedTuple, Sequence
from unittest.mock import patch

import torch
from torch import nn

from detectron2.utils.events import EventStorage

from ..modeling import BalancedFeaturePyramid, LibraFastRCNNOutputLayers, LibraRetinaNet
from ..modeling.roi_heads import BalancedSamplingMixin

__all__ = ["Candidates", "Levels", "Recording", "record"]


class Candidates(NamedTuple):
    """The R proposals of an image that its sampler may draw: a :class:`BalancedSampler`'s input."""

    labels: torch.Tensor
    max_iou: torch.Tensor
    matched_idxs: torch.Tensor
    num_instances: int
    num_samples: int
    positive_fraction: float


@dataclass
class Levels:
    """The L levels of an image's feature pyramid, (C, Hl, Wl) each, from high to low resolution."""

    before: List[torch.Tensor]
    #: None if the model has no balanced feature pyramid
    after: List[torch.Tensor]


@dataclass
class Recording:
    """What :func:`record` has seen. What a model does not have stays empty."""

    candidates: List[Candidates] = field(default_factory=list)
    levels: List[Levels] = field(default_factory=list)
    #: (n,) absolute differences of predicted and target deltas, of each batch's foreground
    box_errors: List[torch.Tensor] = field(default_factory=list)


@contextmanager
def _hooked(module: nn.Module, hook) -> Iterator[None]:
    handle = module.register_forward_hook(hook)
    try:
        yield
    finally:
        handle.remove()


@torch.no_grad()
def record(model: nn.Module, batches: Sequence[List[Dict[str, Any]]]) -> Recording:
    """
    Compute the losses of ``batches`` and record what is balanced on the way: proposals that may be
    sampled, pyramid levels, and errors of boxes. The model is not changed: nothing is trained, and
    batch norms use and keep their running statistics.

    Args:
        model: a model with ``LibraROIHeads`` or ``LibraCascadeROIHeads``, or a
            ``LibraRetinaNet``, whether or not its balancing is turned on. Of other models only the
            levels are recorded.
        batches: inputs of the model in training, with annotations.
    """
    recording = Recording()

    def see_levels(module, inputs, outputs):
        (before,) = inputs
        for i in range(len(before[0])):
            recording.levels.append(
                Levels([x[i].float() for x in before], [x[i].float() for x in outputs])
            )

    def see_plain_levels(module, inputs, outputs):
        before = sorted(outputs.values(), key=lambda x: -x.shape[-1])
        for i in range(len(before[0])):
            recording.levels.append(Levels([x[i].float() for x in before], None))

    def see_errors(input, target, reduction):
        recording.box_errors.append((input - target).abs().float().flatten())
        return input.sum() * 0  # the losses are not looked at

    with ExitStack() as stack:
        training = {module: module.training for module in model.modules()}
        pyramids = [m for m in model.modules() if isinstance(m, BalancedFeaturePyramid)]
        for module in model.modules():
            # The losses are computed in training mode only.
            module.training = not isinstance(module, nn.modules.batchnorm._BatchNorm)
            if isinstance(module, BalancedFeaturePyramid):
                stack.enter_context(_hooked(module, see_levels))
            elif isinstance(module, LibraFastRCNNOutputLayers):
                stack.enter_context(patch.object(module, "box_reg_loss_type", "balanced_l1"))
                stack.enter_context(patch.object(module, "balanced_l1", see_errors))
            elif isinstance(module, LibraRetinaNet):
                stack.enter_context(patch.object(module, "balanced_l1", see_errors))
            elif isinstance(module, BalancedSamplingMixin):
                sampler = module.proposal_sampler

                def see_candidates(*args, sampler=sampler):
                    recording.candidates.append(Candidates(*args))
                    return sampler(*args)

                stack.enter_context(patch.object(module, "proposal_sampler", see_candidates))
        if not pyramids:
            stack.enter_context(_hooked(model.backbone, see_plain_levels))
        stack.enter_context(EventStorage())
        try:
            for batch in batches:
                model(batch)
        finally:
            for module, mode in training.items():
                module.training = mode
    return recording
