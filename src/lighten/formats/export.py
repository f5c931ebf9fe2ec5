"""Convert between formats what can be converted without loss: same values, other bytes. What would have to be rounded is refused.

| from \\ to | safetensors | compressed-tensors | gguf | onnx, openvino |
|---|---|---|---|---|
| dense safetensors | is one | refused: rounds | the same floats | the same floats, or float32 |
| without its zeros | the same floats | refused: rounds | the same floats | the same floats, or float32 |
| compressed-tensors | dequantized, float32 | is one | the type that holds the codes | the same codes, or float32 where the runtime has none such |
| factors, corrections | multiplied out, float32 | refused: other linears | refused: by way of safetensors | two products, as above |
| gguf | the narrowest float that holds all | Q4_0 and Q8_0 | is one | refused: by way of safetensors |
| onnxruntime's artifact | refused: no weights come back | refused | refused | refused, but ort |

`ort`, ONNX Runtime's own file for phones and small boards, is made of what `onnx` would be, or of an artifact for onnxruntime.

Every output is loaded back and compared before it is called done.
"""

from __future__ import annotations

import errno
import json
import tempfile
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
import torch
from torch import Tensor

from lighten.compress.ggml import LAYOUTS, GgmlTensor, from_ggml
from lighten.compress.grid import Quantized
from lighten.compress.skeleton import main_input
from lighten.errors import ModelError, OutputError, RecipeError
from lighten.formats import files
from lighten.formats.artifact import MANIFEST, folder_bytes, read_artifact
from lighten.formats.gguf_file import Layout, Slot, gguf_notes, lay_out, refuse_gguf, verify_gguf, write_gguf
from lighten.formats.onnx_artifact import write_onnx_artifact
from lighten.formats.onnx_export import dense_weights, export_onnx
from lighten.formats.openvino_ir import write_openvino
from lighten.formats.ort_file import stored_types, write_ort
from lighten.formats.safetensors_file import SafetensorsWriter
from lighten.formats.safetensors_folder import StoredWeights, copy_side_files, expanded_weights, read_weights, write_folder
from lighten.formats.verify import Witness, verify_folder, verify_graph
from lighten.model import ModelSpec, read_spec
from lighten.model.families import describe
from lighten.model.ggml_types import exact_ggml_type, ggml_format
from lighten.model.gguf_header import GgufHeader, read_gguf_header
from lighten.model.low_rank import CORRECTION, DOWN, RANKS, UP, has_low_rank, is_low_rank
from lighten.model.quantized import refuse_layouts
from lighten.model.quantized.masked import SPARSITY_CONFIG, is_masked
from lighten.model.spec import Embedding, Linear, Part, TensorSpec, WeightFormat
from lighten.recipe import Recipe, apply_recipe
from lighten.recipe.targets import carries

Weight: TypeAlias = Tensor | Quantized
DENSE, PACKED, GGUF, FACTORED = "safetensors", "compressed-tensors", "gguf", "low rank"
SPARSE = "sparse safetensors"
"""A source alone, as FACTORED is: `lighten compress` writes them."""
GRAPHS = {"onnx": "onnxruntime", "openvino": "openvino"}
"""Format → the runtime whose artifact it is."""
ORT = "ort"
TARGETS = (DENSE, PACKED, GGUF, *GRAPHS, ORT)
COMPARED_PARAMETERS = 2_000_000_000
"""Models up to this size are also run, loaded back and from the source; larger ones are compared tensor by tensor alone. Choice."""

RETURNED = ("llama", "mixtral", "qwen2", "qwen3", "gemma")
"""Families whose whole config follows from a GGUF file's metadata, as `read_gguf` reads it."""


@dataclass(frozen=True, kw_only=True)
class Exported:
    """What was written.

    Attributes:
        path: the file or folder.
        source, target: the formats.
        types: how many weight matrices are stored in each type.
        tensors: read back and equal; 0 where a graph was compared by its output alone.
        output_error: of the loaded output, relative to the source's; None where it was not compared.
        notes: what the reader should know, one sentence each.
    """

    path: Path
    source: str
    target: str
    size_bytes: int
    types: Mapping[str, int]
    tensors: int
    output_error: float | None = None
    notes: tuple[str, ...] = ()


