"""Where generated programs run: walls around them, and a verdict that they cannot write."""
