"""The sampling room: text out of a model."""
