"""The sample set and its makers."""
