"""What each runtime can carry, as data: read when a recipe is checked, long before the runtime is imported."""

from __future__ import annotations

from dataclasses import dataclass

from lighten.model.spec import PER_CHANNEL, PER_TENSOR, WeightFormat


@dataclass(frozen=True, kw_only=True)
class RuntimeKind:
    """A runtime that a recipe may name.

    Attributes:
        extra: what `pip install lighten[extra]` installs it.
        dtypes: the types that it computes in; the first is its default.
        exported: its artifact is a graph made from the checkpoint, in float32 where `stored` lacks the checkpoint's type.
        stored: the types in which its artifact can store weights that are not quantized.
        decoders: whether it generates with a KV cache here.
        formats: the quantized formats that it carries, for people.
    """

    extra: str
    dtypes: tuple[str, ...]
    exported: bool
    stored: tuple[str, ...]
    decoders: bool
    formats: str


RUNTIMES: dict[str, RuntimeKind] = {
    "torch": RuntimeKind(
        extra="torch", dtypes=("float32", "bfloat16"), exported=False, stored=("float32", "bfloat16", "float16"), decoders=True,
        formats="weights of every width (expanded when loaded: smaller on disk, not faster)",
    ),
    "torch-compile": RuntimeKind(
        extra="torch", dtypes=("float32", "bfloat16"), exported=False, stored=("float32", "bfloat16", "float16"), decoders=False,
        formats="weights of every width (expanded when loaded: smaller on disk, not faster)",
    ),
    "onnxruntime": RuntimeKind(
        extra="onnx", dtypes=("float32",), exported=True, stored=("float32",), decoders=False, formats="quantize(dynamic)",
    ),
    "openvino": RuntimeKind(
        extra="openvino", dtypes=("float32", "bfloat16"), exported=True, stored=("float32", "float16"), decoders=True,
        formats="quantize(dynamic), quantize(static) of encoders, quantize(rtn) with bits=8 and group_size=channel or bits=4 by channel or group",
    ),
}  # fmt: skip


def carries(runtime: str, weight: WeightFormat, *, decoder: bool) -> bool:
    """Whether a runtime's artifact can hold and compute a weight of this format."""
    if weight.bits is None:
        return weight.dtype in RUNTIMES[runtime].stored
    if runtime in ("torch", "torch-compile"):
        return weight.activations is None
    if runtime == "onnxruntime":
        return weight.activations == "dynamic"
    if weight.activations:
        return weight.activations == "dynamic" or not decoder
    return weight.group_size == PER_CHANNEL if weight.bits == 8 else weight.bits == 4 and weight.group_size != PER_TENSOR
