"""The specs of the zoo: one TOML file per variant, found with `importlib.resources.files`."""
