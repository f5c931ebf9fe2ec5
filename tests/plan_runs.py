"""The oracle of plans: one rank of a plan, run by torch's own distributed code under a fake process group, every storage and collective counted.

FSDP2 (`fully_shard`), DTensor tensor parallelism (`parallelize_module`), `torch.distributed.pipelining`; on fake tensors, whose collectives send
nothing. Storages are counted as in live_bytes.py, and as FSDP2 resizes them.
"""

from __future__ import annotations

import contextlib
import sys
import warnings
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any
from unittest.mock import patch

import torch
import torch.distributed as dist
import transformers
from live_bytes import OPTIMIZERS, LiveBytes, _default_dtype
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode, unset_fake_temporarily
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.fsdp._fully_shard import _fsdp_param
from torch.distributed.pipelining import PipelineStage, Schedule1F1B, ScheduleGPipe, ScheduleInterleaved1F1B
from torch.distributed.pipelining.stage import InferenceMode
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard
from torch.distributed.tensor._sharding_prop import ShardingPropagator
from torch.distributed.tensor.parallel import (
    ColwiseParallel,
    PrepareModuleInput,
    RowwiseParallel,
    SequenceParallel,
    loss_parallel,
    parallelize_module,
)
from torch.testing._internal.distributed.fake_pg import FakeStore
from torch.utils._pytree import tree_leaves
from transformers import PretrainedConfig, PreTrainedModel

from lighten.cost.workload import Workload
from lighten.parallel.plan import Plan
from lighten.parallel.rank import stage_blocks

Sent = tuple[str, int, int]
"""Kind, bytes of the whole buffer, ranks."""

FUNCTIONAL = {
    "all_reduce": "all_reduce", "all_gather_into_tensor": "all_gather", "reduce_scatter_tensor": "reduce_scatter", "all_to_all_single": "all_to_all",
}  # fmt: skip
IN_PLACE = {"_allgather_base_": "all_gather", "_reduce_scatter_base_": "reduce_scatter", "allreduce_": "all_reduce", "send": "send"}


class Watched(LiveBytes):
    """Live bytes of one rank, and what it sends.

    Attributes:
        sent: collective → how often, since the last `start_over`.
    """

    def __init__(self) -> None:
        super().__init__()
        self.sent: Counter[Sent] = Counter()
        self._aside = False

    def start_over(self) -> None:
        super().start_over()
        self.sent.clear()

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None) -> Any:
        if any(issubclass(each, DTensor) for each in types):
            return NotImplemented  # what it does to its local tensors is what is counted
        if self._aside:
            return func(*args, **(kwargs or {}))
        self._note(func, args)
        return super().__torch_dispatch__(func, types, args, kwargs)

    def watch(self, tensors: Iterable[torch.Tensor], label: str) -> None:
        super().watch([each._local_tensor if isinstance(each, DTensor) else each for each in tensors], label)

    def _note(self, func: Any, args: tuple[Any, ...]) -> None:
        space, _, name = func._schema.name.partition("::")
        if space == "_c10d_functional" and name in FUNCTIONAL:
            group = next(each for each in reversed(args) if isinstance(each, str))
            ranks = dist.distributed_c10d._resolve_process_group(group).size()
            grows = name == "all_gather_into_tensor"
            self._count(FUNCTIONAL[name], _bytes(args[0]) * (ranks if grows else 1), ranks)
        elif space == "c10d" and name in IN_PLACE:
            tensors = [each for each in tree_leaves(args) if isinstance(each, torch.Tensor)]
            boxed = next(each for each in args if isinstance(each, torch.ScriptObject))
            self._count(IN_PLACE[name], max(map(_bytes, tensors)), dist.ProcessGroup.unbox(boxed).size())

    def _count(self, kind: str, size: int, ranks: int) -> None:
        self.sent[kind, size, ranks] += 1

    def _add_in_place(self, gradient: torch.Tensor) -> None:
        """Autograd alone adds in place: not the Python of a backward pass, which calls the same operator, nor a subclass of tensors."""
        frame = sys._getframe(2)  # whoever called the operator
        while frame.f_code.co_name == "__torch_dispatch__" and frame.f_back is not None:
            frame = frame.f_back
        if frame.f_code.co_name == "_engine_run_backward":
            super()._add_in_place(gradient)

    def resized(self, tensor: torch.Tensor) -> None:
        """FSDP2 frees and takes a storage without an operator."""
        storage = tensor.untyped_storage()
        if storage._cdata not in self._live:
            self._born(tensor, "gathered")
            return
        size, label, shape = self._live[storage._cdata]
        self._live[storage._cdata] = (storage.nbytes(), label, shape)
        self.now += storage.nbytes() - size
        if self.now > self.peak:
            self.peak, self.at_peak = self.now, dict(self._live)

    @contextlib.contextmanager
    def counting(self) -> Iterator[None]:
        def then(call: Callable[[torch.Tensor], None]) -> Callable[[torch.Tensor], None]:
            def both(tensor: torch.Tensor) -> None:
                call(tensor)
                self.resized(tensor)

            return both

        infer = ShardingPropagator._propagate_tensor_meta_non_cached

        def aside(*args: Any) -> Any:  # DTensor asks for shapes by running operators on whole tensors, which have no bytes
            before, self._aside = self._aside, True
            try:
                return infer(*args)
            finally:
                self._aside = before

        with (
            patch.object(ShardingPropagator, "_propagate_tensor_meta_non_cached", aside),
            patch.object(_fsdp_param, "alloc_storage", then(_fsdp_param.alloc_storage)),
            patch.object(_fsdp_param, "free_storage", then(_fsdp_param.free_storage)),
            self,
        ):
            yield


