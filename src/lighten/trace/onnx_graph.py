"""An ONNX graph followed operator by operator, at any batch and length: parameters, bytes, FLOPs, and the life of every value."""

from __future__ import annotations

import hashlib
import json
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lighten.cost.operators import Op
from lighten.cost.workload import Workload
from lighten.errors import WorkloadError
from lighten.model.spec import WeightFormat
from lighten.trace.components import component_of
from lighten.trace.onnx_file import BITS, OnnxFile, read_onnx
from lighten.trace.onnx_flops import Counted, count_node
from lighten.trace.onnx_shapes import UNFIT, Values, attribute, follow_shapes, unfit
from lighten.trace.onnx_weights import (
    Weight,
    find_weights,
    largest_type,
    module_paths,
    numbered_blocks,
    parameters_by_component,
    weight_bytes,
)
from lighten.trace.program import Program, Storage, Timeline

if TYPE_CHECKING:
    import onnx

VIEWS = frozenset({"Reshape", "Squeeze", "Unsqueeze", "Identity", "Flatten", "Dropout"})
"""Operators whose output is its input under another shape; runtimes let both share one piece of memory."""

_PAST = re.compile(r"^past|past_key|past_value|key_cache|value_cache", re.IGNORECASE)
_PRESENT = re.compile(r"^present", re.IGNORECASE)
_BATCH = re.compile(r"batch|^(b|n)$", re.IGNORECASE)
_TOTAL = re.compile(r"total|past.*(\+|plus).*(seq|length)|(seq|length).*(\+|plus).*past", re.IGNORECASE)
_LENGTH = re.compile(r"seq|length|token|^(s|l|t)$", re.IGNORECASE)


@dataclass(frozen=True, kw_only=True)
class _Sizes:
    """The sizes of one run: `query` new positions after `past` cached ones."""

    batch: int
    query: int
    past: int = 0


@dataclass(frozen=True, kw_only=True)
class _Run:
    """One run of the graph: its operators, and births and deaths of what it makes."""

    ops: list[Op]
    causal_is_known: bool
    unknown: dict[str, int]
    unsized: int
    storages: list[Storage]
    events: list[int]


@dataclass(kw_only=True)
class _Lives:
    """Births and deaths, as they are noted."""

    storages: list[Storage] = field(default_factory=list)
    events: list[int] = field(default_factory=list)

    def born(self, storage: Storage) -> int:
        self.storages.append(storage)
        self.events.append(len(self.storages) - 1)
        return len(self.storages) - 1

    def died(self, index: int) -> None:
        self.events.append(-1 - index)


