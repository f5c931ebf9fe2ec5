"""A model folder as a `transformers` module, ready to run or to export."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from lighten.errors import ModelError
from lighten.formats.safetensors_folder import expanded_weights
from lighten.model.spec import ModelSpec


def load_module(folder: Path, spec: ModelSpec, *, dtype: str, attention: str) -> Any:
    """The module in eval mode, its weights in `dtype`: a decoder with its head, an encoder's body without a task head.

    Raises:
        ModelError: a decoder without a language-model head; `transformers` would give it a random one.
    """
    import transformers

    if spec.is_decoder and not any(part.component == "head" for part in spec.parts):
        raise ModelError(f"{folder}: {spec.architecture} has no language-model head, so it gives no logits and cannot be run here.")

    transformers.logging.set_verbosity_error()  # type: ignore[no-untyped-call]
    transformers.logging.disable_progress_bar()  # type: ignore[no-untyped-call]
    kind = transformers.AutoModelForCausalLM if spec.is_decoder else transformers.AutoModel
    torch_dtype: torch.dtype = getattr(torch, dtype)
    if "quantization_config" not in spec.config:
        loaded = kind.from_pretrained(folder, dtype=torch_dtype, attn_implementation=attention, use_safetensors=True, local_files_only=True)
        return loaded.eval()
    config = transformers.AutoConfig.from_pretrained(folder, local_files_only=True)
    del config.quantization_config
    config.dtype = torch_dtype
    weights = {name: tensor.to(torch_dtype) for name, tensor in expanded_weights(folder, spec)}
    with torch.device("meta"):
        model_class = type(kind.from_config(config))  # type: ignore[no-untyped-call]
    return model_class.from_pretrained(None, config=config, state_dict=weights, dtype=torch_dtype, attn_implementation=attention).eval()
