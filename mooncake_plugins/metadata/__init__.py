"""How a segment's name is resolved to a peer."""

from __future__ import annotations

from ._interface import MetadataBackend, MetadataHost

__all__ = ["MetadataBackend", "MetadataHost"]
