# SPDX-License-Identifier: Apache-2.0
"""Best model, early stopping, number of checkpoints, speed, signals; see also test_trainer.py."""

import os
import signal
from types import SimpleNamespace

import pytest
from test_trainer import SECTION, ToyTrainer, lines, make, run, send
from test_trainer import toy_data as toy_data
from torch import distributed

from detectron2.utils import comm
from detectron2.utils.events import EventStorage

from libra_d2.engine.hooks import Aborted, BestModel, EarlyStopping, StopOnSignal, Throughput
from libra_d2.errors import InputError


def test_no_number(toy_data, tmp_path):
    """Patience is counted from the first number; a metric that is not there is an error."""
    scores = [float("nan")] * 3 + [1.0, 0.5, 0.5]

    class Late(ToyTrainer):
        @classmethod
        def test(cls, cfg, model, evaluators=None):
            return {"bbox": {"AP": scores.pop(0)}}

    opts = ["TEST.EVAL_PERIOD", 1, f"{SECTION}PATIENCE", 2, f"{SECTION}EMA_DECAY", 0.0]
    run(tmp_path / "a", *opts, trainer=Late)
    assert scores == []
    scores.append(1.0)
    opts += [f"{SECTION}BEST_METRIC", "bbox/APx"]
    assert make(tmp_path / "b", *opts, trainer=Late).best.describe() == ""
    with pytest.raises(InputError, match="^evaluations do not report bbox/APx, but bbox/AP$"):
        run(tmp_path / "b", *opts, trainer=Late)


@pytest.mark.parametrize(
    ("metric", "data"), [("bbox/AP", "toy"), ("bbox/AP50", "toy"), ("bbox/AP", "one")]
)
def test_other_measure(toy_data, tmp_path, metric, data, caplog):
    """The best by another metric, or on other data, does not count when a training is resumed."""
    opts = ["TEST.EVAL_PERIOD", 2, f"{SECTION}PATIENCE", 9]
    before = run(tmp_path, *opts, until=5).best.state_dict()
    assert before["measure"]["metric"] == "bbox/AP"
    opts += [f"{SECTION}BEST_METRIC", metric, "DATASETS.TEST", (data,)]
    trainer = run(tmp_path, *opts)
    is_same = (metric, data) == ("bbox/AP", "toy")
    assert ("The best model so far had bbox/AP " in caplog.text) != is_same
    found = {x["iteration"]: x[metric] for x in lines(tmp_path) if metric in x}
    counted = {i: value for i, value in found.items() if i > 3 or is_same}
    assert trainer.best.best_metric == pytest.approx(max(counted.values()))
    assert trainer.best.best_iter in [i for i, v in counted.items() if v == max(counted.values())]
    (stopping,) = [h for h in trainer._hooks if isinstance(h, EarlyStopping)]
    assert stopping.best == pytest.approx(max(v for i, v in counted.items() if i < 10))


def test_other_measure_before_any_evaluation(caplog):
    """There is nothing to say."""
    best = BestModel(1, None, "bbox/AP", {})
    best.load_state_dict({"measure": {"metric": "x"}, "best_metric": None, "best_iter": None})
    assert (best.describe(), caplog.messages) == ("", [])


def test_number_of_checkpoints(toy_data, tmp_path, monkeypatch):
    """
    The last three are kept, including those from before the training was resumed, which had kept
    five. The best model and other files do not count.
    """
    opts = ["SOLVER.CHECKPOINT_PERIOD", 1, f"{SECTION}VALIDATION_LOSS", False]
    trainer = make(tmp_path, *opts, f"{SECTION}MAX_CHECKPOINTS", 5, "SOLVER.MAX_ITER", 6)
    (tmp_path / "model_0000050.pth").touch()  # not of this training
    trainer.train()
    (tmp_path / "model_0000050.pth").unlink()
    others = {"model_0000003.pth.0", "model_00000100.pth", "other_0000007.pth"}
    for name in others:
        (tmp_path / name).touch()
    listed = os.listdir  # in any order
    monkeypatch.setattr(os, "listdir", lambda *path: sorted(listed(*path), reverse=True))
    run(tmp_path, *opts, f"{SECTION}MAX_CHECKPOINTS", 3, "SOLVER.MAX_ITER", 7)
    kept = {f"model_{i:07d}.pth" for i in (4, 5, 6)}
    kept |= {"model_best.pth", "model_final.pth", "model_final_ema.pth"}
    assert {p.name for p in tmp_path.glob("*.pth*")} == kept | others


