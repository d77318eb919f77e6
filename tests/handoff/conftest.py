"""Hypothesis without its own time limit: a busy machine is no failure."""

from __future__ import annotations

from hypothesis import settings

settings.register_profile("mooncake", deadline=None)
settings.load_profile("mooncake")
