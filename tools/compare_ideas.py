#!/usr/bin/env python
# SPDX-License-Identifier: Apache-2.0
r"""
Measure whether balanced learning helps on your data: train the plain detector, a detector with each
idea of Libra R-CNN alone, and one with all of them, several times each, and compare the results.

    python tools/compare_ideas.py --config-file configs/BCCD/libra_faster_rcnn_R_18_FPN.yaml \
        --train-json train.json --train-images images/ --val-json val.json --val-images images/ \
        --seeds 1 2 3 --output output/compare

OUTPUT/summary then contains results.md, curves.png and the metrics of each run. results.md lists
means and standard deviations, and the differences to the baseline with confidence intervals.
Differences are between runs with the same seed. Run the same command again to continue an
interrupted comparison.
"""

import argparse
import json
import math
import os
import shutil
import statistics
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor, as_completed
from itertools import product
from pathlib import Path
from typing import Dict, List

from scipy import stats
from tabulate import tabulate
from tqdm import tqdm

from libra_d2.config import VARIANTS, Recipe, changed_values, identify
from libra_d2.data.fingerprint import file_digest
from libra_d2.engine import (
    add_data_arguments,
    config_argument_parser,
    prepare_output_dir,
    read_config,
    register_own_data,
    report_errors,
)
from libra_d2.errors import InputError, one_line
from libra_d2.evaluation import read_metrics
from libra_d2.evaluation.significance import holm_correction, verdict
from libra_d2.utils.atomic_write import atomic_write

# Metrics of each run, by variant and seed.
Runs = Dict[str, Dict[int, List[Dict[str, float]]]]
# The variants of a RetinaNet, which does not sample.
WITHOUT_SAMPLING = ("baseline", "feature_pyramid", "balanced_l1", "all")


def build_argument_parser() -> argparse.ArgumentParser:
    """The arguments of this program."""
    parser = config_argument_parser(__doc__)
    add_data_arguments(parser, required=True)
    parser.add_argument("--variants", nargs="+", choices=VARIANTS, help="default: all")
    parser.add_argument(
        "--seeds", nargs="+", type=int, default=[1, 2, 3], help="one training each; default: 1 2 3"
    )
    parser.add_argument(
        "--jobs",
        type=int,
        default=1,
        help="trainings that run at the same time and share the CPU cores; default: 1",
    )
    parser.add_argument("--output", required=True, metavar="DIR")
    return parser


def is_finished(folder: Path) -> bool:
    """Whether a training has ended with an evaluation."""
    if not (folder / "model_final.pth").exists():
        return False
    return any("bbox/AP" in entry for entry in read_metrics(str(folder / "metrics.json"))[-1:])


def run_options(args: argparse.Namespace, recipe: Recipe, variant: str, seed: int) -> List[str]:
    """The command line options of a training."""
    bins = variant == "all_reference"
    options = [*args.opts, *recipe.variant_options(VARIANTS[variant], reference_bins=bins)]
    options += recipe.options({"output_dir": run_folder(args, variant, seed), "seed": seed})
    return list(map(str, options))


def begin(args: argparse.Namespace, recipe: Recipe, variant: str, seed: int) -> None:
    """
    Create the folder of a training, which says what it is; one that is there must be of the same.

    Args:
        args: of the command line.
        recipe: with the registered data.
        variant, seed: of the training.

    Raises:
        InputError: if there is a training of something else.
    """
    folder = run_folder(args, variant, seed)
    run = read_config(args.config_file, run_options(args, recipe, variant, seed))
    for name in ("train_datasets", "test_datasets", "train_proposals", "test_proposals"):
        if getattr(recipe, name):
            setattr(run, name, getattr(recipe, name))
    # Other than in a run that is resumed, the initial weights matter.
    weights = file_digest(run.weights) if os.path.isfile(run.weights) else run.weights
    now, path = {**identify(run), "initial weights": weights}, folder / "run.json"
    if not path.exists() and (folder / "metrics.json").exists():
        raise InputError(
            f"{folder}: it contains a training with unknown settings; use another --output"
        )
    if path.exists():
        try:
            found = changed_values(json.loads(path.read_text(encoding="utf-8")), now)
        except (ValueError, TypeError) as e:
            raise InputError(f"{path}: {one_line(e)}; use another --output") from e
        if found:
            raise InputError(
                f"{folder}: it contains a training with other settings; use another --output: "
                + "; ".join(found.values())
            )
    folder.mkdir(parents=True, exist_ok=True)
    with atomic_write(str(path), "w") as f:
        json.dump(now, f, indent=1)


