"""T-Eval's parts: the records of its files, the answers to them, and what those are worth."""
