"""Stage 12: the command line. Parse, call one verb, print."""
