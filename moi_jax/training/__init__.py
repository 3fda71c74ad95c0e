"""The training room: start and resume, state, step, loop, metrics and report."""
