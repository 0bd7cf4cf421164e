# SPDX-License-Identifier: Apache-2.0
"""The frame of pages that are one HTML file and need no network."""

import html
from pathlib import Path
from string import Template

from .atomic_write import atomic_write

__all__ = ["write_web_page"]

_PARTS = Path(__file__).with_suffix("")  # web_page.html and .css


def write_web_page(path: str, title: str, body: str, style: str = "") -> None:
    """
    Write an HTML file that may not load anything, follows light and dark mode, and fits narrow
    windows.

    Args:
        path: of the file.
        title: any text.
        body: HTML below the title; other text in it has to be escaped.
        style: more CSS.
    """
    page, own = (_PARTS.with_suffix(x).read_text("utf-8") for x in (".html", ".css"))
    parts = {"title": html.escape(title), "style": own + style, "body": body}
    with atomic_write(path, "w") as f:
        f.write(Template(page).substitute(parts))