def _bytes(tensor: torch.Tensor) -> int:
    return tensor.numel() * tensor.element_size()


@contextlib.contextmanager
def ranks(world: int, rank: int = 0) -> Iterator[None]:
    """A fake process group of so many ranks, of which this process is one."""
    dist.init_process_group("fake", rank=rank, world_size=world, store=FakeStore())
    try:
        yield
    finally:
        dist.destroy_process_group()


@dataclass(frozen=True, kw_only=True)
class Names:
    """Where a class of transformers keeps what tensor parallelism splits.

    Attributes:
        blocks: of the blocks; the others are paths inside one.
        heads: attribute of the attention module that counts its heads, where its `forward` asks for it.
    """

    blocks: str
    attention: str
    columns: tuple[str, ...]
    out: str
    mlp: str
    up: tuple[str, ...]
    down: str
    norms: tuple[str, ...]
    embedding: str
    last_norm: str
    head: str
    heads: str = ""


LLAMA = Names(
    blocks="model.layers", attention="self_attn", columns=("q_proj", "k_proj", "v_proj"), out="self_attn.o_proj", mlp="mlp",
    up=("gate_proj", "up_proj"), down="down_proj", norms=("input_layernorm", "post_attention_layernorm"), embedding="model.embed_tokens",
    last_norm="model.norm", head="lm_head",
)  # fmt: skip
NAMES = {
    "llama": LLAMA,
    "qwen2": LLAMA,
    "qwen3": LLAMA,
    "gemma": LLAMA,
    "opt": Names(
        blocks="model.decoder.layers", attention="self_attn", columns=("q_proj", "k_proj", "v_proj"), out="self_attn.out_proj", mlp="", up=("fc1",),
        down="fc2", norms=("self_attn_layer_norm", "final_layer_norm"), embedding="model.decoder.embed_tokens",
        last_norm="model.decoder.final_layer_norm", head="lm_head", heads="num_heads",
    ),
    "bert": Names(
        blocks="bert.encoder.layer", attention="attention.self", columns=("query", "key", "value"), out="attention.output.dense", mlp="",
        up=("intermediate.dense",), down="output.dense", norms=(), embedding="bert.embeddings.word_embeddings", last_norm="",
        head="cls.predictions.decoder",
    ),
    "gpt2": Names(
        blocks="transformer.h", attention="attn", columns=(), out="", mlp="", up=(), down="", norms=(), embedding="transformer.wte",
        last_norm="transformer.ln_f", head="lm_head",
    ),
    "mixtral": Names(
        blocks="model.layers", attention="self_attn", columns=(), out="", mlp="", up=(), down="", norms=(), embedding="model.embed_tokens",
        last_norm="model.norm", head="lm_head",
    ),
}  # fmt: skip


