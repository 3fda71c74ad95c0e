"""What is trained on, shown and proved."""
