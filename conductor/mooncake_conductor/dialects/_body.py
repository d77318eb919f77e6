"""A request body of which only the top level is decoded.

The values stay slices of what the client sent (`msgspec.Raw`), so a 48 KB prompt is scanned once and never becomes a
Python object. Editing copies the slices that stay; bytes inside them never change.

msgspec silently takes the last of several equal keys, and an engine might take the first: two readings of one request
are a hole. Repeated keys are found without parsing again:

- Written out from the decoded fields, in one of the two spacings that JSON libraries use, a body without repeated keys
is the
  body that came, byte for byte. This settles nearly every request with one comparison.
- Else the top level is walked, jumping over values by the length of their slices. With a repeated key, either it is met
  twice, or the slice of its last value does not stand where its first value does.

Repeated keys deeper inside are the engine's business: the Conductor decides nothing by them.
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
_encode = msgspec.json.Encoder().encode
_USUAL = """
    model messages prompt stream stream_options max_tokens max_completion_tokens temperature top_p top_k min_p n stop
    seed presence_penalty frequency_penalty repetition_penalty logprobs top_logprobs echo user tools tool_choice suffix
    best_of response_format ignore_eos min_tokens stop_token_ids skip_special_tokens logit_bias metadata
    chat_template_kwargs add_generation_prompt continue_final_message cache_salt priority kv_transfer_params
"""
# What stands before a value in the two usual spacings. Only names that need no escaping may be in here.
_SPACED = {name: b', "%b": ' % name.encode() for name in _USUAL.split()}
_COMPACT = {name: b',"%b":' % name.encode() for name in _USUAL.split()}


class BodyError(ValueError):
    """The body cannot be accepted; ``param`` names the field, ``code`` is a short word for programs."""

    def __init__(self, message: str, code: str, param: str | None = None) -> None:
        super().__init__(message)
        self.code, self.param = code, param


class Body:
    """A JSON object: its top-level values as raw slices.

    Attributes:
        data: What the client sent.
        fields: Raw JSON text of each top-level value.
    """

    __slots__ = ("data", "fields")

    def __init__(self, data: bytes, fields: dict[str, msgspec.Raw]) -> None:
        self.data, self.fields = data, fields

    def edited(self, drop: Collection[str], add: bytes = b"") -> bytes:
        """The object without some fields and with others at its end.

        Args:
            drop: Names to leave out; also those that ``add`` sets anew.
            add: JSON text of further members, ``"name":value,...``, without braces; may be empty.
        """
        if self.fields.keys().isdisjoint(drop):
            if not add:
                return self.data
            kept = self.data[: self.data.rindex(b"}")]
            return b"%b%b%b}" % (kept, b"," if self.fields else b"", add)
        parts: list[bytes | msgspec.Raw] = []
        for name, raw in self.fields.items():
            if name not in drop:
                parts += (_COMPACT.get(name) or b",%b:" % _encode(name), raw)
        if add:
            parts += (b",", add)
        return b"{%b}" % b"".join(parts)[1:]


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
    if not _is_usual(data, fields):
        _walk(data, fields)
    return Body(data, fields)


def _is_usual(data: bytes, fields: dict[str, msgspec.Raw]) -> bool:
    """Whether the body is these fields and nothing else, in one of the usual spacings."""
    before = _SPACED if data.find(b'": ', 0, 64) >= 0 else _COMPACT
    parts: list[bytes | msgspec.Raw] = []
    try:
        for name, raw in fields.items():
            parts += (before[name], raw)
    except KeyError:
        return False
    if not parts:
        return False
    parts[0] = b"{" + bytes(parts[0])[1:].lstrip()
    parts.append(b"}")
    return b"".join(parts) == data


def _walk(data: bytes, fields: dict[str, msgspec.Raw]) -> None:
    """Meet each member once, in order.

    Raises:
        BodyError: A member is repeated.
    """
    met: list[str] = []
    match_key, at = _KEY.match, 0
    for _ in range(len(fields)):
        found = match_key(data, at)
        if found is None:
            raise _duplicate(met)
        met.append(_name(found[1]))
        raw, at = fields[met[-1]], found.end()
        if not data.startswith(raw, at):
            raise _duplicate(met)
        at += len(memoryview(raw))
    if not (_END.fullmatch(data, at) if met else _EMPTY.fullmatch(data)):
        again = match_key(data, at)
        raise _duplicate([*met, _name(again[1])] if again else met)


def _name(key: bytes) -> str:
    if b"\\" in key:
        return msgspec.json.decode(b'"' + key + b'"', type=str)
    return key.decode()


def _duplicate(met: list[str]) -> BodyError:
    """The error for a walk that failed: names the first repeated member, or the one in whose value it broke."""
    repeated = next((name for at, name in enumerate(met) if name in met[:at]), met[-1])
    return BodyError(f"Field {repeated!r} stands more than once in the request body.", "duplicate_field", repeated)
