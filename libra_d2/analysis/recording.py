# SPDX-License-Identifier: Apache-2.0
"""Recording of what Libra R-CNN balances while a model computes its losses."""

import copy
from dataclasses import dataclass, field
from typing import Any, Dict, Iterable, List, NamedTuple, Optional

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
    """The R proposals of an image to sample from: the input of :class:`BalancedSampler`."""

    labels: torch.Tensor
    max_iou: torch.Tensor
    matched_idxs: torch.Tensor
    num_instances: int
    num_samples: int
    positive_fraction: float


@dataclass
class Levels:
    """L levels of an image's feature pyramid, (C, Hl, Wl) each, from high to low resolution."""

    before: List[torch.Tensor]
    #: None if the model has no balanced feature pyramid
    after: Optional[List[torch.Tensor]]


@dataclass
class Recording:
    """What :func:`record` returns; empty lists for what the model does not have."""

    candidates: List[Candidates] = field(default_factory=list)
    levels: List[Levels] = field(default_factory=list)
    #: (n,) absolute differences of predicted and target deltas of foreground boxes, by batch
    box_errors: List[torch.Tensor] = field(default_factory=list)


@torch.no_grad()
def record(model: nn.Module, batches: Iterable[List[Dict[str, Any]]]) -> Recording:
    """
    Compute the losses of ``batches`` with a copy of the model, whose batch norms use their running
    statistics, and record sampling candidates, pyramid levels and box errors.

    Args:
        model: with ``LibraROIHeads`` or ``LibraCascadeROIHeads``, or a ``LibraRetinaNet``, balanced
            or not. Of other models only the levels are recorded.
        batches: training inputs of the model, with annotations.
    """
    recording = Recording()

    def add_levels(before, after=None):
        for i in range(len(before[0])):
            of_image = [x and [level[i].float() for level in x] for x in (before, after)]
            recording.levels.append(Levels(*of_image))

    def see_levels(module, inputs, outputs):
        add_levels(*inputs, outputs)

    def see_plain_levels(module, inputs, outputs):
        add_levels(sorted(outputs.values(), key=lambda x: -x.shape[-1]))

    def see_errors(module, inputs):
        input, target = inputs
        recording.box_errors.append((input - target).abs().float().flatten())

    first_stages = []

    def see_candidates(module, inputs):
        if module in first_stages:  # later stages of a cascade have copies of it, with this hook
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
            first_stages.append(module.proposal_sampler)
            module.proposal_sampler.register_forward_pre_hook(see_candidates)
    if not any(isinstance(module, BalancedFeaturePyramid) for module in modules):
        model.backbone.register_forward_hook(see_plain_levels)
    with EventStorage():
        for batch in batches:
            model(batch)
    return recording
