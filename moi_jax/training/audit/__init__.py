"""The audit of a run: it is read, recomputed and replayed, and never changed."""
