#!/usr/bin/env python
# SPDX-License-Identifier: Apache-2.0
r"""
Measure whether balanced learning helps on your data: train the plain detector, a detector with each
idea of Libra R-CNN alone, and one with all of them, several times each, and compare the results.

    python tools/compare_ideas.py --config-file configs/BCCD/libra_faster_rcnn_R_18_FPN.yaml \
        --train-json train.json --train-images images/ --val-json val.json --val-images images/ \
        --seeds 1 2 3 4 5 --output output/compare

OUTPUT/summary then contains results.md (means and standard deviations of AP, and the differences to
the baseline with confidence intervals), index.html (the same for errors, IoUs, sizes and classes,
and the images on which the detectors differ most), and the metrics of each run. Differences are
between runs with the same seed. Run the same command again to continue an interrupted comparison.

With --find 1.0 the program says how many seeds it takes to find a difference of 1 AP, and trains
nothing. Variants of your own have a name, and a config, KEY VALUE pairs, or both:

    python tools/compare_ideas.py --variants all \
        --variant beta_half MODEL.LIBRA.BALANCED_L1.BETA 0.5 --config-file ...
"""

import argparse
import json
import os
import queue
import re
import shlex
import shutil
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor, as_completed
from importlib.util import find_spec
from itertools import product
from pathlib import Path
from typing import Any, Dict, List, NamedTuple

import torch
from tqdm import tqdm

from libra_d2.config import VARIANTS, Recipe, changed_values, check_datasets, identify
from libra_d2.data.fingerprint import file_digest
from libra_d2.engine import (
    add_data_arguments,
    config_argument_parser,
    prepare_output_dir,
    read_config,
    register_own_data,
    report_errors,
    title_of,
)
from libra_d2.errors import InputError, one_line
from libra_d2.evaluation import read_metrics
from libra_d2.tools.comparison_summary import (
    Runs,
    differences,
    found_differences,
    number,
    pair_deviation,
    plan,
    plot,
    table,
    uncertainty,
    weakness,
    write_page,
)
from libra_d2.utils.atomic_write import atomic_write
from libra_d2.utils.safe_reading import read_weights

# The variants of a RetinaNet, which does not sample.
WITHOUT_SAMPLING = ("baseline", "feature_pyramid", "balanced_l1", "all")
# Of differences in AP of a small detector on BCCD, see docs/results/bccd.md.
DEVIATION = 1.1


class Variant(NamedTuple):
    """What is trained under a name."""

    name: str
    config_file: str
    #: after those of the command line that all variants share
    options: List[str]
    #: of the config, with whatever options
    recipe: Recipe


def build_argument_parser() -> argparse.ArgumentParser:
    """The arguments of this program."""
    parser = config_argument_parser(__doc__)
    add_data_arguments(parser)
    parser.add_argument(
        "--variants",
        nargs="+",
        choices=VARIANTS,
        help="default: all, or only the config as it is if there is a --variant. The others are "
        "compared with the baseline or, without it, with the first",
    )
    parser.add_argument(
        "--variant",
        nargs="+",
        action="append",
        default=[],
        metavar=("NAME", "CONFIG or KEY VALUE"),
        help="one more variant; may be repeated. Another option must follow",
    )
    parser.add_argument(
        "--seeds",
        nargs="+",
        type=int,
        default=[1, 2, 3, 4, 5],
        help="one training each; default: 1 2 3 4 5",
    )
    parser.add_argument(
        "--jobs",
        type=int,
        help="trainings that run at the same time: they share the CPU cores, and each uses one of "
        "the visible GPUs; default: one for each GPU",
    )
    parser.add_argument(
        "--find", type=float, metavar="AP", help="say how many seeds find a difference of this size"
    )
    parser.add_argument(
        "--deviation",
        type=float,
        metavar="AP",
        help="for --find: the standard deviation of the difference between two runs of a seed; "
        "default: that of the runs in --output",
    )
    parser.add_argument("--output", required=True, metavar="DIR")
    return parser


