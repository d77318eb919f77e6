"""What is refused while the engine's configuration is made, and what registering does."""

from __future__ import annotations

import ctypes
import platform
from pathlib import Path
from typing import Any

import mooncake_vllm
import pytest
from mooncake_vllm._amx import request_amx
from mooncake_vllm._settings import settings_of
from mooncake_vllm._support import check_groups

from mooncake_plugins.errors import ConfigError

NGRAM = {"method": "ngram", "num_speculative_tokens": 2, "prompt_lookup_max": 3}


def test_a_plain_engine_is_accepted(make_config: Any) -> None:
    settings = settings_of(make_config("kv_producer"))
    assert (settings.role, settings.secret, settings.key, settings.listen_host) == ("prefill", None, b"", "127.0.0.1")


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"data_parallel_size": 2}, ["--data-parallel-size", "2"]),
        ({"speculative_config": NGRAM}, ["--speculative-config"]),
        ({"extra": {"lease": 3}}, ["lease", "lease_s"]),
        ({"extra": {"lease_s": -1}}, ["lease_s", "-1"]),
        ({"extra": {"lease_s": "soon"}}, ["lease_s", "soon"]),
        ({"extra": {"readers": 0}}, ["readers", "0"]),
        ({"extra": {"readers": 2.5}}, ["readers", "2.5"]),
        ({"extra": {"read_bytes": "64 potatoes"}}, ["read_bytes", "64 potatoes"]),
        ({"extra": {"verify": "perhaps"}}, ["verify", "perhaps"]),
        ({"extra": {"listen_port": 70000}}, ["listen_port", "70000"]),
    ],
)
def test_what_cannot_work_is_refused_by_name(make_config: Any, options: dict[str, Any], named: list[str]) -> None:
    with pytest.raises(ConfigError) as caught:
        make_config("kv_both", **options)
    assert all(word in str(caught.value) for word in named), str(caught.value)


@pytest.mark.parametrize("field", ["decode_context_parallel_size", "prefill_context_parallel_size"])
def test_context_parallelism_is_refused(make_config: Any, field: str) -> None:
    from mooncake_vllm._support import check_supported

    config = make_config()
    setattr(config.parallel_config, field, 2)
    with pytest.raises(ConfigError, match=field.replace("_", "-")):
        check_supported(config)


def test_device_memory_is_refused(make_config: Any) -> None:
    from mooncake_vllm._support import check_supported

    config = make_config()
    config.device_config.device_type = "cuda"
    with pytest.raises(ConfigError, match="host memory only"):
        check_supported(config)


def test_hybrid_models_are_refused() -> None:
    check_groups(1)
    with pytest.raises(ConfigError, match="hybrid"):
        check_groups(2)


def test_settings_come_from_the_environment_too(make_config: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MOONCAKE_HANDOFF_LEASE_S", "7.5")
    monkeypatch.setenv("MOONCAKE_HANDOFF_READ_BYTES", "1MiB")
    options = settings_of(make_config(extra={"read_bytes": 8192})).options
    assert (options.lease_s, options.read_bytes) == (7.5, 8192)


def test_a_misspelt_variable_is_refused(make_config: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MOONCAKE_HANDOFF_LEASES", "7")
    with pytest.raises(ConfigError, match="MOONCAKE_HANDOFF_LEASES"):
        make_config()


def test_a_secret_opens_the_engines_address(make_config: Any, monkeypatch: Any, tmp_path: Path) -> None:
    file = tmp_path / "secret"
    file.write_text("sixteen bytes or more")
    file.chmod(0o600)
    monkeypatch.setenv("MOONCAKE_SECRET_FILE", str(file))
    monkeypatch.setenv("VLLM_HOST_IP", "127.0.0.2")
    settings = settings_of(make_config())
    assert (settings.key, settings.listen_host) == (b"sixteen bytes or more", "127.0.0.2")


@pytest.mark.parametrize(
    ("content", "mode", "named"),
    [(None, 0, "cannot be read"), ("short", 0o600, "16"), ("sixteen bytes or more", 0o644, "chmod 600")],
)
def test_an_unusable_secret_file_is_refused(
    make_config: Any, monkeypatch: Any, tmp_path: Path, content: str | None, mode: int, named: str
) -> None:
    file = tmp_path / "secret"
    if content is not None:
        file.write_text(content)
        file.chmod(mode)
    monkeypatch.setenv("MOONCAKE_SECRET_FILE", str(file))
    with pytest.raises(ConfigError, match=named):
        make_config()


def test_other_connectors_are_none_of_our_business(make_config: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MOONCAKE_HANDOFF_LEASES", "7")
    other = {"kv_connector": "ExampleConnector", "kv_role": "kv_both"}
    config = make_config(kv_transfer_config=other, speculative_config=NGRAM)
    assert config.kv_transfer_config.kv_connector == "ExampleConnector"
    assert make_config(kv_transfer_config=None).kv_transfer_config is None


def test_a_policy_that_fails_requests_is_pointed_out(make_config: Any, caplog: pytest.LogCaptureFixture) -> None:
    make_config(kv_transfer_config={"kv_connector": "mooncake", "kv_role": "kv_both"})
    assert "kv_load_failure_policy is 'fail'" in caplog.text


# --- registering -------------------------------------------------------------------------------------------------


def test_registering_again_changes_nothing() -> None:
    from vllm.distributed.kv_transfer.kv_connector.factory import KVConnectorFactory
    from vllm.engine.arg_utils import EngineArgs

    before = (EngineArgs.add_cli_args, EngineArgs.create_engine_config)
    mooncake_vllm.register()
    mooncake_vllm.register()
    assert (EngineArgs.add_cli_args, EngineArgs.create_engine_config) == before
    found = KVConnectorFactory.get_connector_class_by_name(mooncake_vllm.CONNECTOR_NAME)
    assert found.__name__ == "MooncakePluginsConnector"


def test_asking_for_amx_is_idempotent() -> None:
    assert request_amx() == request_amx()


def test_amx_is_not_asked_for_elsewhere(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(platform, "machine", lambda: "aarch64")
    monkeypatch.setattr(ctypes, "CDLL", lambda *_: pytest.fail("no system call on other machines"))
    assert request_amx() is False
