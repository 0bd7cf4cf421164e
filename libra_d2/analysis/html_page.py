# SPDX-License-Identifier: Apache-2.0
"""A page with the figures of one model, or of two side by side."""

import base64
import html
from dataclasses import dataclass, field
from typing import Dict, List, Sequence

from ..utils.web_page import write_web_page
from .judgments import Judgment

__all__ = ["Section", "Side", "write_page"]

_STYLE = """
.sides {
  display: grid; gap: 0 2rem;
  grid-template-columns: repeat(auto-fit, minmax(min(100%, 32rem), 1fr));
}
main { max-width: 60rem; }
main.two { max-width: none; }
.table { overflow: auto; }
table { border-collapse: collapse; }
th, td { padding: 0.2rem 0.7rem 0.2rem 0; text-align: left; vertical-align: top; }
th { border-bottom: 1px solid var(--line); }
td:last-child { white-space: nowrap; font-weight: 600; }
"""
_MARKS = {"speaks for it": "▲ speaks for it", "speaks against it": "▼ speaks against it"}


@dataclass
class Section:
    """Title and text, both plain text, and the path of a PNG file."""

    title: str
    text: str
    picture: str


@dataclass
class Side:
    """What the page shows of a model."""

    #: the model and the data, plain text
    about: str
    judgments: List[Judgment] = field(default_factory=list)
    #: by the name of the figure
    sections: Dict[str, Section] = field(default_factory=dict)


def _judgments(side: Side) -> str:
    cells = [
        (x.idea, f'<a href="#{x.figure}">{html.escape(x.measured)}</a>', _MARKS.get(x.says, x.says))
        for x in side.judgments
    ]
    rows = "".join("<tr>" + "".join(f"<td>{x}</td>" for x in row) + "</tr>" for row in cells)
    head = "<tr><th>idea</th><th>measured</th><th>which</th></tr>"
    return f'<div class="table"><table>{head}{rows}</table></div>' if rows else "<p>Nothing.</p>"


def _figure(section: Section) -> str:
    with open(section.picture, "rb") as f:
        data = base64.b64encode(f.read()).decode("ascii")
    title, text = html.escape(section.title), html.escape(section.text)
    return f'<figure><p>{text}</p><img alt="{title}" src="data:image/png;base64,{data}"></figure>'


def write_page(path: str, title: str, introduction: str, sides: Sequence[Side]) -> None:
    """
    Write an HTML file with its pictures embedded.

    Args:
        path: of the file.
        title, introduction: plain text.
        sides: one model, or two that are shown side by side.
    """
    parts: List[str] = [f"<p>{html.escape(introduction)}</p>"]

    def add(title: str, own: Sequence[str], id: str) -> None:
        letters = ["<h3>A</h3>", "<h3>B</h3>"] if len(sides) > 1 else [""]
        columns = "".join(f"<div>{x}{y}</div>" for x, y in zip(letters, own))
        parts.append(f'<h2 id="{id}">{html.escape(title)}</h2><div class="sides">{columns}</div>')

    abouts = [f"<p>{html.escape(x.about)}</p>" for x in sides]
    judged = [about + _judgments(side) for about, side in zip(abouts, sides)]
    add("What the figures say", judged, "judgments")
    parts.append(
        "<p>The limits are rules of thumb, see docs/error_analysis.md. Whether an idea helps, only "
        "trainings with and without it decide: tools/compare_ideas.py.</p>"
    )
    names = dict.fromkeys(name for side in sides for name in side.sections)
    for name in names:
        found = [side.sections.get(name) for side in sides]
        figures = [_figure(x) if x else "<p>This model has none.</p>" for x in found]
        add(next(x.title for x in found if x), figures, name)
    body = "\n".join(parts)
    kind = " class=two" if len(sides) > 1 else ""
    write_web_page(path, title, f"<main{kind}>{body}</main>", _STYLE)
