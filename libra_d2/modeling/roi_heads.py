# SPDX-License-Identifier: Apache-2.0
"""ROI heads with balanced sampling and balanced L1 box loss."""

import math
from typing import Dict, List, Tuple

import numpy as np
import torch
from torch import nn
from torch.nn import functional as F

from detectron2.config import configurable
from detectron2.layers import ShapeSpec
from detectron2.modeling import ROI_HEADS_REGISTRY, StandardROIHeads
from detectron2.modeling.roi_heads import FastRCNNOutputLayers, Res5ROIHeads
from detectron2.structures import Instances
from detectron2.utils.events import get_event_storage

from .balanced_sampling import SamplingResult, build_proposal_sampler
from .fast_rcnn import LibraFastRCNNOutputLayers
from .reference_recipe.matcher import build_anchor_matcher
from .reference_recipe.padding import pad_masks

__all__ = [
    "BalancedSamplingMixin",
    "LibraROIHeads",
    "LibraRes5ROIHeads",
]

# Detectron2's logit of ground truth that is added to the proposals.
_GROUND_TRUTH_OBJECTNESS = math.log((1 - 1e-10) / 1e-10)


class BalancedSamplingMixin:
    """
    The sample level balance of Libra R-CNN for any subclass of :class:`ROIHeads`, which comes after
    it in the bases: proposals are drawn by a :class:`BalancedSampler`, or another sampler.

    In training it puts means over the images of the batch into the event storage:

    * ``roi_head/num_bg_iou_bin_<k>``: negatives drawn from the k-th of K bins of equal width of
      ``[0, IoU threshold of negatives)``, whichever sampler drew them;
    * ``roi_head/num_fg_instances``: ground-truth instances with at least one positive drawn.
    """

    @configurable
    def __init__(
        self,
        *,
        proposal_sampler: nn.Module,
        low_quality_iou: float = -1.0,
        pad_masks: bool = False,
        **kwargs,
    ):
        """
        Args:
            proposal_sampler: draws ``batch_size_per_image`` proposals of each image, such as a
                :class:`BalancedSampler`.
            low_quality_iou: ``min_iou`` of a :class:`LowQualityMatcher` for the proposals, as in
                mmdetection's Mask R-CNN. Added ground truth is not matched by it. Negative for the
                matcher of the ROI heads alone.
            pad_masks: whether to :func:`pad_masks` in training, as in mmdetection.
            kwargs: arguments of the ROI heads. Pass :class:`LibraFastRCNNOutputLayers` as their box
                predictors for balanced L1 loss.
        """
        super().__init__(**kwargs)
        self.proposal_sampler = proposal_sampler
        self.low_quality_iou = low_quality_iou
        self.pad_masks = pad_masks
        # For each image of the batch.
        self._objectness: List[torch.Tensor] = []
        self._max_iou: List[torch.Tensor] = []
        self._sampled: List[SamplingResult] = []

    @classmethod
    def from_config(cls, cfg, input_shape) -> Dict:
        return {
            **super().from_config(cfg, input_shape),
            "proposal_sampler": build_proposal_sampler(cfg),
            "low_quality_iou": cfg.MODEL.LIBRA.ROI_HEADS.LOW_QUALITY_IOU,
            "pad_masks": cfg.MODEL.LIBRA.ROI_HEADS.PAD_MASKS,
        }

    def _sample_proposals(
        self, matched_idxs: torch.Tensor, matched_labels: torch.Tensor, gt_classes: torch.Tensor
    ) -> Tuple[torch.Tensor, torch.Tensor]:
        """
        See :meth:`ROIHeads._sample_proposals`. Returns: indices of the sampled proposals, positives
        first, and their classes.
        """
        image = len(self._sampled)
        objectness, max_iou = self._objectness[image], self._max_iou[image]
        num_added = len(max_iou) - len(objectness)
        sampled = self.proposal_sampler(
            matched_labels,
            max_iou,
            matched_idxs,
            len(gt_classes),
            self.batch_size_per_image,
            self.positive_fraction,
            objectness=F.pad(objectness, (0, num_added), value=_GROUND_TRUTH_OBJECTNESS),
        )
        self._sampled.append(sampled)
        classes = gt_classes[matched_idxs[sampled.positives]]
        classes = F.pad(classes, (0, len(sampled.negatives)), value=self.num_classes)
        return torch.cat([sampled.positives, sampled.negatives]), classes

    @torch.no_grad()
    def label_and_sample_proposals(
        self, proposals: List[Instances], targets: List[Instances]
    ) -> List[Instances]:
        """See :meth:`ROIHeads.label_and_sample_proposals`; records the statistics of the draw."""
        self._objectness = [x.objectness_logits for x in proposals]
        self._max_iou, self._sampled = [], []
        matcher = self.proposal_matcher

        def match(ious: torch.Tensor) -> Tuple[torch.Tensor, torch.Tensor]:
            # Only the matcher is given the IoUs, (M, R). Without objects the highest one is 0.
            self._max_iou.append(F.pad(ious, (0, 0, 0, 1)).amax(dim=0))
            matches, labels = matcher(ious)
            if self.low_quality_iou >= 0:
                given = len(self._objectness[len(self._sampled)])
                low_quality = build_anchor_matcher(matcher, self.low_quality_iou)
                matches[:given], labels[:given] = low_quality(ious[:, :given])
            return matches, labels

        self.proposal_matcher = match
        try:
            targets = pad_masks(targets) if self.pad_masks else targets
            sampled = super().label_and_sample_proposals(proposals, targets)
        finally:
            self.proposal_matcher = matcher
        storage = get_event_storage()
        num_instances = np.mean([x.num_instances for x in self._sampled])
        storage.put_scalar("roi_head/num_fg_instances", num_instances)
        in_bins = np.mean([x.negatives_in_bins for x in self._sampled], axis=0)
        for k, num_negatives in enumerate(in_bins):
            storage.put_scalar(f"roi_head/num_bg_iou_bin_{k}", num_negatives)
        return sampled


