# SPDX-License-Identifier: Apache-2.0
import gzip
import json

import pytest

from libra_d2.data import json_lists
from libra_d2.data.json_lists import JSONLists
from libra_d2.errors import InputError

CONTENT = {
    "info": {"a": [1, {"images": [2]}], "b": ']}\\"'},
    "number": 12345,
    "images": [{"id": 1, "name": "\u65e5\u00e9\U0001f600"}, "x", -1.5e-30, 123, [], None, True],
    "empty": [],
    "other": [1],
}
CHUNK = json_lists._CHUNK


@pytest.mark.parametrize("indent", [None, 1])
@pytest.mark.parametrize("chunk", [1, 2, 3, 7, CHUNK])
def test_entries(tmp_path, monkeypatch, chunk, indent):
    """Wherever the text is cut, in a number or a character of several bytes, too."""
    monkeypatch.setattr(json_lists, "_CHUNK", chunk)
    path = tmp_path / "a.json"
    path.write_text(json.dumps(CONTENT, ensure_ascii=False, indent=indent), encoding="utf-8-sig")
    lists = JSONLists(str(path), ("images", "empty", "number", "absent"))
    assert (lists.is_complete, lists.has_byte_order_mark) == (False, False)
    for _ in range(2):
        assert list(lists) == [("images", entry) for entry in CONTENT["images"]]
        assert lists.found == ["images", "empty"]
        assert lists.rest == {key: CONTENT[key] for key in ("info", "number", "other")}
        assert lists.has_byte_order_mark
        assert lists.is_complete


@pytest.mark.parametrize("chunk", [5, CHUNK])
def test_invalid(tmp_path, monkeypatch, chunk):
    """Each prefix of a valid text, and what is no JSON."""
    monkeypatch.setattr(json_lists, "_CHUNK", chunk)
    text, path = '{"a": [{"b": 1}, 2], "c": 3}', tmp_path / "a.json"
    cases = {text[:i]: "is the file cut short" for i in range(len(text))}
    cases.update(
        {
            f"{text},": "Expecting the end: character 28",
            "[1,": "Expecting value: character 3",
            "[" * 10**5: "not valid JSON",
            "{1: 2}": "Expecting '\"': character 1",
            '{"a" [1]}': "Expecting ':': character 5",
            '{"a": [1 2]}': "Expecting ',' or ']': character 9",
            '{"a": [,1]}': "Expecting value: character 7",
            '{"c": 1;}': "Expecting ',' or '}': character 7",
            '{"a": [], "a": []}': "there are two lists 'a'",
        }
    )
    for content, message in cases.items():
        path.write_text(content)
        with pytest.raises(InputError, match=f"^{path}: .*{message}"):
            list(JSONLists(str(path), ("a",)))
    for content, rest in (("{}", {}), ("[1]", {}), ('{"a": {}}', {"a": {}})):
        path.write_text(content)
        lists = JSONLists(str(path), ("a",))
        assert (list(lists), lists.found, lists.rest) == ([], [], rest)


@pytest.mark.parametrize("chunk", [1, 5, CHUNK])
def test_encoding(tmp_path, monkeypatch, chunk):
    """The place of what is no UTF-8; the entries before it, if they are not read at once."""
    monkeypatch.setattr(json_lists, "_CHUNK", chunk)
    (tmp_path / "a.json").write_bytes('{"a": [5, "\u65e5'.encode() + b'\xe4"]}')
    lists, found = JSONLists(str(tmp_path / "a.json"), ("a",)), []
    with pytest.raises(InputError, match="not encoded in UTF-8 .byte 14 is 0xe4.*in Latin-1; save"):
        found.extend(entry for _, entry in lists)
    assert found == ([] if chunk == CHUNK else [5])
    assert not lists.is_complete


@pytest.mark.parametrize(
    ("encoding", "message"),
    [
        *((name, "encoded in UTF-16; save it") for name in ("utf-16", "utf-16-le", "utf-16-be")),
        (None, "compressed with gzip; unpack it"),
    ],
)
def test_other_encodings(tmp_path, encoding, message):
    text, path = "\ufeff" * (encoding == "utf-16-be") + json.dumps(CONTENT), tmp_path / "a.json"
    path.write_bytes(text.encode(encoding) if encoding else gzip.compress(text.encode()))
    with pytest.raises(InputError, match=f"^{path}: {message}"):
        list(JSONLists(str(path), ("a",)))


@pytest.mark.parametrize("read", [list, JSONLists.digest])
def test_unreadable(tmp_path, read):
    for path, message in (
        (tmp_path / "none.json", "no such annotation file$"),
        ("/proc/self/mem", "cannot be read: .*Input/output error"),
    ):
        with pytest.raises(InputError, match=f"^{path}: {message}"):
            read(JSONLists(str(path), ()))
