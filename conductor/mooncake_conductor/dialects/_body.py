"""A request body of which only the top level is decoded.

The values stay slices of what the client sent, so a 48 KB prompt is scanned once by msgspec and never becomes a Python
object. Editing copies the slices that stay; bytes inside them never change.

msgspec silently takes the last of several equal keys, and an engine might take the first: two readings of one request
are a hole. So the top level is walked a second time, jumping over values by the length of the slice that msgspec found.
With a repeated key, either the key is met twice, or the slice of its last value does not stand where its first value
does, and the walk fails. Repeated keys deeper inside are the engine's business: the Conductor decides nothing by them.
"""

from __future__ import annotations

import re
from collections.abc import Collection

import msgspec

# Possessive quantifiers: no backtracking, whatever is sent. The text was validated by msgspec before these look at it.
_KEY = re.compile(rb'[ \t\n\r]*+[,{][ \t\n\r]*+"((?:[^"\\]|\\.)*+)"[ \t\n\r]*+:[ \t\n\r]*+', re.DOTALL)
_END = re.compile(rb"[ \t\n\r]*+}[ \t\n\r]*+")
_EMPTY = re.compile(rb"[ \t\n\r]*+{[ \t\n\r]*+}[ \t\n\r]*+")
_decode = msgspec.json.Decoder(dict[str, msgspec.Raw]).decode


class BodyError(ValueError):
    """The body cannot be accepted; ``param`` names the field, ``code`` is a short word for programs."""

    def __init__(self, message: str, code: str, param: str | None = None) -> None:
        super().__init__(message)
        self.code, self.param = code, param


class Body:
    """A JSON object: its top-level values as raw slices, and where they stand.

    Attributes:
        data: What the client sent.
        fields: Raw JSON text of each top-level value.
    """

    __slots__ = ("_spans", "data", "fields")

    def __init__(self, data: bytes, fields: dict[str, msgspec.Raw], spans: list[tuple[str, int, int]]) -> None:
        self.data, self.fields, self._spans = data, fields, spans

    def edited(self, drop: Collection[str], add: bytes = b"") -> bytes:
        """The object without some fields and with others at its end.

        Args:
            drop: Names to leave out; also those that ``add`` sets anew.
            add: JSON text of further members, ``"name":value,...``, without braces; may be empty.
        """
        if self.fields.keys().isdisjoint(drop):
            return self._appended(add)
        view = memoryview(self.data)
        parts: list[bytes | memoryview] = []
        start = end = -1
        for name, key_at, value_end in self._spans:
            if name in drop:
                if start >= 0:
                    parts.append(view[start:end])
                start = -1
            else:
                start, end = (key_at if start < 0 else start), value_end
        if start >= 0:
            parts.append(view[start:end])
        if add:
            parts.append(add)
        return b"{" + b",".join(parts) + b"}"

    def _appended(self, add: bytes) -> bytes:
        if not add:
            return self.data
        if not self._spans:
            return b"{" + add + b"}"
        return b"".join((memoryview(self.data)[: self._spans[-1][2]], b",", add, b"}"))


def parse_body(data: bytes) -> Body:
    """Decode the top level of a JSON object.

    Raises:
        BodyError: Not UTF-8, malformed, not an object, or a top-level key stands twice.
    """
    try:
        if not data.isascii():
            data.decode()
        fields = _decode(data)
    except UnicodeDecodeError as error:
        raise BodyError(
            f"The request body is not UTF-8: {error.reason} at byte {error.start}.", "invalid_json"
        ) from error
    except msgspec.ValidationError as error:
        raise BodyError("The request body must be a JSON object.", "invalid_json") from error
    except msgspec.DecodeError as error:
        raise BodyError(f"The request body is not valid JSON: {error}.", "invalid_json") from error
    except RecursionError as error:
        raise BodyError("The request body is nested too deeply.", "invalid_json") from error
    return Body(data, fields, _spans(data, fields))


def _spans(data: bytes, fields: dict[str, msgspec.Raw]) -> list[tuple[str, int, int]]:
    """Name, start of the key and end of the value of each member, in order."""
    spans: list[tuple[str, int, int]] = []
    match_key, at = _KEY.match, 0
    for _ in range(len(fields)):
        found = match_key(data, at)
        if found is None:
            raise _duplicate(spans)
        name = _name(found[1])
        key_at, at = found.start(1) - 1, found.end()
        raw = fields[name]
        spans.append((name, key_at, at + len(memoryview(raw))))
        if not data.startswith(raw, at):
            raise _duplicate([*spans, spans[-1]])
        at = spans[-1][2]
    if not (_END.fullmatch(data, at) if spans else _EMPTY.fullmatch(data)):
        again = match_key(data, at)
        raise _duplicate([*spans, (_name(again[1]), 0, 0)] if again else spans)
    return spans


def _name(key: bytes) -> str:
    if b"\\" in key:
        return msgspec.json.decode(b'"' + key + b'"', type=str)
    return key.decode()


def _duplicate(spans: list[tuple[str, int, int]]) -> BodyError:
    """The error for a walk that failed: names the first repeated member, or the one in whose value it broke."""
    names = [name for name, _, _ in spans]
    repeated = next((name for at, name in enumerate(names) if name in names[:at]), names[-1])
    return BodyError(f"Field {repeated!r} stands more than once in the request body.", "duplicate_field", repeated)
