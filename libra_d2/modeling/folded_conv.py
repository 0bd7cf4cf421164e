# SPDX-License-Identifier: Apache-2.0
"""Convolutions that compute the batch norm behind them with their own weights."""

from typing import Any, Callable, Dict, List, Optional, Tuple

import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from detectron2.layers import Conv2d, FrozenBatchNorm2d, NaiveSyncBatchNorm

from .batch_norm import AffineBatchNorm2d
from .replacement import Replacement, has_hooks, has_tangent, is_captured, is_ordinary

__all__ = ["FoldedConv2d"]


class FoldedConv2d(Replacement, Conv2d):
    """
    :class:`Conv2d` whose ``norm`` is folded into weight and bias where its statistics are fixed:
    frozen batch norms always, others in evaluation mode. A batch norm of fixed statistics
    multiplies each channel by a scale and adds a shift, so that it is cheaper to multiply the
    weights than the much larger features. In training, where weights that are learned have to be
    multiplied in each call, that is done where they are fewer than the features.

    Parameters, gradients and checkpoint keys are those of the parent. What needs no gradient is
    folded once, and again when a tensor it was made of has changed or ``train``, ``eval`` or ``to``
    is called; only a write to the ``.data`` of a tensor between two inferences goes unnoticed. A
    norm with a hook of its own is called. On CPUs, weights that are learned are folded again for
    the gradients, so that the folded ones need not be kept.
    """

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Args: x: (N, C, H, W). Returns: what :class:`Conv2d` does, but for rounding."""
        if not self.can_fold() or not self._gains(x):
            return super().forward(x)
        if self._can_save_memory(x):
            x = _FoldedConvolution.apply(x, self.weight, *self._scale_and_shift(), self)
        else:
            x = self._conv_forward(x, *self.fold())
        return x if self.activation is None else self.activation(x)

    def can_fold(self) -> bool:
        """Whether there is a norm, with fixed statistics and without a hook."""
        return self.norm is not None and _can_be_folded(self.norm)

    def fold(self) -> Tuple[torch.Tensor, torch.Tensor]:
        """Weight (C, ...) and bias (C,) of convolution and norm together."""
        return self._keep("folded", (self.weight, *self._tensors_of_norm()), self._fold)

    def _tensors_of_norm(self) -> Tuple[Optional[torch.Tensor], ...]:
        norm = self.norm
        return norm.weight, norm.bias, norm.running_mean, norm.running_var, self.bias

    def _scale_and_shift(self) -> Tuple[torch.Tensor, torch.Tensor]:
        return self._keep("norm", self._tensors_of_norm(), self._fold_norm)

    def _is_learned(self) -> bool:
        return torch.is_grad_enabled() and self.weight.requires_grad

    def _gains(self, x: torch.Tensor) -> bool:
        if is_captured() or not self._is_learned():
            return True  # folded once
        num_pixels = len(x) * x.shape[2:].numel() // (self.stride[0] * self.stride[1])
        return num_pixels * self.out_channels > self.weight.numel()

    def _can_save_memory(self, x: torch.Tensor) -> bool:
        """Whether :class:`_FoldedConvolution` can compute it, and is needed."""
        if not self._is_learned() or isinstance(self.padding, str) or not is_ordinary(x):
            return False
        folded = (t for t in (self.weight, *self._tensors_of_norm()) if t is not None)
        return not torch.is_autocast_enabled("cpu") and not any(map(has_tangent, folded))

    def conv_gradients(
        self, grad: torch.Tensor, x: torch.Tensor, weight: torch.Tensor, needed: List[bool]
    ) -> Tuple[Optional[torch.Tensor], ...]:
        """The gradients of what ``_conv_forward`` gets, as far as they are needed."""
        geometry = (self.stride, self.padding, self.dilation, False, (0, 0), self.groups)
        gradients = torch.ops.aten.convolution_backward
        return gradients(grad, x, weight, [len(weight)], *geometry, needed)

    # In training, each of these is kept as far as what it is made of needs no gradient.

    def _fold(
        self, weight: torch.Tensor, *norm: Optional[torch.Tensor]
    ) -> Tuple[torch.Tensor, torch.Tensor]:
        """The convolution's weight (C, ...) and the shift (C,)."""
        scale, shift = self._scale_and_shift()
        return _multiply(weight, scale), shift

    def _fold_norm(
        self, weight: torch.Tensor, bias: torch.Tensor, *statistics: Optional[torch.Tensor]
    ) -> Tuple[torch.Tensor, torch.Tensor]:
        """Scale (C,) and shift (C,)."""
        mean, inverse_deviation = self._keep("statistics", statistics, self._fold_statistics)
        scale = weight * inverse_deviation
        return scale, torch.addcmul(bias, mean, scale, value=-1)

    def _fold_statistics(
        self, mean: torch.Tensor, variance: torch.Tensor, conv_bias: Optional[torch.Tensor]
    ) -> Tuple[torch.Tensor, torch.Tensor]:
        """Mean (C,), less the bias of the convolution, and inverse standard deviation (C,)."""
        mean = mean if conv_bias is None else mean - conv_bias
        return mean, (variance + self.norm.eps).rsqrt()

    def _keep(
        self, name: str, tensors: Tuple[Optional[torch.Tensor], ...], function: Callable
    ) -> Any:
        """``function(*tensors)``, which is computed again if a tensor has changed."""
        used = [x for x in tensors if x is not None]
        if is_captured():
            return function(*tensors)
        has_gradient = torch.is_grad_enabled() and any(x.requires_grad for x in used)
        if has_gradient or any(x.is_inference() for x in used):
            return function(*tensors)
        kept = self.__dict__.setdefault("_kept", {})
        versions = [(id(x), x._version) for x in used]
        if name not in kept or kept[name][0] != versions:
            # Training cannot use tensors that were made in inference mode.
            with torch.inference_mode(False), torch.no_grad():
                kept[name] = (versions, used, function(*tensors))
        return kept[name][2]

    def train(self, mode: bool = True) -> "FoldedConv2d":
        self.__dict__.pop("_kept", None)
        return super().train(mode)

    def _apply(self, *args, **kwargs) -> "FoldedConv2d":
        self.__dict__.pop("_kept", None)
        return super()._apply(*args, **kwargs)

    def __getstate__(self) -> Dict[str, Any]:
        return {name: x for name, x in super().__getstate__().items() if name != "_kept"}

    @classmethod
    def can_replace(cls, module: nn.Module) -> bool:
        """Convolutions with a norm; :class:`Conv2d` pads with zeros whatever its mode is."""
        is_known = super().can_replace(module) and module.padding_mode == "zeros"
        return is_known and module.norm is not None


