"""The typed experiment: its schema, and reading it from YAML."""
