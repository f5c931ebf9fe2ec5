"""lighten: what a Transformer costs before it is run, how to make it smaller and faster, and which way is best, by experiment."""

__version__ = "0.1.0"