def with_weights_of(
    parent: FastRCNNOutputLayers, cfg, input_shape: ShapeSpec, **kwargs
) -> LibraFastRCNNOutputLayers:
    """A predictor with the initial weights of ``parent``; it leaves the random state alone."""
    with torch.random.fork_rng(devices=[]):
        predictor = LibraFastRCNNOutputLayers(cfg, input_shape, **kwargs)
    predictor.load_state_dict(parent.state_dict())
    return predictor


@ROI_HEADS_REGISTRY.register()
class LibraROIHeads(BalancedSamplingMixin, StandardROIHeads):
    """
    :class:`StandardROIHeads` with the sample level and objective level balance of Libra R-CNN, see
    :class:`BalancedSamplingMixin` and :class:`LibraFastRCNNOutputLayers`.
    """

    # For scripting: annotations of the parent are not inherited.
    mask_on: torch.jit.Final[bool]
    keypoint_on: torch.jit.Final[bool]

    @classmethod
    def _init_box_head(cls, cfg, input_shape) -> Dict:
        ret = super()._init_box_head(cfg, input_shape)
        ret["box_predictor"] = with_weights_of(
            ret["box_predictor"], cfg, ret["box_head"].output_shape
        )
        return ret


@ROI_HEADS_REGISTRY.register()
class LibraRes5ROIHeads(BalancedSamplingMixin, Res5ROIHeads):
    """:class:`Res5ROIHeads`, those of C4 models, as :class:`LibraROIHeads`."""

    @classmethod
    def from_config(cls, cfg, input_shape) -> Dict:
        ret = super().from_config(cfg, input_shape)
        parent = ret["box_predictor"]
        shape = ShapeSpec(channels=parent.cls_score.in_features, height=1, width=1)
        return {**ret, "box_predictor": with_weights_of(parent, cfg, shape)}
