# SPDX-License-Identifier: Apache-2.0
from difflib import get_close_matches
from typing import Any, Dict, Iterable, Iterator, Tuple

__all__ = ["did_you_mean", "leaves"]


def leaves(node: Dict[str, Any], prefix: str = "") -> Iterator[Tuple[str, Any]]:
    """The dotted key and the value of each leaf of nested dictionaries."""
    for name, value in node.items():
        if isinstance(value, dict):
            yield from leaves(value, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", value


def did_you_mean(key: str, known: Iterable[str], cutoff: float = 0.8) -> str:
    """
    What to append to a message about an unknown key: the known one that it resembles most, by a
    ratio of difflib; "" if none is similar.
    """
    similar = get_close_matches(key, known, n=1, cutoff=cutoff)
    return f"; did you mean {similar[0]}?" if similar else ""
