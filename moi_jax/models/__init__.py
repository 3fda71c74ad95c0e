"""The models room: architecture, parameters, attention and the vocabulary loss."""
