"""Tiny configs of every family, one module for each module of lighten.model.families."""
