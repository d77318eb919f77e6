"""Mooncake for vLLM and SGLang: prefill and decode apart, one KVCache pool, one router.

Nothing is imported here, so that ``import mooncake_plugins`` costs nothing. Each sub-package says in its ``__all__``
what is public.
"""

__version__ = "0.1.0"
__all__ = ["__version__"]
