# SPDX-License-Identifier: Apache-2.0
from difflib import get_close_matches
from typing import Any, Dict, Iterable, Iterator, Tuple

__all__ = ["leaves", "similar_key"]


def leaves(node: Dict[str, Any], prefix: str = "") -> Iterator[Tuple[str, Any]]:
    """The dotted key and the value of each leaf of nested dictionaries."""
    for name, value in node.items():
        if isinstance(value, dict):
            yield from leaves(value, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", value


def similar_key(key: str, known: Iterable[str], cutoff: float = 0.8) -> str:
    """The known key that ``key`` resembles most, by a ratio of difflib; "" if none is similar."""
    return next(iter(get_close_matches(key, known, n=1, cutoff=cutoff)), "")
