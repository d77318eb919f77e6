"""The builder of tiny models, in the environment that has an engine's libraries."""

from __future__ import annotations

import hashlib
import json
import runpy
from collections.abc import Callable
from pathlib import Path

import pytest

PROGRAM = Path(__file__).parents[2] / "examples" / "tiny_model" / "make_tiny_model.py"
SMALL = ("--layers", "2", "--hidden", "64", "--heads", "2", "--kv-heads", "1")
Make = Callable[..., None]

pytestmark = pytest.mark.vllm
pytest.importorskip("torch", reason="needs the environment with an engine: make venv-vllm")


@pytest.fixture
def make(monkeypatch: pytest.MonkeyPatch) -> Make:
    """Runs the program, in this process because importing its libraries takes seconds."""

    def make(folder: Path, *options: str) -> None:
        monkeypatch.setattr("sys.argv", [str(PROGRAM), str(folder), *options])
        runpy.run_path(str(PROGRAM), run_name="__main__")

    return make


def digest(folder: Path) -> str:
    return hashlib.sha256((folder / "model.safetensors").read_bytes()).hexdigest()


def test_the_seed_alone_decides_the_weights(make: Make, tmp_path: Path) -> None:
    for name, seed in (("a", "1"), ("b", "1"), ("c", "2")):
        make(tmp_path / name, *SMALL, "--seed", seed)
    assert digest(tmp_path / "a") == digest(tmp_path / "b") != digest(tmp_path / "c")
    configs = {(tmp_path / name / "config.json").read_text() for name in "abc"}
    [config] = configs
    assert json.loads(config)["num_key_value_heads"] == 1
    assert "float32" in config


def test_any_text_survives_the_tokenizer(make: Make, tmp_path: Path) -> None:
    make(tmp_path, *SMALL)
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(tmp_path)
    text = "Größe 🙂\n\ttab  two spaces"
    assert tokenizer.decode(tokenizer(text)["input_ids"]) == text
    chat = [{"role": "user", "content": "hello"}]
    assert (
        tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=True)
        == "<bos>[user] hello\n[assistant]"
    )


@pytest.mark.parametrize(
    ("options", "why"),
    [
        (("--heads", "7"), "must be one of (32, 64"),
        (("--kv-heads", "3"), "is not a multiple of --kv-heads 3"),
        (("--vocab", "100"), "--vocab 100 is too small"),
        (("--layers", "0"), "sizes must be 1 or more"),
    ],
)
def test_impossible_sizes_are_refused(
    make: Make, tmp_path: Path, capsys: pytest.CaptureFixture[str], options: tuple[str, ...], why: str
) -> None:
    with pytest.raises(SystemExit) as caught:
        make(tmp_path / "m", *options)
    assert caught.value.code == 2
    assert why in capsys.readouterr().err
    assert not (tmp_path / "m").exists()
