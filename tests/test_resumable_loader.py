# SPDX-License-Identifier: Apache-2.0
"""The same images, augmented in the same way, whether or not the loader was resumed."""

import random

import numpy as np
import pytest
import torch

from detectron2.data.samplers import RepeatFactorTrainingSampler

from libra_d2.data.random_state import get_random_state, keep_random_state, seeded, set_random_state
from libra_d2.data.resumable_loader import ResumableLoader

IMAGES = [{"id": i, "width": 9 if i % 3 else 4, "height": 6} for i in range(13)]


def augment(image):
    """Random numbers of all three generators."""
    drawn = (random.random(), np.random.rand(), torch.rand(()).item())
    return {**image, "drawn": drawn}


def loader(seed=3, **kwargs):
    arguments = {"dataset": IMAGES, "mapper": augment, "total_batch_size": 3, **kwargs}
    return ResumableLoader(lambda: dict(arguments), seed=seed)


def take(iterator, number):
    return [next(iterator) for _ in range(number)]


@pytest.mark.parametrize("num_workers", [(0, 0), (2, 2), (2, 0), (0, 1)])
@pytest.mark.parametrize("grouped", [True, False])
@pytest.mark.parametrize("position", [0, 1, 5, 11])
def test_resume(num_workers, grouped, position):
    """At any batch, with images waiting for others of their shape, and with other workers."""
    before, after = (loader(num_workers=n, aspect_ratio_grouping=grouped) for n in num_workers)
    batches = iter(before)
    take(batches, position)
    state = before.state_dict()
    expected = take(batches, 8)
    batches.close()
    after.load_state_dict(state)
    batches = iter(after)
    assert take(batches, 8) == expected
    assert after.state_dict() == before.state_dict()
    batches.close()


def test_resumed_twice():
    whole = take(iter(loader()), 12)
    found, state = [], None
    for number in (2, 3, 7):
        one = loader(seed=99 if state else 3)  # the seed is part of the state
        if state:
            one.load_state_dict(state)
        found += take(iter(one), number)
        state = one.state_dict()
    assert found == whole


def test_sampler_of_its_own():
    """One of Detectron2's, which draws its seed when it is made."""

    def arguments():
        sampler = RepeatFactorTrainingSampler(torch.linspace(0.5, 2, len(IMAGES)))
        return {"dataset": IMAGES, "mapper": augment, "total_batch_size": 2, "sampler": sampler}

    first, second = ResumableLoader(arguments, seed=1), ResumableLoader(arguments, seed=2)
    batches = iter(first)
    take(batches, 9)
    second.load_state_dict(first.state_dict())
    assert take(iter(second), 5) == take(batches, 5)


def test_leaves_the_random_state_alone():
    """What training draws does not depend on how many workers load data."""
    numbers = []
    for num_workers in (0, 2):
        torch.manual_seed(0)
        batches = iter(loader(num_workers=num_workers))
        numbers.append([])
        for _ in range(3):
            next(batches)
            numbers[-1].append(torch.rand(()).item())
        batches.close()
    assert numbers[0] == numbers[1]


def test_augmentation_differs_from_image_to_image():
    drawn = [image["drawn"] for batch in take(iter(loader()), 20) for image in batch]
    assert len({x for numbers in drawn for x in numbers}) == 3 * len(drawn)


def draw():
    return random.random(), np.random.rand(), np.random.randn(), torch.rand(()).item()


def test_random_state():
    np.random.randn()  # half of a pair
    state = get_random_state()
    expected = draw()
    with keep_random_state():
        draw()
    with seeded(1, 2):
        inside = draw()
    set_random_state(state)
    assert draw() == expected
    with seeded(1, 2):
        assert draw() == inside
    with seeded(1, 3):
        assert draw() != inside
