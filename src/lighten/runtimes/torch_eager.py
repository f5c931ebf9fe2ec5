"""PyTorch, operator by operator."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from lighten.model.spec import ModelSpec
from lighten.runtimes.session import Floats, Ids, Session, Setup, as_float32


def version() -> str:
    import torch

    return str(torch.__version__)


def load(folder: Path, spec: ModelSpec, setup: Setup) -> Session:
    """A `transformers` module with scaled-dot-product attention."""
    import torch

    from lighten.formats.torch_model import load_module

    torch.set_num_threads(setup.threads)
    return TorchSession(load_module(folder, spec, dtype=setup.dtype, attention="sdpa"))


class TorchSession:
    """See `Session`."""

    def __init__(self, module: Any) -> None:
        self.module = module
        self._cache: Any = None

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
            return as_float32(self.module(input_ids=torch.from_numpy(input_ids), use_cache=False).logits)

    def prefill(self, input_ids: Ids) -> Floats:
        self._cache = None
        return self.decode(input_ids)

    def decode(self, input_ids: Ids) -> Floats:
        import torch

        with torch.inference_mode():
            output = self.module(input_ids=torch.from_numpy(input_ids), past_key_values=self._cache, use_cache=True, logits_to_keep=1)
        self._cache = output.past_key_values
        return as_float32(output.logits[:, -1])
