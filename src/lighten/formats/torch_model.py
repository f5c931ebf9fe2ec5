"""A model folder as a `transformers` module, ready to run or to export."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor

from lighten.compress.fake_quant import simulate_activations
from lighten.errors import ModelError, UnsupportedFamily
from lighten.formats.safetensors_folder import StoredWeights
from lighten.model.quantized.masked import SPARSITY_CONFIG
from lighten.model.read import weight_files
from lighten.model.spec import Linear, ModelSpec


def load_module(folder: Path, spec: ModelSpec, *, dtype: str, attention: str) -> Any:
    """The module in eval mode, its weights in `dtype`: a decoder with its head, an encoder's body without a task head, else the class that its
    config names. Quantized weights are expanded; quantized activations are simulated as `compressed-tensors` does.

    Raises:
        ModelError: a decoder without a language-model head; `transformers` would give it a random one.
        UnsupportedFamily: a class that `transformers` has not.
    """
    import transformers

    if spec.is_decoder and not any(part.component == "head" for part in spec.parts):
        raise ModelError(f"{folder}: {spec.architecture} has no language-model head, so it gives no logits and cannot be run here.")

    transformers.logging.set_verbosity_error()  # type: ignore[no-untyped-call]
    transformers.logging.disable_progress_bar()  # type: ignore[no-untyped-call]
    kind = transformers.AutoModelForCausalLM if spec.is_decoder else named_class(spec) if spec.is_encoder_decoder else transformers.AutoModel
    return _load(folder, spec, kind, dtype=dtype, attention=attention)


def load_any(folder: Path, spec: ModelSpec, *, dtype: str, attention: str = "eager") -> Any:
    """The class that a folder's config names, loaded like `load_module`'s.

    Raises:
        UnsupportedFamily: `transformers` has no such class.
    """
    import transformers

    transformers.logging.set_verbosity_error()  # type: ignore[no-untyped-call]
    transformers.logging.disable_progress_bar()  # type: ignore[no-untyped-call]
    return _load(folder, spec, named_class(spec), dtype=dtype, attention=attention)


def named_class(spec: ModelSpec) -> Any:
    """The class of `transformers` that a spec's config names.

    Raises:
        UnsupportedFamily: it has none of that name.
    """
    import transformers

    found = getattr(transformers, spec.architecture, None)
    if found is None:
        raise UnsupportedFamily(f"{spec.source}: transformers has no class {spec.architecture}, so its weights cannot be run here.")
    return found


def _load(folder: Path, spec: ModelSpec, kind: Any, *, dtype: str, attention: str) -> Any:
    import transformers

    torch_dtype: torch.dtype = getattr(torch, dtype)
    if "quantization_config" not in spec.config and SPARSITY_CONFIG not in spec.config:
        loaded = kind.from_pretrained(folder, dtype=torch_dtype, attn_implementation=attention, use_safetensors=True, local_files_only=True)
        return loaded.eval()
    config = transformers.AutoConfig.from_pretrained(folder, local_files_only=True)
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    config.dtype = torch_dtype
    stored = StoredWeights(folder, spec)
    weights = {name: _Unread(stored, name) for name in stored.names if not name.endswith(".input_scale")}
    with torch.device("meta"):
        model_class = type(kind.from_config(config)) if hasattr(kind, "from_config") else kind
    module = model_class.from_pretrained(None, config=config, state_dict=weights, dtype=torch_dtype, attn_implementation=attention).eval()
    simulate_activations(module, spec, input_scales(folder, spec))
    return module


class _Unread:
    """A weight that is expanded when `transformers` takes it by `[...]`, as it takes the slices of a safetensors file: one copy of it is held."""

    def __init__(self, stored: StoredWeights, name: str) -> None:
        self._stored, self._name = stored, name

    def __getitem__(self, index: Any) -> Tensor:
        return self._stored.expanded(self._name)[index]


def input_scales(folder: Path, spec: ModelSpec) -> dict[str, Tensor]:
    """The scale of the static activations of each linear that has them, [1], by the linear's name."""
    wanted = {f"{part.name}.input_scale" for part in spec.parts if isinstance(part, Linear) and part.weight.activations == "static"}
    found: dict[str, Tensor] = {}
    for file in weight_files(folder) if wanted else ():
        with safe_open(file, framework="pt") as opened:
            found |= {name.removesuffix(".input_scale"): opened.get_tensor(name) for name in wanted & set(opened.keys())}
    return found
