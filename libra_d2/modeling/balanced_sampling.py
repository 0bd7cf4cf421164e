# SPDX-License-Identifier: Apache-2.0
"""
IoU-balanced sampling of negatives and instance-balanced sampling of positives: the sample level
balance of Libra R-CNN (paper Section 3.1).

Naming and shape shorthand in this module:

    R: number of proposals (RoIs) of one image, ground truth added as proposals included
    M: number of ground-truth instances of that image
    K: number of IoU bins
    label: 1 for positives (foreground), 0 for negatives (background), -1 for ignored proposals
    max_iou: for each proposal, its highest IoU with any ground truth; 0 if there is none
"""

from typing import Any, Dict, NamedTuple, Optional

import numpy as np
import torch
from torch import nn

from detectron2.config import configurable
from detectron2.utils.registry import Registry

from ..errors import ArgumentError, check_choice

__all__ = [
    "MODES",
    "NEGATIVE_SAMPLERS",
    "POSITIVE_SAMPLERS",
    "PROPOSAL_SAMPLER_REGISTRY",
    "BalancedSampler",
    "SamplingResult",
    "build_proposal_sampler",
    "iou_histogram",
]

PROPOSAL_SAMPLER_REGISTRY = Registry("LIBRA_PROPOSAL_SAMPLER")
PROPOSAL_SAMPLER_REGISTRY.__doc__ = """
Samplers of proposals for training the second stage, by ``MODEL.LIBRA.SAMPLER.NAME``: modules that
are built from a config and called as :class:`BalancedSampler` is.
"""

NEGATIVE_SAMPLERS = ("iou_balanced", "random")
POSITIVE_SAMPLERS = ("instance_balanced", "random")
MODES = ("paper", "reference")


def iou_bins(max_iou: np.ndarray, num_bins: int, upper: float) -> np.ndarray:
    """
    Args:
        max_iou: (R,) float32, in [0, 1].
        num_bins: K.
        upper: in (0, 1], upper end of the last bin, exclusive.

    Returns:
        (R,) int64: index of the IoU's bin, of K bins of equal width in [0, upper); K for no bin.
    """
    return np.minimum(max_iou * np.float32(num_bins / upper), num_bins).astype(np.int64)


def iou_histogram(max_iou: np.ndarray, num_bins: int, upper: float) -> np.ndarray:
    """Count the IoUs in each bin of :func:`iou_bins`. Returns: (K,) int64."""
    return np.bincount(iou_bins(max_iou, num_bins, upper), minlength=num_bins + 1)[:num_bins]


def _draw_counts(sizes: np.ndarray, num: int) -> np.ndarray:
    """
    Draw ``num`` members (or all, if there are fewer) at random, without replacement, from the union
    of groups of the given sizes, (G,) int64. Returns: (G,) int64, members drawn of each group.
    """
    if num == 0:
        return np.zeros_like(sizes)
    ends = sizes.cumsum()
    if num >= ends[-1]:
        return sizes
    drawn = torch.randperm(int(ends[-1]))[:num].numpy()
    return np.bincount(ends.searchsorted(drawn, side="right"), minlength=len(sizes))


class SamplingResult(NamedTuple):
    """The sampled proposals of one image, and statistics of the draw."""

    #: indices in [0, R) of the positives drawn, without repetition, ordered by instance
    positives: torch.Tensor
    #: the same for negatives
    negatives: torch.Tensor
    #: number of ground-truth instances with at least one positive drawn
    num_instances: int
    #: (K,) int64: negatives drawn from each of K bins of equal width of the negatives' IoU range
    negatives_in_bins: np.ndarray