def export(source: str | Path, target: str, out: str | Path) -> Exported:
    """Write a model or an artifact in another format, to a new folder, or a file for a name that ends in .gguf.

    Args:
        source: a folder of safetensors, a .gguf file, or an artifact that holds one of these.
        target: one of `TARGETS`.

    Raises:
        RecipeError: a conversion that would lose something, or an architecture that the format does not have; why, and what would work.
        ModelError: a source that cannot be read.
        OutputError: `out` is there already or cannot be written, or what was written does not read back the same.
    """
    path = Path(out)
    if target not in TARGETS:
        raise RecipeError(f"format {target!r} is not written; these are: {', '.join(TARGETS)}.")
    if path.exists() and (path.is_file() or any(path.iterdir())):
        raise OutputError(f"{path} exists and is not empty; name a new file or folder, or remove it.")
    if target == ORT and (Path(source) / files.ONNX).is_file():
        return _written(path, lambda folder: _graph_to_ort(Path(source), folder))
    opened = open_source(Path(source))
    writer = _WAYS.get((opened.kind, target))
    if writer is None:
        raise RecipeError(f"{source} {_REFUSED[opened.kind, target].format(source=source)}")
    if path.suffix == ".gguf" and target == GGUF:
        return _to_file(opened, path)
    return _written(path, lambda folder: writer(opened, folder))


def _written(path: Path, write: Callable[[Path], Exported]) -> Exported:
    """What was written into a folder that then got its name."""
    with _beside(path) as beside:
        folder = beside / path.name
        folder.mkdir()
        found = write(folder)
        if path.is_dir():
            path.rmdir()
        folder.replace(path)
    return replace(found, path=path, size_bytes=folder_bytes(path))


