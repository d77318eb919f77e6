"""The two markers of our pluggy project."""

from __future__ import annotations

import pluggy

PROJECT = "mooncake"

hookspec = pluggy.HookspecMarker(PROJECT)
hookimpl = pluggy.HookimplMarker(PROJECT)
