"""What each runtime can carry, as data: read when a recipe is checked, long before the runtime is imported."""

from __future__ import annotations

from dataclasses import dataclass

from lighten.errors import RecipeError
from lighten.model.ggml_types import exact_ggml_type
from lighten.model.spec import PER_CHANNEL, PER_TENSOR, Embedding, Linear, ModelSpec, Part, WeightFormat
from lighten.model.tasks import runs_with_head
from lighten.recipe.words import FEW_ROWS


@dataclass(frozen=True, kw_only=True)
class RuntimeKind:
    """A runtime that a recipe may name.

    Attributes:
        extra: what `pip install lighten[extra]` installs it.
        builds: the packages that building its artifacts takes.
        runs: what running them takes beside that.
        dtypes: the types that it computes in on the CPU; the first is its default.
        cuda: the types that it computes in on a CUDA device; none: it does not run there.
        exported: its artifact is made from the checkpoint for this runtime, in float32 where `stored` lacks the checkpoint's type.
        stored: the types in which its artifact can store weights that are not quantized.
        heads: whether it runs an encoder with its head, which classifies or answers.
        formats: the quantized formats that it carries, for people.
        options: those of `OPTIONS` that it takes beside its type.
    """

    extra: str
    builds: tuple[str, ...]
    runs: tuple[str, ...] = ()
    dtypes: tuple[str, ...]
    exported: bool
    stored: tuple[str, ...]
    heads: bool = True
    formats: str
    options: tuple[str, ...] = ("batching",)
    cuda: tuple[str, ...] = ()

    def types_on(self, device: str | None) -> tuple[str, ...]:
        """The types that it computes in on a device; None: the CPU."""
        return self.cuda if device == CUDA else self.dtypes


CUDA = "cuda"
DEVICES = ("cpu", CUDA)
_SPECULATES = ("batching", "speculate", "draft_tokens")
_ON_CUDA = ("float32", "bfloat16", "float16")
_TORCH = ("torch", "transformers", "safetensors")
RUNTIMES: dict[str, RuntimeKind] = {
    "torch": RuntimeKind(
        extra="torch", builds=_TORCH, dtypes=("float32", "bfloat16"), exported=False, stored=("float32", "bfloat16", "float16"), options=_SPECULATES,
        formats="weights of every width and float format (expanded when loaded: smaller on disk, not faster), with 8-bit activations simulated",
        cuda=_ON_CUDA,
    ),
    "torch-compile": RuntimeKind(
        extra="torch", builds=_TORCH, dtypes=("float32", "bfloat16"), exported=False, stored=("float32", "bfloat16", "float16"),
        formats="weights of every width and float format (expanded when loaded: smaller on disk, not faster), with 8-bit activations simulated",
        cuda=_ON_CUDA,
    ),
    "onnxruntime": RuntimeKind(
        extra="onnx", builds=("torch", "transformers", "onnx", "onnxscript", "onnxruntime"),
        dtypes=("float32",), exported=True, stored=("float32",), options=_SPECULATES,
        formats="whole-number codes of 8 and 4 bits; for encoders quantize(dynamic), quantize(static) and 8 bits by channel with activations=dynamic",
    ),
    "openvino": RuntimeKind(
        extra="openvino", builds=("torch", "transformers", "onnx", "onnxscript", "openvino", "nncf"),
        dtypes=("float32", "bfloat16"), exported=True, stored=("float32", "float16"), options=_SPECULATES,
        formats="quantize(dynamic), quantize(static) of encoders, codes with bits=8 and group_size=channel or bits=4 by channel or group",
    ),
    "llama.cpp": RuntimeKind(
        extra="llama-cpp", builds=("torch", "gguf"), runs=("llama_cpp",),
        dtypes=("float32", "float16"), exported=False, stored=("float32", "float16", "bfloat16"), heads=False, options=(),
        formats="all types of ggml (format=q8_0 to q2_k), mxfp4, and whole-number codes in groups of a multiple of 32",
    ),
    "ctranslate2": RuntimeKind(
        extra="ctranslate2", builds=("torch", "transformers", "ctranslate2"),
        dtypes=("float32",), exported=True, stored=("float32",), heads=False,
        formats="quantize(dynamic, embeddings=true), or symmetric codes of 8 bits by channel with activations=dynamic and symmetric_activations=true",
    ),
}  # fmt: skip


