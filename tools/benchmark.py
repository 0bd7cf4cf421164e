#!/usr/bin/env python
# SPDX-License-Identifier: Apache-2.0
"""
Measure time and memory: of whole models, compared with those of Detectron2 and, if it is installed,
mmdetection; of each optimization; of exported files; of growing images and numbers of proposals; of
the parts of Libra R-CNN; and of loading images.

    python tools/benchmark.py --only models --output benchmark.json --plot benchmark.png

mmcv-lite has no compiled operators: if it is installed, add tests/reference to PYTHONPATH.

The candidates take turns in the same process, call by call, so that changes of the machine's speed
affect all of them. Times are medians, plus or minus half the interquartile range. Memory is the
peak that one call adds. Ratios are those of the medians.
"""

import argparse
import json
import os
import platform
import sys
from dataclasses import asdict
from typing import Dict, Iterator, List, Tuple

import numpy as np
import torch
from matplotlib.backend_bases import FigureCanvasBase
from tabulate import tabulate
from tqdm import tqdm

from libra_d2.engine import argument_parser, report_errors
from libra_d2.errors import InputError
from libra_d2.tools.benchmark_models import (
    LEVERS,
    OURS,
    PLAIN,
    REFERENCE,
    SYSTEMS,
    exported_files,
    growth,
    levers,
    profile,
    whole_models,
)
from libra_d2.tools.benchmark_parts import (
    attention,
    box_loss,
    loading,
    non_local,
    pyramid,
    sampling,
)
from libra_d2.utils.atomic_write import atomic_write
from libra_d2.utils.meter import Meter, Result
from libra_d2.utils.output_path import output_path

PARTS = (
    *("models", "levers", "files", "growth"),
    *("attention", "non-local", "pyramid", "sampling", "loss", "loading"),
)
WITHOUT_REFERENCE = {"levers", "growth", "attention"}
GROWTH = ("pixels", "proposals")


def ratio(result: Result, name: str, other: str) -> str:
    if name == other or not {name, other} <= result.values.keys():
        return ""
    return f"{result.values[name] / max(result.values[other], 1e-9):.2f}"


def cell(result: Result, name: str) -> str:
    spread = f" ± {result.spreads[name] / 2:.2g}" if name in result.spreads else ""
    return f"{result.values[name]:.3g}{spread}"


def table(results: List[Result]) -> str:
    """
    In Markdown, a line for each that was compared, with its ratios to the plain detector (and that
    of the operations) and to mmdetection, or else to the first one.
    """
    rows = []
    for result in results:
        first = next(iter(result.values))
        others = (PLAIN, REFERENCE) if OURS in result.values else (first, first)
        for name in result.values:
            plain = ratio(result, name, others[0])
            if result.expected and name == OURS and plain:
                plain += f" ({result.expected:.2f})"
            reference = ratio(result, name, others[1]) if others[1] != others[0] else ""
            row = [result.what, name, result.unit, cell(result, name), plain, reference]
            rows.append(row if name == first else ["", *row[1:]])
    headers = ["what", "", "unit", "median", f"to {PLAIN} or the first", f"to {REFERENCE}"]
    return tabulate(rows, headers, tablefmt="github", disable_numparse=True)


def exponents(results: List[Result]) -> str:
    """Fitted exponents of how time grows, as lines."""
    lines = []
    for what, series in growth_series(results).items():
        for name, (numbers, times) in series.items():
            slope = np.polyfit(np.log(numbers), np.log(times), 1)[0]
            lines.append(f"{what}: {name}: time grows with the number to the {slope:.2f}")
    return "\n".join(lines)


def growth_series(results: List[Result]) -> Dict[str, Dict[str, Tuple[List[int], List[float]]]]:
    """Numbers and times of each model, by what grows and the system."""
    series: Dict[str, Dict[str, Tuple[List[int], List[float]]]] = {}
    for result in results:
        if result.what.startswith(GROWTH):
            what, number = result.what.rsplit(", ", 1)
            for name, value in result.values.items():
                numbers, times = series.setdefault(what, {}).setdefault(name, ([], []))
                numbers.append(int(number))
                times.append(value)
    return series