def choose_variants(args: argparse.Namespace, recipe: Recipe) -> List[Variant]:
    """
    What is trained, in the order of the tables.

    Raises:
        InputError: if a name is no name for a folder, or is there twice.
    """
    as_it_is = "all" if recipe.has_ideas else "baseline"
    names = list(dict.fromkeys(args.variants or ()))
    if not names:
        every = WITHOUT_SAMPLING if recipe.is_retinanet else VARIANTS
        names = [as_it_is] if args.variant else list(every)
    if not recipe.has_ideas and set(names) != {as_it_is}:
        print(f"{args.config_file} has nothing of Libra R-CNN: only the baseline is trained")
        names = [as_it_is]
    found = []
    for name in names:
        bins = name == "all_reference"
        options = recipe.variant_options(VARIANTS[name], reference_bins=bins)
        found.append(Variant(name, args.config_file, options, recipe))
    for name, *options in args.variant:
        has_config = options and options[0].endswith((".yaml", ".py"))
        config_file = options.pop(0) if has_config else args.config_file
        if not re.fullmatch(r"\w[\w.-]*", name):
            raise InputError(f"--variant {name!r}: use a name of letters, digits, _, - and .")
        if name in {x.name for x in found} | {"summary"}:
            raise InputError(f"--variant {name!r}: this name is taken; use another one")
        own = read_config(config_file, [*args.opts, *options])
        found.append(Variant(name, config_file, options, own))
    return found


def reference_of(variants: List[Variant]) -> str:
    """The variant that the others are compared with."""
    names = [x.name for x in variants]
    return "baseline" if "baseline" in names else names[0]


def is_finished(folder: Path) -> bool:
    """Whether a training has ended with an evaluation."""
    if not (folder / "model_final.pth").exists():
        return False
    return any("bbox/AP" in entry for entry in read_metrics(str(folder / "metrics.json"))[-1:])


def run_options(args: argparse.Namespace, variant: Variant, seed: int) -> List[str]:
    """The command line options of a training."""
    own = {"output_dir": str(run_folder(args, variant.name, seed)), "seed": seed}
    return list(map(str, [*args.opts, *variant.options, *variant.recipe.options(own)]))


def begin(args: argparse.Namespace, recipe: Recipe, variant: Variant, seed: int) -> None:
    """
    Create the folder of a training, which says what it is; one that is there must be of the same.

    Args:
        args: of the command line.
        recipe: with the registered data.
        variant, seed: of the training.

    Raises:
        InputError: if there is a training of something else, or it is evaluated on other data.
    """
    folder = run_folder(args, variant.name, seed)
    run = read_config(variant.config_file, run_options(args, variant, seed))
    own = {"train": args.train_json, "test": args.val_json}
    for name in (f"{split}_{x}" for split in own if own[split] for x in ("datasets", "proposals")):
        if getattr(recipe, name):
            setattr(run, name, getattr(recipe, name))
    if tuple(run.test_datasets) != tuple(recipe.test_datasets):
        raise InputError(
            f"variant {variant.name}: {run.name_of('test_datasets')} is {run.test_datasets}, not "
            f"{recipe.test_datasets} as in {args.config_file}: evaluate all on the same data"
        )
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


def visible_gpus() -> List[str]:
    """What CUDA_VISIBLE_DEVICES may hold, one GPU each."""
    own = os.environ.get("CUDA_VISIBLE_DEVICES")
    num_gpus = torch.cuda.device_count()
    return own.split(",")[:num_gpus] if own else list(map(str, range(num_gpus)))


