# SPDX-License-Identifier: Apache-2.0
"""RetinaNet with balanced L1 loss and mmdetection's recipe."""

from typing import Dict, List, Optional, Tuple

import torch
from torchvision.ops import clip_boxes_to_image

from detectron2.config import configurable
from detectron2.layers import ShapeSpec, cat, nonzero_tuple
from detectron2.modeling import BACKBONE_REGISTRY, META_ARCH_REGISTRY, Backbone, RetinaNet
from detectron2.modeling.backbone.fpn import build_retinanet_resnet_fpn_backbone
from detectron2.modeling.box_regression import _dense_box_regression_loss
from detectron2.structures import Boxes, Instances
from detectron2.utils.events import get_event_storage

from ..errors import check_choice
from .backbone import configure_backbone
from .balanced_l1_loss import BalancedL1Loss
from .focal_loss import focal_loss
from .normalizer import NORMALIZE_OVER, mean_over_batch
from .reference_recipe.matcher import build_anchor_matcher
from .reference_recipe.p6p7 import LinearLastLevelP6P7
from .reference_recipe.padding import label_without_padding

__all__ = [
    "LibraRetinaNet",
    "RETINANET_NORMALIZERS",
    "build_libra_retinanet_resnet_fpn_backbone",
]

RETINANET_NORMALIZERS = ("batch", "moving_average")


@BACKBONE_REGISTRY.register()
def build_libra_retinanet_resnet_fpn_backbone(cfg, input_shape: ShapeSpec) -> Backbone:
    """
    Build Detectron2's ResNet-FPN with the levels P3 to P7, and a balanced feature pyramid over all
    of them unless ``MODEL.LIBRA.BFP.ENABLED`` is False. ``MODEL.LIBRA.RETINANET.P7_RELU`` chooses
    the top block. Its checkpoint keys are those of ``build_retinanet_resnet_fpn_backbone`` and
    ``bfp.*``.
    """
    backbone = build_retinanet_resnet_fpn_backbone(cfg, input_shape)
    if not cfg.MODEL.LIBRA.RETINANET.P7_RELU:
        p6 = backbone.top_block.p6
        backbone.top_block = LinearLastLevelP6P7(p6.in_channels, p6.out_channels)
    return configure_backbone(cfg, backbone)