def plot(results: List[Result], path: str) -> None:
    """What grows, as far as it was measured: models, and the non-local block."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    panels = [(what, "time (ms)", x) for what, x in growth_series(results).items()]
    for unit, label in (("ms", "time (ms)"), ("MB", "peak memory added (MB)")):
        chosen = [r for r in results if r.what.startswith("non-local") and r.unit == unit]
        positions = [int(r.what.split()[2]) * int(r.what.split()[4].strip(",")) for r in chosen]
        if chosen:
            lines = {n: (positions, [r.values[n] for r in chosen]) for n in chosen[0].values}
            panels.append(("positions, non-local block, both passes", label, lines))
    size = (4.5 * max(len(panels), 1), 3.6)
    figure, axes = plt.subplots(
        1, max(len(panels), 1), figsize=size, layout="constrained", squeeze=False
    )
    for axis, (what, label, lines) in zip(axes[0], panels):
        number, title = what.split(", ", 1)
        for name, (x, y) in lines.items():
            axis.loglog(x, y, "o-", label=name)
        axis.set(xlabel=number, ylabel=label, title=title)
        axis.grid(True, which="both", alpha=0.3)
        axis.legend()
    with atomic_write(path) as f:
        figure.savefig(f, dpi=120, format=os.path.splitext(path)[1][1:].lower())


def build_argument_parser() -> argparse.ArgumentParser:
    """The arguments of this program."""
    parser = argument_parser(__doc__)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--seconds", type=float, default=10.0, help="duration of each measurement")
    parser.add_argument(
        "--only", nargs="+", choices=PARTS, default=PARTS, help="what to measure; default: all"
    )
    parser.add_argument(
        "--systems",
        nargs="+",
        choices=SYSTEMS,
        default=list(SYSTEMS),
        help="whole models to measure; default: all",
    )
    parser.add_argument(
        "--p4-size",
        type=int,
        nargs=2,
        default=(50, 84),
        metavar=("HEIGHT", "WIDTH"),
        help="size of level P4; half and twice this size are also measured. Default: 50 84, as for "
        "an image of 800 x 1344",
    )
    parser.add_argument(
        "--image-size",
        type=int,
        nargs=2,
        metavar=("HEIGHT", "WIDTH"),
        default=(800, 1344),
        help="size of the image for whole models; default: 800 1344",
    )
    parser.add_argument(
        "--num-images",
        type=int,
        choices=range(1, 65),
        default=1,
        metavar="N",
        help="images of a training step; default: 1",
    )
    parser.add_argument(
        "--precision",
        nargs="+",
        choices=("float32", "bfloat16", "float16"),
        default=["float32"],
        help="of the whole models of this project; the others are measured in float32",
    )
    parser.add_argument(
        "--levers", nargs="+", choices=LEVERS, help="optimizations to measure; default: all"
    )
    parser.add_argument(
        "--output", metavar="FILE", help="write each result, as JSON, when it is there"
    )
    parser.add_argument("--profile", metavar="FILE", help="write a profile of a training step")
    parser.add_argument("--plot", metavar="FILE", help="write a figure of how time and memory grow")
    return parser


def has_mmdetection() -> bool:
    """Import mmdetection, or say on stderr why it cannot be."""
    try:
        try:
            from uncompiled_mmcv import import_mmdet
        except ImportError:
            import mmcv.ops  # noqa: F401
            import mmdet  # noqa: F401
        else:
            import_mmdet()
    except ImportError as e:
        print(f"Nothing is compared with mmdetection: {e}", file=sys.stderr)
        return False
    return True


def check_outputs(args: argparse.Namespace) -> None:
    """Raise InputError for files that cannot be written, before anything is measured."""
    outputs = {f"--{name}": getattr(args, name) for name in ("output", "profile", "plot")}
    for option, path in outputs.items():
        if path:
            output_path(option, path, {k: v for k, v in outputs.items() if k != option})
    suffixes = FigureCanvasBase.get_supported_filetypes()
    if args.plot and os.path.splitext(args.plot)[1][1:].lower() not in suffixes:
        raise InputError(f"--plot: {args.plot}: use one of the suffixes {', '.join(suffixes)}")


def run(args: argparse.Namespace) -> None:
    """Measure, print and write."""
    check_outputs(args)
    reference = not WITHOUT_REFERENCE.issuperset(args.only) and has_mmdetection()
    torch.manual_seed(0)
    meter = Meter(args.device, args.seconds)
    height, width = args.p4_size
    sizes = [(height // 2, width // 2), (height, width), (height * 2, width * 2)]
    image_size = tuple(args.image_size)
    models = (meter, args.systems, image_size)
    parts: Dict[str, Iterator[Result]] = {
        "models": whole_models(*models, reference, args.precision, args.num_images),
        "levers": levers(*models, args.levers, args.num_images),
        "files": exported_files(*models, reference),
        "growth": growth(*models),
        "attention": attention(meter, sizes),
        "non-local": non_local(meter, reference, sizes),
        "pyramid": pyramid(meter, reference, sizes[:2]),
        "sampling": sampling(meter, reference),
        "loss": box_loss(meter, reference),
        "loading": loading(meter, reference),
    }
    results = []
    with tqdm(unit=" results") as progress:
        for name in args.only:
            progress.set_description(name)
            for result in parts[name]:
                results.append(result)
                if args.output:
                    with atomic_write(args.output, "w") as f:
                        json.dump([asdict(r) for r in results], f, indent=1)
                progress.update()
                progress.set_description(result.what)
    machine = torch.cuda.get_device_name() if args.device == "cuda" else platform.processor()
    num_threads = torch.get_num_threads()
    threads = f", {num_threads} thread{'s' * (num_threads > 1)}" if args.device == "cpu" else ""
    print(f"\n{machine or platform.machine()}{threads}, PyTorch {torch.__version__}\n")
    print(f"{table(results)}\n\n{exponents(results)}")
    if args.profile:
        with atomic_write(args.profile, "w") as f:
            f.write(profile(args.device, args.systems, image_size))
    if args.plot:
        plot(results, args.plot)


def main(argv=None) -> None:
    """Command line entry point."""
    report_errors(run, build_argument_parser().parse_args(argv))


if __name__ == "__main__":
    main()
