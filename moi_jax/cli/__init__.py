"""What the commands share: their arguments."""
