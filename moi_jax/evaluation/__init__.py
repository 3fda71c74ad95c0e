"""The evaluation room: what a model is judged by."""
