# SPDX-License-Identifier: Apache-2.0
"""Cascade R-CNN with balanced sampling and balanced L1 loss, as in Detectron2 or in mmdetection."""

import copy
from typing import Any, Dict, List, Sequence

import torch
from torch import nn

from detectron2.config import configurable
from detectron2.layers import ShapeSpec
from detectron2.modeling import ROI_HEADS_REGISTRY
from detectron2.modeling.roi_heads import CascadeROIHeads, build_mask_head
from detectron2.modeling.roi_heads.fast_rcnn import fast_rcnn_inference
from detectron2.modeling.roi_heads.roi_heads import select_foreground_proposals
from detectron2.structures import Boxes, Instances, pairwise_iou
from detectron2.utils.events import get_event_storage
from detectron2.utils.registry import locate

from ..errors import ArgumentError, check_choice
from .balanced_sampling import BalancedSampler
from .reference_recipe.padding import pad_masks
from .roi_heads import BalancedSamplingMixin, with_weights_of

__all__ = [
    "AVERAGES",
    "LibraCascadeROIHeads",
    "MaskHeadPerStage",
    "build_mask_head_per_stage",
]

AVERAGES = ("probabilities", "logits")


class MaskHeadPerStage(nn.ModuleList):
    """A mask head for each stage of a cascade. A stage trains its own; predictions are averaged."""

    def forward(self, x: torch.Tensor, instances: List[Instances]) -> List[Instances]:
        """
        Args:
            x: (R, C, P, P) features of the R boxes of all images.
            instances: predictions for each image, R in all.

        Returns:
            ``instances``, with the mean of the heads' probabilities as ``pred_masks``,
            (R_i, 1, M, M) in [0, 1].
        """
        masks = []
        for head in self:
            instances = head(x, instances)
            masks.append([found.pred_masks for found in instances])
        for found, of_heads in zip(instances, zip(*masks)):
            found.pred_masks = torch.stack(of_heads).mean(dim=0)
        return instances


def build_mask_head_per_stage(
    *, plain_head: str, num_stages: int = 3, **kwargs
) -> MaskHeadPerStage:
    """
    Build a :class:`MaskHeadPerStage`: a ``_target_`` for LazyConfigs in place of the plain head's,
    next to the same arguments.

    Args:
        plain_head: name of the class of the heads, such as
            "detectron2.modeling.roi_heads.MaskRCNNConvUpsampleHead".
        num_stages: number of heads.
        kwargs: arguments of ``plain_head``.
    """
    return MaskHeadPerStage(locate(plain_head)(**kwargs) for _ in range(num_stages))


