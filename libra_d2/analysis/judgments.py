# SPDX-License-Identifier: Apache-2.0
"""
Which figures speak for or against each idea, on the data that they were measured on.

The limits are rules of thumb. On COCO, where the ideas help, the paper reports that 70% of randomly
sampled negatives have an IoU below 0.05 (Section 3.1), and that an inlier contributes 30% of the
gradient of an outlier (Section 3.3). Only trainings with and without an idea decide.
"""

from typing import Any, Callable, Dict, List, NamedTuple

import numpy as np

from .objective_level import box_loss_name

__all__ = ["Judgment", "judge"]


class Judgment(NamedTuple):
    """A row of the table."""

    idea: str
    #: name of the figure
    figure: str
    #: what was measured, in words with its numbers
    measured: str
    #: "speaks for it", "speaks against it" or "says little"
    says: str


class _Rule(NamedTuple):
    idea: str
    figure: str
    #: of the two values
    measured: str
    #: [with the idea, without it], shares or similarities; empty if there are none
    values: Callable[[Dict[str, Any]], List[float]]
    #: differences of the first to the second value from which on it speaks for the idea, and up to
    #: which it speaks against it
    pro: float
    contra: float


def _easy_negatives(numbers: Dict[str, Any]) -> List[float]:
    kinds = ("random", "balanced, paper's bins")
    return [numbers["samples"][kind]["negatives"][0] for kind in kinds]


def _instances(numbers: Dict[str, Any]) -> List[float]:
    kinds = ("balanced, paper's bins", "random")
    return [numbers["samples"][kind]["instances"] for kind in kinds]


def _similarities(numbers: Dict[str, Any]) -> List[float]:
    own = np.flatnonzero(~np.array(numbers["features"]["repeated"]))
    similarity = np.array(numbers["features"]["before"]["similarity"])[np.ix_(own, own)]
    fine, coarse = np.triu_indices(len(similarity), 1)
    is_adjacent = coarse - fine == 1
    if is_adjacent.all():  # of two levels, or one
        return []
    values = similarity[fine, coarse]
    return [float(values[is_adjacent].mean()), float(values[~is_adjacent].mean())]


def _inlier_gradients(numbers: Dict[str, Any]) -> List[float]:
    objective = numbers["objective"]
    plain = box_loss_name(objective["smooth_l1_beta"])
    return [objective[kind]["inlier_gradient"] for kind in ("balanced L1", plain)]


_RULES = (
    _Rule(
        *("balanced sampling", "samples"),
        "{0:.0%} of the negatives sampled at random are easy ones, {1:.0%} of those of balanced "
        "sampling",
        *(_easy_negatives, 0.25, 0.1),
    ),
    _Rule(
        *("balanced sampling", "samples"),
        "{0:.0%} of the objects have a positive with balanced sampling, {1:.0%} at random",
        *(_instances, 0.05, 0.01),
    ),
    _Rule(
        *("balanced feature pyramid", "levels"),
        "neighboring levels have a similarity of {0:.2f} before it, others one of {1:.2f}",
        *(_similarities, 0.1, 0.0),
    ),
    _Rule(
        *("balanced L1 loss", "gradient_shares"),
        "inliers contribute {0:.0%} of the gradient of balanced L1 loss, {1:.0%} of that of the "
        "plain detector's",
        *(_inlier_gradients, 0.05, 0.0),
    ),
)
_NEEDS = {"samples": "samples", "levels": "features", "gradient_shares": "objective"}


def judge(numbers: Dict[str, Any]) -> List[Judgment]:
    """
    What the figures of a model say about each idea.

    Args:
        numbers: "samples" of :func:`sample_statistics`, "features" of :func:`feature_statistics`
            and "objective" of :func:`objective_statistics`, as far as there are.

    Returns:
        one row for each rule whose numbers are there.
    """
    rows = []
    for rule in _RULES:
        if _NEEDS[rule.figure] not in numbers:
            continue
        values = rule.values(numbers)
        if not values:
            continue
        difference = values[0] - values[1]
        says = (
            "speaks for it"
            if difference >= rule.pro
            else "speaks against it"
            if difference <= rule.contra
            else "says little"
        )
        rows.append(Judgment(rule.idea, rule.figure, rule.measured.format(*values), says))
    return rows
