# SPDX-License-Identifier: Apache-2.0
import pickle

import pytest
import torch
from test_checkpoint import save, theirs  # noqa: F401

from libra_d2.checkpoint import LibraCheckpointer
from libra_d2.tools.convert_mmdet import main


def equal(a, b):
    return a.keys() == b.keys() and all(
        torch.equal(a[key], b[key]) and a[key].dtype == b[key].dtype for key in a
    )


def test_round_trip(theirs, tmp_path, capsys):  # noqa: F811
    """From mmdetection and back, bit by bit, counters included; either side loads its own."""
    from detectron2.modeling import build_model

    cfg, model, _ = theirs
    meta = {"mmdet_version": "2.25.0", "CLASSES": ["a"]}
    original = {"meta": meta, "state_dict": model.state_dict(), "optimizer": {}}
    source = save(tmp_path / "theirs.pth", original)
    main([str(source), str(tmp_path / "ours.pth")])
    printed = capsys.readouterr().out
    assert "ours.pth: Libra " in printed
    assert "R-50 with 80 classes" in printed
    main([str(tmp_path / "ours.pth"), str(tmp_path / "back.pth")])
    back = torch.load(tmp_path / "back.pth")
    assert equal(back["state_dict"], model.state_dict())
    assert back["meta"] == meta
    model.load_state_dict(back["state_dict"], strict=True)

    ours = build_model(cfg)
    LibraCheckpointer(ours, complete=True).load(str(tmp_path / "ours.pth"))
    assert ours.load_state_dict(torch.load(tmp_path / "ours.pth")["model"], strict=True)


@pytest.mark.parametrize("suffix", [".pth", ".pkl"])
def test_from_detectron2(theirs, tmp_path, suffix):  # noqa: F811
    """A model trained here, old files of Detectron2 included, is one of mmdetection's."""
    from detectron2.modeling import build_model

    cfg, model, _ = theirs
    ours = build_model(cfg)
    state = {**ours.state_dict(), "pixel_mean": torch.zeros(3, 1, 1)}
    state["proposal_generator.anchor_generator.cell_anchors.0"] = torch.zeros(3, 4)
    if suffix == ".pth":
        source = save(tmp_path / "a.pth", {"model": state, "iteration": 3})
    else:
        source = tmp_path / "a.pkl"
        state = {key: value.numpy() for key, value in state.items()}
        source.write_bytes(pickle.dumps({"model": state, "__author__": "a"}))
    main([str(source), str(tmp_path / "theirs.pth")])
    content = torch.load(tmp_path / "theirs.pth")
    model.load_state_dict(content["state_dict"], strict=True)
    main([str(tmp_path / "theirs.pth"), str(tmp_path / "back.pth")])
    assert equal(torch.load(tmp_path / "back.pth")["model"], dict(ours.state_dict()))


class Malicious:
    def __reduce__(self):
        return (open, ("executed", "w"))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "source.pth: the weights cannot be read: .*No such file"),
        (b"", "source.pth: not a checkpoint, or cut short"),
        (b"PK\x03\x04 no archive", "source.pth: not a checkpoint, or cut short"),
        (b"plain text", "source.pth: not loaded"),
        ({"model": {"a.weight": torch.zeros(1)}}, "source.pth: 'a.weight' has no counterpart"),
        ({"state_dict": {}}, "source.pth: not a checkpoint"),
        ([1], "source.pth: not a checkpoint: it holds a list"),
        (
            {
                "meta": {"mmdet_version": "1.2.0"},
                "state_dict": {"backbone.conv1.weight": torch.zeros(1)},
            },
            "source.pth: a checkpoint of mmdetection 1.x",
        ),
        (Malicious(), "source.pth: not loaded, .*short: Unsupported global: GLOBAL io.open$"),
        (
            {"state_dict": {"backbone.conv1.weight": torch.zeros(1), "mask": torch.zeros(1)}},
            "source.pth: '.?mask' has no counterpart",
        ),
    ],
)
def test_bad_source(tmp_path, monkeypatch, capsys, content, message):
    """One line, and nothing is left behind."""
    monkeypatch.chdir(tmp_path)
    if isinstance(content, bytes):
        (tmp_path / "source.pth").write_bytes(content)
    elif content is not None:
        save(tmp_path / "source.pth", content)
    with pytest.raises(SystemExit) as exit:
        main(["source.pth", "target.pth"])
    assert exit.value.code == 2
    (line,) = capsys.readouterr().err.strip().splitlines()
    import re

    assert re.match(f"error: {message}", line), line
    assert {p.name for p in tmp_path.iterdir()} <= {"source.pth"}


def test_bad_target(theirs, tmp_path, capsys):  # noqa: F811
    _, model, _ = theirs
    source = save(tmp_path / "a.pth", model.state_dict())
    with pytest.raises(SystemExit):
        main([str(source), str(tmp_path / "none/b.pth")])
    assert "none/b.pth: cannot be written: " in capsys.readouterr().err
