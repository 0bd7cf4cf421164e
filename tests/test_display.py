# SPDX-License-Identifier: Apache-2.0
"""Class names of any kind in tables and pictures."""

import numpy as np
import pytest

from detectron2.data import Metadata
from detectron2.utils.visualizer import Visualizer

from libra_d2.utils.display import class_colors, display_metadata, display_name, table_cell

SHOWN = {  # each name, in a picture, and in the cell of a table if that differs
    **{"a$b$c": ("a$b$c",), "$\\frac{": ("$\\frac{", "$\\\\frac{"), "%s {0}": ("%s {0}",)},
    **{"|": ("|", "\\|"), "a|b\nc": ("a|b c", "a\\|b c"), "\u202e a\t": ("a",)},
    "<script>alert(1)</script>": ("<script>alert(1)</script>", "\\<script\\>alert(1)\\</script\\>"),
    "\x1b[31mred": ("[31mred", "\\[31mred"),
    "`rm` *b* a_b": ("`rm` *b* a_b", "\\`rm\\` \\*b\\* a\\_b"),
    **{"日" * 40: ("日" * 40,), "y" * 41: ("y" * 40 + "…",)},
    "x" * 39 + " \r\n" + "y" * 10000: ("x" * 39 + " …",),
}


@pytest.mark.parametrize("name", SHOWN, ids=lambda n: ascii(n)[:20])
def test_names(name):
    """One short line without control characters, Markdown or formulas."""
    assert display_name(name) == SHOWN[name][0]
    assert table_cell(name) == SHOWN[name][-1]
    metadata = display_metadata(Metadata(thing_classes=["a", name]))
    assert metadata.thing_classes == ["a", SHOWN[name][0].replace("$", "\\$")]
    assert metadata.thing_colors == [(0, 113, 188), (216, 82, 24)]
    visualizer = Visualizer(np.zeros((60, 90, 3), np.uint8), Metadata())
    visualizer.overlay_instances(
        boxes=np.array([[5, 5, 60, 50]]), labels=metadata.thing_classes[1:]
    )
    assert visualizer.output.get_image().shape == (60, 90, 3)


def test_metadata():
    """Metadata without classes is returned unchanged; colors of the dataset are kept."""
    metadata, own = Metadata(name="x"), Metadata(thing_classes=["a"], thing_colors=[(1, 2, 3)])
    assert display_metadata(metadata) is metadata
    assert display_metadata(own).thing_colors == own.thing_colors


def test_colors():
    """Detectron2's colors, repeated if there are more classes."""
    colors = class_colors(75)
    assert (len(colors), len(set(colors)), colors[74]) == (75, 70, colors[0])
