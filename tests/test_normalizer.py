# SPDX-License-Identifier: Apache-2.0
"""Loss normalizers of batches that are spread over micro-batches and processes."""

import pytest
import torch
from torch import nn

from detectron2.utils import comm

from libra_d2.modeling.normalizer import Normalizers, is_batch_divided, mean_over_batch


def another_process(monkeypatch, number):
    """Simulate two processes, the other of which contributes ``number`` to each all-reduce."""
    monkeypatch.setattr(comm, "get_world_size", lambda: 2)
    monkeypatch.setattr(torch.distributed, "all_reduce", lambda x: x.add_(number))


@pytest.mark.parametrize(("other", "expected"), [(None, [4.0, 40.0]), (30, [17.0, 35.0])])
def test_micro_batches(monkeypatch, other, expected):
    """Each of two heads has its own mean over three micro-batches, in any order of use."""
    if other is not None:
        another_process(monkeypatch, other)
    normalizers, heads = Normalizers(), (nn.Identity(), nn.Identity())
    with normalizers.active():
        for numbers in ((1, 10), (3, 20), (8, 90)):
            assert is_batch_divided()
            for number, head in zip(numbers, heads):
                assert mean_over_batch(torch.tensor(number), head) == number
    normalizers.finish()
    for order in (1, -1):
        with normalizers.active():
            found = [mean_over_batch(torch.tensor(9), head).item() for head in heads[::order]]
            assert found == expected[::order]
    assert is_batch_divided() == (other is not None)


def test_errors_inside():
    """Normalizers are deactivated after an error; without losses there is nothing to average."""
    with pytest.raises(ZeroDivisionError), Normalizers().active():
        1 / 0  # noqa: B018
    assert not is_batch_divided()
    Normalizers().finish()
