# SPDX-License-Identifier: Apache-2.0
"""What the trainings of compare_ideas.py show: tables, curves, and a page of their errors."""

import os
import statistics
from pathlib import Path
from typing import Any, Dict, List, Optional, Sequence, Tuple

import numpy as np
from tabulate import tabulate

from detectron2.data import MetadataCatalog

from libra_d2.data.coco_json import read_coco_json
from libra_d2.evaluation.detection_metrics import DetectionMetrics
from libra_d2.evaluation.error_page import MAX_MODELS, write_error_page
from libra_d2.evaluation.matching import match_detections, read_results
from libra_d2.evaluation.runs import compare_models
from libra_d2.evaluation.significance import (
    detectable_difference,
    deviation_limit,
    holm_correction,
    paired_t_test,
    pairs_needed,
    power,
    verdict,
)
from libra_d2.utils.display import table_cell

# Metrics of each run, by variant and seed.
Runs = Dict[str, Dict[int, List[Dict[str, float]]]]


def mean_and_spread(values: List[float]) -> str:
    """Mean and standard deviation of a sample."""
    spread = f" ± {statistics.stdev(values):.1f}" if len(values) > 1 else ""
    return f"{statistics.mean(values):.1f}{spread}"


def number(value: Optional[float]) -> float:
    """An AP, 0 if it is missing or NaN, because nothing was detected."""
    return 0.0 if value is None or value != value else value


def table(runs: Runs) -> str:
    """A Markdown table of the final results of each variant."""
    final = {
        variant: [
            {k.split("/", 1)[1]: v for k, v in metrics[-1].items() if k.startswith("bbox/AP")}
            for metrics in by_seed.values()
        ]
        for variant, by_seed in runs.items()
    }
    # APs, APm or APl without objects of that size is NaN in all runs, and any AP in a run without
    # detections, which may lack those of classes.
    everything = [run for runs in final.values() for run in runs]
    names = list({name for run in everything for name, value in run.items() if value == value})
    order = ("AP", "AP50", "AP75", "APs", "APm", "APl")
    names.sort(key=lambda name: (order.index(name) if name in order else len(order), name))
    rows = [
        [variant, *(mean_and_spread([number(r.get(name)) for r in results]) for name in names)]
        for variant, results in final.items()
    ]
    headers = ["", *(table_cell(name.replace("AP-", "AP ", 1)) for name in names)]
    return tabulate(rows, headers, "github", disable_numparse=True)


def weakness(runs: Runs) -> str:
    """What to say first of detectors that find next to nothing; "" if one finds more."""
    best = max(statistics.mean(m[-1]["bbox/AP"] for m in x.values()) for x in runs.values())
    if best >= 1:
        return ""
    return (
        f"**No variant has learned to find objects**: the highest mean AP is {best:.2f}. What "
        "follows says nothing about the ideas. Train longer, or start from pretrained weights."
    )


def pooled_deviation(samples: List[List[float]]) -> Tuple[float, int]:
    """The standard deviation within samples, 0 if unknown, and its degrees of freedom."""
    freedom = sum(len(values) - 1 for values in samples)
    squares = sum((len(v) - 1) * statistics.variance(v) for v in samples if len(v) > 1)
    return (squares / freedom) ** 0.5 if freedom else 0.0, freedom


def uncertainty(runs: Runs) -> str:
    """The random variation of AP, pooled over all variants, since each has few runs."""
    finals = [[m[-1]["bbox/AP"] for m in by_seed.values()] for by_seed in runs.values()]
    deviation, freedom = pooled_deviation(finals)
    if freedom == 0:
        return "One run of each does not say how far AP differs by chance."
    runs_each = min(map(len, finals))
    return (
        f"A run's AP has a standard deviation of {deviation:.2f} (pooled over all variants, "
        f"{freedom} degrees of freedom), the difference of two means of {runs_each} runs one of "
        f"{deviation * (2 / runs_each) ** 0.5:.2f}."
    )


def difference_of_pairs(runs: Runs, reference: str) -> Dict[str, List[float]]:
    """AP less that of the reference's run with the same seed, of each other variant with pairs."""
    first = runs.get(reference, {})
    pairs = {
        variant: [
            by_seed[seed][-1]["bbox/AP"] - first[seed][-1]["bbox/AP"]
            for seed in by_seed
            if seed in first
        ]
        for variant, by_seed in runs.items()
        if variant != reference
    }
    return {variant: values for variant, values in pairs.items() if len(values) > 1}


