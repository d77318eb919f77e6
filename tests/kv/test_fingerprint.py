"""Fingerprints: equal, or every difference named with both values."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from mooncake_plugins.kv import fingerprint_differences

fingerprints = st.dictionaries(st.text(max_size=8), st.integers() | st.text(max_size=8), max_size=6)


def test_equal_fingerprints_do_not_differ() -> None:
    assert fingerprint_differences({"dtype": "float32", "layers": 2}, {"layers": 2, "dtype": "float32"}) == {}


def test_every_difference_is_named_with_both_values() -> None:
    here: dict[str, str | int] = {"dtype": "float32", "block_size": 16, "model": "a"}
    there: dict[str, str | int] = {"dtype": "bfloat16", "block_size": 64, "model": "a"}
    assert fingerprint_differences(here, there) == {"block_size": (16, 64), "dtype": ("float32", "bfloat16")}


def test_a_field_that_one_side_does_not_state_is_a_difference() -> None:
    assert fingerprint_differences({"rope": "x"}, {}) == {"rope": ("x", "(not stated)")}
    assert fingerprint_differences({}, {"rope": "x"}) == {"rope": ("(not stated)", "x")}


def test_no_value_can_pose_as_silence() -> None:
    assert "rope" in fingerprint_differences({"rope": "(not stated)"}, {})


def test_a_number_and_its_text_differ() -> None:
    assert fingerprint_differences({"block_size": 16}, {"block_size": "16"}) == {"block_size": (16, "16")}


def test_true_is_not_one() -> None:
    assert fingerprint_differences({"mla": True}, {"mla": 1}) == {"mla": (True, 1)}


@given(fingerprints, fingerprints)
def test_differences_are_symmetric_and_empty_only_for_equal_fingerprints(
    here: dict[str, str | int], there: dict[str, str | int]
) -> None:
    differences = fingerprint_differences(here, there)
    mirrored = fingerprint_differences(there, here)
    assert {name: (b, a) for name, (a, b) in differences.items()} == mirrored
    assert (differences == {}) == (here == there)
