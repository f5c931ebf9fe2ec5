"""Stage 2: what a workload costs on a model, in operations and bytes; no torch."""

from lighten.cost.operators import Forward, Op, forward_operators
from lighten.cost.workload import Workload

__all__ = ["Forward", "Op", "Workload", "forward_operators"]
