"""What KV bytes are: whose values they hold, where they lie, and how to know them again. Pure but for the weights."""

from mooncake_plugins.kv._checksum import block_checksums, span_seeds
from mooncake_plugins.kv._digest import prompt_digest, weights_digest
from mooncake_plugins.kv._fingerprint import Fingerprint, fingerprint_differences
from mooncake_plugins.kv._layout import CacheLayout, Coordinate, blocks_covering

__all__ = [
    "CacheLayout",
    "Coordinate",
    "Fingerprint",
    "block_checksums",
    "blocks_covering",
    "fingerprint_differences",
    "prompt_digest",
    "span_seeds",
    "weights_digest",
]
