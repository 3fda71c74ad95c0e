"""Sources: turns each row of a file or dataset into a `Conversation` or a `BadRow`."""