@contextmanager
def _beside(path: Path) -> Iterator[Path]:
    """A folder beside a path, on its disk, that is gone at the end.

    Raises:
        OutputError: no such place, read-only, or full.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=path.parent, prefix=f".{path.name}.", ignore_cleanup_errors=True) as work:
            yield Path(work)
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES, errno.ENOTDIR):
            raise OutputError(f"{path} cannot be written: {error.strerror}.") from error
        raise


# ---- sources ----


@dataclass(frozen=True, kw_only=True)
class Source:
    """An opened source.

    Attributes:
        kind: DENSE, SPARSE, PACKED, GGUF or FACTORED.
        spec: by Hugging Face's names; its parts say how each weight is stored.
        weights: each weight by those names, as stored; anew at each call.
        side: a context with a folder that holds config and tokenizer, and the headers of the tensors that `spec` has.
    """

    path: Path
    kind: str
    spec: ModelSpec
    weights: Callable[[], Iterator[tuple[str, Weight]]]
    notes: tuple[str, ...] = ()


def open_source(path: Path) -> Source:
    """Raises:
    RecipeError: an exported graph, from which no weights come back.
    ModelError: nothing that can be read.
    """
    graph = next((name for name in (files.ONNX, files.OPENVINO) if path.is_dir() and (path / name).is_file()), None)
    if path.is_dir() and any(path.glob("*.safetensors")):
        spec = read_spec(path)
        refuse_layouts(spec.parts, spec.source)
        quantized = any(part.weight.bits is not None for part in _matrices(spec))
        sparse = any(is_masked(part) for part in spec.parts)
        kind = FACTORED if has_low_rank(spec.config) else PACKED if quantized else SPARSE if sparse else DENSE
        return Source(path=path, kind=kind, spec=_with_zeros(spec), weights=lambda: iter(read_weights(path, spec)))
    if path.is_dir() and (path / files.GGUF).is_file():
        path = path / files.GGUF
    elif graph:
        raise RecipeError(f"{path} holds the graph {graph}, from which no weights come back; export {_original(path)} instead.")
    spec = read_spec(path)
    if not path.is_file():
        raise ModelError(f"{path}: no weights; a source is a folder of safetensors, or a .gguf file.")
    header = read_gguf_header(path)
    return Source(path=path, kind=GGUF, spec=_returned(spec, header), weights=lambda: _gguf_weights(path, spec))


def _with_zeros(spec: ModelSpec) -> ModelSpec:
    """The spec whose files hold all zeros, as its weights are read."""

    def whole(part: Part) -> Part:
        return replace(part, weight=replace(part.weight, kept=None)) if isinstance(part, Linear | Embedding) and is_masked(part) else part

    config = {key: value for key, value in spec.config.items() if key != SPARSITY_CONFIG}
    return replace(spec.with_parts(whole), config=config)


def _original(folder: Path) -> str:
    try:
        return str(json.loads((folder / MANIFEST).read_text())["original"])
    except (OSError, ValueError, KeyError):
        return "the folder that it was made from"


def _matrices(spec: ModelSpec) -> list[Linear | Embedding]:
    return [part for part in spec.parts if isinstance(part, Linear | Embedding)]


def _stored_types(spec: ModelSpec) -> dict[str, int]:
    """How many matrices are stored in each type."""

    def name(part: Linear | Embedding) -> str:
        weight = part.weight
        kind = {"int": "int", "e4m3": "fp", "e2m1": "fp"}[weight.element]
        return weight.ggml_type or (weight.dtype if weight.bits is None else f"{kind}{weight.bits}")

    return dict(Counter(name(part) for part in _matrices(spec) for tensor in part.tensors() if tensor.endswith(".weight")))


# ---- to safetensors ----


def _plain(spec: ModelSpec, dtype: str) -> ModelSpec:
    """The spec with each quantized weight as floats of a type."""

    def changed(part: Part) -> Part:
        if isinstance(part, Linear | Embedding) and part.weight.bits is not None:
            return replace(part, weight=WeightFormat(dtype=dtype))
        return part

    config = {key: value for key, value in spec.config.items() if key != "quantization_config"}
    return replace(spec.with_parts(changed), dtype=dtype, config=config)


def _dequantized_folder(source: Source, folder: Path) -> Exported:
    spec = _plain(source.spec, "float32")
    _refuse_activations(source)
    return _write_folder(source, folder, spec, expanded_weights(source.path, read_spec(source.path)), source.path)


def _dense_folder(source: Source, folder: Path) -> Exported:
    return _write_folder(source, folder, source.spec, source.weights(), source.path)


def _multiplied_folder(source: Source, folder: Path) -> Exported:
    """Factors multiplied out and corrections added: a model that its class loads."""
    _refuse_activations(source)
    config = {key: value for key, value in source.spec.config.items() if key not in (RANKS, CORRECTION, "quantization_config")}
    spec = replace(source.spec, parts=describe(config, source.spec.architecture), config=config, dtype="float32")
    return _write_folder(source, folder, spec, _multiplied(StoredWeights(source.path, read_spec(source.path)), source.spec, spec), source.path)


def _multiplied(stored: StoredWeights, spec: ModelSpec, dense: ModelSpec) -> Iterator[tuple[str, Tensor]]:
    """Every tensor of a class in its checkpoint's layout, float32 where it was made."""
    turned = {part.name for part in dense.parts if isinstance(part, Linear) and part.transposed}
    pairs = dict.fromkeys(spec.config.get(RANKS, {}), (DOWN, UP)) | dict.fromkeys(spec.config.get(CORRECTION, {}), ("lora_A", "lora_B"))
    own = {name for part in spec.parts if is_low_rank(part, spec.config) for name in part.tensors()}
    for name in stored.names:
        if name not in own and name.removesuffix(".weight") not in pairs:
            yield name, stored.expanded(name)
    for name, (first, second) in pairs.items():
        product = stored.expanded(f"{name}.{second}.weight").float() @ stored.expanded(f"{name}.{first}.weight").float()
        product = product.T.contiguous() if name in turned else product
        if first == DOWN and f"{name}.{UP}.bias" in stored.names:
            yield f"{name}.bias", stored.expanded(f"{name}.{UP}.bias")
        yield f"{name}.weight", product if first == DOWN else product + stored.expanded(f"{name}.weight")


def _write_folder(source: Source, folder: Path, spec: ModelSpec, weights: Iterable[tuple[str, Weight]], like: Path) -> Exported:
    """Write and check a folder of safetensors. like: a folder with config, tokenizer and headers of the source's tensors."""
    witness = Witness(spec, like)
    write_folder(witness.watch(weights), spec, like, folder)
    runs = main_input(spec.architecture) == "input_ids" and spec.total_parameters <= COMPARED_PARAMETERS
    found = verify_folder(folder, witness, compare_output=runs)
    quantized = any(part.weight.bits is not None for part in _matrices(spec))
    return Exported(
        path=folder, source=source.kind, target=PACKED if quantized else DENSE, size_bytes=0, types=_stored_types(spec), tensors=found.tensors,
        output_error=found.output_error, notes=source.notes,
    )  # fmt: skip


