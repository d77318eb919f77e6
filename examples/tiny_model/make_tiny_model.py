#!/usr/bin/env python3
"""Build a small random Llama with a byte-level tokenizer and a chat template. Needs no network.

    make_tiny_model.py FOLDER [--layers 4] [--hidden 256] [--heads 8] [--kv-heads 4] [--seed 0] ...

It answers nonsense, but always the same nonsense: the same options give the same weights. They are drawn widely, so
that one wrong KV block changes the tokens; that is what makes the model useful for tests. Needs torch and transformers,
so run it with the Python of an engine's environment.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

# Head sizes that vLLM's CPU attention kernels take.
HEAD_SIZES = (32, 64, 80, 96, 112, 128, 160, 192, 224, 256, 512)
SPECIAL_TOKENS = ("<bos>", "<eos>", "<pad>")
# Frequent letter pairs become tokens of their own, so that prompts are tokenized by rules and not only byte by byte.
MERGES = (
    "th",
    "he",
    "in",
    "er",
    "an",
    "re",
    "on",
    "at",
    "en",
    "nd",
    "ti",
    "es",
    "or",
    "te",
    "of",
    "ed",
    "is",
    "it",
    "al",
    "ar",
)
CHAT_TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}[{{ message['role'] }}] {{ message['content'] }}\n{% endfor %}"
    "{% if add_generation_prompt %}[assistant]{% endif %}"
)
# Standard deviation of the weights; the usual 0.02 gives nearly flat logits, in which wrong KV may go unnoticed.
SPREAD = 0.2


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--hidden", type=int, default=256)
    parser.add_argument("--heads", type=int, default=8)
    parser.add_argument("--kv-heads", type=int, default=4)
    parser.add_argument("--vocab", type=int, default=512, help="rows of the embedding")
    parser.add_argument("--max-positions", type=int, default=8192)
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    parser.add_argument("--seed", type=int, default=0, help="other weights for the same configuration")
    given = parser.parse_args()
    if min(given.layers, given.hidden, given.heads, given.kv_heads, given.max_positions) < 1:
        parser.error("sizes must be 1 or more")
    if given.hidden % given.heads or given.hidden // given.heads not in HEAD_SIZES:
        parser.error(f"--hidden / --heads is {given.hidden} / {given.heads}; the quotient must be one of {HEAD_SIZES}")
    if given.heads % given.kv_heads:
        parser.error(f"--heads {given.heads} is not a multiple of --kv-heads {given.kv_heads}")
    least = len(vocabulary())
    if given.vocab < least:
        parser.error(f"--vocab {given.vocab} is too small, the tokenizer has {least} tokens")
    return given


def vocabulary() -> dict[str, int]:
    """Number the tokens: special ones, one for each byte, then the merged pairs."""
    tokens = [*SPECIAL_TOKENS, *sorted(pre_tokenizers.ByteLevel.alphabet()), *MERGES]
    return {token: number for number, token in enumerate(tokens)}


def build_tokenizer() -> PreTrainedTokenizerFast:
    bpe = Tokenizer(models.BPE(vocab=vocabulary(), merges=[(pair[0], pair[1]) for pair in MERGES]))
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    bos, eos, pad = SPECIAL_TOKENS
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=bpe, bos_token=bos, eos_token=eos, pad_token=pad)
    tokenizer.chat_template = CHAT_TEMPLATE
    return tokenizer


def build_model(given: argparse.Namespace) -> LlamaForCausalLM:
    torch.manual_seed(given.seed)
    config = LlamaConfig(
        vocab_size=given.vocab,
        hidden_size=given.hidden,
        intermediate_size=2 * given.hidden,
        num_hidden_layers=given.layers,
        num_attention_heads=given.heads,
        num_key_value_heads=given.kv_heads,
        head_dim=given.hidden // given.heads,
        max_position_embeddings=given.max_positions,
        bos_token_id=0,
        eos_token_id=1,
        pad_token_id=2,
        tie_word_embeddings=False,
        initializer_range=SPREAD,
    )
    return LlamaForCausalLM(config).to(getattr(torch, given.dtype))


def main() -> None:
    given = parse_arguments()
    build_tokenizer().save_pretrained(given.folder)
    model = build_model(given)
    model.save_pretrained(given.folder)
    print(f"{given.folder}: Llama with {sum(p.numel() for p in model.parameters()):,} random parameters")


if __name__ == "__main__":
    main()
