# SPDX-License-Identifier: Apache-2.0
from typing import Dict, Optional, Tuple

__all__ = ["describe_weights"]

_BLOCKS_OF_RES4 = {6: 50, 23: 101, 36: 152}  # in ResNets with bottlenecks, by their depth


def describe_weights(shapes: Dict[str, Tuple[int, ...]]) -> Optional[str]:
    """
    Args:
        shapes: shapes of a model's weights, by their names in Detectron2.

    Returns:
        what the model is, such as "Libra Faster R-CNN R-50 with 80 classes"; None if unknown.
    """

    def shape(name: str, default: Tuple[int, ...] = ()) -> Tuple[int, ...]:
        return tuple(shapes.get(name, default))

    def has(prefix: str) -> bool:
        return any(name.startswith(prefix) for name in shapes)

    words = ["Libra"] if has("backbone.bfp.") else []
    num_classes = None
    predictor = "roi_heads.box_predictor.cls_score.weight"
    cascade = "roi_heads.box_predictor.0.cls_score.weight"
    if shape("head.cls_score.weight"):
        words.append("RetinaNet")
        num_anchors = shape("head.bbox_pred.weight", (36,))[0] // 4
        num_classes = shape("head.cls_score.weight")[0] // max(num_anchors, 1)
    elif shape(predictor) or shape(cascade):
        num_classes = shape(predictor, shape(cascade))[0] - 1
        kind = "Faster" if has("proposal_generator.") else "Fast"
        kind = "Mask" if has("roi_heads.mask_head.") else kind
        words.append(f"{'Cascade' if shape(cascade) else kind} R-CNN")
    elif has("proposal_generator."):
        words.append("region proposal network")
    elif has("backbone.bottom_up."):
        words.append("backbone")
    else:
        return None
    blocks = {k.split(".")[3] for k in shapes if k.startswith("backbone.bottom_up.res4.")}
    first = shape("backbone.bottom_up.res2.0.conv2.weight")
    if "backbone.bottom_up.res2.0.conv3.weight" in shapes and len(blocks) in _BLOCKS_OF_RES4:
        groups = first[0] // first[1]
        suffix = f"-{groups}x{first[1]}d" if groups > 1 else ""
        words.append(f"{'X' if groups > 1 else 'R'}-{_BLOCKS_OF_RES4[len(blocks)]}{suffix}")
    if num_classes is not None:
        words.append(f"with {num_classes} classes")
    return " ".join(words)