@META_ARCH_REGISTRY.register()
class LibraRetinaNet(RetinaNet):
    """
    Detectron2's RetinaNet with another box loss type, "balanced_l1"
    (``MODEL.RETINANET.BBOX_REG_LOSS_TYPE``), and mmdetection's loss normalizer and clipping of
    boxes before non-maximum suppression. A config also sets its :class:`LowQualityMatcher`.
    """

    @configurable
    def __init__(
        self,
        *,
        box_reg_loss_type: str = "smooth_l1",
        balanced_l1: Optional[BalancedL1Loss] = None,
        normalizer: str = "batch",
        clip_boxes: bool = True,
        padding_anchors: bool = False,
        normalize_over: str = "batch",
        **kwargs,
    ):
        """
        Args:
            box_reg_loss_type: "balanced_l1", or one that :class:`RetinaNet` knows.
            balanced_l1: the loss for ``box_reg_loss_type="balanced_l1"``. None for one with the
                paper's parameters and a beta of 0.11.
            normalizer: what the losses are divided by. "batch": number of foreground anchors in
                the batch, at least one per image. "moving_average": that of
                Detectron2, which starts at 100 and has a momentum of 0.9.
            clip_boxes: whether boxes are clipped to the image, and those without area dropped,
                before non-maximum suppression rather than after it.
            padding_anchors: whether anchors in a batch's padding are trained on as in Detectron2;
                see :func:`label_without_padding`.
            normalize_over: whether the number that the losses are divided by is the mean over all
                processes of a "batch" or that of each "process"; see :func:`mean_over_batch`.
            kwargs: arguments of :class:`RetinaNet`.

        Raises:
            ArgumentError: if ``normalizer`` or ``normalize_over`` is neither.
        """
        super().__init__(box_reg_loss_type=box_reg_loss_type, **kwargs)
        check_choice("normalizer", normalizer, RETINANET_NORMALIZERS)
        self.balanced_l1 = balanced_l1 or BalancedL1Loss(beta=0.11)
        self.normalizer = normalizer
        self.clip_boxes = clip_boxes
        self.padding_anchors = padding_anchors
        check_choice("normalize_over", normalize_over, NORMALIZE_OVER)
        self.normalize_over = normalize_over

    @classmethod
    def from_config(cls, cfg) -> Dict:
        ret, libra = super().from_config(cfg), cfg.MODEL.LIBRA.RETINANET
        return {
            **ret,
            "anchor_matcher": build_anchor_matcher(ret["anchor_matcher"], libra.LOW_QUALITY_IOU),
            "balanced_l1": BalancedL1Loss(cfg),
            "normalizer": libra.NORMALIZER,
            "clip_boxes": libra.CLIP_BOXES,
            "padding_anchors": libra.PADDING_ANCHORS,
            "normalize_over": cfg.MODEL.LIBRA.NORMALIZE_OVER,
        }

    @torch.no_grad()
    def label_anchors(
        self, anchors: List[Boxes], gt_instances: List[Instances]
    ) -> Tuple[List[torch.Tensor], List[torch.Tensor]]:
        if self.padding_anchors:
            return super().label_anchors(anchors, gt_instances)
        return label_without_padding(super().label_anchors, anchors, gt_instances)

    def losses(
        self,
        anchors: List[Boxes],
        pred_logits: List[torch.Tensor],
        gt_labels: List[torch.Tensor],
        pred_anchor_deltas: List[torch.Tensor],
        gt_boxes: List[torch.Tensor],
    ) -> Dict[str, torch.Tensor]:
        """
        See :meth:`RetinaNet.losses`. Its compiled focal loss rounds differently in its first calls,
        so that a resumed training would not be the uninterrupted one; see :func:`focal_loss`.
        """
        labels = torch.stack(gt_labels)  # (N, R)
        foreground = (labels >= 0) & (labels != self.num_classes)
        chosen = nonzero_tuple(foreground)  # one host synchronization for all that is indexed
        num_foreground = len(chosen[0])
        get_event_storage().put_scalar("num_pos_anchors", num_foreground / len(labels))
        if self.normalizer == "batch":
            normalizer = mean_over_batch(foreground.sum(dim=1).clamp(min=1).sum(), self)
        else:
            normalizer = self._ema_update("loss_normalizer", max(num_foreground, 1), 100)

        of_levels = labels.split([logits.shape[1] for logits in pred_logits], dim=1)
        loss_cls = sum(
            focal_loss(
                logits.flatten(0, 1), x.flatten(), self.focal_loss_alpha, self.focal_loss_gamma
            )
            for logits, x in zip(pred_logits, of_levels)
        )
        if self.box_reg_loss_type == "balanced_l1":
            anchor_boxes = Boxes.cat(anchors).tensor.expand(len(labels), -1, -1)
            matched_boxes = torch.stack(gt_boxes)[chosen]
            targets = self.box2box_transform.get_deltas(anchor_boxes[chosen], matched_boxes)
            predicted = cat(pred_anchor_deltas, dim=1)[chosen]
            loss_box_reg = self.balanced_l1(predicted, targets, reduction="sum")
        else:
            loss_box_reg = _dense_box_regression_loss(
                anchors,
                self.box2box_transform,
                pred_anchor_deltas,
                gt_boxes,
                foreground,
                box_reg_loss_type=self.box_reg_loss_type,
                smooth_l1_beta=self.smooth_l1_beta,
            )
        return {"loss_cls": loss_cls / normalizer, "loss_box_reg": loss_box_reg / normalizer}

    def _decode_multi_level_predictions(
        self,
        anchors: List[Boxes],
        pred_scores: List[torch.Tensor],
        pred_deltas: List[torch.Tensor],
        score_thresh: float,
        topk_candidates: int,
        image_size: Tuple[int, int],
    ) -> Instances:
        """See :meth:`RetinaNet._decode_multi_level_predictions`; super() cannot be scripted."""
        predictions: List[Instances] = []
        for anchors_i, scores_i, deltas_i in zip(anchors, pred_scores, pred_deltas):
            predictions.append(
                self._decode_per_level_predictions(
                    anchors_i, scores_i, deltas_i, score_thresh, topk_candidates, image_size
                )
            )
        merged = predictions[0].cat(predictions)
        if not self.clip_boxes:
            return merged
        if torch.jit.is_scripting() or torch.jit.is_tracing():
            merged.pred_boxes.clip(image_size)
            return merged[merged.pred_boxes.nonempty()]
        # Without the host synchronizations of Boxes.clip() and of dropping boxes without area:
        # these get a score of 0, and postprocessing drops them.
        merged.pred_boxes = Boxes(clip_boxes_to_image(merged.pred_boxes.tensor, image_size))
        merged.scores = merged.scores.masked_fill(~merged.pred_boxes.nonempty(), 0)
        return merged
