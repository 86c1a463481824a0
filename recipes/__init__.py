"""Training stages: a script, and a YAML file per stage. `mobilemoe.recipes` where the package is installed."""