def _refuse_activations(source: Source) -> None:
    """Raises:
    RecipeError: weights that are computed with 8-bit activations, which the target would not say.
    """
    found = next((part for part in _matrices(source.spec) if part.weight.activations), None)
    if found is not None:
        raise RecipeError(
            f"{source.path} computes {found.name} with {found.weight.activations} 8-bit activations, which only compressed-tensors says."
        )


def _from_gguf(source: Source, folder: Path) -> Exported:
    dtype = _narrowest(source)
    spec = _plain(source.spec, dtype)
    spec = spec.with_parts(lambda part: replace(part, weight=WeightFormat(dtype=dtype)) if isinstance(part, Linear | Embedding) else part)
    note = f"its weights are {dtype}, the narrowest float that holds all of the file's values"
    with _skeleton(source, spec, dtype) as like:
        weights = ((name, _value(weight).to(getattr(torch, dtype))) for name, weight in source.weights())
        found = _write_folder(source, folder, spec, weights, like)
    return replace(found, notes=(*found.notes, note))


def _value(weight: Weight) -> Tensor:
    return weight if isinstance(weight, Tensor) else weight.dequantize()


def _narrowest(source: Source) -> str:
    """bfloat16 or float16 where that type holds every value, else float32."""
    able = ["bfloat16", "float16"]
    for _, weight in source.weights():
        if not isinstance(weight, Tensor):
            return "float32"
        able = [dtype for dtype in able if torch.equal(weight.to(getattr(torch, dtype)).float(), weight.float())]
        if not able:
            return "float32"
    return able[0]


# ---- to compressed-tensors ----


def _packed_from_gguf(source: Source, folder: Path) -> Exported:
    """Q4_0 and Q8_0 as symmetric codes in groups of 32, all else as it is."""
    other = next((part for part in _matrices(source.spec) if part.weight.ggml_type not in (None, "Q4_0", "Q8_0")), None)
    if other is not None:
        raise RecipeError(
            f"{source.path} stores {other.name} as {other.weight.ggml_type}, whose scales compressed-tensors cannot say; "
            "Q4_0 and Q8_0 can be; --to safetensors dequantizes all."
        )

    def changed(part: Part) -> Part:
        if isinstance(part, Linear | Embedding) and part.weight.bits is not None:
            return replace(part, weight=WeightFormat(bits=part.weight.bits, group_size=32, symmetric=True))
        return part

    spec = replace(source.spec.with_parts(changed), dtype="float32")
    with _skeleton(source, spec, "float32") as like:
        weights = ((name, from_ggml(weight) if isinstance(weight, GgmlTensor) else weight) for name, weight in source.weights())
        return _write_folder(source, folder, spec, weights, like)


# ---- to GGUF ----


def _held(source: Source) -> ModelSpec:
    """The spec with each quantized weight in the type of ggml that holds it.

    Raises:
        RecipeError: a weight that none holds.
    """
    _refuse_activations(source)

    def changed(part: Part) -> Part:
        if not isinstance(part, Linear | Embedding) or part.weight.bits is None:
            return part
        weight, columns = part.weight, part.in_features if isinstance(part, Linear) else part.embedding_dim
        name = None if weight.global_scale else exact_ggml_type(
            bits=weight.bits or 0, symmetric=weight.symmetric, group_size=weight.group_size, columns=columns, element=weight.element,
        )  # fmt: skip
        if name is None:
            kind = f"{weight.bits}-bit {'' if weight.symmetric else 'a'}symmetric codes ({weight.element}, groups of {weight.group_size})"
            raise RecipeError(
                f"{source.path} stores {part.name} as {kind}, which no type of ggml holds without loss; "
                "compress the original with format=q4_k, or --to safetensors first."
            )
        return replace(part, weight=WeightFormat(**ggml_format(name, columns)))

    return source.spec.with_parts(changed)


def _to_gguf(source: Source, folder: Path) -> Exported:
    found = _write_gguf(source, folder / files.GGUF)
    copy_side_files(source.path, folder)
    return found


def _write_gguf(source: Source, path: Path) -> Exported:
    spec = _held(source)
    refuse_gguf(spec, source.path)
    witness = write_gguf(source.weights(), spec, source.path, path)
    verify_gguf(path, witness)
    notes = tuple(gguf_notes(spec, source.path))
    return Exported(path=path, source=source.kind, target=GGUF, size_bytes=0, types=_stored_types(spec), tensors=len(witness), notes=notes)