def split(model: PreTrainedModel, names: Names, mesh: DeviceMesh, *, sequence: bool) -> None:
    """Tensor parallelism as torchtitan sets it up: one collective before and one behind each branch, a loss over the split vocabulary."""
    between = Shard(1) if sequence else Replicate()
    styles: dict[str, Any] = {
        names.embedding: RowwiseParallel(input_layouts=Replicate(), output_layouts=between),
        names.head: ColwiseParallel(input_layouts=between, output_layouts=Shard(-1), use_local_output=False),
    }
    tied = model.get_submodule(names.head).weight is model.get_submodule(names.embedding).weight
    if sequence:
        styles[names.last_norm] = SequenceParallel(use_local_output=True)
    parallelize_module(model, mesh, styles)
    if tied:  # which became two tensors
        head = model.get_submodule(names.head)
        head.weight = model.get_submodule(names.embedding).weight
        around = model.get_submodule(names.head.rpartition(".")[0])
        if getattr(around, "bias", None) is not None:
            around.bias = head.bias
    for block in model.get_submodule(names.blocks):
        inner: dict[str, Any] = {
            names.attention: PrepareModuleInput(
                input_layouts=(between,) if names.attention == "attention.self" else None,
                desired_input_layouts=(Replicate(),) if names.attention == "attention.self" else None,
                input_kwarg_layouts={} if names.attention == "attention.self" else {"hidden_states": between},
                desired_input_kwarg_layouts={} if names.attention == "attention.self" else {"hidden_states": Replicate()},
            )
        }
        inner |= {f"{names.attention}.{name}": ColwiseParallel() for name in names.columns}
        inner[names.out] = RowwiseParallel(output_layouts=between)
        if names.mlp:
            inner[names.mlp] = PrepareModuleInput(input_layouts=(between,), desired_input_layouts=(Replicate(),))
        at = f"{names.mlp}." if names.mlp else ""
        inner |= {f"{at}{name}": ColwiseParallel(input_layouts=None if names.mlp else between) for name in names.up}
        inner[f"{at}{names.down}"] = RowwiseParallel(output_layouts=between)
        inner |= {name: SequenceParallel(use_local_output=False) for name in names.norms} if sequence else {}
        parallelize_module(block, mesh, inner)
        if names.heads:
            attention = block.get_submodule(names.attention)
            setattr(attention, names.heads, getattr(attention, names.heads) // mesh.size())


def shard(model: PreTrainedModel, names: Names, mesh: DeviceMesh, workload: Workload) -> None:
    """FSDP2 around each block and around the whole."""
    options: dict[str, Any] = {"mesh": mesh}
    if workload.master_weights:
        options["mp_policy"] = MixedPrecisionPolicy(param_dtype=getattr(torch, workload.dtype), reduce_dtype=torch.float32)
    for block in model.get_submodule(names.blocks):
        fully_shard(block, **options)
    fully_shard(model, **options)


def run_plan(config: PretrainedConfig, workload: Workload, plan: Plan) -> Watched:
    """The second training step of rank 0 of a plan of data (zero3) and tensor parallelism."""
    live = Watched()
    held_as = "float32" if workload.master_weights else workload.dtype
    with contextlib.ExitStack() as stack:
        stack.enter_context(warnings.catch_warnings())
        stack.enter_context(ranks(plan.devices))
        copies, names_of = plan.dp // plan.sharing_ranks, ("replicate", "dp", "tp")
        mesh = init_device_mesh("cpu", (copies, plan.sharing_ranks, plan.tp), mesh_dim_names=names_of)  # which looks at values
        data, tensor = mesh["replicate", "dp"] if copies > 1 else mesh["dp"], mesh["tp"]
        stack.enter_context(_real_meshes())
        stack.enter_context(FakeTensorMode(allow_non_fake_inputs=True))
        stack.enter_context(patch("transformers.masking_utils.find_packed_sequence_indices", lambda position_ids: None))
        stack.enter_context(_default_dtype(getattr(torch, held_as)))
        model = _built(config, workload)
        names = NAMES[config.model_type]
        if plan.tp > 1:
            split(model, names, tensor, sequence=plan.sequence_parallel)
        if plan.shard == "zero3":
            shard(model, names, data, workload)
        warnings.filterwarnings("ignore", message=".*returned a view tensor")  # which nobody changes in place
        with live.counting():
            live.watch(model.parameters(), "parameter")
            live.watch(model.buffers(), "buffer")
            _train(model, workload, plan, live)
    return live


@contextlib.contextmanager
def _real_meshes() -> Iterator[None]:
    """FSDP2 joins its mesh with that of tensor parallelism, whose values it looks at."""
    join = DeviceMesh._concatenate

    def real(meshes: list[DeviceMesh]) -> DeviceMesh:
        with unset_fake_temporarily():
            return join(meshes)

    with patch.object(DeviceMesh, "_concatenate", real):
        yield


def _built(config: PretrainedConfig, workload: Workload) -> PreTrainedModel:
    made = getattr(transformers, config.architectures[0])
    config._attn_implementation = "eager" if workload.attention == "eager" else "sdpa"
    return made(config)


def _train(model: PreTrainedModel, workload: Workload, plan: Plan, live: Watched) -> None:
    model.train()
    if workload.recompute == "full":
        model.activation_checkpointing_enable()
    optimizer = OPTIMIZERS[workload.optimizer or ""](model.parameters())
    micro = plan.micro_batch(workload.batch_size)
    given: dict[str, Any] = {"input_ids": torch.zeros(micro, workload.seq_len, dtype=torch.long)}
    given["labels"] = given["input_ids"]
    if plan.sequence_parallel:
        given["position_ids"] = torch.arange(workload.seq_len)[None]
    live.watch(given.values(), "inputs")
    if model.config.model_type not in ("bert",):
        given["use_cache"] = False
    for _ in range(2):
        live.start_over()
        for _ in range(plan.micro_batches(workload.batch_size)):
            with loss_parallel() if plan.tp > 1 else contextlib.nullcontext():
                made = model(**given)
                loss = made.loss
                del made
                loss.backward()
            del loss
        _reduce_partial(model.parameters())
        optimizer.step()
        optimizer.zero_grad()


def _reduce_partial(parameters: Iterable[torch.Tensor]) -> None:
    """Sum the gradients of norms over the positions that each rank has, once: the optimizer would do it in each of its operators."""
    for parameter in parameters:
        gradient = parameter.grad
        if isinstance(gradient, DTensor) and any(isinstance(each, Partial) for each in gradient.placements):
            parameter.grad = gradient.redistribute(placements=[Replicate() if isinstance(each, Partial) else each for each in gradient.placements])


class Stage(nn.Module):
    """A stage of a pipeline, of the modules of a model: what its first, its last and every stage runs."""

    def __init__(self, model: PreTrainedModel, blocks: Iterable[int], *, first: bool, last: bool) -> None:
        super().__init__()
        names = NAMES[model.config.model_type]
        every = model.get_submodule(names.blocks)
        self.kind = model.config.model_type
        self.blocks = nn.ModuleList(every[i] for i in blocks)
        before = {"bert": ("bert.embeddings",), "gpt2": ("transformer.wte", "transformer.wpe", "transformer.drop")}
        after = {"bert": ("cls",)}
        self.before = nn.ModuleList(map(model.get_submodule, before.get(self.kind, (names.embedding,)) if first else ()))
        self.after = nn.ModuleList(map(model.get_submodule, after.get(self.kind, (names.last_norm, names.head)) if last else ()))
        self.rotary = getattr(getattr(model, "model", None), "rotary_emb", None)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        positions = torch.arange(x.shape[1])[None]
        if self.kind == "gpt2" and len(self.before):
            table, position_table, dropout = self.before
            x = dropout(table(x) + position_table(positions))
        else:
            for each in self.before:
                x = each(x)
        shared: dict[str, Any] = {"attention_mask": None}
        if self.rotary is not None:
            shared |= {"position_embeddings": self.rotary(x, positions), "position_ids": positions}
        for block in self.blocks:
            made = block(x, **shared)
            x = made[0] if isinstance(made, tuple) else made
        for each in self.after:
            x = each(x)
        return x


def run_stage(config: PretrainedConfig, workload: Workload, plan: Plan, stage: int) -> Watched:
    """The second training step of one rank of a pipeline, in the order of torch's own schedule. Its loss is the head's cross entropy."""
    live = Watched()
    count = plan.micro_batches(workload.batch_size)
    with contextlib.ExitStack() as stack:
        stack.enter_context(ranks(plan.pp, stage))
        stack.enter_context(FakeTensorMode(allow_non_fake_inputs=True))
        stack.enter_context(_default_dtype(getattr(torch, workload.dtype)))
        layers = getattr(config, "num_hidden_layers", None) or config.n_layer
        whole = _built(config, workload)
        blocks = stage_blocks(layers, plan)[stage]
        pieces = [_piece(whole, workload, plan, stage + i * plan.pp, own) for i, own in enumerate(blocks)]
        del whole
        modules = nn.ModuleList(piece.submod for piece in pieces)
        optimizer = OPTIMIZERS[workload.optimizer or ""](modules.parameters())
        kind = {"1f1b": Schedule1F1B, "gpipe": ScheduleGPipe, "interleaved": ScheduleInterleaved1F1B}[plan.schedule]
        stages = pieces if plan.schedule == "interleaved" else pieces[0]
        schedule = kind(stages, n_microbatches=count, loss_fn=partial(_loss, config))
        for piece in pieces:  # a vote that reads what it was sent
            piece._inference_mode = InferenceMode.STATIC
        schedule._warmup_p2p = lambda *_: None
        tokens = torch.zeros(workload.batch_size // plan.dp, workload.seq_len, dtype=torch.long)
        stack.enter_context(live.counting())
        live.watch(modules.parameters(), "parameter")
        live.watch(modules.buffers(), "buffer")
        live.watch([tokens], "inputs")
        given, wanted = ([tokens] if stage == 0 else []), ({"target": tokens, "losses": []} if stage == plan.pp - 1 else {})
        for _ in range(2):
            live.start_over()
            schedule.step(*given, **wanted, return_outputs=False)
            optimizer.step()
            optimizer.zero_grad()
    return live


def _piece(model: PreTrainedModel, workload: Workload, plan: Plan, index: int, blocks: Iterable[int]) -> PipelineStage:
    """One of the pipeline's pp · virtual_stages stages, told the shapes of what it gets and gives."""
    config, count = model.config, plan.pp * plan.virtual_stages
    first, last = index == 0, index == count - 1
    micro = plan.micro_batch(workload.batch_size)
    hidden = torch.zeros(micro, workload.seq_len, getattr(config, "hidden_size", None) or config.n_embd)
    ids = torch.zeros(micro, workload.seq_len, dtype=torch.long)
    made = torch.zeros(micro, workload.seq_len, config.vocab_size) if last else hidden
    return PipelineStage(
        Stage(model, blocks, first=first, last=last), index, count, torch.device("cpu"), input_args=(ids if first else hidden,), output_args=(made,),
        input_grads=(None if first else hidden,), output_grads=None if last else (hidden,),
    )  # fmt: skip


def _loss(config: PretrainedConfig, logits: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    wide = logits if config.model_type == "bert" else logits.float()
    return nn.functional.cross_entropy(wide.flatten(0, 1), target.flatten())