class OnnxGraph:
    """An `.onnx` file as something that can be followed (`lighten.trace.program.Followed`).

    Its free sizes are set to the workload's: of token inputs the batch and the new positions, of a mask with a cache all positions, of cached
    keys and values the positions before. A graph with a cache as input is a decoder (phases prefill, decode, generate), any other an encoder.

    Counted: parameters and bytes of weights as `onnx_weights.find_weights` tells them; FLOPs of each node with its shapes at that size;
    memory as the values that live between their making and their last reader, in the order of the nodes. Left out: the bodies of If, Loop and
    Scan (they are named in `unknown_ops`), what a runtime fuses away or keeps for itself, and that it may write a result over an input.
    What reads constants alone is made once, when the graph is loaded, and stays, as ONNX Runtime's constant folding has it.

    Raises:
        RuntimeUnavailable: the package onnx is not installed.
        ModelError: a file that cannot be read; see `onnx_file.read_onnx`.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self.file: OnnxFile = read_onnx(self.path)
        self.weights: Mapping[str, Weight] = find_weights(self.file)
        config = _config_beside(self.path)
        self.name: str = self.path.resolve().parent.name if self.path.stem == "model" else self.path.stem
        self.family: str = str(config.get("model_type") or "onnx")
        named = config.get("architectures")
        self.architecture: str = str(named[0]) if isinstance(named, list) and named else self.file.model.graph.name
        self.source: str = str(path)
        self.dtype: str = largest_type(self.weights)
        self.phases: tuple[str, ...] = ("prefill", "decode", "generate") if self.has_cache else ("encode",)
        self.breaks: tuple[int, ...] = ()

    @cached_property
    def inputs(self) -> dict[str, onnx.ValueInfoProto]:
        """What it is given at each run, by name."""
        return {given.name: given for given in self.file.model.graph.input if given.name not in self.file.tensors}

    @cached_property
    def paths(self) -> dict[str, str]:
        """First output of each node → the module that it comes from, as far as it can be told."""
        return module_paths(self.file.model.graph)

    @property
    def has_cache(self) -> bool:
        """Whether cached keys and values are among its inputs."""
        return any(_PAST.search(name) for name in self.inputs)

    @cached_property
    def fixed_len(self) -> int | None:
        """The only length that it takes; None where that is free. A graph without token inputs takes what its inputs' shapes say: 1."""
        tokens = [given for name, given in self.inputs.items() if _is_tokens(name)]
        if not tokens:
            return 1
        sizes = [dims[1] for given in tokens if len(dims := _dims(given)) > 1]
        return next((size for size in sizes if isinstance(size, int)), None)

    @cached_property
    def fingerprint(self) -> str:
        """Of its operators and the shapes and types of its tensors, not of their values."""
        said = [f"{t.name} {t.shape} {t.type}" for t in self.file.tensors.values()]
        return hashlib.sha256(self.file.model.SerializeToString(deterministic=True) + "\n".join(said).encode()).hexdigest()

    def follow(self, workload: Workload) -> Program:
        """Its program; see `Followed.follow`.

        decode: `new_tokens` steps after a context of `seq_len`; generate: a prefill, whose logits give the first token, and the steps after
        it. Sizes of a step are linear in its context, so the middle step stands for all (the two middle ones where their number is even).
        Memory is that of the prefill and of the last step.

        Raises:
            WorkloadError: a phase or size that the graph does not have, or a type that is not the one it computes in.
            TraceError: nodes that do not fit together at these sizes.
        """
        self._check(workload)
        steps = workload.new_tokens - (workload.phase == "generate")
        whole = None if workload.phase == "decode" else self._run(_Sizes(batch=workload.batch_size, query=workload.seq_len))
        runs = [(whole, 1)] if whole else []
        if steps > 0:
            middle = sorted({(steps + 1) // 2, steps // 2 + 1})
            runs += [(self._step(workload, step), steps // len(middle) if len(middle) > 1 else steps) for step in middle]
        last = self._step(workload, steps) if steps > 0 else None
        followed = (("prefill" if self.has_cache else "encode", whole), ("decode", last))
        timelines = tuple(self._timeline(name, run) for name, run in followed if run is not None)
        unknown: dict[str, int] = {}
        for run, count in runs:
            for name, times in run.unknown.items():
                unknown[name] = unknown.get(name, 0) + times * count
        parameters = parameters_by_component(self.weights)
        total = sum(parameters.values())
        return Program(
            parameters=parameters, trainable_parameters=total, active_parameters=None if self._is_routed else total,
            weight_bytes=weight_bytes(self.weights), ops=[(op, count) for run, count in runs for op in run.ops],
            memory=max((timeline.breakdown() for timeline in timelines), key=lambda each: each.peak), timelines=timelines,
            causal_is_known=all(run.causal_is_known for run, _ in runs), unknown_ops=unknown,
            layers=numbered_blocks([*self.file.tensors, *self.paths.values()]),
            assumptions=self._assumptions(workload, sum(run.unsized for run, _ in runs)),
        )  # fmt: skip

    def _check(self, workload: Workload) -> None:
        if workload.phase not in self.phases:
            kind = "takes cached keys and values" if self.has_cache else "takes no cached keys and values"
            raise WorkloadError(f"{self.name}: phase {workload.phase} does not fit a graph that {kind}; its phases: {', '.join(self.phases)}.")
        if workload.dtype != self.dtype or (workload.kv_dtype or self.dtype) != self.dtype:
            asked = workload.kv_dtype if workload.dtype == self.dtype else workload.dtype
            raise WorkloadError(f"{self.name}: dtype {asked} has no effect on a graph, which computes in {self.dtype}; export it anew for another.")
        if workload.kept_by != "transformers":
            raise WorkloadError(f"{self.name}: kept_by={workload.kept_by} has no effect on a graph, whose cache is its own inputs and outputs.")

    @cached_property
    def _is_routed(self) -> bool:
        """Whether some nodes choose among experts, so that a token meets not all parameters."""
        return any(node.op_type in ("TopK", "MoE", "QMoE", "If") for node in self.file.model.graph.node)

    def _assumptions(self, workload: Workload, unsized: int) -> tuple[str, ...]:
        found = [
            "operators as the graph has them: a runtime may fuse some",
            f"attention as the graph has it, not as attention={workload.attention} says",
        ]
        if workload.phase == "generate":
            found.append("the graph gives logits at every position of the prompt")
        if self.fixed_len == 1 and not any(_is_tokens(name) for name in self.inputs):
            found.append("no token inputs: seq_len is not used")
        if unsized:
            found.append(f"{unsized} values of unknown size are left out of the memory")
        return tuple(found)

    def _step(self, workload: Workload, step: int) -> _Run:
        return self._run(_Sizes(batch=workload.batch_size, query=1, past=workload.seq_len + step - 1))

    # ---- one run ----

    def _run(self, sizes: _Sizes) -> _Run:
        values = follow_shapes(self.file, {name: self._shape(name, given, sizes) for name, given in self.inputs.items()})
        ops: list[Op] = []
        unknown: dict[str, int] = {}
        causal_is_known = True
        for node in self.file.model.graph.node:
            if all(name in values.data for name in node.output):
                continue  # a size or an axis: it was computed to tell shapes
            read, made = ([values.shape(name) if name else None for name in names] for names in (node.input, node.output))
            try:
                counted = count_node(node, read, made)
            except UNFIT as error:
                raise unfit(self.file, node, error) from error
            if counted is None:
                unknown[node.op_type] = unknown.get(node.op_type, 0) + 1
                continue
            op = self._op(node, counted, values)
            causal_is_known &= not (self.has_cache and self._may_be_masked(node, counted))
            ops.append(op)
        lives, unsized = self._lives(values)
        return _Run(
            ops=ops, causal_is_known=causal_is_known, unknown=unknown, unsized=unsized, storages=lives.storages, events=lives.events
        )  # fmt: skip

    def _may_be_masked(self, node: onnx.NodeProto, counted: Counted) -> bool:
        """Whether a node makes scores, or reads them, that another node masks: a product of two values that are no weights."""
        if counted.kind == "attention":
            return counted.causal_flops is None
        return counted.matmul_flops > 0 and counted.products > 0 and not any(name in self.file.tensors for name in node.input)

    def _shape(self, name: str, given: onnx.ValueInfoProto, sizes: _Sizes) -> tuple[int, ...]:
        """The shape of an input at the given sizes.

        Raises:
            WorkloadError: a free size that no rule tells, or a fixed one that is another.
        """
        dims = _dims(given)
        meant = _meant(name, dims, sizes, has_cache=self.has_cache)
        found = []
        for place, (dim, size) in enumerate(zip(dims, meant, strict=True)):
            if isinstance(dim, str) and size is None:
                raise WorkloadError(
                    f"{self.name}: size {dim or place!r} of its input {name} is free and no workload tells it; export it with that size."
                )
            if isinstance(dim, int) and size is not None and dim != size:
                what = ("batch_size" if place == 0 else "seq_len") if sizes.past == 0 else "this step"
                raise WorkloadError(f"{self.name}: {what} asks for {size}, and its input {name} has the fixed shape {dims}; {dim} works.")
            found.append(dim if isinstance(dim, int) else int(size or 0))
        return tuple(found)

    def _op(self, node: onnx.NodeProto, counted: Counted, values: Values) -> Op:
        path = self.paths[node.output[0]]
        own = [name for name in node.input if name in self.weights]
        component = component_of(path)
        if component == "other" and own:
            component = self.weights[own[0]].component
        stored = sum(self.weights[name].tensor.bytes for name in own)
        made = sum(_bytes(values, name) for name in node.output)
        moved = made + sum(_bytes(values, name) for name in node.input if name not in self.file.tensors)
        if node.op_type in VIEWS:
            moved = 0
        if node.op_type in ("Gather", "GatherBlockQuantized") and own:
            stored = min(stored, made)
        return Op(
            name=f"{path}.{node.op_type}" if path else node.name or node.op_type, kind=counted.kind, component=component,
            matmul_flops=counted.matmul_flops, causal_flops=counted.matmul_flops if counted.causal_flops is None else counted.causal_flops,
            other_flops=counted.other_flops, weight_bytes=stored, activation_bytes=moved, rows=counted.rows, columns=counted.columns,
            outputs=counted.outputs, products=counted.products, weight=self._format(node),
        )  # fmt: skip

    def _format(self, node: onnx.NodeProto) -> WeightFormat:
        """How the weight of a product is stored and computed with."""
        if node.op_type == "MatMulNBits":
            return WeightFormat(bits=attribute(node, "bits", 4), group_size=attribute(node, "block_size"), scale_dtype=self.dtype)
        if node.op_type in ("MatMulInteger", "DynamicQuantizeMatMul", "MatMulIntegerToFloat", "ConvInteger"):
            return WeightFormat(bits=8, activations="dynamic", scale_dtype=self.dtype)
        if node.op_type in ("QLinearMatMul", "QLinearConv", "QGemm", "QAttention"):
            return WeightFormat(bits=8, activations="static", scale_dtype=self.dtype)
        return WeightFormat(dtype=self.dtype)

    # ---- the life of values ----

    def _lives(self, values: Values) -> tuple[_Lives, int]:
        """Births and deaths in one run, and how many values have no known size."""
        lives, unsized = _Lives(), 0
        owner: dict[str, int | None] = dict.fromkeys(self.file.tensors)  # value → the storage that it lies in; None: the weights'
        constant = set(self.file.tensors)
        last = self._last_readers()
        for name in self.inputs:
            kind = "kv_cache" if _PAST.search(name) else "activations"
            owner[name] = lives.born(_storage(values, name, kind, "", "input"))
        held: dict[int, int] = {}
        kept = {owner[name] for name in self.inputs}
        for number, node in enumerate(self.file.model.graph.node):
            constant_alone = all(name in constant for name in node.input if name) and len(node.input) > 0
            for name in filter(None, node.output):
                if constant_alone:
                    constant.add(name)
                if node.op_type == "Constant" or name in values.data:
                    owner[name] = None
                elif node.op_type in VIEWS and name == node.output[0]:
                    owner[name] = owner[node.input[0]]
                else:
                    unsized += values.shape(name) is None
                    kind = "weights" if constant_alone else "kv_cache" if _PRESENT.search(name) else "activations"
                    owner[name] = lives.born(_storage(values, name, kind, self.paths[node.output[0]], node.op_type))
                    if constant_alone:
                        kept.add(owner[name])
                if (index := owner[name]) is not None:
                    held[index] = max(held.get(index, number), last.get(name, number))
            for index in [index for index, end in held.items() if end <= number]:
                del held[index]
                if index not in kept:
                    lives.died(index)
        for index in sorted({index for index in (*kept, *held) if index is not None}):
            lives.died(index)
        return lives, unsized

    def _last_readers(self) -> dict[str, int]:
        """Value → the number of the last node that reads it; beyond all nodes for what the graph gives."""
        graph = self.file.model.graph
        found: dict[str, int] = {}
        for number, node in enumerate(graph.node):
            for name in (*node.input, *_inner_reads(node)):
                found[name] = number
        return found | {given.name: len(graph.node) for given in graph.output}

    def _timeline(self, phase: str, run: _Run) -> Timeline:
        """The weights, which stay, and one run."""
        weights = [
            Storage(bytes=weight.tensor.bytes, kind="weights", module=name, operator="initializer", shape=weight.tensor.shape)
            for name, weight in self.weights.items()
        ]
        base = len(weights)
        events = [*range(base), *(event + base if event >= 0 else event - base for event in run.events)]
        return Timeline(storages=[*weights, *run.storages], events=events, phases=[(base, phase)])


def _inner_reads(node: onnx.NodeProto) -> Iterator[str]:
    """Names that the graphs inside a node read."""
    for each in node.attribute:
        for inner in ([each.g] if each.HasField("g") else []) + list(each.graphs):
            for within in inner.node:
                yield from within.input
                yield from _inner_reads(within)


def _dims(given: onnx.ValueInfoProto) -> list[int | str]:
    """Sizes of an input: a number, or the name of a free one."""
    return [dim.dim_value if dim.HasField("dim_value") else dim.dim_param for dim in given.type.tensor_type.shape.dim]


def _is_tokens(name: str) -> bool:
    return any(word in name for word in ("input_ids", "token_type_ids", "attention_mask", "position_ids", "inputs_embeds", "hidden_states"))


def _meant(name: str, dims: Sequence[int | str], sizes: _Sizes, *, has_cache: bool) -> list[int | None]:
    """What each size of an input should be: by the input's name, else by its own; None where nothing tells."""
    if _PAST.search(name):
        return [sizes.batch if place == 0 else sizes.past if isinstance(dim, str) else None for place, dim in enumerate(dims)]
    if _is_tokens(name):
        mask = "mask" in name and "encoder" not in name and has_cache
        length = sizes.past + sizes.query if mask else sizes.query
        if len(dims) > 2 and "mask" in name:  # [B, 1, S, T]
            return [sizes.batch, *([None] * (len(dims) - 3)), sizes.query, length]
        return [size for size, _ in zip((sizes.batch, length, *([None] * len(dims))), dims, strict=False)]
    return [_by_its_name(str(dim), place, sizes) if isinstance(dim, str) else None for place, dim in enumerate(dims)]


def _by_its_name(dim: str, place: int, sizes: _Sizes) -> int | None:
    if _BATCH.search(dim) or (place == 0 and not _LENGTH.search(dim)):
        return sizes.batch
    if _TOTAL.search(dim):
        return sizes.past + sizes.query
    if "past" in dim.lower():
        return sizes.past
    return sizes.query if _LENGTH.search(dim) else None


def _element_bits(number: int) -> int:
    import onnx

    return next((BITS.get(name, 0) for name, value in onnx.TensorProto.DataType.items() if value == number), 0)


def _bytes(values: Values, name: str) -> int:
    """Bytes of a value; 0 where its shape is not known."""
    shape = values.shape(name) if name else None
    return 0 if shape is None else math.ceil(math.prod(shape) * _element_bits(values.element_type(name)) / 8)


def _storage(values: Values, name: str, kind: str, module: str, operator: str) -> Storage:
    return Storage(bytes=_bytes(values, name), kind=kind, module=module, operator=operator, shape=values.shape(name) or ())


def _config_beside(path: Path) -> dict[str, Any]:
    """The config.json that an exporter left beside a graph; empty where there is none that can be read."""
    try:
        config = json.loads((path.parent / "config.json").read_bytes())
    except (OSError, ValueError, RecursionError):
        return {}
    return config if isinstance(config, dict) else {}
