"""2 describe, by running: a model followed operator by operator on tensors without memory, or along a graph that a file holds."""
