# SPDX-License-Identifier: Apache-2.0
"""Class names, which may be any text, in pictures, tables and HTML pages."""

from typing import List, Tuple

from detectron2.data import Metadata
from detectron2.utils.colormap import colormap

__all__ = ["class_colors", "display_metadata", "display_name", "table_cell"]

MAX_LENGTH = 40


def display_name(name: str) -> str:
    """``name`` as a label: one line of limited length, without control characters."""
    line = " ".join("".join(c if c.isprintable() else " " for c in str(name)).split())
    return line if len(line) <= MAX_LENGTH else f"{line[:MAX_LENGTH]}…"


def table_cell(name: str) -> str:
    """``name`` as a cell of a Markdown table."""
    text = display_name(name)
    for character in "\\`*_[]<>|":
        text = text.replace(character, f"\\{character}")
    return text


def display_metadata(metadata: Metadata) -> Metadata:
    """Metadata for Detectron2's visualizer, with names that are not typeset as math."""
    names = metadata.get("thing_classes")
    if names is None:
        return metadata
    return Metadata(
        thing_classes=[display_name(name).replace("$", r"\$") for name in names],
        thing_colors=metadata.get("thing_colors") or class_colors(len(names)),
    )


def class_colors(num_classes: int) -> List[Tuple[int, int, int]]:
    """A color for each class, RGB in 0 to 255: Detectron2's colors, repeated if there are more."""
    colors = colormap(rgb=True, maximum=255).astype(int).tolist()
    return [tuple(colors[i % len(colors)]) for i in range(num_classes)]
