"""Tests of the Conductor import their helpers by plain name, because pytest's importlib mode knows no test packages."""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))
