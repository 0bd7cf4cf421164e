#!/usr/bin/env python
# SPDX-License-Identifier: Apache-2.0
"""
Mutation testing: change the package in one place at a time and check whether a test fails.

    python tools/mutants.py --seed 0 --mutants 64 --only libra_d2/data

See docs/contributing.md. Most mutation operators are Cosmic Ray's. Its own runner uses the same
test command for all mutants; this one runs the tests of the mutated module first, then those of its
folder.
"""

import argparse
import difflib
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from itertools import chain, islice, zip_longest
from pathlib import Path
from queue import SimpleQueue
from typing import Callable, Dict, Iterable, Iterator, List, Optional, Set, Tuple

import psutil
import tomllib
from cosmic_ray.ast import ast_nodes, get_ast
from cosmic_ray.mutating import mutate_code
from cosmic_ray.operators.provider import OperatorProvider
from parso.python.tree import Name
from parso.tree import NodeOrLeaf
from tabulate import tabulate

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = ROOT / "libra_d2"
TIMEOUT = 600  # seconds for the tests of a module; mutants may not terminate
# Operators of Cosmic Ray that resemble human errors, such as + for -, but not << for -.
CHOSEN = re.compile(
    r"""ReplaceBinaryOperator_(Add_Sub|Sub_Add|Mul_Div|Div_Mul|FloorDiv_Div|Pow_Mul|BitAnd_BitOr
    |BitOr_BitAnd) | ReplaceComparisonOperator_(Eq_NotEq|NotEq_Eq|Is_IsNot|IsNot_Is|Lt_LtE|LtE_Lt
    |Gt_GtE|GtE_Gt|Lt_Gt|Gt_Lt) | ReplaceUnaryOperator_Delete_\w+ | AddNot | NumberReplacer
    | Replace(True|False|And|Or|Break|Continue)With\w+ | ExceptionReplacer | RemoveDecorator
    | ZeroIterationForLoop""",
    re.VERBOSE,
)
LEFT_OUT = (".git", ".venv", "output", "datasets", "build", "__pycache__", ".*_cache")
# Statements and arguments that need no tests, or that ruff checks.
IGNORED = re.compile(r"@abstractmethod|(self\.)?logger\.|log_first_n\(|axis\.spines|color = ")
IGNORED_ARGUMENTS = (
    *("color", "figsize", "fontsize", "layout", "ha", "va", "linestyle", "linewidth", "pad"),
    *("frameon", "loc", "markersize", "help", "metavar", "encoding"),
)
PAIRS = {"min": "max", "mean": "sum", "any": "all", "floor": "ceil", "height": "width"}
PAIRS.update({new: old for old, new in PAIRS.items()})

Tests = Dict[Path, List[str]]  # test files by module


class Replacement:
    """A mutation operator that replaces a node by what ``new`` returns, unless it is None."""

    def __init__(self, new: Callable[[NodeOrLeaf], Optional[str]]):
        self._new = new

    def mutation_positions(self, node: NodeOrLeaf) -> Iterator[Tuple]:
        if self._new(node) is not None:
            yield node.start_pos, node.end_pos

    def mutate(self, node: NodeOrLeaf, index: int) -> NodeOrLeaf:
        return Name(self._new(node), node.start_pos, node.get_first_leaf().prefix)


def no_statement(node: NodeOrLeaf) -> Optional[str]:
    """Replaces a call, ``raise``, ``del``, return in an ``if`` or update of a value by ``pass``."""
    if node.parent is None or node.parent.type != "simple_stmt" or not node.get_next_sibling():
        return None
    code = node.get_code(include_prefix=False)
    if node.type == "expr_stmt":
        # A new name is not removed, as any test would fail; an update of its own value is.
        names = re.match(r"([\w, ()]+)(:[^=]+)?( = |$)", code)
        old = names and re.findall(r"\w+", code[names.end() :])
        removable = not names or any(x in old for x in re.findall(r"\w+", names[1]))
    elif code.startswith("return"):
        removable = node.parent.parent.parent.type == "if_stmt"
    else:
        removable = node.type in ("atom_expr", "raise_stmt", "del_stmt")
    return "pass" if removable else None


