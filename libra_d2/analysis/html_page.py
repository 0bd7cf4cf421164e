# SPDX-License-Identifier: Apache-2.0
"""A self-contained HTML page with pictures."""

import base64
import html
from dataclasses import dataclass
from typing import List

from ..utils.atomic_write import atomic_write

__all__ = ["Section", "write_page"]

_STYLE = """
body { font: 16px/1.5 system-ui, sans-serif; max-width: 60rem; margin: 2rem auto; padding: 0 1rem;
       color: #222; background: #fff; }
img { width: 100%; height: auto; }
h2 { margin: 2.5rem 0 0.3rem; }
p { margin: 0.3rem 0 1rem; }
"""


@dataclass
class Section:
    """Title and text, both plain text, and the path of a PNG file."""

    title: str
    text: str
    picture: str


def write_page(path: str, title: str, introduction: str, sections: List[Section]) -> None:
    """Write an HTML file with its pictures embedded."""
    parts = [
        f'<!DOCTYPE html><html lang="en"><head><meta charset="utf-8">'
        f"<title>{html.escape(title)}</title><style>{_STYLE}</style></head><body>"
        f"<h1>{html.escape(title)}</h1><p>{html.escape(introduction)}</p>"
    ]
    for section in sections:
        with open(section.picture, "rb") as f:
            data = base64.b64encode(f.read()).decode("ascii")
        parts.append(
            f"<h2>{html.escape(section.title)}</h2><p>{html.escape(section.text)}</p>"
            f'<img alt="{html.escape(section.title)}" src="data:image/png;base64,{data}">'
        )
    with atomic_write(path) as f:
        f.write("\n".join([*parts, "</body></html>\n"]).encode())
