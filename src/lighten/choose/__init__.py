"""Stage 10: choose by experiment."""

from lighten.choose.search import Request, choose

__all__ = ["Request", "choose"]
