"""A quantized weight as the tensors of its file form, and back: the layouts that `lighten.model.quantized.packed` describes.

Shape legend: O rows, I columns, G scales of a row.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import torch
from torch import Tensor

from lighten.compress.grid import QuantizedTensor
from lighten.model.quantized import FLOAT, FORMAT, INT, MXFP4, NVFP4
from lighten.model.spec import PER_TENSOR, WeightFormat


def pack(weight: QuantizedTensor, kind: str = FORMAT) -> dict[str, Tensor]:
    """The tensors that stand for a quantized weight in a compressed-tensors format, by their names below the module's."""
    by_tensor = weight.group_size == PER_TENSOR
    tensors = {"weight_scale": weight.scale.reshape(1) if by_tensor else weight.scale}
    if kind == FORMAT:
        tensors |= {"weight_packed": pack_codes(weight.codes, weight.bits), "weight_shape": torch.tensor(weight.codes.shape, dtype=torch.int64)}
    elif kind == INT:
        tensors["weight"] = _signed(weight.codes, weight.bits)
    elif kind == FLOAT:
        tensors["weight"] = weight.codes.view(torch.float8_e4m3fn)
    else:
        tensors["weight_packed"] = weight.codes[:, 0::2] | weight.codes[:, 1::2] << 4
    if weight.zero_point is not None:
        signed = _signed(weight.zero_point, weight.bits)
        packed = kind == FORMAT and not by_tensor
        tensors["weight_zero_point"] = pack_codes(weight.zero_point.T, weight.bits).T if packed else signed.reshape(1) if by_tensor else signed
    if weight.global_scale is not None:
        tensors["weight_global_scale"] = weight.global_scale.reshape(1)
    if weight.input_scale is not None:
        tensors["input_scale"] = weight.input_scale.reshape(1)
    return {name: tensor.contiguous() for name, tensor in tensors.items()}


def unpack(tensors: Mapping[str, Tensor], weight: WeightFormat, kind: str = FORMAT) -> QuantizedTensor:
    """The inverse of `pack`."""
    assert weight.bits is not None, "asked for where a weight is quantized"
    by_tensor, bits = weight.group_size == PER_TENSOR, weight.bits
    scale, zero = tensors["weight_scale"], tensors.get("weight_zero_point")
    if kind == FORMAT:
        rows, columns = (int(n) for n in tensors["weight_shape"])
        codes = unpack_codes(tensors["weight_packed"], bits, columns)
        if zero is not None and not by_tensor:
            zero = unpack_codes(zero.T.contiguous(), bits, rows).T.contiguous()
    elif kind == INT:
        codes = _unsigned(tensors["weight"], bits)
    elif kind == FLOAT:
        codes = tensors["weight"].view(torch.uint8)
    else:
        assert kind in (NVFP4, MXFP4), "the formats that are read"
        pairs = tensors["weight_packed"]
        codes = torch.stack([pairs & 15, pairs >> 4], dim=-1).reshape(len(pairs), -1)
    if zero is not None and (kind == INT or by_tensor):
        zero = _unsigned(zero, bits)
    return QuantizedTensor(
        codes=codes, scale=scale.reshape(1, 1) if by_tensor else scale, zero_point=zero.reshape(1, 1) if by_tensor and zero is not None else zero,
        bits=bits, group_size=weight.group_size, element=weight.element, global_scale=tensors.get("weight_global_scale"),
        input_scale=tensors.get("input_scale"),
    )  # fmt: skip


def pack_codes(codes: Tensor, bits: int) -> Tensor:
    """[R, C] uint8 codes → [R, ceil(C · bits / 32)] int32: the codes' bits one after another, low bits first."""
    rows, columns = codes.shape
    if bits in (1, 2, 4, 8):
        return _pack_divisor(codes, bits)
    one_by_one = np.unpackbits(np.ascontiguousarray(codes.numpy())[..., None], axis=-1, bitorder="little", count=bits).reshape(rows, -1)
    padded = np.pad(one_by_one, ((0, 0), (0, -columns * bits % 32)))
    return torch.from_numpy(np.packbits(padded, axis=-1, bitorder="little").view("<i4").astype(np.int32))


def _pack_divisor(codes: Tensor, bits: int) -> Tensor:
    """The same where a byte holds a whole number of codes: no bit is looked at alone, which takes 8 times the memory."""
    columns, each = codes.shape[1], 8 // bits
    whole = np.pad(codes.numpy(), ((0, 0), (0, -columns % (32 // bits))))
    packed = np.zeros((len(whole), whole.shape[1] // each), np.uint8)
    for place in range(each):
        packed |= whole[:, place::each] << np.uint8(place * bits)
    return torch.from_numpy(packed.view("<i4").astype(np.int32))


def unpack_codes(packed: Tensor, bits: int, columns: int) -> Tensor:
    """The inverse of `pack_codes`."""
    raw = np.ascontiguousarray(packed.numpy()).astype("<i4").view(np.uint8)
    if bits in (1, 2, 4, 8):
        each, mask = 8 // bits, np.uint8(2**bits - 1)
        codes = np.stack([raw >> np.uint8(place * bits) & mask for place in range(each)], axis=-1).reshape(len(raw), -1)
        return torch.from_numpy(np.ascontiguousarray(codes[:, :columns]))
    one_by_one = np.unpackbits(raw, axis=-1, bitorder="little")[:, : columns * bits].reshape(len(raw), columns, bits)
    return torch.from_numpy(np.packbits(one_by_one, axis=-1, bitorder="little")[..., 0])


def _signed(codes: Tensor, bits: int) -> Tensor:
    """Codes from 0 as int8 about their middle."""
    middle: int = 2 ** (bits - 1)
    return (codes.to(torch.int16) - middle).to(torch.int8)


def _unsigned(codes: Tensor, bits: int) -> Tensor:
    middle: int = 2 ** (bits - 1)
    return (codes.to(torch.int16) + middle).to(torch.uint8)
