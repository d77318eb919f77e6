"""``--kv-connector`` and ``--kv-role``: merged with ``--kv-transfer-config`` in every form that vLLM takes."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from mooncake_vllm._flags import install_flags, merge_transfer_config
from vllm.engine.arg_utils import AsyncEngineArgs, EngineArgs
from vllm.utils.argparse_utils import FlexibleArgumentParser

READERS = {"kv_connector_extra_config": {"readers": 4}}
OURS = {"kv_connector": "mooncake", "kv_role": "kv_both", "kv_load_failure_policy": "recompute"}


@pytest.mark.parametrize(
    ("connector", "role", "given", "merged"),
    [
        (None, None, None, None),
        (None, None, {"kv_connector": "X", "kv_role": "kv_both"}, {"kv_connector": "X", "kv_role": "kv_both"}),
        ("mooncake", None, None, OURS),
        ("mooncake", "both", None, OURS),
        ("mooncake", "prefill", None, {**OURS, "kv_role": "kv_producer"}),
        ("mooncake", "decode", None, {**OURS, "kv_role": "kv_consumer"}),
        ("mooncake", None, {"kv_role": "kv_consumer"}, {**OURS, "kv_role": "kv_consumer"}),
        ("mooncake", "decode", {"kv_role": "kv_consumer"}, {**OURS, "kv_role": "kv_consumer"}),
        ("mooncake", None, {"kv_connector": "mooncake"}, OURS),
        ("mooncake", None, {"kv_load_failure_policy": "fail"}, {**OURS, "kv_load_failure_policy": "fail"}),
        ("mooncake", None, READERS, {**OURS, **READERS}),
    ],
)  # fmt: skip
def test_merges(connector: str | None, role: str | None, given: Any, merged: Any) -> None:
    before = json.dumps(given)
    assert merge_transfer_config(connector, role, given) == merged
    assert json.dumps(given) == before


@pytest.mark.parametrize(
    ("connector", "role", "given", "named"),
    [
        ("mooncake", None, {"kv_connector": "NixlConnector"}, ["mooncake", "NixlConnector"]),
        ("mooncake", "prefill", {"kv_role": "kv_consumer"}, ["prefill", "kv_consumer", "decode"]),
        ("mooncake", "both", {"kv_role": "kv_producer"}, ["both", "kv_producer", "prefill"]),
        ("mooncake", "decode", {"kv_role": "nonsense"}, ["decode", "nonsense"]),
        (None, "prefill", None, ["--kv-role prefill", "--kv-connector mooncake"]),
        (None, "both", {"kv_connector": "mooncake"}, ["--kv-role both", "--kv-connector mooncake"]),
    ],
)
def test_contradictions_name_both_values(connector: str | None, role: str | None, given: Any, named: list[str]) -> None:
    with pytest.raises(ValueError) as caught:
        merge_transfer_config(connector, role, given)
    assert all(word in str(caught.value) for word in named)


# --- vLLM's own parser ------------------------------------------------------------------------------------------------


def parser() -> FlexibleArgumentParser:
    """What ``vllm serve`` makes; our flags come with the plugin."""
    return AsyncEngineArgs.add_cli_args(FlexibleArgumentParser(prog="vllm serve"))


@pytest.fixture
def parsed(model: Path) -> Callable[..., Any]:
    """Return a function that gives the transfer configuration which vLLM makes of a command line."""

    def parse(*argv: str) -> Any:
        return EngineArgs.from_cli_args(parser().parse_args(["--model", str(model), *argv])).kv_transfer_config

    return parse


def refused(capsys: pytest.CaptureFixture[str], *argv: str) -> str:
    with pytest.raises(SystemExit) as caught:
        parser().parse_args(["--model", "m", *argv])
    assert caught.value.code == 2
    return capsys.readouterr().err


EXTRA = json.dumps(READERS)
WHOLE = json.dumps({"kv_connector": "mooncake", "kv_role": "kv_producer"})


@pytest.mark.parametrize(
    "argv",
    [
        ["--kv-connector", "mooncake", "--kv-role", "prefill"],
        ["--kv-connector=mooncake", "--kv-role=prefill"],
        ["--kv_connector", "mooncake", "--kv_role", "prefill"],
        ["--kv_connector=mooncake", "--kv_role=prefill"],
        ["--kv-role", "prefill", "--kv-connector", "mooncake"],
        ["--kv-connector", "mooncake", "--kv-transfer-config", '{"kv_role": "kv_producer"}'],
        ["--kv-transfer-config", '{"kv_role": "kv_producer"}', "--kv-connector", "mooncake"],
        ["--kv-transfer-config", WHOLE, "--kv-connector", "mooncake"],
        ["--kv-connector", "mooncake", "--kv-transfer-config.kv_role", "kv_producer"],
        ["--kv-transfer-config.kv_role", "kv_producer", "--kv-connector", "mooncake", "--kv-role", "prefill"],
    ],
)  # fmt: skip
def test_every_form_means_the_same(parsed: Any, argv: list[str]) -> None:
    config = parsed(*argv)
    assert (config.kv_connector, config.kv_role) == ("mooncake", "kv_producer")
    assert config.kv_load_failure_policy == "recompute"


@pytest.mark.parametrize("first", [True, False])
def test_options_of_the_json_are_kept_whatever_the_order(parsed: Any, first: bool) -> None:
    flags, given = ["--kv-connector", "mooncake"], ["--kv-transfer-config", EXTRA]
    config = parsed(*(flags + given if first else given + flags))
    assert config.kv_connector_extra_config == {"readers": 4}
    assert config.kv_role == "kv_both"


def test_dotted_options_are_kept(parsed: Any) -> None:
    config = parsed("--kv-connector", "mooncake", "--kv-transfer-config.kv_connector_extra_config.lease_s", "7")
    assert config.kv_connector_extra_config == {"lease_s": 7}


def test_a_stated_engine_id_is_kept(parsed: Any) -> None:
    assert parsed("--kv-connector", "mooncake", "--kv-transfer-config.engine_id", "mine").engine_id == "mine"


def test_a_stated_failure_policy_is_kept(parsed: Any) -> None:
    config = parsed("--kv-connector", "mooncake", "--kv-transfer-config", '{"kv_load_failure_policy": "fail"}')
    assert config.kv_load_failure_policy == "fail"


def test_flags_from_a_configuration_file(parsed: Any, tmp_path: Path) -> None:
    file = tmp_path / "serve.yaml"
    file.write_text("kv-connector: mooncake\nkv-role: decode\n")
    config = parsed("--config", str(file))
    assert (config.kv_connector, config.kv_role) == ("mooncake", "kv_consumer")


def test_without_our_flags_nothing_changes(parsed: Any) -> None:
    assert parsed() is None
    config = parsed("--kv-transfer-config", '{"kv_connector": "ExampleConnector", "kv_role": "kv_both"}')
    assert (config.kv_connector, config.kv_load_failure_policy) == ("ExampleConnector", "fail")


@pytest.mark.parametrize(
    ("argv", "named"),
    [
        (["--kv-connector", "moonpie"], ["moonpie", "mooncake"]),
        (["--kv-connector", "mooncake", "--kv-role", "prefil"], ["prefil", "both", "decode", "prefill"]),
        (["--kv-role", "decode"], ["--kv-role decode", "--kv-connector mooncake"]),
        (["--kv-connector=mooncake", "--kv-transfer-config", '{"kv_connector": "NixlConnector"}'], ["NixlConnector"]),
        (["--kv-connector=mooncake", "--kv-role=prefill", "--kv-transfer-config", '{"kv_role": "kv_consumer"}'],
         ["prefill", "kv_consumer", "decode"]),
        (["--kv-connector", "mooncake", "--kv-transfer-config", '{"kv_role": "kv_prefill"}'], ["kv_prefill"]),
    ],
)  # fmt: skip
def test_bad_flags_exit_2_and_say_why(capsys: pytest.CaptureFixture[str], argv: list[str], named: list[str]) -> None:
    shown = refused(capsys, *argv)
    assert all(word in shown for word in named), shown


def test_help_shows_the_flags() -> None:
    text = parser().format_help()
    assert "--kv-connector" in text and "--kv-role" in text and "mooncake-plugins" in text


def test_installing_twice_adds_the_flags_once() -> None:
    once = EngineArgs.add_cli_args
    install_flags()
    assert EngineArgs.add_cli_args is once


def test_a_vllm_without_the_hook_is_said_and_survived(monkeypatch: pytest.MonkeyPatch, caplog: Any) -> None:
    monkeypatch.delattr(EngineArgs, "add_cli_args")
    with caplog.at_level(logging.WARNING, logger="mooncake_vllm"):
        install_flags()
    assert "--kv-transfer-config" in caplog.text
