"""Digests that name a prompt and a set of weights."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np

# Bytes read at each of this many places of a weight file. Fine-tunes of one architecture share names, shapes and sizes,
# so headers alone cannot tell them apart; training moves nearly every weight, so a few samples can.
_SAMPLES = 16
_SAMPLE_BYTES = 4096
_HEADER_LIMIT = 64 << 20


def prompt_digest(token_ids: Sequence[int], extras: Iterable[str] = ()) -> bytes:
    """Name a prompt: its tokens and whatever else changes their KV (cache salt, LoRA, multimodal hashes).

    Args:
        token_ids: Token ids, each below 2**32.
        extras: Strings in a fixed order.

    Returns:
        16 bytes; equal for equal prompts only (BLAKE2b).
    """
    digest = hashlib.blake2b(digest_size=16)
    # The number of tokens goes first, so that no token can pose as the beginning of the extras.
    digest.update(len(token_ids).to_bytes(8, "little"))
    digest.update(np.asarray(token_ids, dtype="<u4").tobytes())
    for extra in extras:
        encoded = extra.encode()
        digest.update(len(encoded).to_bytes(4, "little"))
        digest.update(encoded)
    return digest.digest()


def weights_digest(model: Path | str, revision: str | None = None) -> str:
    """Name a model's weights: its configuration, and the headers, sizes and samples of its weight files.

    Reads a few hundred KiB a file however large it is. A model that is not a local folder is named by its hub name and
    revision.

    Returns:
        32 hex digits.

    Blocking: file reads. Raises nothing for absent files: what is not there does not count.
    """
    digest = hashlib.blake2b(digest_size=16)
    folder = Path(model)
    if not folder.is_dir():
        digest.update(f"{model}@{revision or 'default'}".encode())
        return digest.hexdigest()
    config = folder / "config.json"
    if config.is_file():
        digest.update(config.read_bytes())
    for file in sorted(folder.glob("*.safetensors")) or sorted(folder.glob("*.bin")):
        digest.update(f"{file.name}:{file.stat().st_size}".encode())
        _sample(file, digest)
    return digest.hexdigest()


def _sample(file: Path, digest: hashlib.blake2b) -> None:
    """Feed a weight file's header and evenly spaced samples of its data to the digest."""
    size = file.stat().st_size
    with file.open("rb") as stream:
        has_header = file.suffix == ".safetensors"
        header = min(int.from_bytes(stream.read(8), "little"), size, _HEADER_LIMIT) if has_header else 0
        digest.update(stream.read(header))
        first, last = 8 + header, max(8 + header, size - _SAMPLE_BYTES)
        for position in np.linspace(first, last, _SAMPLES, dtype=np.int64).tolist():
            stream.seek(position)
            digest.update(stream.read(_SAMPLE_BYTES))
