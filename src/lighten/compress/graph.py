"""A model's forward pass as a list of operators: which tensor each reads, and which it makes. Nothing is computed and no weight is loaded.

The module runs once on tensors without memory, built from its config. What changes a model without changing its function (scales moved
from one layer into the next, rotations) is read off this list, so that no architecture needs a table of its own.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map_only

from lighten.compress.low_rank_module import put_low_rank
from lighten.cost.workload import Workload
from lighten.errors import LightenError, TraceError
from lighten.model.low_rank import CORRECTION, RANKS
from lighten.trace.torch_model import TransformersModel
from lighten.trace.torch_run import fake_tensors

TOKENS = 4
"""Length of the text that is run: what is found does not depend on it, as long as there is more than one position."""


@dataclass(frozen=True, kw_only=True)
class Value:
    """A tensor of the run; in-place operators give the value that they change."""

    index: int
    shape: tuple[int, ...]
    dtype: torch.dtype


@dataclass(frozen=True, kw_only=True)
class Node:
    """One operator; in `args` and `kwargs` a `Value` stands for each tensor.

    Attributes:
        outputs: the tensors that it gives, in order; at least one.
    """

    op: Any
    args: tuple[Any, ...]
    kwargs: Mapping[str, Any]
    outputs: tuple[Value, ...]

    @property
    def name(self) -> str:
        """As `aten.addmm`, without its overload."""
        return str(self.op.overloadpacket)

    @property
    def inputs(self) -> list[Value]:
        return [leaf for leaf in tree_leaves((self.args, dict(self.kwargs))) if isinstance(leaf, Value)]


@dataclass(frozen=True, kw_only=True)
class Graph:
    """One forward pass.

    Attributes:
        parameters: index of a value → the parameter's name in `state_dict`, the first of tied ones.
        tied: a tied parameter's other names → its first.
        tables: names of parameters, tied ones among them, that their module looks rows up in.
        outputs: what the model gives.
        buffers: index of a value → the buffer's name.
    """

    nodes: tuple[Node, ...]
    parameters: Mapping[int, str]
    tied: Mapping[str, str]
    tables: frozenset[str]
    outputs: tuple[Value, ...]
    buffers: Mapping[int, str] = field(default_factory=dict)

    def last_uses(self) -> dict[int, int]:
        """Index of a value → the number of the last node that reads it."""
        return {value.index: number for number, node in enumerate(self.nodes) for value in node.inputs}


def record_graph(
    config: Any, architecture: str | None = None, *, source: str = "", folder: Path | None = None, trust_remote_code: bool = False
) -> Graph:
    """The graph of a `transformers` model, from its config alone.

    Args:
        config: a `transformers` config, or the content of a `config.json`.
        architecture: the class's name; None: the one that the config names.

    Raises:
        ModelError: no such class, or the config does not make one.
        TraceError: its code looks at values, of which a run without memory has none.
    """
    given = config if isinstance(config, Mapping) else {}
    low_rank = {word: given[word] for word in (RANKS, CORRECTION) if word in given}
    config = {name: value for name, value in given.items() if name not in low_rank} if low_rank else config
    return _Recorded(config, architecture, low_rank=low_rank, source=source, folder=folder, trust_remote_code=trust_remote_code).graph()


class _Recorded(TransformersModel):
    """A model whose forward pass is written down.

    Args:
        low_rank: the words of a config that say which linears are two, or have two more beside them.
    """

    def __init__(self, config: Any, architecture: str | None, *, low_rank: Mapping[str, Any], **named: Any) -> None:
        super().__init__(config, architecture, **named)
        self._low_rank = low_rank

    def graph(self) -> Graph:
        workload = Workload(phase="encode", seq_len=TOKENS if self.takes_ids else self.seq_len, dtype=self.dtype, attention="eager")
        before = torch.get_default_dtype()
        torch.set_default_dtype(getattr(torch, workload.dtype))
        try:
            with fake_tensors(), _every_expert(), torch.no_grad():
                module = self._build(workload)
                put_low_rank(module, self._low_rank)
                module.eval()
                inputs = self._inputs(module, workload)
                recorder = _Recorder(module)
                with recorder:
                    out = self._infer(module, inputs, workload)
                return recorder.graph(out)
        except LightenError:
            raise
        except Exception as error:  # the module's own code, whatever it raises
            text = (str(error).strip().splitlines() or ["no text"])[0][:200]
            raise TraceError(f"{self.architecture} could not be followed on tensors without memory: {type(error).__name__}: {text}") from error
        finally:
            torch.set_default_dtype(before)


class _Recorder(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Writes down what runs inside it."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._values: dict[int, Value] = {}
        self._kept: list[Tensor] = []  # a tensor that died would leave its id to another
        self._nodes: list[Node] = []
        self._parameters: dict[int, str] = {}
        self._tied: dict[str, str] = {}
        for name, parameter in module.named_parameters(remove_duplicate=False):
            first = self._parameters.setdefault(self._value(parameter).index, name)
            if first != name:
                self._tied[name] = first
        self._buffers = {self._value(buffer).index: name for name, buffer in module.named_buffers()}
        self._tables = frozenset(f"{name}.weight" for name, each in module.named_modules() if isinstance(each, nn.Embedding))

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None) -> Any:
        kwargs = kwargs or {}
        read, named = tree_map_only(Tensor, self._value, (args, kwargs))
        result = func(*args, **kwargs)
        made = tuple(self._value(leaf) for leaf in tree_leaves(result) if isinstance(leaf, Tensor))
        if made:
            self._nodes.append(Node(op=func, args=read, kwargs=named, outputs=made))
        return result

    def _value(self, tensor: Tensor) -> Value:
        found = self._values.get(id(tensor))
        if found is None:
            found = self._values[id(tensor)] = Value(index=len(self._values), shape=tuple(tensor.shape), dtype=tensor.dtype)
            self._kept.append(tensor)
        return found

    def graph(self, out: Any) -> Graph:
        """What was written down, of a pass that gave `out`."""
        given = tree_leaves(tuple(out.values()) if isinstance(out, Mapping) else out)
        outputs = tuple(self._value(leaf) for leaf in given if isinstance(leaf, Tensor))
        nodes = tuple(_read(self._nodes, outputs))
        return Graph(nodes=nodes, parameters=self._parameters, tied=self._tied, tables=self._tables, outputs=outputs, buffers=self._buffers)


def _read(nodes: Sequence[Node], outputs: Sequence[Value]) -> list[Node]:
    """The operators that something comes of: code that asks for the type of a weight makes the product of two factors, which nothing reads."""
    needed, found = {value.index for value in outputs}, []
    for node in reversed(nodes):
        if node.op._schema.is_mutable or any(value.index in needed for value in node.outputs):
            needed.update(value.index for value in node.inputs)
            found.append(node)
    return found[::-1]


@contextlib.contextmanager
def _every_expert() -> Iterator[None]:
    """Which experts a row meets depends on values; here each row meets all of them, so that the graph holds every expert once."""
    from transformers.integrations.moe import ExpertsInterface

    with patch.object(ExpertsInterface, "get_interface", lambda self, name, default: _all_experts):
        yield


def _all_experts(self: Any, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
    """The sum of all experts, by the attributes that `transformers`' experts have, each times one weight of its router."""
    weight = top_k_weights.reshape(len(hidden_states), -1)[:, :1]
    total: Tensor | None = None
    for expert in range(self.num_experts):
        x = _expert_linear(self, "gate_up_proj" if self.has_gate else "up_proj", expert, hidden_states)
        x = self._apply_gate(x) if self.has_gate else self.act_fn(x)
        x = _expert_linear(self, "down_proj", expert, x)
        x = (self.post_expert_norm(x) if self.has_post_expert_norm else x) * weight
        total = x if total is None else total + x
    assert total is not None, "a layer of experts has at least one"
    return total


def _expert_linear(experts: Any, name: str, expert: int, x: Tensor) -> Tensor:
    weight = getattr(experts, name)[expert]
    y = x @ weight if experts.is_transposed else nn.functional.linear(x, weight)
    return y + getattr(experts, f"{name}_bias")[expert] if experts.has_bias else y