def train(args: argparse.Namespace, recipe: Recipe, variant: str, seed: int) -> None:
    """
    Train and evaluate a variant of :data:`VARIANTS`, or resume its training.

    Raises:
        InputError: if the training fails.
    """
    folder = run_folder(args, variant, seed)
    if is_finished(folder):
        return
    command = [sys.executable, "-m", "libra_d2.engine.main", "--resume"]
    command += ["--config-file", args.config_file]
    for split in ("train", "val"):
        for what in ("json", "images", "proposals"):
            value = getattr(args, f"{split}_{what}")
            command += [f"--{split}-{what}", value] if value else []
    command += run_options(args, recipe, variant, seed)
    threads = max((os.cpu_count() or 1) // args.jobs, 1)
    environment = {"OMP_NUM_THREADS": str(threads), **os.environ}
    with open(folder / "stdout.txt", "w", encoding="utf-8") as f:
        code = subprocess.run(command, stdout=f, stderr=subprocess.STDOUT, env=environment)
    if code.returncode != 0:
        lines = (folder / "stdout.txt").read_text(encoding="utf-8").splitlines()
        raise InputError(f"{folder}: the training failed: {lines[-1] if lines else code}")


def run_folder(args: argparse.Namespace, variant: str, seed: int) -> Path:
    """The output directory of a training."""
    return Path(args.output) / variant / f"seed_{seed}"


def mean_and_spread(values: List[float]) -> str:
    """Mean and standard deviation of a sample."""
    spread = f" ± {statistics.stdev(values):.1f}" if len(values) > 1 else ""
    return f"{statistics.mean(values):.1f}{spread}"


def table(runs: Runs) -> str:
    """A Markdown table of the final results of each variant."""
    final = {
        variant: [
            {k.split("/")[1]: v for k, v in metrics[-1].items() if k.startswith("bbox/AP")}
            for metrics in by_seed.values()
        ]
        for variant, by_seed in runs.items()
    }
    first = next(iter(final.values()))[0]
    # APs, APm or APl without objects of that size is NaN.
    names = [name for name in first if first[name] == first[name]]
    order = ("AP", "AP50", "AP75", "APs", "APm", "APl")
    names.sort(key=lambda name: (order.index(name) if name in order else len(order), name))
    rows = [
        [variant, *(mean_and_spread([r[name] for r in results]) for name in names)]
        for variant, results in final.items()
    ]
    headers = ["", *(name.replace("AP-", "AP ") for name in names)]
    return tabulate(rows, headers, "github", disable_numparse=True)


def uncertainty(runs: Runs) -> str:
    """The random variation of AP, pooled over all variants, since each has few runs."""
    finals = [[m[-1]["bbox/AP"] for m in by_seed.values()] for by_seed in runs.values()]
    freedom = sum(len(values) - 1 for values in finals)
    if freedom == 0:
        return "One run of each does not say how far AP differs by chance."
    squares = sum((len(v) - 1) * statistics.variance(v) for v in finals if len(v) > 1)
    deviation = (squares / freedom) ** 0.5
    runs_each = min(map(len, finals))
    return (
        f"A run's AP has a standard deviation of {deviation:.2f} (pooled over all variants, "
        f"{freedom} degrees of freedom), the difference of two means of {runs_each} runs one of "
        f"{deviation * (2 / runs_each) ** 0.5:.2f}."
    )


def differences(runs: Runs, level: float = 0.95) -> str:
    """
    A Markdown table of the paired differences of AP to the baseline; "" if there are no pairs. Runs
    with the same seed see the same images in the same order and start from the same weights, so
    that their difference is less uncertain than that of two means. The p-values of the paired
    t-tests are corrected for the number of rows, see :func:`holm_correction`, so that the chance of
    a wrong "helps" or "harms" in the whole table is 1 - ``level`` at most.

    Args:
        runs: for each variant and seed, the metrics of a run.
        level: of each confidence interval, and of all that the table says together.
    """
    rows, tests, baseline = [], [], runs.get("baseline", {})
    for variant, by_seed in runs.items():
        seeds = [seed for seed in by_seed if seed in baseline]
        if variant == "baseline" or len(seeds) < 2:
            continue
        values = [by_seed[seed][-1]["bbox/AP"] - baseline[seed][-1]["bbox/AP"] for seed in seeds]
        mean, error = statistics.mean(values), float(stats.sem(values))
        t = stats.t(len(values) - 1)
        half = error * float(t.ppf((1 + level) / 2))
        low, high = mean - half, mean + half
        numbers = (f"{mean:+.2f}", f"{error:.2f}", f"{low:+.2f} to {high:+.2f}")
        rows.append((variant, len(seeds), *numbers))
        statistic = abs(mean) / error if error else (math.inf if mean else 0)
        tests.append((low, high, 2 * float(t.sf(statistic))))
    if not rows:
        return ""
    p_values = holm_correction([p for *_, p in tests])
    for i, ((low, high, _), p) in enumerate(zip(tests, p_values)):
        rows[i] += (f"{p:.3f}", verdict(low, high, p, level))
    headers = ["AP, less the baseline's", "pairs", "mean", "standard error"]
    headers += [f"{level:.0%} confidence interval", "corrected p-value", "which says that it"]
    return tabulate(rows, headers, "github", disable_numparse=True)


def plot(runs: Runs, path: Path) -> None:
    """Plot AP over the iterations (mean and range of the runs), and all final results."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 4), layout="constrained")
    left, right = figure.subplots(1, 2)
    for i, (variant, by_seed) in enumerate(runs.items()):
        all_metrics, color = list(by_seed.values()), f"C{i}"
        curves = [
            {min(e["iteration"] + 1, m[-1]["iteration"]): e["bbox/AP"] for e in m if "bbox/AP" in e}
            for m in all_metrics
        ]
        iterations = sorted(set.intersection(*map(set, curves)))
        values = [[curve[x] for curve in curves] for x in iterations]
        left.plot(iterations, list(map(statistics.mean, values)), color=color, label=variant)
        lows, highs = list(map(min, values)), list(map(max, values))
        left.fill_between(iterations, lows, highs, color=color, alpha=0.12)
        final = [m[-1]["bbox/AP"] for m in all_metrics]
        right.plot(final, [i] * len(final), "o", color=color, alpha=0.7)
        right.plot(statistics.mean(final), i, "|", color=color, markersize=18, markeredgewidth=2)
    left.set(xlabel="iteration", ylabel="AP (%)", title="during training")
    left.legend(frameon=False, fontsize=8)
    right.set_yticks(range(len(runs)), runs)
    right.invert_yaxis()
    right.set(xlabel="AP (%)", title="at the end: each run, and the mean")
    for axis in (left, right):
        axis.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=130)


def summarize(args: argparse.Namespace, variants: List[str]) -> str:
    """Write the summary of the finished trainings, and return its tables."""
    summary = Path(args.output) / "summary"
    (summary / "metrics").mkdir(parents=True, exist_ok=True)
    runs: Runs = {}
    for variant in variants:
        for seed in args.seeds:
            folder = run_folder(args, variant, seed)
            if is_finished(folder):
                source = folder / "metrics.json"
                shutil.copy(source, summary / "metrics" / f"{variant}_seed_{seed}.json")
                runs.setdefault(variant, {})[seed] = read_metrics(str(source))
    if not runs:
        raise InputError(f"{args.output}: no training has ended with an evaluation in AP")
    text = "\n\n".join(filter(None, (table(runs), uncertainty(runs), differences(runs))))
    plot(runs, summary / "curves.png")
    command = ["python tools/compare_ideas.py", *(sys.argv[1:] or ["..."])]
    seeds = ", ".join(map(str, args.seeds))
    with atomic_write(str(summary / "results.md"), "w") as f:
        f.write(
            f"# {Path(args.config_file).stem}\n\nSeeds {seeds}: mean and standard deviation of "
            f"AP (%) on `{args.val_json}`.\n\n{text}\n\n![AP](curves.png)\n\n"
            f"```bash\n{' '.join(command)}\n```\n"
        )
    return text


def run(args: argparse.Namespace) -> None:
    """Train all variants that are not finished, and summarize."""
    if args.jobs < 1:
        raise InputError(f"--jobs is {args.jobs}: use 1 or more")
    recipe = read_config(args.config_file, args.opts)
    recipe.output_dir = args.output
    prepare_output_dir(recipe)
    register_own_data(recipe, args)
    args.seeds = list(dict.fromkeys(args.seeds))
    variants = list(dict.fromkeys(args.variants or ())) or list(
        WITHOUT_SAMPLING if recipe.is_retinanet else VARIANTS
    )
    if not recipe.has_ideas and set(variants) != {"baseline"}:
        print(f"{args.config_file} has nothing of Libra R-CNN: only the baseline is trained")
        variants = ["baseline"]
    for seed, variant in product(args.seeds, variants):
        begin(args, recipe, variant, seed)
    with ThreadPoolExecutor(args.jobs) as pool:
        # Seed by seed, so that all variants can be compared early.
        jobs = [pool.submit(train, args, recipe, v, seed) for seed in args.seeds for v in variants]
        for job in tqdm(as_completed(jobs), total=len(jobs), unit="training"):
            if job.exception():
                for other in jobs:
                    other.cancel()
                break
    for job in jobs:
        if not job.cancelled():
            job.result()  # raises its error
    print(summarize(args, variants))
    print(Path(args.output) / "summary" / "results.md")


def main(argv=None) -> None:
    """Command line entry point."""
    report_errors(run, build_argument_parser().parse_args(argv))


if __name__ == "__main__":
    main()
