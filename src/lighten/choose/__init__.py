"""Stage 10: choose by experiment."""

from lighten.choose.request import Request
from lighten.choose.run import choose

__all__ = ["Request", "choose"]
