"""PyTorch, operator by operator, on the CPU or a CUDA device."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from lighten.errors import RuntimeUnavailable
from lighten.formats.graph_inputs import encoder_inputs, encoder_outputs
from lighten.model.quantized.kv import KVFormat, read_kv_format
from lighten.model.spec import ModelSpec
from lighten.model.tasks import runs_with_head
from lighten.runtimes.session import Floats, Ids, Session, Setup, as_float32, without_head
from lighten.runtimes.speculate import Croppable


def version() -> str:
    import torch

    return str(torch.__version__)


def load(folder: Path, spec: ModelSpec, setup: Setup) -> Session:
    """A `transformers` module with scaled-dot-product attention.

    Raises:
        RuntimeUnavailable: no such device.
    """
    import torch

    from lighten.formats.torch_model import load_module

    require_device(setup.device)
    torch.set_num_threads(setup.threads)
    module = load_module(folder, spec, dtype=setup.dtype, attention="sdpa").to(setup.device)
    products: tuple[str, ...] = ()
    if setup.device == "cuda":
        from lighten.runtimes.cuda_products import put_cuda_products

        products = put_cuda_products(module, folder, spec)
    return TorchSession(module, read_kv_format(spec.config), spec, products)


def require_device(device: str) -> None:
    """Raises:
    RuntimeUnavailable: torch finds no such device.
    """
    import torch

    if device == "cuda" and not torch.cuda.is_available():
        raise RuntimeUnavailable(f"device=cuda: torch {torch.__version__} finds no CUDA device; leave device out to run on the CPU.")


def multiplies_bfloat16() -> bool:
    """Whether this CPU multiplies bfloat16 by instructions of its own; without them oneDNN does it in float32. Of others than x86 it is not asked."""
    import platform

    import torch

    x86 = platform.machine() in ("x86_64", "AMD64")
    return not x86 or bool(torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported())


class TorchSession(Croppable):
    """See `Session`. Where the config asks for a quantized cache, attention reads codes at every position, of a lone prompt too.

    What is given back lies on the CPU: it is there when the device has finished.

    Args:
        products: what linears multiply other than in the module's type: fp8, 2:4.
    """

    def __init__(self, module: Any, kv: KVFormat | None = None, spec: ModelSpec | None = None, products: tuple[str, ...] = ()) -> None:
        self.module = module
        self.body = module.base_model if spec is not None and runs_with_head(spec) else module
        self.spec = spec
        self.kv = kv
        self.products = products
        self.cache: Any = None

    def on_device(self, value: Ids) -> Any:
        """A tensor where the module is."""
        import torch

        return torch.from_numpy(value).to(self.module.device)

    @property
    def cache_bytes(self) -> int:
        """Bytes that the cache holds now."""
        from lighten.formats.quantized_cache import cache_bytes

        return 0 if self.cache is None else cache_bytes(self.cache)

    @property
    def precision(self) -> str:
        dtype = str(self.module.dtype).removeprefix("torch.")
        emulated = dtype == "bfloat16" and self.module.device.type == "cpu" and not multiplies_bfloat16()
        return ", ".join([dtype, *(["emulated"] if emulated else []), *(f"products of {kind}" for kind in self.products)])

    def encode(self, input_ids: Ids, attention_mask: Ids) -> Floats:
        import torch

        with torch.inference_mode():
            output = self.body(input_ids=self.on_device(input_ids), attention_mask=self.on_device(attention_mask))
        return as_float32(output.last_hidden_state)

    def classify(self, input_ids: Ids, attention_mask: Ids, token_type_ids: Ids) -> Floats:
        import torch

        if self.spec is None or not runs_with_head(self.spec):
            raise without_head("torch")
        inputs = encoder_inputs(self.spec, input_ids, attention_mask, token_type_ids)
        with torch.inference_mode():
            output = self.module(**{name: self.on_device(value) for name, value in inputs.items()})
        found = [as_float32(output[name]) for name in encoder_outputs(self.spec)[1:]]
        return found[0] if len(found) == 1 else np.stack(found, -1)

    def logits(self, input_ids: Ids) -> Floats:
        import torch

        with torch.inference_mode():
            ids, cache = self.on_device(input_ids), self._new_cache()
            return as_float32(self.module(input_ids=ids, past_key_values=cache, use_cache=cache is not None).logits)

    def prefill(self, input_ids: Ids) -> Floats:
        self.cache = self._new_cache()
        return self.decode(input_ids)

    def _new_cache(self) -> Any:
        """An empty cache of codes; None: the module's own."""
        from lighten.formats.quantized_cache import coded_cache

        return None if self.kv is None else coded_cache(self.module.config, self.kv)

    def decode(self, input_ids: Ids) -> Floats:
        return self._step(input_ids, logits_to_keep=1)[:, -1]

    def verify(self, input_ids: Ids) -> Floats:
        return self._step(input_ids)

    def crop(self, length: int) -> None:
        self.cache.crop(min(length - self.cache.get_seq_length(), 0))

    def _step(self, input_ids: Ids, **options: int) -> Floats:
        import torch

        with torch.inference_mode():
            output = self.module(input_ids=self.on_device(input_ids), past_key_values=self.cache, use_cache=True, **options)
        self.cache = output.past_key_values
        return as_float32(output.logits)
