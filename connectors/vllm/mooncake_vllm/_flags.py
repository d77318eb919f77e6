"""``--kv-connector`` and ``--kv-role`` for the stock ``vllm`` command.

vLLM offers ``--kv-transfer-config`` only. Our flags are added to its argument parser and merged into that option after parsing, so
order does not matter and dotted forms still work. This rests on two habits of vLLM that nobody promises (plugins are loaded while
arguments are added; the sub-command's own ``parse_known_args`` is called), so it fails soft: without the flags, the plain
``--kv-transfer-config '{"kv_connector": "mooncake", "kv_role": "kv_both"}'`` still works.
"""

from __future__ import annotations

import argparse
import functools
import logging
from collections.abc import Mapping
from typing import Any

log = logging.getLogger(__name__)

ROLES = {"prefill": "kv_producer", "decode": "kv_consumer", "both": "kv_both"}
_NAMES = {engine: ours for ours, engine in ROLES.items()}
_MARK = "_mooncake_flags"


def merge_transfer_config(connector: str | None, role: str | None, given: Mapping[str, Any] | None) -> dict[str, Any] | None:
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
            log.warning("this vLLM has no EngineArgs.add_cli_args: --kv-connector is not available, use --kv-transfer-config")
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
        "--kv-connector", "--kv_connector", choices=["mooncake"], default=None, help="hand KV over with mooncake-plugins"
    )
    group.add_argument(
        "--kv-role", "--kv_role", choices=sorted(ROLES), default=None, help="what this instance does (default: both)"
    )
    parse = parser.parse_known_args

    def parse_known_args(*args: Any, **kwargs: Any) -> tuple[argparse.Namespace, list[str]]:
        namespace, rest = parse(*args, **kwargs)
        _merge_into(parser, namespace)
        return namespace, rest

    parser.parse_known_args = parse_known_args  # type: ignore[method-assign,assignment]


def _merge_into(parser: argparse.ArgumentParser, namespace: argparse.Namespace) -> None:
    connector, role = getattr(namespace, "kv_connector", None), getattr(namespace, "kv_role", None)
    given = getattr(namespace, "kv_transfer_config", None)
    if connector is None and role is None:
        return
    try:
        merged = merge_transfer_config(connector, role, _as_mapping(given))
    except ValueError as error:
        parser.error(str(error))
    if merged is not None:
        namespace.kv_transfer_config = _as_config(merged)


def _as_mapping(given: Any) -> dict[str, Any] | None:
    """Take ``--kv-transfer-config`` as vLLM parsed it: absent, a dict, or its config object."""
    if given is None or isinstance(given, dict):
        return given
    from dataclasses import MISSING, fields

    stated = {}
    for field in fields(given):
        value = getattr(given, field.name)
        is_default = field.default is not MISSING and value == field.default
        if not is_default and field.name not in ("engine_id", "kv_buffer_device"):
            stated[field.name] = value
    return {**stated, "engine_id": given.engine_id}


def _as_config(merged: dict[str, Any]) -> Any:
    from vllm.config import KVTransferConfig

    return KVTransferConfig(**merged)
