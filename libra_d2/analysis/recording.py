# SPDX-License-Identifier: Apache-2.0
"""Look into a model while it computes its losses."""

import copy
from dataclasses import dataclass, field
from typing import Any, Dict, List, NamedTuple, Sequence

import torch
from torch import nn

from detectron2.utils.events import EventStorage

from ..modeling import (
    BalancedFeaturePyramid,
    BalancedL1Loss,
    BalancedSamplingMixin,
    LibraFastRCNNOutputLayers,
    LibraRetinaNet,
)

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


@torch.no_grad()
def record(model: nn.Module, batches: Sequence[List[Dict[str, Any]]]) -> Recording:
    """
    Compute the losses of ``batches`` and record what is balanced on the way: proposals that may be
    sampled, pyramid levels, and errors of boxes. A copy of the model does it, whose batch norms use
    their running statistics.

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

    def see_errors(module, inputs):
        input, target = inputs
        recording.box_errors.append((input - target).abs().float().flatten())

    def see_candidates(module, inputs):
        recording.candidates.append(Candidates(*inputs))

    model = copy.deepcopy(model)
    model.train()  # it computes no losses otherwise
    modules = list(model.modules())
    for module in modules:
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            module.eval()
        elif isinstance(module, BalancedFeaturePyramid):
            module.register_forward_hook(see_levels)
        elif isinstance(module, (LibraFastRCNNOutputLayers, LibraRetinaNet)):
            # Whichever the loss is, the errors are what this one is called with.
            module.box_reg_loss_type = "balanced_l1"
        elif isinstance(module, BalancedL1Loss):
            module.register_forward_pre_hook(see_errors)
        if isinstance(module, BalancedSamplingMixin):
            module.proposal_sampler.register_forward_pre_hook(see_candidates)
    if not any(isinstance(module, BalancedFeaturePyramid) for module in modules):
        model.backbone.register_forward_hook(see_plain_levels)
    with EventStorage():
        for batch in batches:
            model(batch)
    return recording
