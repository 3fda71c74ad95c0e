"""What the commands share: arguments and stop signals."""