def no_argument(node: NodeOrLeaf) -> Optional[str]:
    """Removes a keyword argument."""
    by_name = node.type == "argument" and node.children[1] == "="
    return "**{}" if by_name and node.children[0].value not in IGNORED_ARGUMENTS else None


def other_name(node: NodeOrLeaf) -> Optional[str]:
    """Replaces a name by its counterpart in PAIRS."""
    return PAIRS.get(node.value) if node.type == "name" and not node.is_definition() else None


OPERATORS = [
    *(OperatorProvider()[name]() for name in OperatorProvider() if CHOSEN.fullmatch(name)),
    *(Replacement(new) for new in (no_statement, no_argument, other_name)),
]


@dataclass
class Mutant:
    """A mutated module and the result of its tests."""

    path: Path  # in the repository
    source: str
    code: str
    stage: str = ""  # tests run last: own, wider
    caught_by: str = ""

    def diff(self) -> List[str]:
        texts = self.source.splitlines(), self.code.splitlines()
        return list(difflib.unified_diff(*texts, str(self.path), str(self.path), lineterm=""))

    def key(self) -> Tuple[str, str, str]:
        """Identifies it independently of line numbers."""
        lines = self.diff()[2:]
        old, new = (one_line(x[1:] for x in lines if x[0] == sign) for sign in "-+")
        return str(self.path), old, new


def one_line(lines: Iterable[str]) -> str:
    """Several lines as one, without indentation."""
    return " ".join(x.strip() for x in lines if x.strip())


def folder_of(path: Path) -> str:
    """The folder of the package that a module is in."""
    return path.parts[len(path.parts) > 2]


def make_mutants(paths: List[Path], seed: str, equivalent: Set[Tuple]) -> Iterator[Mutant]:
    """One random mutant of each line of some modules, in random order."""
    places: Dict[Tuple, List] = {}
    sources = {path: (ROOT / path).read_text(encoding="utf-8") for path in paths}
    for path, source in sources.items():
        nodes = list(ast_nodes(get_ast(source)))
        for operator in OPERATORS:
            found = ((x, start) for x in nodes for start, _ in operator.mutation_positions(x))
            for occurrence, (node, start) in enumerate(found):
                statement = node.search_ancestor("simple_stmt") or node
                is_marker = node.parent is not None and node.parent.type == "parameters"  # *,
                if not is_marker and not IGNORED.match(statement.get_code(include_prefix=False)):
                    places.setdefault((path, start[0]), []).append((operator, occurrence))
    rng = random.Random(seed)
    for path, line in rng.sample(list(places), len(places)):
        code = mutate_code(sources[path], *rng.choice(places[path, line]))
        mutant = Mutant(path, sources[path], code)
        with suppress(SyntaxError):
            compile(code, path, "exec")
            if mutant.key() not in equivalent:
                yield mutant


def _read_toml(path: str) -> Dict:
    with (ROOT / path).open("rb") as f:
        return tomllib.load(f)