@PROPOSAL_SAMPLER_REGISTRY.register()
class BalancedSampler(nn.Module):
    """
    Choose the proposals of one image that the second stage is trained on. Negatives as well as
    positives may also be drawn at "random".

    * **Negatives, "iou_balanced"**: the IoU range of the negatives is split into K bins of equal
      width and ``n / K`` of the ``n`` negatives are drawn from each (paper Equation 2), as random
      samples rarely include hard negatives (Figure 3). Bins with too few are made up for at random.
    * **Positives, "instance_balanced"**: the same number is drawn for every ground-truth instance,
      so that objects with many proposals do not dominate: ``round(n / instances) + 1`` as in
      mmdetection, then topped up or trimmed at random to ``n``.

    Two modes:

    * ``"paper"``, the default: the bins span ``[0, negative_iou_thresh)``, the negatives' range.
    * ``"reference"``: what mmdetection does, to reproduce models trained with it. (1) The bins span
      ``[0, max IoU over all proposals)``, positives and added ground truth included, so that the
      last bins hold no negatives and their share is drawn at random. (2) Negatives with zero IoU
      are in no bin and drawn only once all others are. (3) Topping up draws from all positives and
      does not replace those drawn already, so that there may be fewer than ``n``.

    The sampler has no state. (mmdetection's negative sampler treats zero IoU differently in the
    first image it sees; that is not reproduced.)
    """

    @configurable
    def __init__(
        self,
        *,
        negatives: str = "iou_balanced",
        positives: str = "instance_balanced",
        mode: str = "paper",
        num_bins: int = 3,
        negative_iou_thresh: float = 0.5,
    ):
        """
        Args:
            negatives, positives, mode: see above.
            num_bins: K, at least 1. The paper uses 3 and finds little sensitivity to it.
            negative_iou_thresh: in (0, 1]; proposals with an IoU below are negatives.

        Raises:
            ArgumentError: if an argument is out of range.
        """
        super().__init__()
        check_choice("negatives", negatives, NEGATIVE_SAMPLERS)
        check_choice("positives", positives, POSITIVE_SAMPLERS)
        check_choice("mode", mode, MODES)
        if num_bins < 1:
            raise ArgumentError("num_bins", num_bins, "use 1 or more")
        if not 0 < negative_iou_thresh <= 1:
            raise ArgumentError("negative_iou_thresh", negative_iou_thresh, "use a value in (0, 1]")
        self.negatives = negatives
        self.positives = positives
        self.mode = mode
        self.num_bins = num_bins
        self.negative_iou_thresh = negative_iou_thresh

    @classmethod
    def from_config(cls, cfg) -> Dict[str, Any]:
        keys = ("negatives", "positives", "mode", "num_bins")
        arguments = {key: cfg.MODEL.LIBRA.SAMPLER[key.upper()] for key in keys}
        return {**arguments, "negative_iou_thresh": cfg.MODEL.ROI_HEADS.IOU_THRESHOLDS[0]}

    @torch.jit.unused  # it works on the host; scripted models do not train
    @torch.compiler.disable  # NumPy is no part of a graph
    @torch.no_grad()
    def forward(
        self,
        labels: torch.Tensor,
        max_iou: torch.Tensor,
        matched_idxs: torch.Tensor,
        num_instances: int,
        num_samples: int,
        positive_fraction: float,
        objectness: Optional[torch.Tensor] = None,
    ) -> SamplingResult:
        """
        Args:
            labels: (R,) integer, each one of 1, 0 and -1.
            max_iou: (R,) floating point, in [0, 1].
            matched_idxs: (R,) int64, the ground truth that each proposal is matched with, in
                [0, M). Its value matters for positives only.
            num_instances: M.
            num_samples: number of proposals to draw.
            positive_fraction: limits the positives to ``int(num_samples * positive_fraction)``.
            objectness: (R,) logits of the RPN, 23 for added ground truth. Unused here; other
                samplers may look for hard proposals.

        Returns:
            the sample: ``num_samples`` proposals, or fewer if negatives are too few. The host
            synchronizes with the device once.
        """
        # The rest is less work than launching kernels. Float32 holds any instance's index.
        packed = torch.stack([max_iou.float(), labels.float(), matched_idxs.float()])
        iou, host_labels, instances = packed.cpu().numpy()
        instances = instances.astype(np.int64)
        # Groups: the M instances, the K bins, negatives in no bin, negatives that are drawn last,
        # and ignored proposals.
        first_bin, ignored = num_instances, num_instances + self.num_bins + 2
        upper = self.negative_iou_thresh
        if self.mode == "reference":
            upper = max(iou.max(initial=0), 1e-6)  # 0 without ground truth
        groups = iou_bins(iou, self.num_bins, upper)
        groups += first_bin
        if self.mode == "reference" and self.negatives == "iou_balanced":
            groups[iou == 0] = ignored - 1
        np.copyto(groups, instances, where=host_labels == 1)
        groups[host_labels < 0] = ignored
        # Small integers are sorted in linear time.
        groups = groups.astype(np.uint8 if ignored < 256 else np.uint16)

        # Proposals in random order within each group: the first n of a group are a random sample.
        order = torch.randperm(len(groups)).numpy()
        order = order[np.argsort(groups[order], kind="stable")]
        sizes = np.bincount(groups, minlength=ignored + 1)[:ignored]
        max_positives = min(int(num_samples * positive_fraction), sizes[:first_bin].sum())
        from_instances = self._draw_from_instances(sizes[:first_bin], max_positives)
        num_positives = int(from_instances.sum())
        from_bins = self._draw_from_bins(sizes[first_bin:], num_samples - num_positives)
        taken = np.concatenate([from_instances, from_bins])
        # Positions of the first taken[g] of each group g, one group after the other.
        skipped = np.cumsum(sizes - taken) - (sizes - taken)
        chosen = order[np.arange(taken.sum()) + np.repeat(skipped, taken)]
        on_device = torch.from_numpy(chosen).to(labels.device, non_blocking=True)
        return SamplingResult(
            positives=on_device[:num_positives],
            negatives=on_device[num_positives:],
            num_instances=int(np.count_nonzero(from_instances)),
            negatives_in_bins=iou_histogram(
                iou[chosen[num_positives:]], self.num_bins, self.negative_iou_thresh
            ),
        )

    def _draw_from_instances(self, sizes: np.ndarray, num: int) -> np.ndarray:
        """Args: sizes: (M,), positives of each instance; num: to draw. Returns: (M,), to draw."""
        if num == sizes.sum():
            return sizes
        if self.positives == "random":
            return _draw_counts(sizes, num)
        quotas = np.minimum(sizes, round(num / np.count_nonzero(sizes)) + 1)
        missing = num - quotas.sum()
        if missing < 0:
            return _draw_counts(quotas, num)
        if self.mode == "reference":
            # Drawn from all positives; those that are drawn already are lost.
            drawn = _draw_counts(np.concatenate([quotas, sizes - quotas]), missing)
            return quotas + drawn[len(sizes) :]
        return quotas + _draw_counts(sizes - quotas, missing)

    def _draw_from_bins(self, sizes: np.ndarray, num: int) -> np.ndarray:
        """
        Args: sizes: (K + 2,), negatives in each bin, in no bin, and to be drawn last; num: to draw.
        Returns: (K + 2,), to draw.
        """
        taken = np.zeros_like(sizes)
        if self.negatives == "iou_balanced":
            taken[: self.num_bins] = np.minimum(sizes[: self.num_bins], num // self.num_bins)
        taken[:-1] += _draw_counts((sizes - taken)[:-1], num - taken.sum())
        taken[-1] = min(sizes[-1], num - taken.sum())
        return taken


def build_proposal_sampler(cfg) -> nn.Module:
    """
    Build the sampler that ``MODEL.LIBRA.SAMPLER.NAME`` names.

    Raises:
        ArgumentError: if there is none of that name, or an argument is out of range.
    """
    name = cfg.MODEL.LIBRA.SAMPLER.NAME
    check_choice("name", name, [name for name, _ in PROPOSAL_SAMPLER_REGISTRY])
    return PROPOSAL_SAMPLER_REGISTRY.get(name)(cfg)
