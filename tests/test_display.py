# SPDX-License-Identifier: Apache-2.0
"""Names from strangers in tables, pages and pictures."""

import numpy as np
import pytest

from detectron2.data import Metadata
from detectron2.utils.visualizer import Visualizer

from libra_d2.analysis.html_page import Section, write_page
from libra_d2.evaluation import write_results
from libra_d2.utils.display import display_metadata, display_name, table_cell

SHOWN = {  # each name, in a picture, and in the cell of a table if that differs
    **{"$": ("$",), "a$b$c": ("a$b$c",), "$\\frac{": ("$\\frac{", "$\\\\frac{")},
    **{"|": ("|", "\\|"), "a|b\nc": ("a|b c", "a\\|b c"), "\\": ("\\", "\\\\")},
    **{"%s {0}": ("%s {0}",), "日本語": ("日本語",), "\u202e a\t": ("a",), "x" * 40: ("x" * 40,)},
    "<script>alert(1)</script>": ("<script>alert(1)</script>", "\\<script\\>alert(1)\\</script\\>"),
    "\x1b[31mred": ("[31mred", "\\[31mred"),
    "`rm` *b* a_b": ("`rm` *b* a_b", "\\`rm\\` \\*b\\* a\\_b"),
    "[x](y)": ("[x](y)", "\\[x\\](y)"),
    "y" * 41: ("y" * 40 + "…",),
    "x" * 39 + " \r\n" + "y" * 10000: ("x" * 39 + " …",),
}
NAMES = list(SHOWN)


@pytest.mark.parametrize("name", NAMES, ids=lambda n: ascii(n)[:20])
def test_names(name):
    """One short line; nothing in it changes a terminal, a table, or becomes a formula."""
    assert display_name(name) == SHOWN[name][0]
    assert table_cell(name) == SHOWN[name][-1]
    metadata = display_metadata(Metadata(thing_classes=["a", name]))
    assert metadata.thing_classes == ["a", SHOWN[name][0].replace("$", "\\$")]
    assert metadata.thing_colors == [(0, 113, 188), (216, 82, 24)]


def test_pictures():
    """Matplotlib draws the names, whatever they look like."""
    visualizer = Visualizer(np.zeros((60, 90, 3), np.uint8), Metadata())
    labels = display_metadata(Metadata(thing_classes=NAMES)).thing_classes
    boxes = np.array([[5, 5, 60, 50]] * len(labels))
    visualizer.overlay_instances(boxes=boxes, labels=labels)
    assert visualizer.output.get_image().shape == (60, 90, 3)


def test_metadata():
    """Without classes it is used as it is; colors of the dataset's own are kept."""
    metadata, own = Metadata(name="x"), Metadata(thing_classes=["a"], thing_colors=[(1, 2, 3)])
    assert display_metadata(metadata) is metadata
    assert display_metadata(own).thing_colors == own.thing_colors


def test_table(tmp_path):
    """A row of two cells for each class."""
    for name in NAMES:
        write_results(str(tmp_path / "a.md"), {"data": {"bbox": {f"AP-{name}": 2.0}}}, "x")
        (row,) = [x for x in (tmp_path / "a.md").read_text().splitlines() if "2.0" in x]
        assert row.replace("\\\\", "").replace("\\|", "").count("|") == 3
        assert table_cell(name) in row


def test_page(tmp_path):
    import PIL.Image

    PIL.Image.new("RGB", (4, 4)).save(tmp_path / "a.png")
    for name in NAMES:
        page = tmp_path / "index.html"
        write_page(str(page), name, name, [Section(name, name, str(tmp_path / "a.png"))])
        assert "<script>" not in page.read_text()
