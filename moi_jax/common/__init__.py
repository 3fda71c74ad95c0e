"""What every room may use: errors, the console, files that are written whole."""
