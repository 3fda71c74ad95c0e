"""What every room may use: errors, the log, progress bars, atomic writes, fingerprints."""