def environments(num_jobs: int) -> List[Dict[str, str]]:
    """For each of the trainings that run at the same time: its share of the machine."""
    gpus = visible_gpus()
    threads = str(max((os.cpu_count() or 1) // num_jobs, 1))
    shares: List[Dict[str, str]] = []
    for job in range(num_jobs):
        gpu = {"CUDA_VISIBLE_DEVICES": gpus[job % len(gpus)]} if gpus else {}
        shares.append({"OMP_NUM_THREADS": threads, **os.environ, **gpu})
    return shares


def train(args: argparse.Namespace, variant: Variant, seed: int, shares: "queue.Queue") -> None:
    """
    Train and evaluate a variant, or resume its training, when one of the ``shares`` of the machine
    is free.

    Raises:
        InputError: if the training fails.
    """
    folder = run_folder(args, variant.name, seed)
    if is_finished(folder):
        return
    command = [sys.executable, "-m", "libra_d2.engine.main", "--resume"]
    command += ["--config-file", variant.config_file]
    for split in ("train", "val"):
        for what in ("json", "images", "proposals"):
            value = getattr(args, f"{split}_{what}")
            command += [f"--{split}-{what}", value] if value else []
    command += run_options(args, variant, seed)
    environment = shares.get()
    with open(folder / "stdout.txt", "w", encoding="utf-8") as f:
        code = subprocess.run(command, stdout=f, stderr=subprocess.STDOUT, env=environment)
    shares.put(environment)
    if code.returncode != 0:
        log = (folder / "stdout.txt").read_text(encoding="utf-8", errors="replace")
        lines = log.splitlines()
        raise InputError(f"{folder}: the training failed: {lines[-1] if lines else code}")


def train_all(args: argparse.Namespace, variants: List[Variant]) -> None:
    """Train what is not finished."""
    num_jobs = args.jobs or max(len(visible_gpus()), 1)
    shares: queue.Queue[Dict[str, str]] = queue.Queue()
    for share in environments(num_jobs):
        shares.put(share)
    pool, failed = ThreadPoolExecutor(num_jobs), threading.Event()

    def train_unless_failed(variant: Variant, seed: int) -> None:
        if failed.is_set():
            return
        try:
            train(args, variant, seed, shares)
        except BaseException:
            failed.set()  # before this thread takes the next one
            raise

    try:
        # Seed by seed, so that all variants can be compared early.
        runs = [(variant, seed) for seed in args.seeds for variant in variants]
        jobs = [pool.submit(train_unless_failed, *run) for run in runs]
        for job in tqdm(as_completed(jobs), total=len(jobs), unit="training"):
            job.result()  # raises its error
    finally:  # also when interrupted
        pool.shutdown(cancel_futures=True)


def run_folder(args: argparse.Namespace, variant: str, seed: int) -> Path:
    """The output directory of a training."""
    return Path(args.output) / variant / f"seed_{seed}"


def finished_runs(args: argparse.Namespace, variants: List[Variant]) -> Runs:
    """The metrics of the trainings that have ended. AP without detections, which is NaN, is 0."""
    runs: Runs = {}
    for variant, seed in product(variants, args.seeds):
        folder = run_folder(args, variant.name, seed)
        if is_finished(folder):
            metrics = read_metrics(str(folder / "metrics.json"))
            for entry in metrics:
                if "bbox/AP" in entry:
                    entry["bbox/AP"] = number(entry["bbox/AP"])
            runs.setdefault(variant.name, {})[seed] = metrics
    return runs


def say_how_many_seeds(args: argparse.Namespace, variants: List[Variant]) -> None:
    """Print what --find asks for."""
    for option in ("find", "deviation"):
        value = vars(args)[option]
        if value is not None and not 0 < value < 100:
            raise InputError(f"--{option} is {value:g}: use a difference in AP above 0")
    folders = filter(is_finished, Path(args.output).glob("*/seed_*"))
    args.seeds = sorted({int(x.name[5:]) for x in folders if x.name[5:].isdecimal()})
    own, freedom = pair_deviation(finished_runs(args, variants), reference_of(variants))
    deviation, source = args.deviation, "--deviation"
    if deviation is None and own:
        deviation, source = own, f"of the runs in {args.output}"
    else:
        freedom = 0
    if deviation is None:
        source = "of a small detector on BCCD: yours may differ; train a few seeds and ask again"
        deviation = DEVIATION
    print(plan(args.find, deviation, source, max(len(variants) - 1, 1), freedom))


def unfairness(recipe: Recipe) -> str:
    """What to say if all variants start from a detector that has the ideas, else ""."""
    weights = recipe.weights or ""
    has_pyramid = weights.startswith("libra://")
    if os.path.isfile(weights):
        content = read_weights(weights)
        state = next((content[k] for k in ("model", "state_dict") if k in content), content)
        has_pyramid = any("backbone.bfp." in k or k.startswith("neck.1.") for k in state)
    if not has_pyramid:
        return ""
    return (
        f"{recipe.name_of('weights')} {weights} is a detector with the ideas. All variants start "
        "from it, which favors those that have them: start from ImageNet's weights, or from those "
        "of a plain detector"
    )


def summarize(
    args: argparse.Namespace, variants: List[Variant], dataset_name: str, warning: str = ""
) -> str:
    """Write the summary of the finished trainings, and return its tables, below a ``warning``."""
    summary = Path(args.output) / "summary"
    (summary / "metrics").mkdir(parents=True, exist_ok=True)
    runs, results = finished_runs(args, variants), {}
    if not runs:
        raise InputError(f"{args.output}: no training has ended with an evaluation in AP")
    for variant, by_seed in runs.items():
        folders = {seed: run_folder(args, variant, seed) for seed in by_seed}
        for seed, folder in folders.items():
            name = f"{variant}_seed_{seed}.json"
            shutil.copy(folder / "metrics.json", summary / "metrics" / name)
        detections = Path("inference/coco_instances_results.json")
        results[variant] = {seed: str(x / detections) for seed, x in folders.items()}
    reference = reference_of(variants)
    notes = [f"**Warning**: {warning}." if warning else "", weakness(runs)]
    parts = [*notes, table(runs), uncertainty(runs), differences(runs, reference)]
    text = "\n\n".join(filter(None, [*parts, found_differences(runs, reference)]))
    plot(runs, summary / "curves.png")
    arguments = shlex.join(sys.argv[1:]) or "..."
    seeds, data = ", ".join(map(str, args.seeds)), args.val_json or dataset_name
    with atomic_write(str(summary / "results.md"), "w") as f:
        f.write(
            f"# {title_of(args.config_file)}\n\nSeeds {seeds}: mean and standard deviation of "
            f"AP (%) on `{data}`.\n\n{text}\n\n![AP](curves.png)\n\n"
            f"```bash\npython tools/compare_ideas.py {arguments}\n```\n"
        )
    if find_spec("plotly") is None:
        return f'{text}\n\nFor a page about their errors, run pip install "libra_d2[report]"'
    numbers: Dict[str, Any] = {}
    if reference in runs:
        page = summary / "index.html"
        numbers = write_page(page, runs, reference, results, dataset_name, notes)
    if numbers:
        with atomic_write(str(summary / "errors.json"), "w") as f:
            json.dump(numbers, f, allow_nan=False)
        text += f"\n\n{summary / 'index.html'}"
    return text


def run(args: argparse.Namespace) -> None:
    """Train all variants that are not finished, and summarize."""
    if args.jobs is not None and args.jobs < 1:
        raise InputError(f"--jobs is {args.jobs}: use 1 or more")
    if min(args.seeds) < 0:
        raise InputError(f"--seeds {min(args.seeds)}: use 0 or more; others are not repeatable")
    recipe = read_config(args.config_file, args.opts)
    args.seeds = list(dict.fromkeys(args.seeds))
    variants = choose_variants(args, recipe)
    if args.find is not None:
        say_how_many_seeds(args, variants)
        return
    recipe.output_dir = args.output
    prepare_output_dir(recipe)
    register_own_data(recipe, args)
    check_datasets([*recipe.train_datasets, *recipe.test_datasets])
    if len(recipe.test_datasets) != 1:
        raise InputError(
            f"{recipe.name_of('test_datasets')} is {recipe.test_datasets}: variants are compared "
            "on one dataset; name it, or use --val-json and --val-images"
        )
    warning = unfairness(recipe) if len(variants) > 1 and recipe.has_ideas else ""
    if warning:
        print(f"warning: {warning}", file=sys.stderr)
    for seed, variant in product(args.seeds, variants):
        begin(args, recipe, variant, seed)
    train_all(args, variants)
    print(summarize(args, variants, recipe.test_datasets[0], warning))
    print(Path(args.output) / "summary" / "results.md")


def main(argv=None) -> None:
    """Command line entry point."""
    report_errors(run, build_argument_parser().parse_args(argv))


if __name__ == "__main__":
    main()
