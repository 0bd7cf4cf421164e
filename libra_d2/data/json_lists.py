# SPDX-License-Identifier: Apache-2.0
"""Large JSON files, read entry by entry."""

import codecs
import json
import os
import re
from typing import IO, Any, Dict, Iterator, List, Sequence, Tuple

from ..errors import InputError, one_line
from .fingerprint import file_digest

__all__ = ["JSONLists"]

_CHUNK = 1 << 20  # bytes
_SPACE = re.compile(r"[ \t\n\r]*")
_scan = json.JSONDecoder().scan_once  # in C; the value at a position, and where it ends


class _Text:
    """The text of a file in UTF-8, of which only the part around a position is in memory."""

    def __init__(self, file: IO[bytes]):
        self._file = file
        self._decoder = codecs.getincrementaldecoder("utf-8")()
        self._text, self._position = "", 0
        self._characters = 0  # before the text in memory
        self._at_end = False

    def _read_more(self) -> None:
        """Read at least as much as there is, so that a long value is not scanned often."""
        rest = self._text[self._position :]
        self._characters += self._position
        content = self._file.read(max(_CHUNK, len(rest)))
        self._at_end = not content
        waiting = len(self._decoder.getstate()[0])  # bytes of a character that was cut
        try:
            self._text, self._position = rest + self._decoder.decode(content, not content), 0
        except UnicodeDecodeError as e:
            place = self._file.tell() - len(content) - waiting + e.start
            raise InputError(
                f"{self._file.name}: not encoded in UTF-8 (byte {place} is {e.object[e.start]:#x}),"
                " but perhaps in Latin-1; save it as UTF-8"
            ) from None

    def error(self, message: str, position: int) -> ValueError:
        return ValueError(f"{message}: character {self._characters + position}")

    def next(self) -> str:
        """The next character that is no white space; "" at the end."""
        while True:
            self._position = _SPACE.match(self._text, self._position).end()
            if self._position < len(self._text) or self._at_end:
                return self._text[self._position : self._position + 1]
            self._read_more()

    def expect(self, *characters: str) -> str:
        """The next character that is no white space, which must be one of these."""
        found = self.next()
        if found not in characters:
            what = " or ".join(repr(x) if x else "the end" for x in characters)
            raise self.error(f"Expecting {what}", self._position)
        return found

    def take(self, *characters: str) -> str:
        """See :meth:`expect`; goes on behind it."""
        found = self.expect(*characters)
        self._position += 1
        return found

    def items(self, start: str, end: str) -> Iterator[None]:
        """The items of an object or a list, each of which is read before the next one."""
        self.take(start)
        if self.next() == end:
            self.take(end)
            return
        while True:
            yield
            if self.take(",", end) == end:
                return

    def value(self) -> Any:
        """The next value."""
        self.next()
        while True:
            try:
                value, end = _scan(self._text, self._position)
            except (StopIteration, json.JSONDecodeError) as e:
                if self._at_end:
                    is_stop = isinstance(e, StopIteration)
                    message = "Expecting value" if is_stop else e.msg
                    raise self.error(message, e.value if is_stop else e.pos) from None
            else:
                # A number may go on.
                if self._at_end or self._text[end : end + 1] not in ("", ".", "e", "E"):
                    self._position = end
                    return value
            self._read_more()


class JSONLists:
    """
    The entries of some lists in the object that a JSON file consists of, one after the other. The
    memory that this takes does not depend on the length of the lists.
    """

    def __init__(self, path: str, names: Sequence[str]):
        """
        Args:
            path: of a file in UTF-8.
            names: of the lists; other values are kept in :attr:`rest`.
        """
        self.path = path
        self.names = frozenset(names)
        #: names of the lists that were read so far
        self.found: List[str] = []
        #: the values of other keys that were read so far
        self.rest: Dict[str, Any] = {}
        #: whether all of the file was read
        self.is_complete = False
        self.has_byte_order_mark = False

    def _check_exists(self) -> None:
        if not os.path.isfile(self.path):
            raise InputError(f"{self.path}: no such annotation file")

    def digest(self) -> str:
        """:func:`file_digest` of the file; InputError if it cannot be read."""
        self._check_exists()
        try:
            return file_digest(self.path)
        except OSError as e:
            raise InputError(f"{self.path}: cannot be read: {one_line(e)}") from e

    def __iter__(self) -> Iterator[Tuple[str, Any]]:
        """
        The name of its list, and each entry, in the order of the file.

        Raises:
            InputError: if the file is missing, of another encoding, or no valid JSON.
        """
        self.found, self.rest, self.is_complete = [], {}, False
        self._check_exists()
        try:
            with open(self.path, "rb") as file:
                self._check_start(file)
                yield from self._entries(_Text(file))
        except OSError as e:
            raise InputError(f"{self.path}: cannot be read: {one_line(e)}") from e
        except (ValueError, RecursionError) as e:
            raise InputError(
                f"{self.path}: not valid JSON, is the file cut short? ({one_line(e)})"
            ) from None

    def _check_start(self, file: IO[bytes]) -> None:
        start = file.read(4)
        if start.startswith(b"\x1f\x8b"):
            raise InputError(f"{self.path}: compressed with gzip; unpack it")
        if start.startswith((b"\xff\xfe", b"\xfe\xff")) or start[1:4:2] == b"\0\0":
            raise InputError(f"{self.path}: encoded in UTF-16; save it as UTF-8")
        self.has_byte_order_mark = start.startswith(codecs.BOM_UTF8)
        file.seek(len(codecs.BOM_UTF8) if self.has_byte_order_mark else 0)

    def _entries(self, text: _Text) -> Iterator[Tuple[str, Any]]:
        if text.next() != "{":
            text.value()
        else:
            yield from self._members(text)
        text.expect("")
        self.is_complete = True

    def _members(self, text: _Text) -> Iterator[Tuple[str, Any]]:
        for _ in text.items("{", "}"):
            text.expect('"')
            name = text.value()
            text.take(":")
            if name not in self.names or text.next() != "[":
                self.rest[name] = text.value()
                continue
            if name in self.found:
                raise InputError(f"{self.path}: there are two lists {name!r}")
            self.found.append(name)
            for _ in text.items("[", "]"):
                yield name, text.value()
