"""Small helpers for programs that drive engines themselves, without a Conductor: offline ``LLM``, tests, benchmarks.

They need no vLLM, so a router's process can use them, too.
"""

from __future__ import annotations

import secrets
import time
from collections.abc import Mapping
from typing import Any, Literal

import msgspec

from mooncake_plugins.errors import ConfigError, HandoffError
from mooncake_plugins.handoff import PARAMS_KEY, EngineDescription, EngineRole, Ticket, sign_ticket
from mooncake_vllm._flags import ROLES, merge_transfer_config
from mooncake_vllm._register import CONNECTOR_NAME


def kv_transfer_config(role: EngineRole = "both", **options: Any) -> dict[str, Any]:
    """Return what ``LLM(kv_transfer_config=...)`` needs; the same as ``--kv-connector mooncake --kv-role ROLE``.

    Args:
        role: What the engine is to do.
        options: Settings of the hand-off, by the names in ``HandoffOptions``: ``lease_s=30`` and so on.

    Raises:
        ConfigError: The role is not one. Unknown options are found when the engine is made.
    """
    if role not in ROLES:
        raise ConfigError("role", role, f"give one of: {', '.join(sorted(ROLES))}")
    extra = {"kv_connector_extra_config": dict(options)} if options else None
    merged = merge_transfer_config(CONNECTOR_NAME, role, extra)
    return merged or {}


def handoff_params(role: Literal["prefill", "decode", "describe"], ticket: str = "") -> dict[str, Any]:
    """Return the ``kv_transfer_params`` of one request.

    In HTTP bodies they are the field of that name; offline they go into
    ``SamplingParams(extra_args={"kv_transfer_params": ...})``.

    Args:
        role: The leg of a request, or ``describe``: the engine only says what it is (see ``read_description``).
        ticket: The text of ``new_ticket``; both legs get the same, each leg once.
    """
    return {PARAMS_KEY: {"role": role, "ticket": ticket} if ticket else {"role": role}}


def read_description(answered: Mapping[str, Any] | None) -> EngineDescription:
    """Decode the ``kv_transfer_params`` of the answer to a ``describe`` request.

    Offline they are ``RequestOutput.kv_transfer_params``.

    Raises:
        HandoffError: There is no description in it: the engine was started without this connector.
    """
    try:
        return msgspec.convert((answered or {})[PARAMS_KEY], EngineDescription)
    except (KeyError, TypeError, msgspec.ValidationError) as error:
        raise HandoffError(
            f"the engine did not describe itself, was it started with the connector? {error!r}"
        ) from error


def new_ticket(prefill: EngineDescription, *, key: bytes = b"", lifetime_s: float = 120.0) -> str:
    """Make a ticket for pulling one request's KV from a prefill engine.

    Args:
        prefill: That engine's description.
        key: The cluster secret (``load_secret(os.environ).key``), empty if the engines have none.
        lifetime_s: Seconds from now in which the prefill must begin.
    """
    ticket = Ticket(secrets.token_hex(16), prefill.instance, prefill.addresses, time.time() + lifetime_s)
    return sign_ticket(ticket, key)
