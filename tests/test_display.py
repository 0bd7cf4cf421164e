# SPDX-License-Identifier: Apache-2.0
"""Names from strangers in tables, pages and pictures."""

import numpy as np
import pytest

from detectron2.data import Metadata
from detectron2.utils.visualizer import Visualizer

from libra_d2.analysis.html_page import Section, write_page
from libra_d2.data.display import MAX_LENGTH, display_metadata, display_name, table_cell
from libra_d2.evaluation import write_results

NAMES = [
    *(
        "$",
        "$\\frac{",
        "a$b$c",
        "|",
        "a|b\nc",
        "<script>alert(1)</script>",
        "\x1b[31mred",
        "\u202e",
    ),
    *("`rm`", "*b*", "[x](y)", "\\", "%s {0}", "日本語", "x" * 10000, "a\r\nb"),
]


@pytest.mark.parametrize("name", NAMES, ids=lambda n: ascii(n)[:20])
def test_pictures(name):
    """Matplotlib draws the name, whatever it looks like."""
    metadata = display_metadata(Metadata(thing_classes=[name]))
    visualizer = Visualizer(np.zeros((60, 90, 3), np.uint8), metadata)
    label = metadata.thing_classes[0]
    visualizer.overlay_instances(boxes=np.array([[5, 5, 60, 50]]), labels=[f"{label} 90%"])
    assert visualizer.output.get_image().shape == (60, 90, 3)


@pytest.mark.parametrize("name", NAMES, ids=lambda n: ascii(n)[:20])
def test_names(name):
    """One short line; nothing in it changes a terminal."""
    shown = display_name(name)
    assert len(shown) <= MAX_LENGTH + 1
    assert shown.isprintable()


@pytest.mark.parametrize("name", NAMES, ids=lambda n: ascii(n)[:20])
def test_tables(name, tmp_path):
    """A row of two cells for each class."""
    path = tmp_path / "results.md"
    write_results(str(path), {"data": {"bbox": {"AP": 1.0, f"AP-{name}": 2.0, "AP-b": 3.0}}}, "x")
    lines = path.read_text().splitlines()
    rows = [line for line in lines if line.rstrip(" |").endswith(("2.0", "3.0"))]
    assert len(rows) == 2
    for row in rows:
        assert row.replace("\\\\", "").replace("\\|", "").count("|") == 3
    assert "<script>" not in table_cell(name)


def test_page(tmp_path):
    import PIL.Image

    PIL.Image.new("RGB", (4, 4)).save(tmp_path / "a.png")
    for name in NAMES:
        page = tmp_path / "index.html"
        write_page(str(page), name, name, [Section(name, name, str(tmp_path / "a.png"))])
        assert "<script>" not in page.read_text()
