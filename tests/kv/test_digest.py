"""Digests of prompts and of weights."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mooncake_plugins.kv import prompt_digest, weights_digest

TOKENS = st.lists(st.integers(0, 2**32 - 1), max_size=6)
EXTRAS = st.lists(st.text(max_size=4), max_size=3)


def write_model(
    folder: Path, *, fill: int = 1, megabytes: int = 1, config: str = "{}", name: str = "model.safetensors"
) -> Path:
    """A model folder with one weight file in the safetensors form."""
    folder.mkdir()
    (folder / "config.json").write_text(config)
    size = megabytes << 20
    header = json.dumps({"w": {"dtype": "U8", "shape": [size], "data_offsets": [0, size]}}).encode()
    (folder / name).write_bytes(len(header).to_bytes(8, "little") + header + bytes([fill]) * size)
    return folder


@given(TOKENS, EXTRAS, TOKENS, EXTRAS)
def test_prompts_have_equal_digests_only_if_they_are_equal(
    tokens: list[int], extras: list[str], other_tokens: list[int], other_extras: list[str]
) -> None:
    same = (tokens, extras) == (other_tokens, other_extras)
    assert (prompt_digest(tokens, extras) == prompt_digest(other_tokens, other_extras)) is same


def test_tokens_cannot_pose_as_extras() -> None:
    forged = [7, 4, int.from_bytes(b"salt", "little")]
    assert prompt_digest([7], ["salt"]) != prompt_digest(forged)


def test_extras_count_in_their_order() -> None:
    assert prompt_digest([1], ["a", "b"]) != prompt_digest([1], ["b", "a"])
    assert prompt_digest([1], ["ab"]) != prompt_digest([1], ["a", "b"])


def test_a_digest_has_16_bytes_and_does_not_depend_on_the_container() -> None:
    assert len(prompt_digest([])) == 16
    assert prompt_digest((1, 2)) == prompt_digest([1, 2])


def test_weights_with_the_same_configuration_and_other_values_differ(tmp_path: Path) -> None:
    assert weights_digest(write_model(tmp_path / "a", fill=1)) != weights_digest(write_model(tmp_path / "b", fill=2))


def test_the_same_weights_in_another_folder_are_the_same(tmp_path: Path) -> None:
    assert weights_digest(write_model(tmp_path / "a")) == weights_digest(str(write_model(tmp_path / "b")))


def test_another_configuration_is_another_model(tmp_path: Path) -> None:
    a, b = write_model(tmp_path / "a"), write_model(tmp_path / "b", config='{"rope_theta": 1}')
    assert weights_digest(a) != weights_digest(b)


def test_a_longer_or_renamed_or_further_file_is_another_model(tmp_path: Path) -> None:
    digests = {
        weights_digest(write_model(tmp_path / "a")),
        weights_digest(write_model(tmp_path / "b", megabytes=2)),
        weights_digest(write_model(tmp_path / "c", name="other.safetensors")),
    }
    further = write_model(tmp_path / "d")
    (further / "model-2.safetensors").write_bytes(b"\0" * 64)
    assert len(digests | {weights_digest(further)}) == 4


def test_pickled_weights_count_where_there_are_no_safetensors(tmp_path: Path) -> None:
    digests = set()
    for fill in (1, 2):
        folder = tmp_path / str(fill)
        folder.mkdir()
        (folder / "pytorch_model.bin").write_bytes(bytes([fill]) * 100_000)
        digests.add(weights_digest(folder))
    assert len(digests) == 2


def test_a_hub_model_is_named_by_name_and_revision() -> None:
    assert weights_digest("org/model") == weights_digest("org/model", None)
    assert weights_digest("org/model") != weights_digest("org/model", "main")
    assert weights_digest("org/model") != weights_digest("org/other")


def test_a_folder_without_weights_still_has_a_digest(tmp_path: Path) -> None:
    assert len(weights_digest(tmp_path)) == 32


@pytest.mark.parametrize(
    "claimed", [(1 << 63).to_bytes(8, "little"), (64).to_bytes(8, "little")], ids=["lying", "honest"]
)
def test_reading_is_bounded_however_large_the_file_is_or_its_header_says(
    tmp_path: Path, claimed: bytes, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "model.safetensors"
    file.write_bytes(claimed)
    with file.open("r+b") as stream:
        stream.truncate(1 << 40)  # sparse: takes no room
    monkeypatch.setattr("mooncake_plugins.kv._digest._HEADER_LIMIT", 1 << 20)
    before = bytes_read()
    weights_digest(tmp_path)
    assert bytes_read() - before < 4 << 20


def bytes_read() -> int:
    """What this process has read so far, as the kernel counts it."""
    lines = Path("/proc/self/io").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("rchar"))
