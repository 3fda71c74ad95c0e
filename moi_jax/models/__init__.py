"""The models room: architecture, parameters, attention and vocabulary loss."""
