# SPDX-License-Identifier: Apache-2.0
"""A resumed loader returns the same batches as an uninterrupted one."""

import itertools
import os
import random
import signal
import subprocess
import sys
import types
from contextlib import nullcontext

import numpy as np
import pytest
import torch
from conftest import ROOT

from detectron2.data import DatasetFromList, build_detection_train_loader
from detectron2.data.samplers import RepeatFactorTrainingSampler, TrainingSampler
from detectron2.utils import comm

from libra_d2.data import resumable_loader
from libra_d2.data.resumable_loader import ResumableLoader
from libra_d2.utils.random_state import (
    get_random_state,
    keep_random_state,
    seeded,
    set_random_state,
)

IMAGES = [{"id": i, "width": 9 if i % 3 else 4, "height": 6} for i in range(13)]


def augment(image):
    """Draws from all three generators."""
    drawn = (random.random(), np.random.rand(), torch.rand(()).item())
    return {**image, "drawn": drawn}


def loader(seed=3, **kwargs):
    arguments = {"dataset": IMAGES, "mapper": augment, "total_batch_size": 3, **kwargs}
    return ResumableLoader(lambda: arguments, seed=seed)


def take(iterator, number):
    return [next(iterator) for _ in range(number)]


@pytest.mark.parametrize("num_workers", [(0, 0), (2, 0), (0, 1)])
@pytest.mark.parametrize("grouped", [True, False])
def test_resume(num_workers, grouped):
    """With pending images of incomplete groups, and with another number of workers."""
    before, after = (loader(num_workers=n, aspect_ratio_grouping=grouped) for n in num_workers)
    batches = iter(before)
    take(batches, 5)
    state = before.state_dict()
    expected = take(batches, 8)
    batches.close()
    after.load_state_dicts([state])
    batches = iter(after)
    assert take(batches, 8) == expected
    assert after.state_dict() == before.state_dict()
    batches.close()


@pytest.mark.parametrize("num_workers", [0, 2])
def test_keeps_the_random_state(num_workers, monkeypatch):
    """Random numbers of the training do not depend on the loader, which leaves nothing behind."""
    registered = []  # to be called when the program ends
    atexit = types.SimpleNamespace(register=registered.append, unregister=registered.remove)
    monkeypatch.setattr(resumable_loader, "atexit", atexit)
    state = get_random_state()
    expected = [draw() for _ in range(4)]
    set_random_state(state)
    batches, found = iter(loader(num_workers=num_workers)), [draw()]
    for _ in range(3):
        next(batches)
        found.append(draw())
    assert len(registered) == 1
    batches.close()
    assert registered == []
    assert found == expected


@pytest.mark.parametrize("grouped", [True, False])
@pytest.mark.parametrize("repeated", [True, False])
def test_processes(grouped, repeated, monkeypatch):
    """
    Any number of processes share the sequence of images and augmentations of a single one, also if
    their number changes: none is left out, none is seen twice. A batch is one of the sequence, or
    its images wait in the groups of all processes.
    """

    def arguments(grouped=grouped):
        factors = torch.linspace(0.5, 2, len(IMAGES))
        of_images = RepeatFactorTrainingSampler(factors) if repeated else TrainingSampler(13)
        fixed = {"dataset": IMAGES, "mapper": augment, "total_batch_size": 12}
        return {**fixed, "sampler": of_images, "aspect_ratio_grouping": grouped}

    def drawn(batches):
        return [image["drawn"] for batch in batches for image in batch]

    sequence = drawn(take(iter(ResumableLoader(lambda: arguments(False), seed=3)), 40))
    monkeypatch.setattr(comm, "all_gather", lambda data: [data])  # the seed of the order
    states, seen = [ResumableLoader(arguments, seed=3).state_dict()], []
    for number, iterations in ((2, 5), (1, 3), (4, 4), (2, 2), (6, 1), (1, 7), (3, 2)):
        monkeypatch.setattr(comm, "get_world_size", lambda number=number: number)
        before, states = states, []
        for rank in range(number):
            monkeypatch.setattr(comm, "get_rank", lambda rank=rank: rank)
            own = ResumableLoader(arguments, seed=99)
            own.load_state_dicts(before)
            seen += drawn(take(iter(own), iterations))
            states.append(own.state_dict())
        for rank, state in enumerate(states):
            monkeypatch.setattr(comm, "get_rank", lambda rank=rank: rank)
            own.load_state_dicts(states)
            assert own.state_dict() == state
        places = sorted(map(sequence.index, seen))
        assert len(set(places)) == len(places)
        waiting = places[-1] + 1 - len(places)
        assert waiting < 2 * 12 * 2 if grouped else waiting == 0


def test_order_and_shapes():
    """Batches are those of Detectron2's loader, in an order that follows from the seed."""
    arguments = {"sampler": TrainingSampler(13, seed=5), "mapper": dict, "total_batch_size": 3}
    theirs = build_detection_train_loader(DatasetFromList(IMAGES), **arguments, num_workers=0)
    assert take(iter(loader(**arguments)), 9) == take(iter(theirs), 9)
    with seeded(3):
        order = [*itertools.islice(TrainingSampler(13), 30)]
    found = take(iter(loader(aspect_ratio_grouping=False)), 10)
    assert [image["id"] for batch in found for image in batch] == order
    drawn = [image["drawn"] for batch in found for image in batch]
    assert {type(numbers) for numbers in drawn} == {tuple}  # PyTorch's loader would change it
    assert len({x for numbers in drawn for x in numbers}) == 90


