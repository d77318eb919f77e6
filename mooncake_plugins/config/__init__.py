"""Settings: where they come from, how sizes are written, and the cluster secret.

An argument wins over ``MOONCAKE_<SECTION>_<FIELD>`` in the environment, which wins over ``field`` in table
``[section]`` of a TOML file.
"""

from __future__ import annotations

from mooncake_plugins.config._secret import SECRET_FILE_VARIABLE, Secret, load_secret
from mooncake_plugins.config._sizes import format_bytes, parse_bytes
from mooncake_plugins.config._sources import from_sources

__all__ = ["SECRET_FILE_VARIABLE", "Secret", "format_bytes", "from_sources", "load_secret", "parse_bytes"]