def test_patience_at_the_end():
    """The last iteration has no evaluation of its own; the one before does not count twice."""
    hook, storage = EarlyStopping(2, "bbox/AP", 1, {}), EventStorage(5)
    hook.best, hook.trainer = 5.0, SimpleNamespace(iter=5, max_iter=6, storage=storage)
    storage.put_scalar("bbox/AP", 4.0)
    hook.after_step()
    assert hook.num_bad == 0


def test_throughput(caplog):
    """The batch size by the median time of the last 1000 steps, if there were any."""
    hook = Throughput(6)
    hook.trainer = SimpleNamespace(storage=EventStorage())
    hook.after_train()
    assert not caplog.messages
    for seconds in [9.0] * 501 + [0.5] * 500:
        hook.trainer.storage.put_scalar("time", seconds)
    with caplog.at_level("INFO"):
        hook.after_train()
    assert caplog.messages == ["1.26 images per second (median)"]  # 6 / ((9 + 0.5) / 2)


def test_signals_in_an_evaluation():
    """A second one saves nothing more; an error after one is another process'."""
    hook, saved = StopOnSignal(), []

    def save():
        saved.append(1)
        if len(saved) == 1:
            hook._receive(signal.SIGTERM, None)

    hook.trainer = SimpleNamespace(iter=3, max_iter=9, save_state=save)
    with pytest.raises(Aborted, match="143"), hook:
        hook._receive(signal.SIGTERM, None)
    assert len(saved) == 1
    hook.received = None

    def fail():
        hook.received = signal.SIGTERM
        raise RuntimeError

    with pytest.raises(Aborted, match="143"), hook:
        fail()
    assert len(saved) == 2


def test_agreement(monkeypatch):
    """What one of two processes has received reaches all of them one iteration later."""
    waited, hook = [], StopOnSignal()

    def all_reduce(number, operation, group, async_op):
        assert (group, async_op) == ({"backend": "gloo"}, True)
        assert operation == distributed.ReduceOp.MAX
        return SimpleNamespace(wait=lambda: waited.append(number.fill_(signal.SIGUSR1)))

    monkeypatch.setattr(comm, "get_world_size", lambda: 2)
    monkeypatch.setattr(distributed, "new_group", lambda **kwargs: kwargs)
    monkeypatch.setattr(distributed, "all_reduce", all_reduce)
    hook.trainer = SimpleNamespace(iter=3, max_iter=9, save_state=lambda: None)
    hook.before_train()
    try:
        hook.after_step()
        with pytest.raises(SystemExit, match=str(128 + signal.SIGUSR1)):
            hook.after_step()
        assert len(waited) == 1
    finally:
        for _ in range(2):
            hook.after_train()
    assert len(waited) == 2  # for what was pending, once


def test_second_interrupt(toy_data, tmp_path):
    """A second Ctrl-C stops at once, without a checkpoint; Ctrl-C after another signal does not."""
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path / "a", until=4, action=send(signal.SIGINT, signal.SIGINT))
    assert not (tmp_path / "a/model_0000004.pth").exists()
    with pytest.raises(SystemExit, match="130"):
        run(tmp_path / "b", until=4, action=send(signal.SIGTERM, signal.SIGINT))
    assert (tmp_path / "b/model_0000004.pth").exists()
