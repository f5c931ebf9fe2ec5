"""A model folder as a `transformers` module, ready to run or to export."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor

from lighten.compress.fake_quant import simulate_activations
from lighten.compress.low_rank_module import put_low_rank
from lighten.compress.skeleton import find_places
from lighten.errors import ModelError, UnsupportedFamily
from lighten.formats.safetensors_folder import StoredWeights
from lighten.model.low_rank import CORRECTION, RANKS, UP, is_low_rank
from lighten.model.quantized.masked import SPARSITY_CONFIG
from lighten.model.read import weight_files
from lighten.model.spec import Linear, ModelSpec
from lighten.model.tasks import runs_with_head


def load_module(folder: Path, spec: ModelSpec, *, dtype: str, attention: str) -> Any:
    """The module in eval mode, its weights in `dtype`: a decoder with its head, an encoder with a head that classifies or answers, the body of
    one with another head, else the class that its config names. Quantized weights are expanded; quantized activations are simulated as
    `compressed-tensors` does.

    Raises:
        ModelError: a decoder without a language-model head; `transformers` would give it a random one.
        UnsupportedFamily: a class that `transformers` has not.
    """
    import transformers

    if spec.is_decoder and not any(part.component == "head" for part in spec.parts):
        raise ModelError(f"{folder}: {spec.architecture} has no language-model head, so it gives no logits and cannot be run here.")

    transformers.logging.set_verbosity_error()  # type: ignore[no-untyped-call]
    transformers.logging.disable_progress_bar()  # type: ignore[no-untyped-call]
    whole = spec.is_encoder_decoder or runs_with_head(spec)
    kind = transformers.AutoModelForCausalLM if spec.is_decoder else named_class(spec) if whole else transformers.AutoModel
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


def run_encoder(module: Any, inputs: Mapping[str, Tensor]) -> tuple[Tensor, Any]:
    """(last hidden state, all that comes out) of an encoder with its head or without."""
    body, seen = module.base_model, []
    handle = body.register_forward_hook(lambda _, __, output: seen.append(output))
    try:
        output = module(**inputs)
    finally:
        handle.remove()
    hidden: Tensor = seen[0].last_hidden_state
    return hidden, output


_OURS = ("quantization_config", SPARSITY_CONFIG, RANKS, CORRECTION)
"""What a config says of weights that its class does not store as they lie in the files."""


def _load(folder: Path, spec: ModelSpec, kind: Any, *, dtype: str, attention: str) -> Any:
    import transformers

    torch_dtype: torch.dtype = getattr(torch, dtype)
    ranks: dict[str, int] = spec.config.get(RANKS, {})
    if not any(spec.config.get(key) for key in _OURS):
        loaded = kind.from_pretrained(folder, dtype=torch_dtype, attn_implementation=attention, use_safetensors=True, local_files_only=True)
        return loaded.eval()
    known = transformers.CONFIG_MAPPING[spec.config["model_type"]]
    config = known.from_dict({key: value for key, value in spec.config.items() if key not in _OURS})
    config.dtype = torch_dtype
    stored = StoredWeights(folder, spec)
    weights: dict[str, Any] = {name: _Unread(stored, name) for name in _whole(stored.names, spec)}
    weights |= {f"{name}.bias": _Unread(stored, f"{name}.{UP}.bias") for name in ranks if f"{name}.{UP}.bias" in stored.names}
    with torch.device("meta"):
        empty = kind.from_config(config) if hasattr(kind, "from_config") else kind._from_config(config)
    model_class, state = type(empty), empty.state_dict()
    for name, place in find_places(empty, {f"{name}.weight": (1, 1) for name in ranks}).items():
        weights[name] = torch.zeros(()).expand(state[place.key].shape)  # exchanged once the class is filled
    module = model_class.from_pretrained(None, config=config, state_dict=weights, dtype=torch_dtype, attn_implementation=attention).eval()
    _fill_low_rank(module, spec, stored)
    simulate_activations(module, spec, input_scales(folder, spec))
    return module


def _whole(names: Iterable[str], spec: ModelSpec) -> Iterator[str]:
    """Those of the tensors that a class of `transformers` has."""
    own = {name for part in spec.parts if is_low_rank(part, spec.config) for name in part.tensors()}
    return (name for name in names if name not in own and not name.endswith(".input_scale"))


def _fill_low_rank(module: Any, spec: ModelSpec, stored: StoredWeights) -> None:
    """Exchange the linears that a config names, and put the stored factors in."""
    put_low_rank(module, spec.config)
    own = {name for part in spec.parts if is_low_rank(part, spec.config) for name in part.tensors()}
    state = module.state_dict()
    for name, place in find_places(module, dict.fromkeys(own, (1, 1))).items():
        place.of(state[place.key]).copy_(stored.expanded(name))


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
