# SPDX-License-Identifier: Apache-2.0
from typing import Any, Dict, Iterator, Tuple

__all__ = ["leaves"]


def leaves(node: Dict[str, Any], prefix: str = "") -> Iterator[Tuple[str, Any]]:
    """The dotted key and the value of each leaf of nested dictionaries."""
    for name, value in node.items():
        if isinstance(value, dict):
            yield from leaves(value, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", value