def read_tests(paths: List[Path], suite: bool) -> Tuple[Tests, Tests]:
    """
    The own and the wider tests of each module, see [tool.libra_mutants] in pyproject.toml.

    Own tests are those listed for the module, else tests/test_<module>.py, else those listed for
    its folder. Wider tests are those of its folder and of programs, or with ``suite`` all tests.
    """
    table = _read_toml("pyproject.toml")["tool"]["libra_mutants"]
    listed = {key: [f"tests/test_{x}.py" for x in names] for key, names in table.items()}
    programs, own, folders = listed.pop("programs"), {}, {}
    for path in paths:
        namesake = f"tests/test_{path.stem}.py"
        default = [namesake] if (ROOT / namesake).exists() else listed.get(folder_of(path), [])
        own[path] = listed.get("/".join(path.with_suffix("").parts[1:]), default)
        folders.setdefault(folder_of(path), []).extend(own[path])
    wider = {}
    for path in paths:
        tests = ["tests"] if suite else dict.fromkeys(folders[folder_of(path)] + programs)
        wider[path] = [x for x in tests if x not in own[path]]
    known = {x.relative_to(PACKAGE).with_suffix("").as_posix() for x in PACKAGE.rglob("*")}
    wrong = [*(set(listed) - known), *(str(x) for x in paths if not own[x])]
    wrong += [x for x in chain(*listed.values(), programs) if not (ROOT / x).exists()]
    if wrong:
        sys.exit(f"error: pyproject.toml, [tool.libra_mutants]: {', '.join(wrong)}?")
    return own, wider


def read_equivalent() -> Set[Tuple[str, str, str]]:
    """Keys of the mutants in tests/equivalent_mutants.toml, whose lines must still exist."""
    entries = _read_toml("tests/equivalent_mutants.toml").get("mutant", [])
    for x in entries:
        if x["line"] not in one_line((ROOT / x["file"]).read_text(encoding="utf-8").splitlines()):
            sys.exit(f"error: tests/equivalent_mutants.toml: not in {x['file']}: {x['line']}")
    return {(x["file"], x["line"], x["becomes"]) for x in entries}


def end_processes(copy: Path) -> None:
    """Kill the tests that run in a copy and all their child processes, by their TMPDIR."""
    for process in psutil.process_iter():
        with suppress(psutil.Error):
            if process.environ().get("TMPDIR") == str(copy.parent):
                process.kill()


