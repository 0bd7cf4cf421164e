# SPDX-License-Identifier: Apache-2.0
"""Best model, early stopping, averaged weights, number of checkpoints, signals."""

import os
import signal
from types import SimpleNamespace

import pytest
import torch
from test_trainer import SECTION, Failing, Failure, ToyTrainer, lines, make, run, weights
from test_trainer import toy_data as toy_data
from test_trainer import whole as whole

from detectron2.utils.events import EventStorage

from libra_d2.engine.hooks import Aborted, EarlyStopping, StopOnSignal, Throughput
from libra_d2.errors import InputError


@pytest.mark.parametrize("names", [("one",), ("toy", "one")])
@pytest.mark.parametrize("averaged", [True, False])
def test_average_and_best(toy_data, tmp_path, names, averaged):
    """The moving average of the weights; the best model is that of the metric, averaged or not."""
    several, ema = len(names) > 1, "_EMA" * averaged
    metric = f"one{ema}/bbox/AP" if several else f"bbox{ema}/AP"
    opts = ["DATASETS.TEST", names, f"{SECTION}BEST_METRIC", metric, "TEST.EVAL_PERIOD", 2]
    run(tmp_path, *opts, "SOLVER.CHECKPOINT_PERIOD", 1)
    states = [weights(tmp_path, f"model_{i:07d}") for i in range(11)]
    averages = [states[0][0]]
    for weight, *_ in states[1:]:
        averages.append(0.75 * averages[-1] + 0.25 * weight)
    # Buffers are copies.
    assert weights(tmp_path, "model_final_ema") == pytest.approx([averages[-1], *states[-1][1:]])
    evaluated = {min(x["iteration"], 10): x[metric] for x in lines(tmp_path) if metric in x}
    values = averages if averaged else [weight for weight, *_ in states]
    assert evaluated == pytest.approx({i: values[i] for i in (1, 3, 5, 7, 9, 10)})
    best = max(evaluated, key=evaluated.get)
    assert weights(tmp_path, "model_best") == pytest.approx([values[best], *states[best][1:]])
    state = torch.load(tmp_path / "model_best.pth")
    assert (state.keys(), state["iteration"]) == ({"model", "iteration", "run"}, best)
    prefixes = [f"{name}/" for name in names] if several else [""]
    totals = {k for x in lines(tmp_path) for k in x if k.endswith("/total_loss")}
    assert totals == {f"validation/{x}total_loss" for x in prefixes}


@pytest.mark.parametrize("before", [None, 3, 5, 7])
def test_patience(toy_data, tmp_path, before, caplog):
    """
    The training ends at the second evaluation in a row that is not above the best one, 4 at
    iteration 3, resumed or not; the best model stays that one. An ended training is not continued.
    """
    caplog.set_level("INFO")
    scores, augmented = [3, 4, float("nan"), 4, 9, 9], {"bbox_TTA": {"AP": 5}}

    class Scored(ToyTrainer):
        @classmethod
        def test(cls, cfg, model, evaluators=None):
            return {"bbox": {"AP": left.pop(0)}}

        @classmethod
        def test_with_TTA(cls, cfg, model):
            return augmented

    opts = ["TEST.EVAL_PERIOD", 2, f"{SECTION}EMA_DECAY", 0.0, f"{SECTION}PATIENCE", 2]
    opts += ["TEST.AUG.ENABLED", True, f"{SECTION}VALIDATION_LOSS", False]
    left = scores[:]
    if before:
        run(tmp_path, *opts, until=before, trainer=Scored)
        left = scores[before // 2 :]
    trainer = run(tmp_path, *opts, trainer=Scored)
    assert len(left) == 2
    assert trainer.results == {"bbox": {"AP": 4}, **augmented}
    found = [(x["iteration"], x["bbox/AP"]) for x in lines(tmp_path) if x.get("bbox/AP", 0) > 0]
    assert found == [(1, 3), (3, 4), (7, 4)]
    assert lines(tmp_path)[-1] == {"iteration": 8, "bbox_TTA/AP": 5}
    assert "bbox/AP has not risen above 4.00 in 2 evaluations" in caplog.text
    assert torch.load(tmp_path / "model_best.pth")["iteration"] == 3
    run(tmp_path, *opts, trainer=Scored)
    assert "This training has ended early" in caplog.text
    assert torch.load(tmp_path / "model_final.pth")["iteration"] == 7


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


def test_number_of_checkpoints(toy_data, tmp_path):
    """
    The last three are kept, including those from before the training was resumed. The best model
    and other files do not count.
    """
    opts = ["SOLVER.CHECKPOINT_PERIOD", 1, f"{SECTION}VALIDATION_LOSS", False]
    run(tmp_path, *opts, f"{SECTION}MAX_CHECKPOINTS", 4, "SOLVER.MAX_ITER", 6)
    others = {"model_0000003.pth.0", "model_00000100.pth", "other_0000007.pth"}
    for name in others:
        (tmp_path / name).touch()
    run(tmp_path, *opts, f"{SECTION}MAX_CHECKPOINTS", 3, "SOLVER.MAX_ITER", 8)
    kept = {f"model_{i:07d}.pth" for i in (2, 5, 6, 7)}
    kept |= {"model_best.pth", "model_final.pth", "model_final_ema.pth"}
    assert {p.name for p in tmp_path.glob("*.pth*")} == kept | others


def test_checkpoint_that_is_written_again(toy_data, tmp_path):
    """When an evaluation is made up for, its checkpoint counts once."""
    Failing.left = 3  # of the weights at iteration 5
    opts = ["SOLVER.CHECKPOINT_PERIOD", 3, f"{SECTION}MAX_CHECKPOINTS", 2]
    with pytest.raises(Failure):
        make(tmp_path, *opts, trainer=Failing).train()
    run(tmp_path, *opts)
    kept = {"model_0000005.pth", "model_0000008.pth"}
    assert {p.name for p in tmp_path.glob("model_0*")} == kept


def test_patience_at_the_end():
    """The last iteration has no evaluation of its own; the one before does not count twice."""
    hook, storage = EarlyStopping(2, "bbox/AP", 1, {}), EventStorage(5)
    hook.best, hook.trainer = 5.0, SimpleNamespace(iter=5, max_iter=6, storage=storage)
    storage.put_scalar("bbox/AP", 4.0)
    hook.after_step()
    assert hook.num_bad == 0


SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)


