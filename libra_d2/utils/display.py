# SPDX-License-Identifier: Apache-2.0
"""Names from datasets, which may hold anything, in pictures, tables and pages."""

from typing import List, Tuple

from detectron2.data import Metadata
from detectron2.utils.colormap import colormap

__all__ = ["class_colors", "display_metadata", "display_name", "table_cell"]

MAX_LENGTH = 40


def display_name(name: str) -> str:
    """``name`` in one line that is not too long for a label, without control characters."""
    line = " ".join("".join(c if c.isprintable() else " " for c in str(name)).split())
    return line if len(line) <= MAX_LENGTH else f"{line[:MAX_LENGTH]}…"


def table_cell(name: str) -> str:
    """``name`` for a cell of a Markdown table."""
    text = display_name(name)
    for character in "\\`*_[]<>|":
        text = text.replace(character, f"\\{character}")
    return text


def display_metadata(metadata: Metadata) -> Metadata:
    """
    Args:
        metadata: of a dataset.

    Returns:
        metadata for Detectron2's visualizer, with names that Matplotlib does not take for formulas.
    """
    names = metadata.get("thing_classes")
    if names is None:
        return metadata
    return Metadata(
        thing_classes=[display_name(name).replace("$", r"\$") for name in names],
        thing_colors=metadata.get("thing_colors") or class_colors(len(names)),
    )


def class_colors(num_classes: int) -> List[Tuple[int, int, int]]:
    """Colors of Detectron2's, RGB in 0 to 255, for pictures in which each class has one."""
    colors = colormap(rgb=True, maximum=255).astype(int).tolist()
    return [tuple(colors[i % len(colors)]) for i in range(num_classes)]
