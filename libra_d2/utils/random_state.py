# SPDX-License-Identifier: Apache-2.0
"""The states of all random number generators that a training draws from."""

import random
from contextlib import contextmanager
from typing import Any, Dict, Iterator

import numpy as np
import torch

__all__ = ["get_random_state", "keep_random_state", "seeded", "set_random_state"]


def get_random_state() -> Dict[str, Any]:
    """
    The states of Python's, NumPy's and PyTorch's generators, and of this process' GPU if there is
    one, as tensors, numbers and text, which ``torch.load`` reads with ``weights_only``.
    """
    version, keys, gauss = random.getstate()
    name, words, *rest = np.random.get_state()
    state = {
        "python": [version, torch.tensor(keys), gauss],
        "numpy": [name, torch.from_numpy(words.astype(np.int64)), *rest],
        "torch": torch.get_rng_state(),
    }
    if torch.cuda.is_available():
        state["cuda"] = torch.cuda.get_rng_state()
    return state


def set_random_state(state: Dict[str, Any]) -> None:
    """Restore what :func:`get_random_state` has returned."""
    version, keys, gauss = state["python"]
    random.setstate((version, tuple(keys.tolist()), gauss))
    name, words, *rest = state["numpy"]
    np.random.set_state((name, words.numpy().astype(np.uint32), *rest))
    torch.set_rng_state(state["torch"])
    if "cuda" in state and torch.cuda.is_available():
        torch.cuda.set_rng_state(state["cuda"])


@contextmanager
def keep_random_state() -> Iterator[None]:
    """Restores all RNG states on exit."""
    state = get_random_state()
    try:
        yield
    finally:
        set_random_state(state)


@contextmanager
def seeded(*seed: int) -> Iterator[None]:
    """Seeds the generators of the host inside, and restores their states on exit."""
    python, numpy, of_torch = random.getstate(), np.random.get_state(), torch.get_rng_state()
    words = np.random.SeedSequence(seed).generate_state(3)
    random.seed(int(words[0]))
    np.random.seed(words[1])
    # torch.manual_seed() would also seed the GPUs, whose states are not restored here.
    torch.default_generator.manual_seed(int(words[2]))
    try:
        yield
    finally:
        random.setstate(python)
        np.random.set_state(numpy)
        torch.set_rng_state(of_torch)