def test_pending_images():
    """The state has the first position not drawn yet, and the pending positions before it."""
    sampler = [1, 2, 0, 3, 6, 4, 5]  # 0, 3 and 6 are upright
    one = loader(sampler=sampler, total_batch_size=3)
    batches = iter(one)
    assert (one.num_images, one.state_dict()) == (13, {"seed": 3, "start": 0, "pending": []})
    assert [image["id"] for image in next(batches)] == [0, 3, 6]
    assert one.state_dict() == {"seed": 3, "start": 5, "pending": [0, 1]}
    assert [set(image) for image in next(batches)] == [{"id", "width", "height", "drawn"}] * 3
    assert one.state_dict() == {"seed": 3, "start": 6, "pending": []}
    assert list(batches) == []  # the last image is dropped
    batches = iter(loader(sampler=sampler, aspect_ratio_grouping=False))
    assert [len(batch) for batch in batches] == [3, 3]
    # The augmentation depends on the seed as well.
    assert take(iter(loader(3, sampler=sampler)), 1) != take(iter(loader(4, sampler=sampler)), 1)


def test_options(monkeypatch):
    """Options of PyTorch's loader are passed on; workers leave signals to the main process."""
    options, found, calls = {"prefetch_factor": 3, "persistent_workers": True}, {}, []

    def load(dataset, sampler, **kwargs):
        found.update(kwargs)
        return map(dataset.__getitem__, sampler)

    monkeypatch.setattr("torch.utils.data.DataLoader", load)
    next(iter(loader()))
    assert found["num_workers"] == 0
    batches = iter(loader(num_workers=2, pin_memory=False, **options))
    next(batches)
    assert {**options, "num_workers": 2, "pin_memory": False}.items() <= found.items()
    ignored = (signal.SIGINT, signal.SIGUSR1)
    handlers = {x: signal.getsignal(x) for x in (*ignored, signal.SIGTERM, signal.SIGALRM)}
    monkeypatch.setattr(signal, "setitimer", lambda *args: calls.append(args))
    monkeypatch.setattr(os, "_exit", calls.append)
    try:
        found["worker_init_fn"](0)
        assert [signal.getsignal(x) for x in ignored] == [signal.SIG_IGN] * 2
        signal.raise_signal(signal.SIGTERM)
        assert calls == [(signal.ITIMER_REAL, 20.0)]
        signal.raise_signal(signal.SIGALRM)
        assert calls[1:] == [0]
        batches.close()
        signal.raise_signal(signal.SIGTERM)
        assert calls[2] == 0
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)


ENDS = """
import ctypes, sys
sys.path.insert(0, "tests")
from libra_d2.data import resumable_loader
from test_resumable_loader import loader, take
resumable_loader._GRACE = 3600
batches = iter(loader(num_workers=2))
take(batches, 3)
ctypes.pythonapi.Py_IncRef(ctypes.py_object(batches))  # never freed
"""


def test_ends_with_the_program():
    """Workers do not keep a program whose iterator is still referred to."""
    program = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", ENDS],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert (program.returncode, program.stderr) == (0, "")


def draw():
    return random.random(), np.random.rand(), np.random.randn(), torch.rand(()).item()


@pytest.mark.parametrize("fails", [False, True])
def test_random_state(fails, tmp_path):
    """All RNG states are restored, also from a file and after an error."""
    np.random.randn()  # caches the second number of a pair
    random.gauss(0, 1)
    torch.save(get_random_state(), tmp_path / "state.pth")
    state = torch.load(tmp_path / "state.pth", weights_only=True)
    expected = random.gauss(0, 1), draw()
    for context in (keep_random_state(), seeded(1, 2)):
        set_random_state(state)
        with pytest.raises(ZeroDivisionError) if fails else nullcontext(), context:
            draw(), random.gauss(0, 1)
            assert not fails or 1 / 0
        assert (random.gauss(0, 1), draw()) == expected


def test_seeded(monkeypatch):
    """The numbers follow from all seeds, and differ between generators; those of GPUs are kept."""
    monkeypatch.setattr(torch.cuda, "manual_seed_all", lambda seed: pytest.fail("seeds the GPU"))
    found = []
    for seed in [(1, 2), (1, 2), (1, 3), (2, 2), (2, 1), (1,)]:
        draw()
        with seeded(*seed):
            found.append(draw())
    assert found[0] == found[1]
    assert all(len(set(numbers)) == 5 for numbers in zip(*found))
    words = [int(x) for x in np.random.SeedSequence((1, 2)).generate_state(3)]
    assert found[0][0] == random.Random(words[0]).random()
    assert found[0][1] == np.random.RandomState(words[1]).rand()
    generator = torch.Generator().manual_seed(words[2])
    assert found[0][3] == torch.rand((), generator=generator).item()


def test_random_state_of_the_gpu(monkeypatch):
    """It is kept where there is a GPU; a state from elsewhere can be restored in any case."""
    restored, without = [], get_random_state()
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_rng_state", lambda: "the GPU's")
    monkeypatch.setattr(torch.cuda, "set_rng_state", restored.append)
    state = get_random_state()
    for saved in (state, without):
        set_random_state(saved)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    set_random_state(state)
    assert restored == ["the GPU's"]
