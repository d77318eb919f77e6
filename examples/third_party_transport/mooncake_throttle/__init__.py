"""tcp with a speed limit, as a plugin of mooncake-plugins."""
