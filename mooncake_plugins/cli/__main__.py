"""``python -m mooncake_plugins.cli`` is the same as ``mooncake``."""

from __future__ import annotations

from mooncake_plugins.cli import main

if __name__ == "__main__":
    main()
