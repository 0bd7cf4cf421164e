# SPDX-License-Identifier: Apache-2.0
"""Running a program in one or several processes, with errors in one line."""

import argparse
import errno
import locale
import logging
import os
import re
import signal
import sys
import time
import uuid
from typing import Any, Callable, Mapping, NamedTuple, Optional

import torch
from torch import distributed
from torch.multiprocessing import ProcessExitedException

from detectron2.engine import launch as launch_on_gpus
from detectron2.utils import comm

from ..errors import InputError, Interrupted, one_line

__all__ = [
    "Aborted",
    "Process",
    "join_processes",
    "launch",
    "read_environment",
    "report_errors",
]


class Aborted(SystemExit):
    """Ends a process that others may be waiting for."""


class Process(NamedTuple):
    """This process among all of them; "local" means on its machine."""

    rank: int
    world_size: int
    local_rank: int
    local_size: int


def read_environment(environment: Mapping[str, str]) -> Optional[Process]:
    """
    Read this process's ranks from the environment variables of torchrun, or else of SLURM's srun.

    Returns:
        None if neither has started it, or as the only process.

    Raises:
        InputError: if the machines have different numbers of processes.
    """
    if "LOCAL_WORLD_SIZE" in environment:
        names = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE")
        return Process(*(int(environment[name]) for name in names))
    # Only srun sets this one; a batch script, which is one process, has the others, too.
    if int(environment.get("SLURM_STEP_NUM_TASKS", 1)) == 1:
        return None
    per_machine = environment["SLURM_STEP_TASKS_PER_NODE"]  # such as "8", "8(x2)" or "8(x2),4"
    match = re.fullmatch(r"(\d+)(\(x\d+\))?", per_machine)
    if match is None:
        raise InputError(
            f"SLURM_STEP_TASKS_PER_NODE is {per_machine}: use as many tasks on each machine "
            "(srun --ntasks-per-node)"
        )
    names = ("SLURM_PROCID", "SLURM_STEP_NUM_TASKS", "SLURM_LOCALID")
    return Process(*(int(environment[name]) for name in names), int(match.group(1)))


def join_processes(process: Process) -> None:
    """
    Connect this process to the others that torchrun or SLURM has started: with NCCL and a GPU for
    each process, or with gloo on CPUs.

    Raises:
        InputError: if the others' address is unknown, or there are too few GPUs.
    """
    if "MASTER_ADDR" not in os.environ:
        if process.local_size < process.world_size:
            raise InputError(
                "MASTER_ADDR is not set: in the batch script, before srun, write "
                'export MASTER_ADDR=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)'
            )
        os.environ["MASTER_ADDR"] = "127.0.0.1"
    # Jobs on the same machine have different ports.
    port = 20000 + int(os.environ.get("SLURM_JOB_ID", 0)) % 20000
    os.environ.setdefault("MASTER_PORT", str(port))
    has_gpu = torch.cuda.is_available()
    if has_gpu and process.local_size > torch.cuda.device_count():
        raise InputError(
            f"there are {process.local_size} processes on this machine, but only "
            f"{torch.cuda.device_count()} GPUs: start one for each"
        )
    if has_gpu:
        torch.cuda.set_device(process.local_rank)
    distributed.init_process_group(
        "nccl" if has_gpu else "gloo",
        store=_meet(process),
        rank=process.rank,
        world_size=process.world_size,
    )
    _set_local_group(process)
    comm.synchronize()


def _meet(process: Process) -> distributed.Store:
    """
    Wait until all processes are there.

    Returns:
        the store of ``env://``, in a name space that only these processes use. ``torchrun`` keeps
        its store when it restarts processes, with the addresses of those that have died. It does
        not number the attempts: on several machines, each ``torchrun`` counts its own restarts.

    Raises:
        InputError: if a process does not come.
    """
    store, *_ = next(distributed.rendezvous("env://", process.rank, process.world_size))
    store = distributed.PrefixStore("libra_d2", store)
    own, end = uuid.uuid4().hex, time.monotonic() + store.timeout.total_seconds()
    if process.rank == 0:
        # The name of this attempt. Nobody has used it before, so that nothing in it is outdated.
        store.set("attempt", own)
        try:
            others = [store.get(f"{own}/{rank}") for rank in range(1, process.world_size)]
        except distributed.DistError as e:
            raise InputError(_absent(process)) from e
        store.set(f"{own}/others", b" ".join(others))
        return distributed.PrefixStore(f"{own}/store", store)
    while time.monotonic() < end:
        attempt = store.get("attempt").decode()
        store.set(f"{attempt}/{process.rank}", own)
        # An earlier attempt had other members, or never became complete.
        others = f"{attempt}/others"
        if store.check([others]) and own in store.get(others).decode().split():
            return distributed.PrefixStore(f"{attempt}/store", store)
        time.sleep(0.1)
    raise InputError(_absent(process))