def differences(runs: Runs, reference: str = "baseline", level: float = 0.95) -> str:
    """
    A Markdown table of the paired differences of AP to the reference; "" if there are no pairs.
    Runs with the same seed see the same images in the same order and start from the same weights,
    so that their difference is less uncertain than that of two means. The p-values of the paired
    t-tests are corrected for the number of rows, see :func:`holm_correction`, so that the chance of
    a wrong "helps" or "harms" in the whole table is 1 - ``level`` at most.

    Args:
        runs: for each variant and seed, the metrics of a run.
        reference: the variant that the others are compared with.
        level: of each confidence interval, and of all that the table says together.
    """
    pairs = difference_of_pairs(runs, reference)
    if not pairs:
        return ""
    tests = [paired_t_test(np.array(values), level) for values in pairs.values()]
    p_values = holm_correction([float(test.p_value) for test in tests])
    rows = [
        (
            *(variant, len(values), f"{test.mean:+.2f}", f"{test.standard_error:.2f}"),
            "" if np.isnan(test.low) else f"{test.low:+.2f} to {test.high:+.2f}",
            f"{p:.3f}",
            verdict(float(test.low), float(test.high), p, level),
        )
        for (variant, values), test, p in zip(pairs.items(), tests, p_values)
    ]
    headers = [f"AP, less that of {reference}", "pairs", "mean", "standard error"]
    headers += [f"{level:.0%} confidence interval", "corrected p-value", "which says that it"]
    return tabulate(rows, headers, "github", disable_numparse=True)


def pair_deviation(runs: Runs, reference: str) -> Tuple[float, int]:
    """The :func:`pooled_deviation` of differences of pairs."""
    return pooled_deviation(list(difference_of_pairs(runs, reference).values()))


def found_differences(runs: Runs, reference: str) -> str:
    """How large a difference such a table of AP can find; "" if that is unknown."""
    pairs = difference_of_pairs(runs, reference)
    deviation, freedom = pooled_deviation(list(pairs.values()))
    if not deviation:
        return ""
    num, limit = min(map(len, pairs.values())), deviation_limit(deviation, freedom)
    smallest, larger = (detectable_difference(x, num, len(pairs)) for x in (deviation, limit))
    found = f"a true difference of {smallest:.1f} AP is found"
    only = f"only a difference of {larger:.1f} AP is found so often"
    if smallest > 100:  # which no two APs differ by
        found = "not even a difference of 100 AP is found"
    if larger > 100:
        only = "no difference is found so often. Train more seeds"
    return (
        f"Differences of pairs have a standard deviation of {deviation:.2f}. With {num} pairs of "
        f"each, {found} with a probability of 80%, and a true difference of 1 AP with "
        f"{power(1.0, deviation, num, len(pairs)):.0%}. This standard deviation is an estimate: it "
        f"may well be as large as {limit:.2f} (the upper end of a one-sided 80% confidence "
        f"interval), and then {only}. A difference that cannot be told from chance may still be "
        "there."
    )


def plan(wanted: float, deviation: float, source: str, num_tests: int, freedom: int = 0) -> str:
    """
    How many seeds a comparison needs.

    Args:
        wanted: the difference in AP that should be found.
        deviation: see :func:`pair_deviation`, above 0.
        source: where it comes from.
        num_tests: how many variants are compared with the first.
        freedom: degrees of freedom of the deviation, or 0 if it was not estimated.
    """
    each = f" in each of {num_tests} comparisons" if num_tests > 1 else ""
    lines = [
        f"Differences of pairs of runs have a standard deviation of {deviation:.2f} AP ({source}). "
        f"So many seeds find a true difference{each} with a probability of 80%:"
    ]
    sizes = sorted({wanted, *(round(deviation * x, 1) for x in (0.5, 1, 2))} - {0.0})
    columns = {"seeds": deviation}
    if freedom:
        limit = deviation_limit(deviation, freedom)
        columns[f"seeds if it is {limit:.2f}"] = limit
    rows = [
        (f"{x:g}", *(pairs_needed(x, y, num_tests) or "more than 1000" for y in columns.values()))
        for x in sizes
    ]
    lines.append(tabulate(rows, ["AP", *columns], "github", disable_numparse=True))
    if freedom:
        lines.append(
            f"The standard deviation is an estimate: it may well be as large as {limit:.2f} (the "
            "upper end of a one-sided 80% confidence interval). Plan with the last column."
        )
    return "\n\n".join(lines)