def _to_file(source: Source, path: Path) -> Exported:
    with _beside(path) as beside:
        found = _write_gguf(source, beside / path.name)
        (beside / path.name).replace(path)
    return replace(found, path=path, size_bytes=path.stat().st_size)


# ---- to graphs ----


def _to_graph(format_name: str) -> Callable[[Source, Path], Exported]:
    runtime = GRAPHS[format_name]

    def write(source: Source, folder: Path) -> Exported:
        kept = source.kind in (DENSE, SPARSE) or all(carries(runtime, part.weight, decoder=source.spec.is_decoder) for part in _matrices(source.spec))
        if not kept:
            _refuse_activations(source)
        spec = apply_recipe(Recipe(runtime=runtime), source.spec if kept else _plain(source.spec, "float32"))
        weights = dict(source.weights())
        values = dense_weights(weights, spec)
        with _beside(folder) as work:
            exported = work / "graph.onnx"
            export_onnx(source.path, source.spec, exported)
            if runtime == "onnxruntime":
                write_onnx_artifact(exported, weights if kept else values, spec, folder, fused=False)
            else:
                write_openvino(exported, weights if kept else values, spec, folder, calibration=None, keeps_last=False)
        copy_side_files(source.path, folder)
        found = verify_graph(folder, runtime, source.path, spec, values)
        return Exported(
            path=folder, source=source.kind, target=format_name, size_bytes=0, types=_stored_types(spec), tensors=0, output_error=found.output_error,
            notes=() if kept else (f"{runtime} has no such codes: its weights are float32",),
        )  # fmt: skip

    return write


def _to_ort(source: Source, folder: Path) -> Exported:
    with _beside(folder) as work:
        graph = work / "graph"
        graph.mkdir()
        made = _WAYS[source.kind, "onnx"](source, graph)
        write_ort(graph / files.ONNX, folder, dynamic=False)
    copy_side_files(source.path, folder)
    return replace(made, target=ORT)


def _graph_to_ort(source: Path, folder: Path) -> Exported:
    """Of an artifact's own graph, codes and all."""
    dynamic = read_artifact(source).recipe.activations == "dynamic" if (source / MANIFEST).is_file() else False
    graph = source / files.ONNX
    difference = write_ort(graph, folder, dynamic=dynamic)
    copy_side_files(source, folder)
    return Exported(path=folder, source="onnx", target=ORT, size_bytes=0, types=stored_types(graph), tensors=0, output_error=difference)


# ---- from GGUF ----


def _returned(spec: ModelSpec, header: GgufHeader) -> ModelSpec:
    """The spec of a GGUF file with a config that transformers computes the same from.

    Raises:
        RecipeError: a file whose metadata this package does not translate whole.
    """
    scaled = any(key.endswith("rope.scaling.type") for key in header.metadata) or any(t.name == "rope_freqs.weight" for t in header.tensors)
    if spec.family not in RETURNED or scaled:
        why = "with scaled positions" if scaled else f"of {spec.family}"
        raise RecipeError(f"{header.path}: GGUF files {why} are not turned back; these are: {', '.join(RETURNED)}, with positions as they are.")
    other = sorted({t.type for t in header.tensors} - {"F32", "F16", "BF16", *LAYOUTS})
    if other:
        raise RecipeError(
            f"{header.path} has tensors in {', '.join(other)}, which are not read here; these are: F32, F16, BF16, {', '.join(LAYOUTS)}."
        )
    marks = {
        f"{name}_token_id": header.metadata.get(f"tokenizer.ggml.{key}_token_id")
        for name, key in (("bos", "bos"), ("eos", "eos"), ("pad", "padding"))
    }
    config = {**spec.config, **{name: value for name, value in marks.items() if value is not None}, "dtype": spec.dtype}
    return replace(spec, config=config)


