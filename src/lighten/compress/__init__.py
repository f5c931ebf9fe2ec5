"""Stage 6: do it. Pure tensor algorithms, one a file, and the walk that applies a recipe's steps to a checkpoint."""
