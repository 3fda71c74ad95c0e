"""What the commands share: how they end, stop signals, and arguments."""
