# SPDX-License-Identifier: Apache-2.0
"""Fast R-CNN predictor with balanced L1 box loss."""

from typing import Dict, List, Optional

import torch

from detectron2.config import configurable
from detectron2.layers import ShapeSpec, nonzero_tuple
from detectron2.modeling.roi_heads.fast_rcnn import FastRCNNOutputLayers
from detectron2.structures import Instances

from ..errors import check_choice
from .balanced_l1_loss import BalancedL1Loss
from .normalizer import NORMALIZE_OVER, is_batch_divided, mean_over_batch

__all__ = ["LibraFastRCNNOutputLayers"]


class LibraFastRCNNOutputLayers(FastRCNNOutputLayers):
    """
    Detectron2's box predictor with another box loss type, "balanced_l1"
    (``MODEL.ROI_BOX_HEAD.BBOX_REG_LOSS_TYPE``).
    """

    @configurable
    def __init__(
        self,
        input_shape: ShapeSpec,
        *,
        balanced_l1: Optional[BalancedL1Loss] = None,
        normalize_over: str = "batch",
        **kwargs,
    ):
        """
        Args:
            input_shape: shape of the features of one proposal.
            balanced_l1: the loss for ``box_reg_loss_type="balanced_l1"``. None for one with the
                paper's parameters.
            normalize_over: whether the number that the losses are divided by is the mean over all
                processes of a "batch" or that of each "process"; see :func:`mean_over_batch`.
            kwargs: arguments of :class:`FastRCNNOutputLayers`.

        Raises:
            ArgumentError: if ``normalize_over`` is neither.
        """
        super().__init__(input_shape, **kwargs)
        check_choice("normalize_over", normalize_over, NORMALIZE_OVER)
        self.normalize_over = normalize_over
        self.balanced_l1 = balanced_l1 or BalancedL1Loss()

    @classmethod
    def from_config(cls, cfg, input_shape) -> Dict:
        return {
            **super().from_config(cfg, input_shape),
            "balanced_l1": BalancedL1Loss(cfg),
            "normalize_over": cfg.MODEL.LIBRA.NORMALIZE_OVER,
        }

    def losses(self, predictions, proposals: List[Instances]) -> Dict[str, torch.Tensor]:
        """
        See :meth:`FastRCNNOutputLayers.losses`. If the batch is divided, losses are normalized by
        the mean number of proposals, see :func:`mean_over_batch`.
        """
        losses = super().losses(predictions, proposals)
        if not is_batch_divided():
            return losses
        # float16 and bfloat16 cannot represent every number of proposals.
        dtype = torch.promote_types(predictions[0].dtype, torch.float32)
        num_proposals = predictions[0].new_tensor(sum(map(len, proposals)), dtype=dtype)
        scale = num_proposals / mean_over_batch(num_proposals, self).clamp(min=1)
        return {name: loss * scale for name, loss in losses.items()}

    def box_reg_loss(
        self,
        proposal_boxes: torch.Tensor,
        gt_boxes: torch.Tensor,
        pred_deltas: torch.Tensor,
        gt_classes: torch.Tensor,
    ) -> torch.Tensor:
        """
        Args:
            proposal_boxes, gt_boxes: (R, 4), R proposals of a batch and the boxes they are matched
                with, absolute XYXY.
            pred_deltas: (R, 4), or (R, num_classes * 4).
            gt_classes: (R,) int64 in [0, num_classes], background last.

        Returns:
            scalar: sum of the loss over the foreground's deltas, divided by R.
        """
        if self.box_reg_loss_type != "balanced_l1":
            return super().box_reg_loss(proposal_boxes, gt_boxes, pred_deltas, gt_classes)
        foreground = nonzero_tuple((gt_classes >= 0) & (gt_classes < self.num_classes))[0]
        box_dim = proposal_boxes.shape[1]
        pred_deltas = pred_deltas.view(-1, pred_deltas.shape[1] // box_dim, box_dim)
        # One box per class, or a single one for all of them.
        class_idxs = gt_classes[foreground] if pred_deltas.shape[1] > 1 else 0
        loss = self.balanced_l1(
            pred_deltas[foreground, class_idxs],
            self.box2box_transform.get_deltas(proposal_boxes[foreground], gt_boxes[foreground]),
            reduction="sum",
        )
        # All sampled proposals rather than the foreground, as in Detectron2 and mmdetection.
        return loss / max(gt_classes.numel(), 1)
