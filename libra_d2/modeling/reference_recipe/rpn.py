# SPDX-License-Identifier: Apache-2.0
"""Region proposal network as mmdetection trains it."""

from typing import Dict, List, Tuple

import torch

from detectron2.config import configurable
from detectron2.modeling.proposal_generator import PROPOSAL_GENERATOR_REGISTRY, RPN
from detectron2.structures import Boxes, Instances

from ...errors import check_choice
from ..normalizer import NORMALIZE_OVER, mean_over_batch
from .matcher import build_anchor_matcher
from .padding import label_without_padding

__all__ = ["LibraRPN", "RPN_NORMALIZERS"]

RPN_NORMALIZERS = ("sampled", "batch_size")


@PROPOSAL_GENERATOR_REGISTRY.register()
class LibraRPN(RPN):
    """
    Detectron2's RPN trained as in mmdetection: on at most ``max_neg_per_pos`` negative anchors per
    positive one, with losses that are divided by the actual number of anchors, which the limit
    reduces, rather than the batch size. A config also sets its :class:`LowQualityMatcher`.
    """

    @configurable
    def __init__(
        self,
        *,
        max_neg_per_pos: int = 5,
        normalizer: str = "sampled",
        padding_anchors: bool = False,
        normalize_over: str = "batch",
        **kwargs,
    ):
        """
        Args:
            max_neg_per_pos: limit of sampled negative anchors per sampled positive one, in each
                image; an image without positives counts as having one. Negative for no limit.
            normalizer: what the losses are divided by. "sampled": number of sampled anchors in the
                batch, at least one positive and one negative per image.
                "batch_size": ``batch_size_per_image`` times the number of images, as in Detectron2.
            padding_anchors: whether anchors in a batch's padding are trained on as in Detectron2;
                see :func:`label_without_padding`.
            normalize_over: whether the number that the losses are divided by is the mean over all
                processes of a "batch" or that of each "process"; see :func:`mean_over_batch`.
            kwargs: arguments of :class:`RPN`.

        Raises:
            ArgumentError: if ``normalizer`` or ``normalize_over`` is neither.
        """
        super().__init__(**kwargs)
        check_choice("normalizer", normalizer, RPN_NORMALIZERS)
        self.max_neg_per_pos = max_neg_per_pos
        self.normalizer = normalizer
        self.padding_anchors = padding_anchors
        check_choice("normalize_over", normalize_over, NORMALIZE_OVER)
        self.normalize_over = normalize_over

    @classmethod
    def from_config(cls, cfg, input_shape) -> Dict:
        ret, rpn = super().from_config(cfg, input_shape), cfg.MODEL.LIBRA.RPN
        return {
            **ret,
            "anchor_matcher": build_anchor_matcher(ret["anchor_matcher"], rpn.LOW_QUALITY_IOU),
            "max_neg_per_pos": rpn.MAX_NEG_PER_POS,
            "normalizer": rpn.NORMALIZER,
            "padding_anchors": rpn.PADDING_ANCHORS,
            "normalize_over": cfg.MODEL.LIBRA.NORMALIZE_OVER,
        }

    @torch.jit.unused
    @torch.no_grad()
    def label_and_sample_anchors(
        self, anchors: List[Boxes], gt_instances: List[Instances]
    ) -> Tuple[List[torch.Tensor], List[torch.Tensor]]:
        label = super().label_and_sample_anchors
        if self.padding_anchors:
            return label(anchors, gt_instances)
        return label_without_padding(label, anchors, gt_instances)

    def _subsample_labels(self, label: torch.Tensor) -> torch.Tensor:
        """
        Args:
            label: (R,) labels 1, 0 and -1 of the anchors of one image. Modified in place.

        Returns:
            ``label``, with -1 for all anchors that were not drawn.
        """
        label = super()._subsample_labels(label)
        if self.max_neg_per_pos < 0:
            return label
        # Random negatives beyond the limit are found by rank, without host synchronization.
        negative = label == 0
        limit = (label == 1).sum().clamp(min=1) * self.max_neg_per_pos
        key = torch.rand(label.shape, device=label.device) - negative.float()
        key, idx = key.topk(min(self.batch_size_per_image, len(label)), largest=False)
        surplus = (torch.arange(len(idx), device=label.device) >= limit) & (key < 0)
        label[idx] = label[idx].masked_fill(surplus, -1)
        return label

    @torch.jit.unused
    def losses(
        self,
        anchors,
        pred_objectness_logits: List[torch.Tensor],
        gt_labels: List[torch.Tensor],
        pred_anchor_deltas: List[torch.Tensor],
        gt_boxes: List[torch.Tensor],
    ) -> Dict[str, torch.Tensor]:
        losses = super().losses(
            anchors, pred_objectness_logits, gt_labels, pred_anchor_deltas, gt_boxes
        )
        if self.normalizer == "batch_size":
            return losses
        labels = torch.stack(gt_labels)
        num_sampled = sum((labels == x).sum(dim=1).clamp(min=1).sum() for x in (0, 1))
        scale = self.batch_size_per_image * len(gt_labels) / mean_over_batch(num_sampled, self)
        return {name: loss * scale for name, loss in losses.items()}
