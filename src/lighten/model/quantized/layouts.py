"""The tensors of each method's checkpoints for one weight of out_features × in_features.

Shape legend: O out_features, I in_features, G group_size, b bits.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

from lighten.model.spec import PER_CHANNEL, PER_TENSOR

Stored = dict[str, tuple[tuple[int, ...], str]]
"""What follows the module's name → (shape, element type)."""


@dataclass(frozen=True, kw_only=True)
class GptqLayout:
    """`qweight` int32 [I·b/32, O], `qzeros` int32 [I/G, O·b/32], `scales` [I/G, O], `g_idx` int32 [I]: each input's group.

    Source: GPTQModel, nn_modules/qlinear (and AutoGPTQ before it).
    """

    bits: int
    group_size: int

    def tensors(self, rows: int, columns: int, scale_dtype: str) -> Stored:
        groups = _groups(columns, self.group_size)
        return {
            ".qweight": ((columns * self.bits // 32, rows), "int32"),
            ".qzeros": ((groups, rows * self.bits // 32), "int32"),
            ".scales": ((groups, rows), scale_dtype),
            ".g_idx": ((columns,), "int32"),
        }


@dataclass(frozen=True, kw_only=True)
class AwqLayout:
    """`qweight` int32 [I, O·b/32], `qzeros` int32 [I/G, O·b/32], `scales` [I/G, O].

    Source: AutoAWQ, modules/linear/gemm.py.
    """

    bits: int
    group_size: int

    def tensors(self, rows: int, columns: int, scale_dtype: str) -> Stored:
        groups, packed = _groups(columns, self.group_size), rows * self.bits // 32
        return {".qweight": ((columns, packed), "int32"), ".qzeros": ((groups, packed), "int32"), ".scales": ((groups, rows), scale_dtype)}


@dataclass(frozen=True, kw_only=True)
class Fp8Layout:
    """`weight` of one byte each [O, I], and the number that each block of it was divided by; one for all of it without `block`.

    Attributes:
        static: the scale of its inputs is stored too.

    Source: transformers, integrations/finegrained_fp8.py, FP8Linear.
    """

    block: tuple[int, int] | None
    static: bool

    def tensors(self, rows: int, columns: int, scale_dtype: str) -> Stored:
        scales = (math.ceil(rows / self.block[0]), math.ceil(columns / self.block[1])) if self.block else ()
        found: Stored = {".weight": ((rows, columns), "float8_e4m3fn"), ".weight_scale_inv": (scales, scale_dtype)}
        return found | ({".activation_scale": ((), "float32")} if self.static else {})


@dataclass(frozen=True, kw_only=True)
class Bnb4Layout:
    """`weight` [O·I/2, 1] with two codes a byte, `absmax` of each 64 codes, the 16 values of the codes as `quant_map`.

    With `double_quant` (QLoRA, arXiv:2305.14314, section 3) `absmax` is of one byte each, and each 256 of them have an `absmax` of their own.
    A description as JSON of some hundred bytes, which depends on the values, is stored beside them and not counted.

    Attributes:
        storage: element type that the bytes of `weight` are stored as, and its bytes.

    Source: bitsandbytes, functional.py, QuantState.as_dict; blocks of 64 and 256 are its defaults.
    """

    double_quant: bool
    storage: tuple[str, int]

    def tensors(self, rows: int, columns: int, scale_dtype: str) -> Stored:
        dtype, size = self.storage
        blocks = math.ceil(rows * columns / 64)
        found: Stored = {
            ".weight": ((math.ceil(math.ceil(rows * columns / 2) / size), 1), dtype),
            ".weight.absmax": ((blocks,), "uint8" if self.double_quant else "float32"),
            ".weight.quant_map": ((16,), "float32"),
        }
        if self.double_quant:
            found[".weight.nested_absmax"] = ((math.ceil(blocks / 256),), "float32")
            found[".weight.nested_quant_map"] = ((256,), "float32")
        return found


@dataclass(frozen=True, kw_only=True)
class Bnb8Layout:
    """`weight` int8 [O, I], `SCB`: the largest value of each row, `weight_format`: how it lies (arXiv:2208.07339).

    Source: bitsandbytes, nn/modules.py, Linear8bitLt._save_to_state_dict.
    """

    def tensors(self, rows: int, columns: int, scale_dtype: str) -> Stored:
        return {".weight": ((rows, columns), "int8"), ".SCB": ((rows,), "float32"), ".weight_format": ((), "uint8")}


@dataclass(frozen=True, kw_only=True)
class Mxfp4Layout:
    """`_blocks` uint8 [O, I/32, 16] with two codes a byte, `_scales` uint8 [O, I/32]: the exponent of each 32 codes.

    Source: transformers, integrations/mxfp4.py; OCP Microscaling Formats (MX) v1.0, section 5.
    """

    def tensors(self, rows: int, columns: int, scale_dtype: str) -> Stored:
        groups = columns // 32
        return {"_blocks": ((rows, groups, 16), "uint8"), "_scales": ((rows, groups), "uint8")}


@dataclass(frozen=True, kw_only=True)
class EetqLayout:
    """`weight` int8 [I, O], `weight_scales` [O].

    Source: transformers, integrations/eetq.py, EetqLinear.
    """

    def tensors(self, rows: int, columns: int, scale_dtype: str) -> Stored:
        return {".weight": ((columns, rows), "int8"), ".weight_scales": ((rows,), scale_dtype)}


@dataclass(frozen=True, kw_only=True)
class RowFp8Layout:
    """`weight` of one byte each [O, I], `weight_scale` float32 [O, 1].

    Source: transformers, integrations/fbgemm_fp8.py, FbgemmFp8Linear.
    """

    def tensors(self, rows: int, columns: int, scale_dtype: str) -> Stored:
        return {".weight": ((rows, columns), "float8_e4m3fn"), ".weight_scale": ((rows, 1), "float32")}


@dataclass(frozen=True, kw_only=True)
class TernaryLayout:
    """`weight` uint8 [O/4, I] with four codes a byte, `weight_scale` [1] (BitNet b1.58, arXiv:2402.17764).

    Source: transformers, integrations/bitnet.py, BitLinear.
    """

    def tensors(self, rows: int, columns: int, scale_dtype: str) -> Stored:
        return {".weight": ((math.ceil(rows / 4), columns), "uint8"), ".weight_scale": ((1,), scale_dtype)}


Strategy = Literal["tensor", "channel", "group", "block"]


@dataclass(frozen=True, kw_only=True)
class NaiveLayout:
    """compressed-tensors' float-, int- and naive-quantized: `weight` of one byte each [O, I] and `weight_scale`.

    Attributes:
        dtype: of the weight.
        strategy: which weights share a scale; `block`, `group_size`: how many where it is blocks or groups.
        zero_points: stored too, int8, as many as scales.
        static: the scale of its inputs is stored too.
        own: as lighten writes and reads it.

    Source: the `compressed-tensors` package, compressors/naive_quantized.
    """

    dtype: str
    strategy: Strategy
    group_size: int = PER_CHANNEL
    block: tuple[int, int] = (1, 1)
    zero_points: bool = False
    static: bool = False
    own: bool = False

    def tensors(self, rows: int, columns: int, scale_dtype: str) -> Stored:
        scales = self._scales(rows, columns)
        found: Stored = {".weight": ((rows, columns), self.dtype), ".weight_scale": (scales, scale_dtype)}
        if self.zero_points:
            found[".weight_zero_point"] = (scales, "int8")
        return found | ({".input_scale": ((1,), scale_dtype)} if self.static else {})

    def _scales(self, rows: int, columns: int) -> tuple[int, ...]:
        if self.strategy == "tensor":
            return (1,)
        if self.strategy == "block":
            return (math.ceil(rows / self.block[0]), math.ceil(columns / self.block[1]))
        return (rows, _groups(columns, self.group_size))


@dataclass(frozen=True, kw_only=True)
class Nvfp4Layout:
    """`weight_packed` uint8 [O, I/2], `weight_scale` of one byte for each 16 weights [O, I/16], and one number for all of them.

    Attributes:
        inputs: one number for its inputs too.

    Source: the `compressed-tensors` package, compressors/nvfp4.
    """

    inputs: bool

    def tensors(self, rows: int, columns: int, scale_dtype: str) -> Stored:
        found: Stored = {
            ".weight_packed": ((rows, columns // 2), "uint8"),
            ".weight_scale": ((rows, columns // 16), "float8_e4m3fn"),
            ".weight_global_scale": ((1,), "float32"),
        }
        return found | ({".input_global_scale": ((1,), "float32")} if self.inputs else {})


@dataclass(frozen=True, kw_only=True)
class MxPackedLayout:
    """`weight_packed` uint8 [O, I/2], `weight_scale` uint8 for each 32 weights [O, I/32].

    Source: the `compressed-tensors` package, compressors/mxfp4.
    """

    def tensors(self, rows: int, columns: int, scale_dtype: str) -> Stored:
        return {".weight_packed": ((rows, columns // 2), "uint8"), ".weight_scale": ((rows, columns // 32), "uint8")}


@dataclass(frozen=True, kw_only=True)
class PackedLayout:
    """compressed-tensors' pack-quantized where lighten itself would store the weight otherwise: `weight_packed` int32 [O, I·b/32] and so on.

    Source: the `compressed-tensors` package, compressors/pack_quantized.
    """

    bits: int
    group_size: int
    symmetric: bool

    def tensors(self, rows: int, columns: int, scale_dtype: str) -> Stored:
        by_tensor = self.group_size == PER_TENSOR
        groups = _groups(columns, self.group_size) if not by_tensor else 1
        scales: tuple[int, ...] = (1,) if by_tensor else (rows, groups)
        found: Stored = {
            ".weight_packed": ((rows, math.ceil(columns * self.bits / 32)), "int32"), ".weight_scale": (scales, scale_dtype),
            ".weight_shape": ((2,), "int64"),
        }  # fmt: skip
        if not self.symmetric:
            found[".weight_zero_point"] = (scales, "int8") if by_tensor else ((math.ceil(rows * self.bits / 32), groups), "int32")
        return found


def _groups(columns: int, group_size: int) -> int:
    return 1 if group_size == PER_CHANNEL else math.ceil(columns / group_size)
