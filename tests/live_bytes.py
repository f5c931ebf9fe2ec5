"""The memory oracle: every storage's birth and death in a real PyTorch run of a transformers model, on fake tensors or true ones."""

from __future__ import annotations

import contextlib
import inspect
import weakref
from collections.abc import Iterable, Iterator
from typing import Any
from unittest.mock import patch

import torch
import transformers
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import DynamicCache, EncoderDecoderCache, PretrainedConfig, PreTrainedModel

from lighten.cost.workload import Workload

OPTIMIZERS = {
    "adamw": torch.optim.AdamW,
    "adam": torch.optim.Adam,
    "sgd": torch.optim.SGD,
    "sgd-momentum": lambda parameters: torch.optim.SGD(parameters, lr=0.1, momentum=0.9),
    "adagrad": torch.optim.Adagrad,
    "rmsprop": torch.optim.RMSprop,
    "adafactor": torch.optim.Adafactor,
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
        if func is torch.ops.aten.add.Tensor and torch._C._current_graph_task_id() != -1 and not torch.is_grad_enabled():
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
        A sum of a recomputed forward pass is none of these: there gradients are recorded.
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
    with _tensors(fake), _default_dtype(getattr(torch, workload.dtype)):
        model = _built(config, workload)
        with live:
            live.watch(model.parameters(), "parameter")
            live.watch(model.buffers(), "buffer")
            _run(model, workload, live)
    return live


def run_untracked(config: PretrainedConfig, workload: Workload) -> None:
    """The same run on true tensors, with no observer."""
    with _tensors(fake=False), _default_dtype(getattr(torch, workload.dtype)):
        _run(_built(config, workload), workload, LiveBytes())


def _built(config: PretrainedConfig, workload: Workload) -> PreTrainedModel:
    made = getattr(transformers, config.architectures[0])
    for each in (config, *(value for value in vars(config).values() if isinstance(value, PretrainedConfig))):
        each._attn_implementation = "sdpa" if workload.attention != "eager" and made._supports_sdpa else "eager"
    return made(config)


def _run(model: PreTrainedModel, workload: Workload, live: LiveBytes) -> None:
    if workload.phase == "train":
        _train(model, workload, live)
        return
    model.eval()
    with torch.no_grad():
        _infer(model, workload, live)


def sources(model: PreTrainedModel, workload: Workload, tokens: int) -> dict[str, torch.Tensor]:
    """What goes into a model: token ids, an image or a recording's frames of the model's own size, or several of them."""
    config, takes = model.config, inspect.signature(model.forward).parameters
    made: dict[str, torch.Tensor] = {}
    if "input_features" in takes:
        made["input_features"] = torch.zeros(workload.batch_size, config.num_mel_bins, 2 * config.max_source_positions)
    elif "input_ids" in takes:
        made["input_ids"] = torch.zeros(workload.batch_size, tokens, dtype=torch.long)
    if "pixel_values" in takes:
        vision = getattr(config, "vision_config", config)
        made["pixel_values"] = torch.zeros(workload.batch_size, vision.num_channels, vision.image_size, vision.image_size)
    return made


def _train(model: PreTrainedModel, workload: Workload, live: LiveBytes) -> None:
    model.train()
    if workload.recompute == "full":
        model.activation_checkpointing_enable()
    optimizer = OPTIMIZERS[workload.optimizer or ""](model.parameters())
    given: dict[str, Any] = dict(sources(model, workload, workload.seq_len))
    given |= _targets(model, workload, given)
    live.watch([value for value in given.values() if isinstance(value, torch.Tensor)], "inputs")
    if "use_cache" in inspect.signature(model.forward).parameters:
        given["use_cache"] = False
    for _ in range(2):
        live.start_over()
        made = model(**given)
        loss = made.loss if "labels" in given or "return_loss" in given else made.last_hidden_state.mean()
        del made
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        del loss


def _targets(model: PreTrainedModel, workload: Workload, given: dict[str, torch.Tensor]) -> dict[str, Any]:
    """Labels, or what else makes the model's own loss; the decoder's input where it has none."""
    takes, architecture = inspect.signature(model.forward).parameters, model.config.architectures[0]
    target = torch.zeros(workload.batch_size, getattr(workload, "target_len", None) or workload.seq_len, dtype=torch.long)
    if "return_loss" in takes:
        return {"return_loss": True}
    if "labels" not in takes:
        return {"decoder_input_ids": target} if model.config.is_encoder_decoder else {}
    if model.config.is_encoder_decoder:
        return {"labels": target}
    if "input_ids" not in given:
        return {"labels": target[:, 0]}
    return {"labels": given["input_ids"][:, 0] if "SequenceClassification" in architecture else given["input_ids"]}


def _infer(model: PreTrainedModel, workload: Workload, live: LiveBytes) -> None:
    if model.config.is_encoder_decoder:
        _translate(model, workload, live)
        return
    ids = sources(model, workload, 1 if workload.phase == "decode" else workload.seq_len)
    live.watch(ids.values(), "ids")
    if workload.phase in ("encode", "prefill"):
        model(**ids, **({"use_cache": False} if workload.phase == "prefill" else {}))
        return
    given = ids["input_ids"]
    cache, name = DynamicCache(config=model.config), "cache_params" if model.config.model_type == "mamba" else "past_key_values"
    last = {"logits_to_keep": 1} if hasattr(model, "lm_head") else {}
    if workload.phase == "generate":
        model(given, use_cache=True, **{name: cache}, **last)
        if workload.new_tokens == 1:
            return
        between = workload.new_tokens - 2
    else:
        between = workload.seq_len + workload.new_tokens - 1
        if name == "cache_params":  # its state has one size, however many tokens it stands for
            model(given, use_cache=True, **{name: cache}, **last)
    if between and name != "cache_params":
        if between > 1:
            _fill(cache, model.config, workload, between - 1)
        model(given[:, :1], use_cache=True, **{name: cache}, **last)  # after which a window's layers have no more than the window
    if workload.phase == "decode":
        live.start_over()
    model(given[:, :1], use_cache=True, **{name: cache}, **last)


def _translate(model: PreTrainedModel, workload: Workload, live: LiveBytes) -> None:
    """Encode a source and give the first token; then the last of the tokens, with the cache and the encoder's output at hand."""
    given = sources(model, workload, workload.seq_len)
    prompt = workload.seq_len if "input_features" in given else 1
    first = torch.zeros(workload.batch_size, prompt, dtype=torch.long)
    live.watch([*given.values(), first], "ids")
    if workload.phase == "prefill":
        model(**given, decoder_input_ids=first, use_cache=False)
        return
    cache = EncoderDecoderCache(DynamicCache(config=model.config), DynamicCache(config=model.config))
    encoded = model.get_encoder()(*given.values())
    model(encoder_outputs=encoded, decoder_input_ids=first, past_key_values=cache, use_cache=True)
    between = workload.new_tokens - (2 if workload.phase == "generate" or prompt == 1 else 1)
    if between < 0:
        return
    if between:
        _fill(cache.self_attention_cache, model.config, workload, between)
    if workload.phase == "decode":
        live.start_over()
    model(encoder_outputs=encoded, decoder_input_ids=first[:, :1], past_key_values=cache, use_cache=True)


def _fill(cache: DynamicCache, config: PretrainedConfig, workload: Workload, tokens: int) -> None:
    """Put `tokens` more tokens into each layer's cache."""
    whole = config.num_attention_heads
    width = getattr(config, "d_kv", None) or getattr(config, "head_dim", None) or config.hidden_size // whole
    heads = getattr(config, "num_key_value_heads", None) or getattr(config, "decoder_attention_heads", None) or whole
    layers = getattr(config, "decoder_layers", None) or getattr(config, "num_decoder_layers", None) or config.num_hidden_layers
    for layer in range(layers):
        shape = (workload.batch_size, heads, tokens, width)
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
