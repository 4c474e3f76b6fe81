"""prefopt's own lm-eval tasks: YAML and items that need no hub. `generate` writes the items."""
