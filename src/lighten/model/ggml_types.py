"""The element types of ggml: values to a block, bytes of a block, and the width of one code.

Source: `type_traits` in ggml/src/ggml.c and the block structures of ggml/src/ggml-common.h (llama.cpp); `GGML_QUANT_SIZES` of the `gguf` package,
against which tests/test_sources.py holds every entry.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True, kw_only=True)
class GgmlType:
    """One element type.

    Attributes:
        number: as a GGUF file stores it.
        block: values that are stored together; a row is a whole number of blocks.
        bytes: of one block, its scales included.
        bits: of one code; None where the values are plain numbers.
    """

    number: int
    block: int
    bytes: int
    bits: int | None

    def stored_bytes(self, rows: int, columns: int) -> int:
        """Bytes of a matrix, each row in whole blocks.

        >>> GGML_TYPES["Q4_K"].stored_bytes(2, 512)
        576
        """
        return rows * math.ceil(columns / self.block) * self.bytes


_TABLE: dict[str, tuple[int, int, int, int | None]] = {
    "F32": (0, 1, 4, None), "F16": (1, 1, 2, None), "Q4_0": (2, 32, 18, 4), "Q4_1": (3, 32, 20, 4), "Q5_0": (6, 32, 22, 5), "Q5_1": (7, 32, 24, 5),
    "Q8_0": (8, 32, 34, 8), "Q8_1": (9, 32, 40, 8), "Q2_K": (10, 256, 84, 2), "Q3_K": (11, 256, 110, 3), "Q4_K": (12, 256, 144, 4),
    "Q5_K": (13, 256, 176, 5), "Q6_K": (14, 256, 210, 6), "Q8_K": (15, 256, 292, 8), "IQ2_XXS": (16, 256, 66, 2), "IQ2_XS": (17, 256, 74, 2),
    "IQ3_XXS": (18, 256, 98, 3), "IQ1_S": (19, 256, 50, 1), "IQ4_NL": (20, 32, 18, 4), "IQ3_S": (21, 256, 110, 3), "IQ2_S": (22, 256, 82, 2),
    "IQ4_XS": (23, 256, 136, 4), "I8": (24, 1, 1, None), "I16": (25, 1, 2, None), "I32": (26, 1, 4, None), "I64": (27, 1, 8, None),
    "F64": (28, 1, 8, None), "IQ1_M": (29, 256, 56, 1), "BF16": (30, 1, 2, None), "TQ1_0": (34, 256, 54, 2), "TQ2_0": (35, 256, 66, 2),
    "MXFP4": (39, 32, 17, 4), "NVFP4": (40, 64, 36, 4), "Q1_0": (41, 128, 18, 1),
}  # fmt: skip

GGML_TYPES = {name: GgmlType(number=n, block=block, bytes=size, bits=bits) for name, (n, block, size, bits) in _TABLE.items()}
GGML_NAMES = {kind.number: name for name, kind in GGML_TYPES.items()}

PLAIN = {
    "F32": "float32", "F16": "float16", "BF16": "bfloat16", "F64": "float64", "I8": "int8", "I16": "int16", "I32": "int32", "I64": "int64",
}  # fmt: skip
"""Types that are not quantized, by their usual names."""

RECIPE_TYPES = {
    "q8_0": "Q8_0", "q6_k": "Q6_K", "q5_k": "Q5_K", "q4_k": "Q4_K", "q4_0": "Q4_0", "q3_k": "Q3_K", "q2_k": "Q2_K",
}  # fmt: skip
"""Word of a recipe's `format` → type."""

_FALLBACKS = {"Q2_K": "Q4_0", "Q3_K": "Q4_0", "Q4_K": "Q5_0", "Q5_K": "Q5_1", "Q6_K": "Q8_0"}
"""Type in blocks of 256 → the type in blocks of 32 that stands in for it. Source: `tensor_type_fallback` in src/llama-quant.cpp of llama.cpp."""

_HELD = {"Q4_0": 8, "Q5_0": 16, "Q8_0": 128}
"""Types of one float16 scale for each 32 values → n: they hold the whole numbers from -n to n - 1."""


def ggml_fallback(name: str, columns: int) -> str:
    """The type that a matrix of so many columns is stored in where `name` was asked for: itself where its blocks fill the rows, else what
    llama.cpp puts in its place, which is never narrower; F16 where no block of 32 fits either.

    >>> ggml_fallback("Q4_K", 1536), ggml_fallback("Q4_K", 576), ggml_fallback("Q4_K", 100)
    ('Q4_K', 'Q5_0', 'F16')

    Source: `tensor_type_fallback` in src/llama-quant.cpp of llama.cpp.
    """
    if columns % GGML_TYPES[name].block == 0:
        return name
    found = _FALLBACKS.get(name, name)
    return found if columns % GGML_TYPES[found].block == 0 else "F16"


OFFSET = ("Q4_1", "Q5_1", "Q2_K", "Q4_K", "Q5_K")
"""Types whose groups have an offset, so that 0 is seldom one of their values. Source: ggml-common.h, the blocks with `m` or `dmin`."""


def ggml_format(name: str, columns: int) -> dict[str, Any]:
    """The fields of a `WeightFormat` for a matrix that is asked for in a type: those that `read_gguf` gives it.

    >>> ggml_format("Q6_K", 576)
    {'bits': 8, 'group_size': 32, 'ggml_type': 'Q8_0'}
    """
    found = ggml_fallback(name, columns)
    kind = GGML_TYPES[found]
    return {"dtype": PLAIN[found]} if found in PLAIN else {"bits": kind.bits, "group_size": kind.block, "ggml_type": found}


def exact_ggml_type(*, bits: int, symmetric: bool, group_size: int, columns: int, element: str = "int") -> str | None:
    """The smallest type that holds a weight of such codes without loss, scales of float16 taken for granted; None where none does.

    Codes lose their zero points: (code - zero_point) is a whole number that the type holds. Groups are whole numbers of its blocks of 32.

    >>> exact_ggml_type(bits=4, symmetric=True, group_size=64, columns=576), exact_ggml_type(bits=4, symmetric=False, group_size=64, columns=576)
    ('Q4_0', 'Q5_0')
    """
    if columns % 32 or (group_size > 0 and group_size % 32):
        return None
    if element != "int":
        return "MXFP4" if element == "e2m1" and group_size == 32 else None
    needed = 2 ** (bits - 1) if symmetric else 2**bits
    return next((name for name, held in _HELD.items() if held >= needed), None)
