"""``--kv-connector`` and ``--kv-role`` for the stock ``vllm`` command.

vLLM offers ``--kv-transfer-config`` only. Our flags are added to its argument parser and merged into that option after
parsing, so order does not matter and dotted forms still work. This rests on two habits of vLLM that nobody promises
(plugins are loaded while arguments are added; the sub-command's own ``parse_known_args`` is called), so it fails soft:
without the flags, the plain ``--kv-transfer-config '{"kv_connector": "mooncake", "kv_role": "kv_both"}'`` still works.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import functools
import json
import logging
from collections.abc import Mapping
from typing import Any

log = logging.getLogger(__name__)

ROLES = {"prefill": "kv_producer", "decode": "kv_consumer", "both": "kv_both"}
_NAMES = {engine: ours for ours, engine in ROLES.items()}
_MARK = "_mooncake_flags"


def merge_transfer_config(
    connector: str | None, role: str | None, given: Mapping[str, Any] | None
) -> dict[str, Any] | None:
    """Merge our flags with what ``--kv-transfer-config`` says.

    Returns:
        The configuration for vLLM; ``given`` unchanged (or None) if our flags are absent.

    Raises:
        ValueError: They contradict each other; the message names both values.
    """
    merged = dict(given or {})
    if connector is None:
        if role is not None:
            raise ValueError(f"--kv-role {role} needs --kv-connector mooncake")
        return dict(given) if given is not None else None
    other = merged.get("kv_connector")
    if other not in (None, connector):
        raise ValueError(f"--kv-connector {connector} contradicts kv_connector {other!r} in --kv-transfer-config")
    wanted, stated = ROLES[role or "both"], merged.get("kv_role")
    if role is not None and stated not in (None, wanted):
        shown = _NAMES.get(str(stated), stated)
        raise ValueError(f"--kv-role {role} contradicts kv_role {stated!r} ({shown}) in --kv-transfer-config")
    merged["kv_connector"] = connector
    merged["kv_role"] = stated or wanted
    # Whatever fails in a transfer is computed again instead of failing the request.
    merged.setdefault("kv_load_failure_policy", "recompute")
    return merged


def install_flags() -> None:
    """Wrap ``EngineArgs.add_cli_args`` once; logs and goes on if vLLM has no such thing."""
    from vllm.engine.arg_utils import EngineArgs

    original = getattr(EngineArgs, "add_cli_args", None)
    if original is None or getattr(original, _MARK, False):
        if original is None:
            log.warning("this vLLM has no EngineArgs.add_cli_args, so no --kv-connector: use --kv-transfer-config")
        return

    @functools.wraps(original)
    def add_cli_args(parser: argparse.ArgumentParser) -> argparse.ArgumentParser:
        parser = original(parser)
        _add_flags(parser)
        return parser

    setattr(add_cli_args, _MARK, True)
    EngineArgs.add_cli_args = staticmethod(add_cli_args)


def _add_flags(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("mooncake-plugins", "KV hand-off between prefill and decode instances")
    group.add_argument(
        "--kv-connector",
        "--kv_connector",
        choices=["mooncake"],
        default=None,
        help="hand KV over with mooncake-plugins",
    )
    group.add_argument(
        "--kv-role", "--kv_role", choices=sorted(ROLES), default=None, help="what this instance does (default: both)"
    )
    stated = _note_stated_fields(parser)
    parse = parser.parse_known_args

    def parse_known_args(*args: Any, **kwargs: Any) -> tuple[argparse.Namespace, list[str]]:
        stated.clear()
        namespace, rest = parse(*args, **kwargs)
        _merge_into(parser, namespace, stated)
        return namespace, rest

    parser.parse_known_args = parse_known_args  # type: ignore[method-assign,assignment]


def _note_stated_fields(parser: argparse.ArgumentParser) -> set[str]:
    """Return a set that holds, after parsing, the fields which ``--kv-transfer-config`` stated.

    vLLM makes a config object of the JSON, in which a stated default cannot be told from one that was not stated.
    """
    stated: set[str] = set()
    action = parser._option_string_actions.get("--kv-transfer-config")
    original = getattr(action, "type", None)
    if action is None or not callable(original):
        return stated

    @functools.wraps(original)
    def note(text: str) -> Any:
        config = original(text)
        with contextlib.suppress(ValueError, AttributeError):
            stated.update(json.loads(text).keys())
        return config

    action.type = note
    return stated


def _merge_into(parser: argparse.ArgumentParser, namespace: argparse.Namespace, stated: set[str]) -> None:
    connector, role = getattr(namespace, "kv_connector", None), getattr(namespace, "kv_role", None)
    if connector is None and role is None:
        return
    given = _as_mapping(getattr(namespace, "kv_transfer_config", None), stated)
    try:
        merged = merge_transfer_config(connector, role, given)
    except ValueError as error:
        parser.error(str(error))
    if merged is not None:
        namespace.kv_transfer_config = _as_config(merged)


def _as_mapping(given: Any, stated: set[str]) -> dict[str, Any] | None:
    """Take ``--kv-transfer-config`` as vLLM parsed it (absent, a dict, or its config object), without its defaults."""
    if given is None or isinstance(given, dict):
        return given
    names = stated or {field.name for field in dataclasses.fields(given) if getattr(given, field.name) != field.default}
    return {name: getattr(given, name) for name in names if hasattr(given, name)}


def _as_config(merged: dict[str, Any]) -> Any:
    from vllm.config import KVTransferConfig

    return KVTransferConfig(**merged)