def curve(by_seed: Dict[int, List[Dict[str, float]]]) -> Dict[str, List[float]]:
    """Where all runs of a variant were evaluated: "iterations", and "mean", "low" and "high" AP."""
    curves = [
        {min(e["iteration"] + 1, m[-1]["iteration"]): e["bbox/AP"] for e in m if "bbox/AP" in e}
        for m in by_seed.values()
    ]
    iterations = sorted(set.intersection(*map(set, curves)))
    values = [[each[x] for each in curves] for x in iterations]
    columns = {"mean": statistics.mean, "low": min, "high": max}
    return {
        "iterations": iterations,
        **{name: list(map(function, values)) for name, function in columns.items()},
    }


def plot(runs: Runs, path: Path) -> None:
    """Plot AP over the iterations (mean and range of the runs), and all final results."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 4), layout="constrained")
    left, right = figure.subplots(1, 2)
    curves = {variant: curve(by_seed) for variant, by_seed in runs.items()}
    has_curves = any(len(x["iterations"]) > 1 for x in curves.values())
    for i, (variant, by_seed) in enumerate(runs.items()):
        color, seen = f"C{i}", curves[variant]
        if has_curves:
            x = seen["iterations"]
            left.plot(x, seen["mean"], color=color, label=variant)
            left.fill_between(x, seen["low"], seen["high"], color=color, alpha=0.12)
        final = [m[-1]["bbox/AP"] for m in by_seed.values()]
        right.plot(final, [i] * len(final), "o", color=color, alpha=0.7)
        right.plot(statistics.mean(final), i, "|", color=color, markersize=18, markeredgewidth=2)
    if has_curves:
        left.set(xlabel="iteration", ylabel="AP (%)", title="during training")
        left.legend(frameon=False, fontsize=8)
    else:
        left.set_title("no evaluation during training")
        left.set_axis_off()
    right.set_yticks(range(len(runs)), runs)
    right.invert_yaxis()
    right.set(xlabel="AP (%)", title="at the end: each run, and the mean")
    for axis in (left, right):
        axis.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=130)


def write_page(
    path: Path,
    runs: Runs,
    reference: str,
    results: Dict[str, Dict[int, str]],
    dataset_name: str,
    notes: Sequence[str],
) -> Dict[str, Any]:
    """
    Write the page of :func:`write_error_page` about all variants; returns its numbers, {} if there
    is nothing to write it from.

    Args:
        path: of the file.
        runs, reference: see :func:`differences`.
        results: for each variant and seed, the path of the detections in COCO's format.
        dataset_name: the registered dataset that they were made on.
        notes: what precedes the tables, in Markdown.
    """
    metadata = MetadataCatalog.get(dataset_name)
    with_pairs = [x for x in runs if x != reference and set(runs[x]) & set(runs[reference])]
    order = [reference, *with_pairs]
    files = {x: {seed: results[x][seed] for seed in runs[x]} for x in order}
    is_there = all(os.path.exists(file) for own in files.values() for file in own.values())
    if not metadata.get("json_file") or not is_there or len(order) > MAX_MODELS:
        return {}
    dataset, _ = read_coco_json(metadata.json_file)
    detections: List[List[Dict]] = []  # of the first run of each
    models: List[Dict[int, DetectionMetrics]] = []
    for name in order:
        models.append({})
        for seed, file in files[name].items():
            found = read_results(file)
            models[-1][seed] = DetectionMetrics(match_detections(dataset, found, name=file))
            if len(models[-1]) == 1:
                detections.append(found)
    numbers = compare_models(models)
    for name, model in zip(order, numbers["models"]):
        model.update(name=name, seeds=list(files[name]))
    write_error_page(
        *(str(path), numbers, dataset, [next(iter(x.values())) for x in models], detections),
        names=order,
        title=f"{reference} and other variants on {dataset_name}",
        image_root=metadata.get("image_root"),
        curves=[curve(runs[x]) for x in order],
        notes=[x.replace("**", "") for x in notes if x],
    )
    return numbers
