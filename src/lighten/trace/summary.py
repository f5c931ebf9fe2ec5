"""The one-call table of a model by submodule: parameters, FLOPs and bytes, each with its share."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from lighten.units import format_bytes, format_count


@dataclass(frozen=True, kw_only=True)
class Row:
    """One submodule with all that is inside it; `depth` 0 is the model.

    Attributes:
        output_bytes: of the tensors that its own operators and those inside it make in one forward pass.
    """

    name: str
    kind: str
    depth: int
    parameters: int
    parameter_bytes: int
    flops: int
    output_bytes: int


@dataclass(frozen=True, kw_only=True)
class Summary:
    """What `lighten.summary` returns; `print` shows it as a table.

    Attributes:
        rows: in the order of the modules; a tied parameter is counted in the first module that has it.
        batch_size, seq_len: of the inputs.
        unknown_ops: operators whose FLOPs are not known.
    """

    rows: tuple[Row, ...]
    batch_size: int
    seq_len: int
    unknown_ops: tuple[str, ...] = ()

    def as_json(self) -> dict[str, Any]:
        """Rows and sizes as plain values."""
        return {
            "batch_size": self.batch_size, "seq_len": self.seq_len, "rows": [vars(row) for row in self.rows], "unknown_ops": list(self.unknown_ops),
        }  # fmt: skip

    def __str__(self) -> str:
        return "\n".join(self._lines())

    def _lines(self) -> Iterator[str]:
        whole = self.rows[0]
        names = [f"{'  ' * row.depth}{row.name} ({row.kind})" for row in self.rows]
        width = max(len("module"), *map(len, names))
        yield f"{'module':<{width}}  {'parameters':>12} {'share':>6}  {'weights':>10}  {'FLOPs':>9} {'share':>6}  {'made':>10}"
        for row, name in zip(self.rows, names, strict=True):
            yield (
                f"{name:<{width}}  {row.parameters:>12,} {_share(row.parameters, whole.parameters):>6}  {format_bytes(row.parameter_bytes):>10}  "
                f"{format_count(row.flops):>9} {_share(row.flops, whole.flops):>6}  {format_bytes(row.output_bytes):>10}"
            )
        yield f"one forward pass of {self.batch_size} × {self.seq_len}; made: bytes of all tensors that are made on the way, not at once"
        if self.unknown_ops:
            yield f"FLOPs not known, counted as 0: {', '.join(self.unknown_ops)}"


def _share(part: int, whole: int) -> str:
    return f"{part / whole:.1%}" if whole else "–"