@ROI_HEADS_REGISTRY.register()
class LibraCascadeROIHeads(BalancedSamplingMixin, CascadeROIHeads):
    """
    :class:`CascadeROIHeads` with balanced L1 loss in each stage and balanced sampling in the first.

    In Detectron2, later stages train on all boxes of the stage before, losses of all stages count
    the same, there is one mask head, which is trained on the proposals of the first stage, and the
    classes have the mean of the stages' probabilities. The arguments choose what mmdetection does.
    """

    @configurable
    def __init__(
        self,
        *,
        stage_loss_weights: Sequence[float] = (),
        resample: bool = False,
        average: str = "probabilities",
        **kwargs,
    ):
        """
        Args:
            stage_loss_weights: weight of the losses of each stage; mmdetection's are (1, 0.5,
                0.25). Empty for Detectron2's rule: each loss has a weight of 1, and the gradient
                that it sends to the features is divided by the number of stages.
            resample: whether later stages train on a balanced sample, too: of the boxes of the
                stage before, other than those that ground truth has become, and of ground truth.
            average: what is averaged over the stages in inference, "probabilities" or "logits".
            kwargs: arguments of :class:`BalancedSamplingMixin` and :class:`CascadeROIHeads`. With a
                :class:`MaskHeadPerStage` as ``mask_head``, each stage trains a mask head.

        Raises:
            ArgumentError: if ``stage_loss_weights`` are not as many as the stages, or ``average``
                is something else.
        """
        super().__init__(**kwargs)
        check_choice("average", average, AVERAGES)
        if len(stage_loss_weights) not in (0, self.num_cascade_stages):
            rule = f"use one number for each of the {self.num_cascade_stages} stages, or none"
            raise ArgumentError("stage_loss_weights", stage_loss_weights, rule)
        self.stage_loss_weights = tuple(stage_loss_weights)
        self.resample = resample
        self.average = average

    @classmethod
    def from_config(cls, cfg, input_shape) -> Dict[str, Any]:
        cascade = cfg.MODEL.LIBRA.CASCADE
        return {
            **super().from_config(cfg, input_shape),
            "stage_loss_weights": cascade.STAGE_LOSS_WEIGHTS,
            "resample": cascade.RESAMPLE,
            "average": cascade.AVERAGE,
        }

    @classmethod
    def _init_box_head(cls, cfg, input_shape) -> Dict[str, Any]:
        ret = super()._init_box_head(cfg, input_shape)
        ret["box_predictors"] = [
            with_weights_of(
                predictor, cfg, head.output_shape, box2box_transform=predictor.box2box_transform
            )
            for head, predictor in zip(ret["box_heads"], ret["box_predictors"])
        ]
        return ret

    @classmethod
    def _init_mask_head(cls, cfg, input_shape) -> Dict[str, Any]:
        ret = super()._init_mask_head(cfg, input_shape)
        if ret and cfg.MODEL.LIBRA.CASCADE.MASK_HEAD_PER_STAGE:
            size = cfg.MODEL.ROI_MASK_HEAD.POOLER_RESOLUTION
            channels = input_shape[ret["mask_in_features"][0]].channels
            shape = ShapeSpec(channels=channels, width=size, height=size)
            others = cfg.MODEL.ROI_BOX_CASCADE_HEAD.IOUS[1:]
            heads = [ret["mask_head"], *(build_mask_head(cfg, shape) for _ in others)]
            ret["mask_head"] = MaskHeadPerStage(heads)
        return ret

    @property
    def _trains_mask_per_stage(self) -> bool:
        return self.training and self.mask_on and isinstance(self.mask_head, MaskHeadPerStage)

    def _forward_box(self, features, proposals, targets=None):
        """See :meth:`CascadeROIHeads._forward_box`; losses include those of a mask per stage."""
        pyramid = [features[name] for name in self.box_in_features]
        boxes, losses, outputs = [], {}, []
        for stage, predictor in enumerate(self.box_predictor):
            if stage > 0:
                proposals = self._refine(boxes, proposals, stage, targets)
            predictions = self._run_stage(pyramid, proposals, stage)
            boxes = predictor.predict_boxes(predictions, proposals)
            outputs.append((predictor, predictions, proposals))
            if self.training:
                weight = self.stage_loss_weights[stage] if self.stage_loss_weights else 1.0
                with get_event_storage().name_scope(f"stage{stage}"):
                    found = predictor.losses(predictions, proposals)
                    if self._trains_mask_per_stage:
                        found = {**found, **self._mask_losses(features, proposals, stage)}
                losses.update({f"{k}_stage{stage}": loss * weight for k, loss in found.items()})
        if self.training:
            return losses
        instances, _ = fast_rcnn_inference(
            boxes,
            self._average_scores(outputs),
            [x.image_size for x in proposals],
            predictor.test_score_thresh,
            predictor.test_nms_thresh,
            predictor.test_topk_per_image,
        )
        return instances

    def _average_scores(self, outputs: List) -> List[torch.Tensor]:
        """
        Args: outputs: of each stage, its predictor, predictions and proposals. Returns: for each
        image, (R_i, num_classes + 1) probabilities.
        """
        if self.average == "logits":
            predictor, (_, deltas), proposals = outputs[-1]
            logits = sum(predictions[0] for _, predictions, _ in outputs) / len(outputs)
            return predictor.predict_probs((logits, deltas), proposals)
        of_stages = [predictor.predict_probs(*found) for predictor, *found in outputs]
        return [sum(of_image) * (1.0 / len(outputs)) for of_image in zip(*of_stages)]

    def _run_stage(self, features, proposals, stage):
        """See :meth:`CascadeROIHeads._run_stage`, which scales gradients."""
        if not self.stage_loss_weights:
            return super()._run_stage(features, proposals, stage)
        x = self.box_pooler(features, [x.proposal_boxes for x in proposals])
        return self.box_predictor[stage](self.box_head[stage](x))

    def _refine(
        self,
        boxes: List[torch.Tensor],
        proposals: List[Instances],
        stage: int,
        targets: List[Instances],
    ) -> List[Instances]:
        """
        Args:
            boxes: for each image, (R_i, 4) predictions of the stage before.
            proposals: those of the stage before, R_i for each image.
            stage: 1 or more.
            targets: ground truth of each image; None in inference.

        Returns:
            the proposals of this stage, in training with their matches.
        """
        if not (self.training and self.resample):
            refined = self._create_proposals_from_boxes(boxes, [x.image_size for x in proposals])
            return (
                self._match_and_label_boxes(refined, stage, targets) if self.training else refined
            )
        refined = []
        for previous, predicted, sampled, given in zip(
            proposals, boxes, self._sampled, self._objectness
        ):
            # Ground truth comes after the proposals that the sampler was given.
            is_own = torch.cat([sampled.positives, sampled.negatives]) < len(given)
            new = Instances(previous.image_size, proposal_boxes=Boxes(predicted.detach()))
            new.proposal_boxes.clip(previous.image_size)
            new.objectness_logits = previous.objectness_logits
            refined.append(new[is_own])
        first = self.proposal_matcher, self.proposal_sampler
        self.proposal_matcher = self.proposal_matchers[stage]
        if isinstance(self.proposal_sampler, BalancedSampler):
            self.proposal_sampler = copy.copy(self.proposal_sampler)
            # The matcher's thresholds have an infinite one at each end.
            self.proposal_sampler.negative_iou_thresh = self.proposal_matcher.thresholds[1]
        try:
            with get_event_storage().name_scope(f"stage{stage}"):
                return self.label_and_sample_proposals(refined, targets)
        finally:
            self.proposal_matcher, self.proposal_sampler = first

    @torch.no_grad()
    def _match_and_label_boxes(self, proposals, stage, targets):
        """See :meth:`CascadeROIHeads._match_and_label_boxes`; adds the masks of the matches."""
        proposals = super()._match_and_label_boxes(proposals, stage, targets)
        if not self._trains_mask_per_stage:
            return proposals
        for found, target in zip(proposals, pad_masks(targets) if self.pad_masks else targets):
            if len(target) > 0:
                ious = pairwise_iou(target.gt_boxes, found.proposal_boxes)
                matches, _ = self.proposal_matchers[stage](ious)
                found.gt_masks = target.gt_masks[matches]
        return proposals

    def _mask_losses(
        self, features: Dict[str, torch.Tensor], proposals: List[Instances], stage: int
    ) -> Dict[str, torch.Tensor]:
        """The losses of the mask head of a stage, from its proposals."""
        foreground, _ = select_foreground_proposals(proposals, self.num_classes)
        pyramid = [features[name] for name in self.mask_in_features]
        x = self.mask_pooler(pyramid, [x.proposal_boxes for x in foreground])
        return self.mask_head[stage](x, foreground)

    def _forward_mask(self, features, instances):
        """See :meth:`StandardROIHeads._forward_mask`; the stages train heads of their own."""
        return {} if self._trains_mask_per_stage else super()._forward_mask(features, instances)
