"""The KVCache pool. Nothing is here yet: this release hands KV from prefill to decode, and stores none."""
