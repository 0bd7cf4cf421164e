# SPDX-License-Identifier: Apache-2.0
"""Pictures of detections next to each other, each under its caption."""

from typing import Any, List, Sequence, Tuple

import matplotlib
import numpy as np
from matplotlib.transforms import Bbox
from PIL import Image, ImageDraw, ImageFont

from detectron2.utils.visualizer import VisImage, Visualizer  # it imports OpenCV

__all__ = ["Panel", "join_panels"]

DARK, LIGHT = (32, 32, 32), (255, 255, 255)  # RGB
LINE = 4  # pixels
MIN_LABEL = 11  # pixels, the font size of labels


class Panel(Visualizer):
    """
    Detectron2's visualizer with labels that can be read: all have one size, lie within the picture,
    and are moved off each other where there is room. In ``ColorMode.SEGMENTATION``, all objects of
    a class have the same color.
    """

    def __init__(self, *args: Any, **kwargs: Any):
        """See :class:`Visualizer`."""
        super().__init__(*args, **kwargs)
        self._labels: List[Bbox] = []  # in pixels of the picture, from its lower left corner

    def _jitter(self, color: Sequence[float]) -> Sequence[float]:
        return color  # Detectron2 varies the color from object to object

    def draw_box(self, box_coord: Sequence[float], alpha: float = 0.9, **style: Any) -> VisImage:
        """See :meth:`Visualizer.draw_box`; the default of ``alpha`` is larger here."""
        return super().draw_box(box_coord, alpha, **style)

    def draw_text(self, text: str, position: Tuple[float, float], **style: Any) -> VisImage:
        """See :meth:`Visualizer.draw_text`. ``font_size`` is ignored."""
        if not text:
            return self.output
        output = self.output
        pixels = max(np.sqrt(output.width * output.height) * output.scale / 35, MIN_LABEL)
        style["font_size"] = pixels * 72 / output.dpi / output.scale  # points
        super().draw_text(text, position, **style)
        label = output.ax.texts[-1]
        area = label.get_window_extent(output.canvas.get_renderer()).padded(2)
        dx, dy = self._offset(area)
        to_pixels = output.ax.transData
        moved = to_pixels.transform(label.get_position()) + (dx, dy)
        label.set_position(to_pixels.inverted().transform(moved))
        self._labels.append(area.translated(dx, dy))
        return output

    def _offset(self, area: Bbox) -> Tuple[float, float]:
        """
        How far, in pixels, a label has to be moved to lie within the picture and, if one of the
        nearest places is free, cover no other label.
        """
        _, _, width, height = self.output.ax.bbox.bounds
        dx = min(max(-area.x0, 0), width - area.x1)
        inside = min(max(-area.y0, 0), height - area.y1)
        for rows in (0, 1, -1, 2, -2):
            dy = inside + rows * area.height
            moved = area.translated(dx, dy)
            if moved.y0 >= 0 and moved.y1 <= height and not moved.count_overlaps(self._labels):
                return dx, dy
        return dx, inside


def join_panels(panels: Sequence[np.ndarray], captions: Sequence[str]) -> np.ndarray:
    """
    Put pictures next to each other, a divider between them and a caption above each.

    Args:
        panels: (H, W, 3) uint8 RGB each, of the same size.
        captions: one line each. A long one is written smaller.

    Returns:
        (H', W', 3) uint8 RGB. The panels are at its bottom, the first at its left and the last at
        its right edge.
    """
    height, width = panels[0].shape[:2]
    divider = np.full((height, 3 * LINE, 3), DARK, np.uint8)
    divider[:, LINE:-LINE] = LIGHT  # a light line between dark ones, to be seen on any picture
    row = [divider] * (2 * len(panels) - 1)
    row[::2] = panels
    picture = np.hstack(row)
    size = max(width // 30, 14)
    strip = Image.new("RGB", (picture.shape[1], 2 * size), DARK)
    draw = ImageDraw.Draw(strip)
    for i, caption in enumerate(captions):
        font = _font(size)
        font = _font(min(size, size * (width - size) / max(font.getlength(caption), 1)))
        center = i * (width + 3 * LINE) + width / 2
        draw.text((center, size), caption, LIGHT, font, anchor="mm")
    return np.vstack([np.asarray(strip), picture])


def _font(size: float) -> ImageFont.FreeTypeFont:
    """The font of the labels, in pixels."""
    return ImageFont.truetype(matplotlib.get_data_path() + "/fonts/ttf/DejaVuSans.ttf", int(size))