def run_tests(copy: Path, tests: Iterable[str], timeout: float) -> str:
    """The first test that fails, or another reason for failure; "" if all pass."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONDONTWRITEBYTECODE": "1"}
    environment.update(PYTHONPATH=str(copy), TMPDIR=str(copy.parent))
    command = [sys.executable, "-m", "pytest", "-x", "-q", "-p", "no:cacheprovider", *tests]
    log = copy.parent / "log.txt"
    with log.open("w", encoding="utf-8") as out:
        where = {"cwd": copy, "env": environment, "stdout": out, "stderr": out}
        process = subprocess.Popen(command, start_new_session=True, **where)
        try:
            status = process.wait(timeout)
        except subprocess.TimeoutExpired:
            return "timeout"
        finally:
            end_processes(copy)
            process.wait()
    output = log.read_text(encoding="utf-8", errors="replace")
    failed = re.search(r"^(?:FAILED|ERROR) (tests/.+?)(?: - |$)", output, re.MULTILINE)
    return "" if status == 0 else failed[1] if failed else f"exit status {status} of pytest"


def try_mutants(
    mutants: List[Mutant], stage: str, tests: Tests, copies: List[Path], deadline: float
) -> None:
    """Run the tests of each mutant, one mutant per copy at a time."""
    free = SimpleQueue()
    for copy in copies:
        free.put(copy)

    def try_one(mutant: Mutant) -> None:
        left = deadline - time.monotonic()
        if left < 0 or not tests[mutant.path]:
            return
        copy = free.get()
        try:
            (copy / mutant.path).write_text(mutant.code, encoding="utf-8")
            caught_by = run_tests(copy, tests[mutant.path], TIMEOUT if stage == "own" else left)
        finally:
            (copy / mutant.path).write_text(mutant.source, encoding="utf-8")
            free.put(copy)
        if stage == "own" or caught_by != "timeout":  # the time left was too short
            mutant.stage, mutant.caught_by = stage, caught_by
            diff = [] if caught_by else mutant.diff()
            result = f"{mutant.path}, {stage} tests: {caught_by or 'survived'}"
            print(result, *diff, sep="\n", flush=True)

    with ThreadPoolExecutor(len(copies)) as pool:
        futures = [pool.submit(try_one, mutant) for mutant in mutants]
        try:
            for future in futures:
                future.result()
        finally:  # also when interrupted
            pool.shutdown(wait=False, cancel_futures=True)
            while not all(x.done() for x in futures):
                for copy in copies:
                    end_processes(copy)


def print_report(mutants: List[Mutant]) -> None:
    """Print diffs of surviving mutants, and the score by folder."""
    for mutant in mutants:
        if not mutant.caught_by:
            print(f"\nSurvived, {mutant.stage} tests:", *mutant.diff(), sep="\n")
    rows = []
    for folder in [*sorted({folder_of(x.path) for x in mutants}), "all"]:
        some = [x for x in mutants if folder in (folder_of(x.path), "all")]
        own, wider = (sum(x.stage == s for x in some if x.caught_by) for s in ("own", "wider"))
        counts = len(some), own, wider, len(some) - own - wider
        rows.append((folder, *counts, *(f"{n / len(some):.0%}" for n in (own, own + wider))))
    headers = ("", "mutants", "caught by own", "by wider", "survived", "own", "own and wider")
    print("", tabulate(rows, headers, colalign=["left"] + ["right"] * 6), sep="\n")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.strip().splitlines()[0])
    parser.add_argument("--seed", default="0", help="random seed")
    parser.add_argument(
        "--mutants", type=int, default=64, help="number of mutants, the same from each folder"
    )
    parser.add_argument(
        "--only", default="libra_d2", metavar="PATH", help="folder or module to mutate"
    )
    parser.add_argument(
        "--minutes", type=float, default=35, help="no mutant is started after this time"
    )
    parser.add_argument("--jobs", type=int, default=2, help="mutants that are tested in parallel")
    parser.add_argument(
        "--suite", action="store_true", help="run the whole test suite on survivors"
    )
    args = parser.parse_args()
    deadline = time.monotonic() + 60 * args.minutes
    signal.signal(signal.SIGTERM, signal.default_int_handler)

    paths = [x.relative_to(ROOT) for x in sorted(PACKAGE.rglob("*.py"))]
    paths = [x for x in paths if x.name != "__init__.py"]  # imports
    (own, wider), equivalent = read_tests(paths, args.suite), read_equivalent()
    choices = []
    for folder in sorted({folder_of(x) for x in paths}):
        some = [x for x in paths if folder_of(x) == folder and str(x).startswith(args.only)]
        choices.append(make_mutants(some, f"{args.seed} {folder}", equivalent))
    in_turn = (x for x in chain.from_iterable(zip_longest(*choices)) if x)
    mutants = list(islice(in_turn, args.mutants))
    if not mutants:
        sys.exit(f"error: --only {args.only}: no module, or none with anything to change")

    with tempfile.TemporaryDirectory(prefix="mutants-") as parent:
        copies = [Path(parent, str(i), "libra_d2") for i in range(args.jobs)]
        for copy in copies:
            shutil.copytree(ROOT, copy, ignore=shutil.ignore_patterns(*LEFT_OUT))
        try_mutants(mutants, "own", own, copies, deadline)
        done = [x for x in mutants if x.stage]
        try_mutants([x for x in done if not x.caught_by], "wider", wider, copies, deadline)
        caught = [x for x in done if x.caught_by]
        again = {y for x in caught for y in ([x.caught_by] if "::" in x.caught_by else own[x.path])}
        wrong = run_tests(copies[0], [f"-n{args.jobs}", *sorted(again)], TIMEOUT) if again else ""
    print_report(done)
    print(f"\n{len(done)} of {len(mutants)} mutants were tried, seed {args.seed}.")
    if wrong:
        sys.exit(f"error: without a mutant, too: {wrong}. The score says nothing.")


if __name__ == "__main__":
    main()
