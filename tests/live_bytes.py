"""The memory oracle: every storage's birth and death in a real PyTorch run of a transformers model, on fake tensors or true ones."""

from __future__ import annotations

import contextlib
import weakref
from collections.abc import Iterable, Iterator
from typing import Any
from unittest.mock import patch

import torch
import transformers
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import DynamicCache, PretrainedConfig, PreTrainedModel

from lighten.cost.workload import Workload

OPTIMIZERS = {
    "adamw": torch.optim.AdamW,
    "adam": torch.optim.Adam,
    "sgd": torch.optim.SGD,
    "sgd-momentum": lambda parameters: torch.optim.SGD(parameters, lr=0.1, momentum=0.9),
    "adagrad": torch.optim.Adagrad,
    "rmsprop": torch.optim.RMSprop,
}
"""The optimizers of `OPTIMIZER_STATE` that torch has, with their own defaults."""


class LiveBytes(TorchDispatchMode):
    """Sums the bytes of the storages that live, and remembers the fullest moment.

    A storage is counted from the operator that makes it to the death of its last tensor (its finalizer), as an allocator sees it.
    What a kernel allocates and frees inside itself is not seen.

    Attributes:
        now, peak: bytes.
        at_peak: storage → (bytes, what made it, shape) of those that lived at the peak.
    """

    def __init__(self) -> None:
        super().__init__()
        self.now = self.peak = 0
        self.at_peak: dict[int, tuple[int, str, tuple[int, ...]]] = {}
        self._live: dict[int, tuple[int, str, tuple[int, ...]]] = {}

    def watch(self, tensors: Iterable[torch.Tensor], label: str) -> None:
        """Count tensors that were made before."""
        for tensor in tensors:
            self._born(tensor, label)

    def start_over(self) -> None:
        """Forget the peak, not what lives."""
        self.peak = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if func is torch.ops.aten.add.Tensor and torch._C._current_graph_task_id() != -1:
            self._add_in_place(args[0])
        for tensor in tree_leaves(result):
            if isinstance(tensor, torch.Tensor):
                self._born(tensor, str(func))
        return result

    def _born(self, tensor: torch.Tensor, label: str) -> None:
        storage = tensor.untyped_storage()
        key = storage._cdata
        if key in self._live:
            return
        self._live[key] = (storage.nbytes(), label, tuple(tensor.shape))
        weakref.finalize(storage, self._died, key)
        self.now += storage.nbytes()
        if self.now > self.peak:
            self.peak, self.at_peak = self.now, dict(self._live)

    def _died(self, key: int) -> None:
        self.now -= self._live.pop(key)[0]

    def _add_in_place(self, gradient: torch.Tensor) -> None:
        """Let a sum of gradients take the place of the earlier one.

        Autograd adds in place where it alone holds the earlier gradient and its storage, but never while a dispatch mode looks on
        (`can_accumulate_inplace` of torch/csrc/autograd/input_buffer.cpp): without this the observer would count what it causes.
        """
        storage = gradient.untyped_storage()
        if torch._C._storage_Use_Count(storage._cdata) == 2:  # the gradient and `storage` here
            size, label, shape = self._live[storage._cdata]
            self._live[storage._cdata] = (0, label, shape)
            self.now -= size


def track(config: PretrainedConfig, workload: Workload, *, fake: bool = True) -> LiveBytes:
    """Run a workload on the first of the config's architectures and return what lived.

    A training step is the second one, when the optimizer's state exists, and ends in the optimizer's step. Its loss is the
    model's own where it has one, else the mean of `last_hidden_state`; nothing of the output but the loss is kept.
    """
    live = LiveBytes()
    dtype = getattr(torch, workload.dtype)
    with _tensors(fake), _default_dtype(dtype):
        config._attn_implementation = "eager" if workload.attention == "eager" else "sdpa"
        model = getattr(transformers, config.architectures[0])(config)
        ids = torch.zeros(workload.batch_size, 1 if workload.phase == "decode" else workload.seq_len, dtype=torch.long)
        with live:
            live.watch(model.parameters(), "parameter")
            live.watch(model.buffers(), "buffer")
            live.watch([ids], "ids")
            if workload.phase == "train":
                _train(model, ids, workload, live)
            else:
                model.eval()
                with torch.no_grad():
                    _infer(model, ids, workload, live)
    return live


def _train(model: PreTrainedModel, ids: torch.Tensor, workload: Workload, live: LiveBytes) -> None:
    model.train()
    if workload.recompute == "full":
        model.activation_checkpointing_enable()
    optimizer = OPTIMIZERS[workload.optimizer or ""](model.parameters())
    options = {"use_cache": False} if model.config.model_type == "llama" else {}
    for _ in range(2):
        live.start_over()
        if hasattr(model, "loss_function") and model.config.architectures[0] not in ("BertModel", "LlamaModel"):
            labels = ids[:, 0] if "SequenceClassification" in model.config.architectures[0] else ids
            loss = model(ids, labels=labels, **options).loss
        else:
            loss = model(ids, **options).last_hidden_state.mean()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        del loss


def _infer(model: PreTrainedModel, ids: torch.Tensor, workload: Workload, live: LiveBytes) -> None:
    if workload.phase == "encode":
        model(ids)
        return
    if workload.phase == "prefill":
        model(ids, use_cache=False)
        return
    cache = DynamicCache(config=model.config)
    last = {"logits_to_keep": 1} if hasattr(model, "lm_head") else {}
    if workload.phase == "generate":
        model(ids, past_key_values=cache, use_cache=True, **last)
        if workload.new_tokens == 1:
            return
        between = workload.new_tokens - 2
    else:
        between = workload.seq_len + workload.new_tokens - 1
    if between:
        _fill(cache, model.config, workload, between)
    if workload.phase == "decode":
        live.start_over()
    model(ids[:, :1], past_key_values=cache, use_cache=True, **last)


def _fill(cache: DynamicCache, config: PretrainedConfig, workload: Workload, tokens: int) -> None:
    """Put `tokens` more tokens into each layer's cache."""
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    for layer in range(config.num_hidden_layers):
        shape = (workload.batch_size, config.num_key_value_heads, tokens, head_dim)
        cache.update(torch.zeros(shape), torch.zeros(shape), layer)


@contextlib.contextmanager
def _tensors(fake: bool) -> Iterator[None]:
    """True tensors on one thread, for threads would cost small ones more than they give; or fake ones.

    Fake tensors have no values, so transformers would assume packed sequences, which plain positions are not.
    """
    if not fake:
        threads = torch.get_num_threads()
        torch.set_num_threads(1)
        try:
            yield
        finally:
            torch.set_num_threads(threads)
        return
    with FakeTensorMode(), patch("transformers.masking_utils.find_packed_sequence_indices", lambda position_ids: None):
        yield


@contextlib.contextmanager
def _default_dtype(dtype: torch.dtype) -> Iterator[None]:
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)