def _absent(process: Process) -> str:
    address = ":".join(os.environ[name] for name in ("MASTER_ADDR", "MASTER_PORT"))
    return f"only some of the {process.world_size} processes have come to {address}"


def _set_local_group(process: Process) -> None:
    """Tell Detectron2 which processes share a machine."""
    if hasattr(comm, "create_local_process_group"):
        comm.create_local_process_group(process.local_size)
        return
    # In Detectron2 0.6 only its launcher does this.
    for first in range(0, process.world_size, process.local_size):
        ranks = list(range(first, first + process.local_size))
        group = distributed.new_group(ranks)
        if process.rank in ranks:
            comm._LOCAL_PROCESS_GROUP = group


# Permissions, read-only or full disks, and files in place of folders.
_NOT_WRITABLE = (
    *(errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOSPC, errno.EDQUOT, errno.EFBIG),
    *(errno.ENOTDIR, errno.EISDIR, errno.EEXIST, errno.ENAMETOOLONG),
)


def report_errors(main: Callable, *args: Any) -> None:
    """
    Call ``main(*args)``. Input errors, files that cannot be written, and text that the locale has
    no encoding for are reported in one line on stderr with exit status 2, interrupts in one line
    with exit status 130, as in shells.
    """
    # Detectron2 logs errors of a training with their traceback; users do not need it for their own.
    logging.getLogger("detectron2.engine.train_loop").addFilter(_is_no_user_error)
    logging.raiseExceptions = False  # a full disk is reported once, not for each line of a log
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="backslashreplace")  # file names are any text
    try:
        main(*args)
    except InputError as e:
        _say(f"error: {e}")
        sys.exit(2)
    except OSError as e:
        if not _is_user_error(e):
            raise
        _say(f"error: {e.filename or 'a file'} cannot be written: {e.strerror}")
        sys.exit(2)
    except UnicodeError as e:
        encoding = locale.getpreferredencoding(False)
        if encoding.lower() in ("utf-8", "utf8"):
            raise
        _say(f"error: {one_line(e)}: this environment's encoding is {encoding}, set PYTHONUTF8=1")
        sys.exit(2)
    except (KeyboardInterrupt, Interrupted) as e:
        _say(f"interrupted. {e}".strip())
        sys.exit(128 + signal.SIGINT)


def _is_user_error(error: Optional[BaseException]) -> bool:
    is_unwritable = isinstance(error, OSError) and error.errno in _NOT_WRITABLE
    return is_unwritable or isinstance(error, InputError)


def _is_no_user_error(record: logging.LogRecord) -> bool:
    return not (record.exc_info and _is_user_error(record.exc_info[1]))


def _say(line: str) -> None:
    # Each process reports: only one of them may have read the broken image.
    process = f"[process {comm.get_rank()}] " if comm.get_world_size() > 1 else ""
    print(f"{process}{line}", file=sys.stderr, flush=True)


def launch(main: Callable, args: argparse.Namespace) -> None:
    """
    Call ``main(args)`` in the processes that torchrun or SLURM has started, or that ``args`` of
    Detectron2's ``default_argument_parser`` asks for; see :func:`report_errors`.
    """
    report_errors(_launch, main, args)


def _leave_processes() -> None:
    """Wait for all processes; threads that still run when the interpreter exits may abort it."""
    comm.synchronize()
    distributed.destroy_process_group()


def _launch(main: Callable, args: argparse.Namespace) -> None:
    num_processes = args.num_gpus * args.num_machines
    process = read_environment(os.environ)
    if process is not None:
        if num_processes > 1:
            raise InputError("--num-gpus: torchrun or SLURM has started the processes already")
        join_processes(process)
        try:
            main(args)
        except Aborted:
            distributed.destroy_process_group()  # an error for those who wait
            raise
        except SystemExit:  # on a signal, all processes have agreed to stop
            _leave_processes()
            raise
        _leave_processes()
        return
    if num_processes > 1 and not torch.cuda.is_available():
        raise InputError(
            "--num-gpus: this machine has no GPU that PyTorch can use; for several "
            "processes on CPUs use torchrun --nproc-per-node N train_net.py ..."
        )
    try:
        launch_on_gpus(
            report_errors,
            args.num_gpus,
            num_machines=args.num_machines,
            machine_rank=args.machine_rank,
            dist_url=args.dist_url,
            args=(main, args),
        )
    except ProcessExitedException as e:  # the process has said why
        sys.exit(e.exit_code)
