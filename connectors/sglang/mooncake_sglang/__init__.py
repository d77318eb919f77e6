"""The connector for SGLang. Nothing is here yet: this release serves vLLM only."""
