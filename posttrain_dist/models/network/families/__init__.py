"""config.json of one architecture family -> Network."""
