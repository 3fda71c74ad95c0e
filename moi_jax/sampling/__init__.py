"""Text from a model: batched generation, likelihoods, files of conversations, and a chat."""
