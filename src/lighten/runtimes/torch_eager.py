"""PyTorch, operator by operator."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from lighten.model.quantized.kv import KVFormat, read_kv_format
from lighten.model.spec import ModelSpec
from lighten.runtimes.session import Floats, Ids, Session, Setup, as_float32
from lighten.runtimes.speculate import Croppable


def version() -> str:
    import torch

    return str(torch.__version__)


def load(folder: Path, spec: ModelSpec, setup: Setup) -> Session:
    """A `transformers` module with scaled-dot-product attention."""
    import torch

    from lighten.formats.torch_model import load_module

    torch.set_num_threads(setup.threads)
    return TorchSession(load_module(folder, spec, dtype=setup.dtype, attention="sdpa"), read_kv_format(spec.config))


class TorchSession(Croppable):
    """See `Session`. Where the config asks for a quantized cache, attention reads codes at every position, of a lone prompt too."""

    def __init__(self, module: Any, kv: KVFormat | None = None) -> None:
        self.module = module
        self._kv = kv
        self._cache: Any = None

    @property
    def cache_bytes(self) -> int:
        """Bytes that the cache holds now."""
        from lighten.formats.quantized_cache import cache_bytes

        return 0 if self._cache is None else cache_bytes(self._cache)

    @property
    def precision(self) -> str:
        return str(self.module.dtype).removeprefix("torch.")

    def encode(self, input_ids: Ids, attention_mask: Ids) -> Floats:
        import torch

        with torch.inference_mode():
            output = self.module(input_ids=torch.from_numpy(input_ids), attention_mask=torch.from_numpy(attention_mask))
        return as_float32(output.last_hidden_state)

    def logits(self, input_ids: Ids) -> Floats:
        import torch

        with torch.inference_mode():
            ids, cache = torch.from_numpy(input_ids), self._new_cache()
            return as_float32(self.module(input_ids=ids, past_key_values=cache, use_cache=cache is not None).logits)

    def prefill(self, input_ids: Ids) -> Floats:
        self._cache = self._new_cache()
        return self.decode(input_ids)

    def _new_cache(self) -> Any:
        """An empty cache of codes; None: the module's own."""
        from lighten.formats.quantized_cache import coded_cache

        return None if self._kv is None else coded_cache(self.module.config, self._kv)

    def decode(self, input_ids: Ids) -> Floats:
        return self._step(input_ids, logits_to_keep=1)[:, -1]

    def verify(self, input_ids: Ids) -> Floats:
        return self._step(input_ids)

    def crop(self, length: int) -> None:
        self._cache.crop(min(length - self._cache.get_seq_length(), 0))

    def _step(self, input_ids: Ids, **options: int) -> Floats:
        import torch

        with torch.inference_mode():
            output = self.module(input_ids=torch.from_numpy(input_ids), past_key_values=self._cache, use_cache=True, **options)
        self._cache = output.past_key_values
        return as_float32(output.logits)
