"""report.html of evaluations: several checkpoints side by side."""