def _gguf_weights(path: Path, spec: ModelSpec) -> Iterator[tuple[str, Weight]]:
    """Each weight by Hugging Face's name, its rows in transformers' order."""
    import gguf

    layout: Layout = lay_out(spec)
    read = {tensor.name: tensor for tensor in gguf.GGUFReader(path).tensors}
    for name, slot in layout.slots.items():
        tensor = read[slot.placed.name]
        kind = tensor.tensor_type.name
        data = np.array(tensor.data)
        if kind in LAYOUTS:
            blocks = torch.from_numpy(data).reshape(-1, data.shape[-1])[slot.rows.start : slot.rows.stop]
            yield name, GgmlTensor(type=kind, blocks=_turned_back(blocks, slot))
        else:
            value = torch.from_numpy(data.view(np.int16)).view(torch.bfloat16) if kind == "BF16" else torch.from_numpy(data)
            if value.ndim > 1:
                value = value.reshape(-1, value.shape[-1])[slot.rows.start : slot.rows.stop]
            yield name, _without_one(name, _turned_back(value, slot), slot)


def _turned_back(rows: Tensor, slot: Slot) -> Tensor:
    return rows if slot.order is None else torch.empty_like(rows).index_copy_(0, slot.order, rows)


def _without_one(name: str, value: Tensor, slot: Slot) -> Tensor:
    """Raises:
    RecipeError: taking 1 off loses something.
    """
    if not slot.plus_one:
        return value
    if not torch.equal((value - 1) + 1, value):
        raise RecipeError(f"{name} is stored with 1 added and cannot be turned back without loss.")
    return value - 1


@contextmanager
def _skeleton(source: Source, spec: ModelSpec, dtype: str) -> Iterator[Path]:
    """A folder with the config and tokenizer of a GGUF file, and a file of tensors that has their headers and, sparse, no data."""
    with tempfile.TemporaryDirectory(prefix="lighten-") as work:
        folder = Path(work)
        (folder / "config.json").write_text(json.dumps(dict(spec.config) | {"dtype": dtype}, indent=2) + "\n")
        _write_tokenizer(source.path, folder)
        shapes = {name: shape for part in spec.parts for name, shape in part.tensors().items()}
        SafetensorsWriter(folder / files.SAFETENSORS, [TensorSpec(name=name, shape=shape, dtype=dtype) for name, shape in shapes.items()]).close()
        yield folder


def _write_tokenizer(path: Path, folder: Path) -> None:
    """The tokenizer of a GGUF file, as transformers reads it; none where the file holds none."""
    import transformers

    model = read_gguf_header(path).metadata.get("tokenizer.ggml.model", "none")
    if model != "none":
        tokenizer: Any = transformers.AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name, local_files_only=True)
        tokenizer.save_pretrained(folder)


_Way: TypeAlias = Callable[[Source, Path], Exported]
_WAYS: dict[tuple[str, str], _Way] = {
    (FACTORED, DENSE): _multiplied_folder,
    (PACKED, DENSE): _dequantized_folder, (SPARSE, DENSE): _dense_folder, (GGUF, DENSE): _from_gguf, (GGUF, PACKED): _packed_from_gguf,
    **dict.fromkeys(((DENSE, GGUF), (SPARSE, GGUF), (PACKED, GGUF)), _to_gguf),
    **{(kind, graph): _to_graph(graph) for kind in (DENSE, SPARSE, PACKED, FACTORED) for graph in GRAPHS},
    **{(kind, ORT): _to_ort for kind in (DENSE, SPARSE, PACKED, FACTORED)},
}  # fmt: skip
_ROUNDS = "is not quantized, and rounding loses; lighten compress {source} --recipe 'quantize(gptq, bits=4, group_size=64)' chooses codes."
_REFUSED = {
    (DENSE, DENSE): "is dense safetensors already.",
    (PACKED, PACKED): "is compressed-tensors already.",
    (GGUF, GGUF): "is a GGUF file already.",
    (DENSE, PACKED): _ROUNDS,
    (SPARSE, PACKED): _ROUNDS,
    (FACTORED, PACKED): "has linears of two factors, which compressed-tensors has not; lighten export {source} --to safetensors multiplies them out.",
    (FACTORED, GGUF): "becomes a GGUF file by way of safetensors: lighten export {source} --to safetensors first.",
    (GGUF, "onnx"): "becomes a graph by way of safetensors: lighten export {source} --to safetensors first.",
    (GGUF, ORT): "becomes a graph by way of safetensors: lighten export {source} --to safetensors first.",
    (GGUF, "openvino"): "becomes a graph by way of safetensors: lighten export {source} --to safetensors first.",
}
"""(source, target) → how it is done, or why it is not; the two tables name all pairs."""
