"""Stage 7: write it in formats that other people's runtimes load."""
