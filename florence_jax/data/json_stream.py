"""JSON files of several GB, item by item."""

import codecs
import io
import json
import re
from collections.abc import Iterator
from typing import Any

from etils import epath

from florence_jax.errors import UserError

_SPACE = re.compile(r"[ \t\r\n]*")
_COMMA = re.compile(r"[ \t\r\n]*,[ \t\r\n]*(?=[^ \t\r\n\]])")
READ_BYTES = 1 << 20  # bytes read at a time


class _JsonText:
    """A JSON text read in chunks, with a position; `items`: those of the list that is read."""

    def __init__(self, file: io.BufferedIOBase):
        self._file, self._text, self._at, self._end = file, "", 0, False
        self.items = 0
        self._before = 0  # characters of the file before those of _text
        self._bytes = codecs.getincrementaldecoder("utf-8-sig")()
        self._decoder = json.JSONDecoder()

    def _more(self) -> bool:
        if self._end:
            return False
        # At least doubling: a long item is parsed again only a few times.
        data = self._file.read(max(READ_BYTES, len(self._text) - self._at))
        self._end = not data
        more = self._bytes.decode(data, final=self._end)
        if not self._end:
            self._before += self._at
            self._text = self._text[self._at :] + more
            self._at = 0
        return not self._end

    def told(self, error: ValueError) -> str:
        """What an error says, and at which character of the file."""
        if isinstance(error, json.JSONDecodeError):
            return f"{error.msg.removesuffix(' at')} at character {self._before + error.pos:,}"
        if isinstance(error, UnicodeDecodeError):
            return f"{error.reason} for UTF-8: save it as UTF-8"
        return f"{error} at character {self._before + self._at:,}"

    def peek(self) -> str:
        """The next character that is not white space; '' at the end."""
        while True:
            self._at = _SPACE.match(self._text, self._at).end()
            if self._at < len(self._text) or not self._more():
                return self._text[self._at : self._at + 1]

    def next_item(self) -> bool:
        """Goes to the item after a comma, if the text that is in memory shows both: most items of a list."""
        if found := _COMMA.match(self._text, self._at):
            self._at = found.end()
        return found is not None

    def take(self, expected: str) -> str:
        """The next character, which must be one of `expected`."""
        if (char := self.peek()) not in expected or not char:
            found = repr(char) if char else "the end"
            raise ValueError(f"{found} where {' or '.join(map(repr, expected))} should be")
        self._at += 1
        return char

    def value(self) -> Any:
        """The next value, whole; `peek` or `next_item` has found its beginning."""
        while True:
            try:
                value, end = self._decoder.raw_decode(self._text, self._at)
            except json.JSONDecodeError:
                if not self._more():
                    raise
                continue
            if end == len(self._text) and not isinstance(value, (dict, list, str)) and self._more():
                continue  # a number may go on in the next chunk
            self._at = end
            return value


def json_items(path: str) -> Iterator[tuple[str, Any]]:
    """(section, item) for each item of each list of a JSON object; ('', item) for a JSON list.

    Other values of the object are skipped.

    Raises:
      UserError: if the file is not such JSON; the message has the place.
    """
    return ((section, item) for section, inside, item in _entries(path) if inside)


def json_members(path: str) -> Iterator[tuple[str, Any]]:
    """(name, value) for each member of a JSON object that is no list; ('', item) for each item of a JSON list.

    Raises:
      UserError: as `json_items`.
    """
    return ((section, item) for section, inside, item in _entries(path) if not inside or not section)


def _entries(path: str) -> Iterator[tuple[str, bool, Any]]:
    """(section, whether it is an item of the section's list, value) of all that is in a JSON object or list."""
    section = ""
    with epath.Path(path).open("rb") as file:
        text = _JsonText(file)
        try:
            if text.peek() == "[":
                for item in _list_items(text):
                    yield section, True, item
                return
            text.take("{")
            while text.peek() != "}":
                section, text.items = text.value(), 0
                text.take(":")
                if text.peek() == "[":
                    for item in _list_items(text):
                        yield section, True, item
                else:
                    yield section, False, text.value()
                if text.peek() != "}":
                    text.take(",")
        except ValueError as error:  # also UnicodeDecodeError and JSONDecodeError
            place = f", after {section}[{text.items - 1}]" if text.items else f", in {section!r}" if section else ""
            raise UserError(
                f"{path} is not complete JSON ({text.told(error)}{place}); save it or fetch it again"
            ) from error


def _list_items(text: _JsonText) -> Iterator[Any]:
    text.take("[")
    while text.peek() != "]":
        yield text.value()
        text.items += 1
        while text.next_item():
            yield text.value()
            text.items += 1
        if text.peek() != "]":
            text.take(",")
    text.take("]")
