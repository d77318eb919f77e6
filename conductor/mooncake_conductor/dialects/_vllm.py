"""vLLM's OpenAI server with the ``mooncake`` connector.

Both legs carry ``kv_transfer_params`` with the ticket. The prefill leg is the same request made as cheap as possible:
one token, one sequence, not streamed, nothing reported. What could change the *prompt* (chat template arguments, tools,
response format) stays, because both engines must compute the same tokens.
"""

from __future__ import annotations

import re
from typing import ClassVar

import msgspec

from mooncake_conductor.core import RequestFacts
from mooncake_conductor.dialects._base import Endpoint, EngineDialect, Probe
from mooncake_conductor.dialects._body import Body, BodyError
from mooncake_plugins.errors import ConductorError
from mooncake_plugins.handoff import PARAMS_KEY, EngineDescription

_HANDOFF_VERSION = 1
_PARAMS = "kv_transfer_params"
_PARAMS_ONLY = frozenset({_PARAMS})
# Not valid together with one token, or work whose result nobody reads.
_DROPPED_FOR_PREFILL = frozenset(
    {
        _PARAMS,
        "best_of",
        "echo",
        "logprobs",
        "max_completion_tokens",
        "max_tokens",
        "min_tokens",
        "n",
        "return_token_ids",
        "return_tokens_as_token_ids",
        "stream",
        "stream_options",
        "top_logprobs",
    }
)
_ONE_TOKEN = {
    Endpoint.COMPLETIONS: b'"max_tokens":1,"n":1,"stream":false',
    Endpoint.CHAT: b'"max_completion_tokens":1,"n":1,"stream":false',
}
_OFF = (b"null", b"false", b"0")
# Field -> (values that do not matter, reason). Each of these needs logits or tokens of the prompt that a decode engine
# which pulled the KV does not have, or makes the two legs see different prompts.
_WHOLE: dict[str, tuple[tuple[bytes, ...], str]] = {
    "prompt_logprobs": ((b"null",), "prompt_logprobs"),
    "use_beam_search": (_OFF, "beam_search"),
    "truncate_prompt_tokens": ((b"null",), "truncated_prompt"),
    "prompt_embeds": ((b"null",), "prompt_embeds"),
}
_LIST_OF_PROMPTS = re.compile(rb'\[[ \t\n\r]*+["\[]')
_decode_name = msgspec.json.Decoder(str).decode
_decode_list = msgspec.json.Decoder(list[msgspec.Raw]).decode


class _ModelList(msgspec.Struct):
    data: list[msgspec.Raw]


class _ModelCard(msgspec.Struct):
    id: str


class _DescribeAnswer(msgspec.Struct):
    kv_transfer_params: dict[str, msgspec.Raw] | None = None


class VllmDialect(EngineDialect):
    """vLLM 0.32 and later."""

    name: ClassVar[str] = "vllm"

    def facts(self, endpoint: Endpoint, body: Body) -> RequestFacts:
        """See `EngineDialect.facts`."""
        fields = body.fields
        model = fields.get("model")
        if model is None:
            raise BodyError("You must provide a model parameter.", "missing_field", "model")
        try:
            name = _decode_name(model)
        except msgspec.DecodeError as error:
            raise BodyError("Field 'model' must be a string.", "invalid_type", "model") from error
        stream = fields.get("stream")
        prompt = fields.get("prompt" if endpoint is Endpoint.COMPLETIONS else "messages")
        return RequestFacts(
            name,
            stream is not None and bytes(stream) == b"true",
            _why_whole(endpoint, fields),
            0 if prompt is None else len(memoryview(prompt)),
        )

    def prefill_leg(self, endpoint: Endpoint, body: Body, ticket: str) -> bytes:
        """See `EngineDialect.prefill_leg`."""
        return body.edited(_DROPPED_FOR_PREFILL, _ONE_TOKEN[endpoint] + b"," + _params("prefill", ticket))

    def decode_leg(self, endpoint: Endpoint, body: Body, ticket: str) -> bytes:
        """See `EngineDialect.decode_leg`."""
        return body.edited(_PARAMS_ONLY, _params("decode", ticket))

    def whole(self, endpoint: Endpoint, body: Body) -> bytes:
        """See `EngineDialect.whole`."""
        return body.edited(_PARAMS_ONLY)

    def describe(self, model: str) -> Probe:
        """See `EngineDialect.describe`."""
        request = {"model": model, "prompt": [0], "max_tokens": 1, _PARAMS: {PARAMS_KEY: {"role": "describe"}}}
        return Probe("POST", Endpoint.COMPLETIONS.value, msgspec.json.encode(request))

    def read_description(self, status: int, body: bytes) -> EngineDescription:
        """See `EngineDialect.read_description`."""
        if status != 200:
            raise ConductorError(f"the describe probe was answered with HTTP {status}: {body[:200]!r}")
        try:
            params = msgspec.json.decode(body, type=_DescribeAnswer).kv_transfer_params or {}
            if PARAMS_KEY not in params:
                raise ConductorError(
                    "it has no mooncake connector; start it with: vllm serve MODEL --kv-connector mooncake --kv-role "
                    "prefill|decode|both (or name it with --coupled, to serve whole requests)"
                )
            described = msgspec.json.decode(params[PARAMS_KEY], type=EngineDescription)
        except msgspec.DecodeError as error:
            raise ConductorError(f"the answer to the describe probe cannot be read: {error}") from error
        if described.version != _HANDOFF_VERSION:
            raise ConductorError(
                f"it speaks version {described.version} of the hand-off, this Conductor {_HANDOFF_VERSION}; install "
                "the same mooncake-plugins on both"
            )
        return described

    def read_models(self, status: int, body: bytes) -> dict[str, msgspec.Raw]:
        """See `EngineDialect.read_models`."""
        if status != 200:
            raise ConductorError(f"GET /v1/models was answered with HTTP {status}: {body[:200]!r}")
        try:
            cards = msgspec.json.decode(body, type=_ModelList).data
            return {msgspec.json.decode(card, type=_ModelCard).id: card.copy() for card in cards}
        except msgspec.DecodeError as error:
            raise ConductorError(f"the answer to GET /v1/models cannot be read: {error}") from error


def _params(role: str, ticket: str) -> bytes:
    # The ticket is URL-safe text, so nothing needs escaping.
    return f'"{_PARAMS}":{{"{PARAMS_KEY}":{{"role":"{role}","ticket":"{ticket}"}}}}'.encode()


def _why_whole(endpoint: Endpoint, fields: dict[str, msgspec.Raw]) -> str | None:
    for name, (harmless, reason) in _WHOLE.items():
        if name in fields and bytes(fields[name]) not in harmless:
            return reason
    limit = fields.get("max_tokens")
    if limit is not None and bytes(limit) == b"0":
        return "no_tokens"
    return _why_whole_completion(fields) if endpoint is Endpoint.COMPLETIONS else None


def _why_whole_completion(fields: dict[str, msgspec.Raw]) -> str | None:
    echo, logprobs = fields.get("echo"), fields.get("logprobs")
    if echo is not None and logprobs is not None and bytes(echo) not in _OFF and bytes(logprobs) != b"null":
        return "echo_logprobs"
    prompt = fields.get("prompt")
    return "several_prompts" if prompt is not None and _is_several(prompt) else None


def _is_several(prompt: msgspec.Raw) -> bool:
    """Whether a completion's prompt is a list of several prompts. One alone in a list is one prompt."""
    return _LIST_OF_PROMPTS.match(prompt) is not None and len(_decode_list(prompt)) > 1
