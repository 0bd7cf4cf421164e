# SPDX-License-Identifier: Apache-2.0
"""Makes a built model fast, Detectron2's own models too, without changing what it computes."""

import logging
import sys
from typing import Callable, List, Tuple

import torch
from torch import nn

from ..errors import check_choice, one_line
from .folded_conv import FoldedConv2d
from .fused_bottleneck import FusedBottleneck, FusedStage
from .lean_fpn import LeanFPN
from .roi_align import ParallelROIAlign
from .winograd_conv import WinogradConv2d, can_gain, is_available

__all__ = ["CHANNELS_LAST", "accelerate", "choose_channels_last"]

logger = logging.getLogger(__name__)


def choose_channels_last(
    model: nn.Module, device_type: str, is_mixed_precision: bool, winograd: bool = True
) -> str:
    """
    When channels last is faster, as far as it was measured (docs/benchmark.md) or is known.

    Args:
        model: what is trained, with ``requires_grad`` off where it is not.
        device_type: "cpu", "cuda" or another kind of device.
        is_mixed_precision: whether convolutions run in 16 bits.
        winograd: whether :class:`WinogradConv2d` is used, which compiled graphs do not contain.

    Returns:
        one of :data:`CHANNELS_LAST`.
    """
    if sys.platform == "win32":
        return "never"
    if device_type != "cpu":
        return "always" if is_mixed_precision else "never"
    if torch.backends.cpu.get_cpu_capability() == "AVX512":
        return "always"
    # Without AVX-512, oneDNN has no fast gradient of a convolution's weights for it.
    has_gradient = winograd and not is_mixed_precision and is_available()
    return "large" if has_gradient and _has_fast_gradients(model) else "inference"


def _has_fast_gradients(model: nn.Module) -> bool:
    """
    Whether Winograd's algorithm computes those of the trained weights, 1x1 convolutions and those
    with a stride aside.
    """
    trained = [m for m in model.modules() if isinstance(m, nn.Conv2d) and m.weight.requires_grad]
    spatial = [conv for conv in trained if max(conv.kernel_size) > 1]
    return any(map(can_gain, spatial)) and all(can_gain(x, stride=x.stride) for x in spatial)


# Forward pre-hooks; their signatures and annotations are those that torch.jit.script asks for.


def _channels_last(self, input: Tuple[torch.Tensor]) -> Tuple[torch.Tensor]:
    return (input[0].contiguous(memory_format=torch.channels_last),)


def _channels_last_if_large(self, input: Tuple[torch.Tensor]) -> Tuple[torch.Tensor]:
    if self.training and input[0].shape[2] * input[0].shape[3] < 2**19:
        return (input[0],)
    return (input[0].contiguous(memory_format=torch.channels_last),)


def _channels_last_in_inference(self, input: Tuple[torch.Tensor]) -> Tuple[torch.Tensor]:
    if self.training:
        return (input[0],)
    return (input[0].contiguous(memory_format=torch.channels_last),)


_HOOKS = {
    "always": _channels_last,
    "large": _channels_last_if_large,
    "inference": _channels_last_in_inference,
}
CHANNELS_LAST = (*_HOOKS, "never")


def accelerate(
    model: nn.Module,
    *,
    channels_last: str = "always",
    fold_norm: bool = True,
    parallel_roi_align: bool = True,
    winograd: bool = True,
    lean_fpn: bool = True,
    compile_backbone: bool = False,
    backend: str = "inductor",
) -> None:
    """
    Let ``model`` compute the same numbers, but for rounding, in less time. It is modified in place;
    its parameters and checkpoint keys stay.

    Args:
        model: a detector of Detectron2 or of this project. One without a ``backbone`` keeps the
            memory format of its features, and is not compiled.
        channels_last: when features have their channels last in memory: "always", "large" (in
            inference, and in training for images of at least 2^19 pixels), "inference" or "never".
            Convolutions and all that follows go on with the format of the image that the backbone
            gets; weights keep theirs.
        fold_norm: see :class:`FoldedConv2d` and :class:`FusedBottleneck`.
        parallel_roi_align: see :class:`ParallelROIAlign`.
        winograd: see :class:`WinogradConv2d`.
        lean_fpn: see :class:`LeanFPN`, which saves memory, not time.
        compile_backbone: whether the backbone is compiled by ``torch.compile``, during the first
            iterations, for images of any size. Where nothing can be compiled, that is logged.
        backend: that of ``torch.compile``.

    Raises:
        ArgumentError: a ValueError, if ``channels_last`` is something else.
    """
    check_choice("channels_last", channels_last, CHANNELS_LAST)
    replacements = {
        FoldedConv2d: fold_norm,
        FusedBottleneck: fold_norm,
        FusedStage: fold_norm,
        ParallelROIAlign: parallel_roi_align,
        WinogradConv2d: winograd,
        LeanFPN: lean_fpn,
    }
    for replacement, is_used in replacements.items():
        if is_used:
            replacement.replace_in(model)
    backbone = getattr(model, "backbone", None)
    if backbone is None:
        return
    if channels_last != "never":
        backbone.register_forward_pre_hook(_HOOKS[channels_last])
    if compile_backbone:
        _compile(backbone, backend)


def _or_eager(backend: str) -> Callable:
    """A backend of ``torch.compile`` that runs a graph as it is if ``backend`` fails."""
    compile_graph = torch._dynamo.lookup_backend(backend)

    def compile_or_run(graph: torch.fx.GraphModule, inputs: List[torch.Tensor]) -> Callable:
        try:
            return compile_graph(graph, inputs)
        except torch._dynamo.exc.RestartAnalysis:  # no failure: the graph is traced once more
            raise
        except Exception as e:  # one of many kinds
            logger.warning(f"The backbone runs without torch.compile: {one_line(e)}")
            return graph.forward

    return compile_or_run


def _compile(module: nn.Module, backend: str) -> None:
    probe = torch.zeros(2, device=next(module.parameters()).device)
    try:
        torch.compile(torch.exp, backend=backend)(probe)
    except Exception as e:  # there is no compiler, or one of many kinds of failure
        logger.warning(f"The backbone runs without torch.compile: {one_line(e)}")
        return
    module.compile(dynamic=True, backend=_or_eager(backend))
    logger.info(f"The backbone is compiled by torch.compile ({backend}) when it is first used")
