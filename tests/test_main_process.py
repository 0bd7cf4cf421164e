# SPDX-License-Identifier: Apache-2.0
import pytest

from detectron2.utils import comm

from libra_d2.errors import InputError
from libra_d2.utils.main_process import in_main_process


def fail(*args):
    raise ValueError("broken\nfile")


def test_in_main_process(monkeypatch):
    """All processes get its value, or its error; others do not call the function."""
    sent = []
    monkeypatch.setattr(comm, "all_gather", lambda mine: sent.append(mine) or [mine])
    assert in_main_process(divmod, 7, 4) == (1, 3)
    with pytest.raises(ValueError, match="^broken\nfile$"):
        in_main_process(fail, 1)
    assert sent == [((1, 3), ""), (None, "broken file")]
    monkeypatch.setattr(comm, "is_main_process", lambda: False)
    for received in ((5, ""), (None, "broken")):
        monkeypatch.setattr(comm, "all_gather", lambda mine, r=received: [r, mine])
        if received[1]:
            with pytest.raises(InputError, match="broken"):
                in_main_process(fail)
        else:
            assert in_main_process(fail) == 5