def test_throughput(caplog):
    """The batch size by the median time, if there were steps."""
    hook = Throughput(6)
    hook.trainer = SimpleNamespace(storage=EventStorage())
    hook.after_train()
    assert not caplog.messages
    for seconds in (0.5, 9.0, 0.25):
        hook.trainer.storage.put_scalar("time", seconds)
    with caplog.at_level("INFO"):
        hook.after_train()
    assert caplog.messages == ["12 images per second (median)"]


def send(*numbers):
    return lambda *_: [os.kill(os.getpid(), number) for number in numbers]


class Signaled(ToyTrainer):
    """Receives a signal in one of its evaluations, two of which are at iterations 2, 5, 8, 10."""

    left, number = 0, 0

    @classmethod
    def test(cls, cfg, model, evaluators=None):
        cls.left -= 1
        if cls.left == 0:
            send(cls.number)()
        return super().test(cfg, model)


@pytest.mark.parametrize(
    ("until", "evaluation", "saved", "number"),
    [
        (4, 0, 4, signal.SIGTERM),
        (5, 0, 5, signal.SIGINT),
        (10, 0, 10, signal.SIGTERM),
        (None, 1, 2, signal.SIGUSR1),
        (None, 4, 5, signal.SIGTERM),
        (None, 7, 10, signal.SIGINT),
    ],
)
def test_signals(whole, tmp_path, capsys, until, evaluation, saved, number):
    """
    During an iteration, one before an evaluation, and an evaluation: the training is saved, exits
    with the status that shells expect, and resumes exactly, with all metrics.
    """
    handlers = [signal.getsignal(x) for x in SIGNALS]
    Signaled.left, Signaled.number = evaluation, number
    opts = ["SOLVER.CHECKPOINT_PERIOD", 100]
    with pytest.raises(SystemExit, match=str(128 + number)):
        run(tmp_path, *opts, until=until, action=send(number), trainer=Signaled)
    if evaluation == 7:  # the one after the last iteration is one of the last things to be done
        for x, handler in zip(SIGNALS, handlers):
            signal.signal(x, handler)
    else:
        assert [signal.getsignal(x) for x in SIGNALS] == handlers
    message = f"{number.name}: stopped after iteration {saved}; --resume continues\n"
    printed = capsys.readouterr().err
    assert printed.endswith(message)
    assert printed.count("stopped after") == 1
    saved_files = {p.name for p in tmp_path.glob("*.pth")} - {"model_best.pth"}
    last = {f"model_{saved:07d}.pth"} if saved < 10 else {"model_final.pth", "model_final_ema.pth"}
    assert saved_files == last
    assert not any("bbox/AP" in x for x in lines(tmp_path) if x["iteration"] == saved)
    run(tmp_path, *opts, seed=99)
    assert weights(tmp_path) == weights(whole)
    for name in ("model_best", "model_final_ema"):
        assert weights(tmp_path, name) == weights(whole, name)
    assert lines(tmp_path) == lines(whole)


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


def test_second_interrupt(toy_data, tmp_path):
    """A second Ctrl-C stops at once, without a checkpoint; Ctrl-C after another signal does not."""
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path / "a", until=4, action=send(signal.SIGINT, signal.SIGINT))
    assert not (tmp_path / "a/model_0000004.pth").exists()
    with pytest.raises(SystemExit, match="130"):
        run(tmp_path / "b", until=4, action=send(signal.SIGTERM, signal.SIGINT))
    assert (tmp_path / "b/model_0000004.pth").exists()