def _multiply(weight: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    """(O, C, H, W), (O,) -> (O, C, H, W)."""
    return weight * scale[:, None, None, None]


class _FoldedConvolution(torch.autograd.Function):
    """
    Folds the weights once more for the gradients, instead of keeping the folded ones, which take as
    much memory as the parameters.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: torch.Tensor,
        weight: torch.Tensor,
        scale: torch.Tensor,
        shift: torch.Tensor,
        conv: FoldedConv2d,
    ) -> torch.Tensor:
        ctx.save_for_backward(x, weight, scale)
        ctx.conv = conv
        return conv._conv_forward(x, _multiply(weight, scale), shift)

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> Tuple[Optional[torch.Tensor], ...]:
        x, weight, scale = ctx.saved_tensors
        needs_x, _, needs_scale, needs_shift, _ = ctx.needs_input_grad
        needed = [needs_x, True, needs_shift]
        with torch.autocast("cpu", enabled=False):  # whatever calls backward()
            folded = _multiply(weight, scale)
            grad_x, grad_folded, grad_shift = ctx.conv.conv_gradients(grad, x, folded, needed)
            grad_scale = (grad_folded * weight).sum((1, 2, 3)) if needs_scale else None
            return grad_x, _multiply(grad_folded, scale), grad_scale, grad_shift, None


# Those of classes derived from them may do something else.
# torch.compile of PyTorch 2.6 cannot look for a function in a set.
_FORWARDS = tuple(
    x.forward
    for x in (
        FrozenBatchNorm2d,
        AffineBatchNorm2d,
        _BatchNorm,
        nn.SyncBatchNorm,
        NaiveSyncBatchNorm,
    )
)


def _can_be_folded(norm: nn.Module) -> bool:
    if type(norm).forward not in _FORWARDS or has_hooks(norm):
        return False
    if isinstance(norm, FrozenBatchNorm2d):
        return True
    return norm.affine and norm.track_running_stats and not norm.training
