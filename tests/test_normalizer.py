# SPDX-License-Identifier: Apache-2.0
"""Loss normalizers of batches that are spread over micro-batches and processes."""

import re

import pytest
import torch
from oracle import Pair, double_precision, in_mmdetection
from torch import nn
from uncompiled_mmcv import import_mmdet

from detectron2.utils import comm
from detectron2.utils.events import EventStorage

from libra_d2.checkpoint import to_mmdetection
from libra_d2.modeling.normalizer import Normalizers, is_batch_divided, mean_over_batch


def another_process(monkeypatch, number):
    """Simulate two processes, the other of which contributes ``number`` to each all-reduce."""
    monkeypatch.setattr(comm, "get_world_size", lambda: 2)
    monkeypatch.setattr(torch.distributed, "all_reduce", lambda x: x.add_(number))


@pytest.mark.parametrize("is_shared", [True, False])
@pytest.mark.parametrize(("other", "expected"), [(None, [4.0, 40.0]), (30, [17.0, 35.0])])
def test_micro_batches(monkeypatch, other, expected, is_shared):
    """
    Each of two heads has its own mean over three micro-batches, in any order of use; the second one
    over all processes or its own.
    """
    if other is not None:
        another_process(monkeypatch, other)
    normalizers, heads = Normalizers(), (nn.Identity(), nn.Identity())
    heads[1].normalize_over = "batch" if is_shared else "process"
    with normalizers.active():
        for numbers in ((1, 10), (3, 20), (8, 90)):
            assert is_batch_divided()
            for number, head in zip(numbers, heads):
                assert mean_over_batch(torch.tensor(number), head) == number
    normalizers.finish()
    expected = expected if is_shared else [expected[0], 40]
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


def losses_and_gradients(model, compute):
    """Losses of this process, and the gradients that all processes have in common."""
    model.zero_grad()
    losses = compute(torch.nn.parallel.DistributedDataParallel(model, broadcast_buffers=False))
    sum(losses.values()).backward()
    gradients = {k: p.grad.clone() for k, p in model.named_parameters() if p.grad is not None}
    return {k: loss.detach() for k, loss in losses.items()}, gradients


def their_losses(pair, inputs):
    def compute(model):
        found = model(**pair.theirs.data_preprocessor(pair.data(inputs), True), mode="loss")
        return {
            name: sum(loss) if isinstance(loss, list) else loss.sum()
            for name, loss in found.items()
            if "loss" in name
        }

    return losses_and_gradients(pair.theirs.train(), compute)


def our_losses(pair, inputs, normalize_over):
    def compute(model):
        with EventStorage():
            return model(inputs)

    for module in pair.ours.modules():
        if hasattr(module, "normalize_over"):
            module.normalize_over = normalize_over
    losses, gradients = losses_and_gradients(pair.ours.train(), compute)
    losses = {in_mmdetection(name): loss for name, loss in losses.items()}
    return losses, to_mmdetection({**pair.ours.state_dict(), **gradients})


def compare(rank, num_processes, folder, seed):
    """One of the processes, with one image of as many; these differ in their numbers of objects."""
    torch.set_num_threads(1)
    torch.distributed.init_process_group(
        "gloo", f"file://{folder}/a", rank=rank, world_size=num_processes
    )
    few = {"num_proposals": 30, "num_tested_proposals": 50, "num_detections": 10, "small": True}
    sizes = [(64, 90), (96, 64), (64, 64), (90, 72)][:num_processes]
    mmdet = import_mmdet()
    for name in ("libra_cascade_mask_rcnn_R_50", "libra_retinanet_R_50"):
        with double_precision():
            pair = Pair(mmdet, name, seed, sizes, **few)
            compare_losses(pair, pair.inputs[rank : rank + 1])
    torch.distributed.destroy_process_group()


def compare_losses(pair, inputs):
    theirs, their_gradients = their_losses(pair, inputs)
    ours, gradients = our_losses(pair, inputs, "process")
    of_batch, _ = our_losses(pair, inputs, "batch")
    assert len(theirs) == len(ours)
    for key, loss in theirs.items():
        torch.testing.assert_close(ours[key], loss, rtol=1e-9, atol=1e-12)
        # That of masks is always a mean over those of the process.
        is_same = abs(of_batch[key] / loss - 1) < 1e-3
        assert is_same == ("mask" in key), (key, of_batch[key], loss)
    # The softmax ignores the bias of phi, whose gradient is rounding.
    del their_gradients["neck.1.refine.phi.conv.bias"]
    for key, gradient in their_gradients.items():
        error = (gradients[key] - gradient).norm()
        # Those of theta and phi are what is left of much larger numbers that cancel out.
        scale = 1 if re.search("theta|phi", key) else gradient.norm()
        assert error <= 1e-9 * scale, (key, error, scale)


def test_processes(tmp_path, pytestconfig):
    """
    With NORMALIZE_OVER "process", two processes, or four with --slow, have mmdetection's losses and
    gradients; by default they do not.
    """
    seed = 3 + pytestconfig.getoption("seed")
    num_processes = 4 if pytestconfig.getoption("slow") else 2
    arguments = {"args": (num_processes, str(tmp_path), seed), "nprocs": num_processes}
    torch.multiprocessing.start_processes(compare, start_method="forkserver", **arguments)