def left_to_runtime(weight: WeightFormat) -> bool:
    """Whether `quantize(dynamic)` or `quantize(static)` left the rounding to what writes the runtime's graph, whose scales are float32."""
    return weight.activations is not None and weight.element == "int" and weight.scale_dtype == "float32"


def carries(runtime: str, weight: WeightFormat, *, decoder: bool) -> bool:
    """Whether a runtime's artifact can hold and compute a weight of this format."""
    if weight.bits is None:
        return weight.dtype in RUNTIMES[runtime].stored
    return _CARRIES[runtime](weight, decoder)


def left_out(part: Part, spec: ModelSpec, runtime: str) -> bool:
    """Whether a runtime's artifact goes without a part: an encoder is exported without pooler and head, but where both classify or answer."""
    kind = RUNTIMES[runtime]
    kept = kind.heads and runs_with_head(spec)
    return kind.exported and not spec.is_decoder and not kept and part.component in ("pooler", "head")


def require_head(runtime: str, spec: ModelSpec) -> None:
    """Raises:
    RecipeError: the runtime has no such heads, so that a model's classes or answers are not known there.
    """
    if not RUNTIMES[runtime].heads:
        able = ", ".join(name for name, kind in RUNTIMES.items() if kind.heads)
        raise RecipeError(f"runtime {runtime} runs {spec.architecture} without its head, so it gives no answers to a task; these do: {able}.")


def refuse_mixture(runtime: str, spec: ModelSpec) -> None:
    """Raises:
    RecipeError: weights of two kinds, for a runtime that has one kind at a time.
    """
    if runtime != "ctranslate2":
        return
    parts = [part for part in spec.parts if isinstance(part, Linear | Embedding) and part.tensors() and not left_out(part, spec, runtime)]
    parts = [part for part in parts if isinstance(part, Linear) or ("position" not in part.name and part.num_embeddings > FEW_ROWS)]  # floats stay
    quantized = [part for part in parts if part.weight.bits is not None]
    if quantized and len(quantized) < len(parts):
        other = next(part for part in parts if part.weight.bits is None)
        raise RecipeError(
            f"runtime ctranslate2 has all weights in 8 bits or none, tables too, and {other.name} is {other.weight.dtype}; say embeddings=true."
        )
    bare = next((part for part in quantized if isinstance(part, Linear) and part.weight.activations is None), None)
    if bare is not None:
        raise RecipeError(
            f"runtime ctranslate2 rounds the activations of 8-bit weights, {bare.name}'s too; say activations=dynamic, symmetric_activations=true."
        )


def _torch(weight: WeightFormat, decoder: bool) -> bool:
    return weight.ggml_type is None and not left_to_runtime(weight)


def _onnxruntime(weight: WeightFormat, decoder: bool) -> bool:
    if weight.ggml_type is not None or weight.element != "int" or weight.activation_group_size is not None:
        return False
    if weight.activations == "static":
        return left_to_runtime(weight) and not decoder
    if weight.activations == "dynamic":  # one scale for all tokens of an input: a decoder's largest activations leave nothing of the others
        return weight.bits == 8 and weight.group_size == PER_CHANNEL and not decoder
    return weight.bits in (8, 4)


def _openvino(weight: WeightFormat, decoder: bool) -> bool:
    if weight.ggml_type is not None or weight.element != "int" or weight.activation_group_size is not None:
        return False
    if weight.activations == "static":
        return left_to_runtime(weight) and not decoder
    return weight.group_size == PER_CHANNEL if weight.bits == 8 else weight.bits == 4 and weight.group_size != PER_TENSOR


def _llama_cpp(weight: WeightFormat, decoder: bool) -> bool:
    if weight.ggml_type is not None:
        return True
    assert weight.bits is not None, "asked for where a weight is quantized"
    held = exact_ggml_type(bits=weight.bits, symmetric=weight.symmetric, group_size=weight.group_size, columns=32, element=weight.element)
    return weight.activations is None and held is not None


def _ctranslate2(weight: WeightFormat, decoder: bool) -> bool:
    """Tables have no activations; products have no others."""
    by_channel = weight.bits == 8 and weight.element == "int" and weight.symmetric and weight.group_size == PER_CHANNEL
    return by_channel and weight.ggml_type is None and weight.activations != "static" and not weight.activation_zero_points


_CARRIES = {
    "torch": _torch, "torch-compile": _torch, "onnxruntime": _onnxruntime, "openvino": _openvino, "llama.cpp": _llama_cpp,
    "ctranslate2": _ctranslate2,
}  # fmt: skip
