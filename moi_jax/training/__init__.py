"""The training room: mesh, state, step, loop, checkpoints, metrics and report."""
