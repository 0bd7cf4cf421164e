# SPDX-License-Identifier: Apache-2.0
"""The map in docs/architecture.md."""

import ast
import re

import pytest
from conftest import ROOT

PACKAGE = ROOT / "libra_d2"
# Each room, and those that it may import from.
ROOMS = {
    "errors": (),
    "utils": ("errors",),
    "modeling": ("errors",),
    "checkpoint": ("errors", "utils"),
    "data": ("errors", "utils"),
    "evaluation": ("errors", "utils", "modeling", "data"),
    "analysis": ("utils", "modeling"),
    "lazy": ("errors", "modeling"),
    "config": ("errors", "modeling", "checkpoint", "data", "evaluation", "lazy"),
    "model_zoo": ("errors", "utils", "checkpoint", "config"),
    "engine": (
        *("errors", "utils", "modeling", "checkpoint", "data", "evaluation", "config"),
        "model_zoo",
    ),
}


def imported_rooms(path):
    """The rooms of this package that a module imports from."""
    package = path.relative_to(ROOT).with_suffix("").parts
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom):
            base = package[: -node.level] if node.level else ()
            module = [*base, *(node.module or "").split(".")]
            if module[0] == "libra_d2":
                yield from [x for x in module[1:2] if x] or [x.name for x in node.names]
        elif isinstance(node, ast.Import):
            yield from (x.name.split(".")[1] for x in node.names if x.name.startswith("libra_d2."))


@pytest.mark.parametrize("room", ROOMS)
def test_imports(room):
    """A room imports only from those below it."""
    assert {path.stem for path in PACKAGE.iterdir() if path.stem in ROOMS} == set(ROOMS)
    folder = PACKAGE / room
    for path in folder.rglob("*.py") if folder.is_dir() else [folder.with_suffix(".py")]:
        above = set(imported_rooms(path)) - {room, *ROOMS[room]}
        assert not above, f"{path.relative_to(ROOT)} imports from {above}"


def test_only_config_knows_the_language():
    """Nothing outside the config room depends on the config language."""
    files = [*PACKAGE.rglob("*.py"), *(ROOT / "tools").glob("*.py"), *(ROOT / "demo").glob("*.py")]
    for path in files:
        # These take and return configs of one language.
        if PACKAGE / "config" in path.parents or path.name in ("lazy.py", "model_zoo.py"):
            continue
        asked = r"isinstance\(.*(Lazy|DictConfig|CfgNode)|LazyRecipe|YamlRecipe"
        assert not re.search(asked, path.read_text(encoding="utf-8")), path


def test_map():
    """The page names every room."""
    page = (ROOT / "docs/architecture.md").read_text(encoding="utf-8")
    assert not [room for room in ROOMS if f"`{room}" not in page]
