"""The module of a checkpoint without its weights, and where each tensor of the checkpoint belongs in it.

Weights come in and go out block by block, so that a model is run that does not fit in memory. The module is the `transformers` class that
the config names; names and layouts that the class does not share with its checkpoint follow that library's own conversion.

Shape legend: O rows (output features), I columns (input features).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from copy import deepcopy
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from lighten.compress.low_rank_module import put_low_rank
from lighten.errors import UnsupportedFamily

Source = Callable[[str], Tensor]
"""A checkpoint tensor's name → its value as the steps before left it."""


@dataclass(frozen=True, kw_only=True)
class Place:
    """Where a tensor of the checkpoint lies in the module.

    Attributes:
        key: the parameter or buffer, as `state_dict` names it.
        region: the slice of it that the tensor fills, one for each dimension; None: all of it.
    """

    key: str
    region: tuple[slice, ...] | None = None

    def of(self, parameter: Tensor) -> Tensor:
        """The view that the tensor fills, in the tensor's own shape."""
        if self.region is None:
            return parameter
        found = parameter[self.region]
        return found.squeeze(0) if found.ndim == 3 and found.shape[0] == 1 else found


@dataclass(frozen=True, kw_only=True)
class Unit:
    """A part of the model whose weights are in memory together: a block, or a linear outside of the blocks."""

    name: str
    module: nn.Module


class Skeleton:
    """A module on the meta device whose weights are loaded and dropped by unit.

    Args:
        config: the content of a `config.json`.
        tensors: names and shapes of the checkpoint.

    Raises:
        UnsupportedFamily: `transformers` has no class for it, or lays its weights out in a way that cannot be followed.
    """

    def __init__(self, config: Mapping[str, Any], tensors: Mapping[str, tuple[int, ...]], *, dtype: torch.dtype) -> None:
        self.dtype = dtype
        self.module = build_module(config, dtype=dtype)
        self._keys: dict[str, list[tuple[nn.Module, str]]] = {}
        for prefix, module in self.module.named_modules():
            for name in [*module._parameters, *module._buffers]:
                self._keys[f"{prefix}.{name}" if prefix else name] = [(module, name)]
        self._tie()
        computed = set(self.module._keys_to_ignore_on_save or ())
        self.places = {name: place for name, place in find_places(self.module, tensors).items() if place.key not in computed}
        self._tensors: dict[str, list[str]] = {}
        for name, place in self.places.items():
            self._tensors.setdefault(place.key, []).append(name)
        self.units = tuple(find_units(self.module))

    def load(self, module: nn.Module, source: Source) -> None:
        """Put the weights of a module and its submodules in memory."""
        for key in self._keys_of(module):
            if self._tensors.get(key) and self.value(key).is_meta:
                self._fill(key, source)

    def load_own(self, module: nn.Module, source: Source) -> None:
        """Put the weights of a module, but not of its submodules, in memory."""
        for key, owners in self._keys.items():
            if self._tensors.get(key) and any(owner is module for owner, _ in owners) and self.value(key).is_meta:
                self._fill(key, source)

    def drop(self, module: nn.Module) -> None:
        """Give the memory of a module's weights back; tied weights that another place has stay there."""
        inside = {id(part) for part in module.modules()}
        for key in self._keys_of(module):
            if self._tensors.get(key) and all(id(owner) in inside for owner, _ in self._keys[key]):
                self._set(key, torch.empty_like(self.value(key), device="meta"))

    def value(self, key: str) -> Tensor:
        """A parameter or buffer by its `state_dict` name."""
        module, name = self._keys[key][0]
        found = module._parameters.get(name)
        return module._buffers[name] if found is None else found  # type: ignore[return-value]

    def view(self, name: str) -> Tensor:
        """What a checkpoint tensor is in the module now; writing to it changes the module."""
        place = self.places[name]
        return place.of(self.value(place.key)).detach()

    def names_in(self, module: nn.Module) -> list[str]:
        """Checkpoint tensors of a module and its submodules."""
        return [name for key in self._keys_of(module) for name in self._tensors.get(key, ())]

    def outside(self) -> Iterator[nn.Module]:
        """Modules outside of all units that have weights of their own."""
        inside = {id(module) for unit in self.units for module in unit.module.modules()}
        for module in self.module.modules():
            if id(module) not in inside and (module._parameters or module._buffers):
                yield module

    def _keys_of(self, module: nn.Module) -> Iterator[str]:
        wanted = {id(m) for m in module.modules()}
        yield from (key for key, owners in self._keys.items() if any(id(owner) in wanted for owner, _ in owners))

    def _tie(self) -> None:
        """One entry for what several modules share."""
        seen: dict[int, str] = {}
        for key, owners in list(self._keys.items()):
            module, name = owners[0]
            parameter = module._parameters.get(name)
            if parameter is None:
                continue
            first = seen.setdefault(id(parameter), key)
            if first != key:
                self._keys[first] += owners
                del self._keys[key]

    def _fill(self, key: str, source: Source) -> None:
        current = self.value(key)
        dtype = self.dtype if current.is_floating_point() else current.dtype
        names = self._tensors[key]
        if len(names) == 1 and self.places[names[0]].region is None:
            self._set(key, source(names[0]).to(dtype).reshape(current.shape))
            return
        value = torch.empty(current.shape, dtype=dtype)
        for name in names:
            self.places[name].of(value).copy_(source(name))
        self._set(key, value)

    def _set(self, key: str, value: Tensor) -> None:
        owners = self._keys[key]
        parameter = nn.Parameter(value, requires_grad=False)
        for module, name in owners:
            if name in module._parameters:
                module._parameters[name] = parameter
            else:
                module._buffers[name] = value


def build_module(config: Mapping[str, Any], *, dtype: torch.dtype) -> Any:
    """The class that a config names, in eval mode, parameters without memory, buffers that no checkpoint holds with their values.

    Raises:
        UnsupportedFamily: `transformers` has no such class, or cannot read the config.
    """
    import transformers

    transformers.logging.set_verbosity_error()  # type: ignore[no-untyped-call]
    kinds = transformers.CONFIG_MAPPING
    if config.get("model_type") not in kinds:
        raise UnsupportedFamily(f"transformers has no model_type {config.get('model_type')!r}; its weights cannot be run, which this recipe needs.")
    try:
        known = kinds[config["model_type"]].from_dict({key: value for key, value in config.items() if key != "quantization_config"})
    except (ValueError, KeyError, TypeError) as error:
        raise UnsupportedFamily(f"transformers cannot read the config ({str(error).splitlines()[0]}).") from error
    known.use_cache = False  # a pass over a whole text; what it would keep, recomputation would meet again
    named = next(iter(known.architectures or ()), None)
    kind = getattr(transformers, named, None) if named else None
    if kind is None:
        raise UnsupportedFamily(f"transformers has no class {named}; its weights cannot be run, so no step that looks at text can be done.")
    with torch.device("meta"):
        module = kind._from_config(known, dtype=dtype, attn_implementation="sdpa" if kind._supports_sdpa else "eager", experts_implementation="eager")
    put_low_rank(module, config)
    module.tie_weights()
    for part in module.modules():
        for name in part._non_persistent_buffers_set:
            buffer = part._buffers[name]
            if buffer is not None and buffer.is_meta:
                part._buffers[name] = torch.zeros(buffer.shape, dtype=buffer.dtype)
    for key in module._keys_to_ignore_on_save or ():  # tables of positions that are computed, and that no checkpoint needs: Marian's
        owner, _, name = key.rpartition(".")
        part = module.get_submodule(owner)
        part._parameters[name] = nn.Parameter(torch.zeros(part._parameters[name].shape, dtype=dtype), requires_grad=False)
    with torch.no_grad():
        module.initialize_weights()
    return module.eval()


def main_input(architecture: str | None) -> str | None:
    """Name of the first input of a class of `transformers`, `input_ids` where it reads text; None: no such class."""
    import transformers

    kind = getattr(transformers, architecture or "", None)
    return str(kind.main_input_name) if kind is not None else None


def find_units(module: nn.Module) -> Iterator[Unit]:
    """The blocks, which are the items of the outermost lists of modules that hold matrices, and every other module with a matrix of its own
    that is no embedding, such as a head or a pooler."""

    def walk(parent: nn.Module, prefix: str) -> Iterator[Unit]:
        for name, child in parent.named_children():
            path = f"{prefix}.{name}" if prefix else name
            if isinstance(parent, nn.ModuleList) or (not list(child.children()) and _has_matrix(child)):
                if _has_matrix(child) and not isinstance(child, nn.Embedding):
                    yield Unit(name=path, module=child)
            else:
                yield from walk(child, path)

    yield from walk(module, "")


def _has_matrix(module: nn.Module) -> bool:
    return any(
        parameter.ndim >= 2
        for part in module.modules()
        if not isinstance(part, nn.Embedding)
        for parameter in part._parameters.values()
        if parameter is not None
    )


def find_places(module: Any, tensors: Mapping[str, tuple[int, ...]]) -> dict[str, Place]:
    """Where each tensor of a checkpoint belongs; those that the class has no use for are left out.

    Args:
        tensors: names and shapes of the checkpoint.

    Raises:
        UnsupportedFamily: a layout that cannot be followed.
    """
    from transformers.conversion_mapping import get_model_conversion_mapping
    from transformers.core_model_loading import WeightConverter, rename_source_key

    known = module.state_dict()
    mapping = get_model_conversion_mapping(module)
    renamings: Any = [entry for entry in mapping if not isinstance(entry, WeightConverter)]
    converters = [entry for entry in mapping if isinstance(entry, WeightConverter)]
    places: dict[str, Place] = {}
    merged: dict[str, list[tuple[str, str]]] = {}
    for name in sorted(tensors, key=_natural):
        key, pattern = rename_source_key(name, renamings, converters, module.base_model_prefix, known)
        if key not in known and name in known:
            key, pattern = rename_source_key(name, [], [], module.base_model_prefix, known)
        if key not in known:
            continue
        if pattern is None:
            places[name] = Place(key=key)
        else:
            merged.setdefault(key, []).append((name, pattern))
    for key, found in merged.items():
        places |= _merged_places(module, key, found, tensors, converters)
    return places


def _merged_places(
    module: Any, key: str, found: list[tuple[str, str]], tensors: Mapping[str, tuple[int, ...]], converters: Iterable[Any]
) -> dict[str, Place]:
    """The regions of one parameter that several tensors fill, found by converting labels in the tensors' place."""
    converter = deepcopy(next(entry for entry in converters if found[0][1] in entry.source_patterns))
    for label, (name, pattern) in enumerate(found):
        converter.add_tensor(key, name, pattern, torch.full((1,) * len(tensors[name]), label, dtype=torch.int16).expand(tensors[name]))
    made = converter.convert(key, model=module, config=module.config).get(key)
    made = made[0] if isinstance(made, list) else made
    if made is None or made.shape != module.state_dict()[key].shape:
        raise UnsupportedFamily(f"{key} is made from {found[0][0]} and others in a way that cannot be followed tensor by tensor.")
    places = {}
    for label, (name, _) in enumerate(found):
        where = (made == label).nonzero()
        low, high = where.amin(0).tolist(), (where.amax(0) + 1).tolist()
        region = tuple(slice(a, b) for a, b in zip(low, high, strict=True))
        shape = tuple(b - a for a, b in zip(low, high, strict=True))
        if len(where) != torch.Size(shape).numel() or shape[-len(tensors[name]) :] != tuple(tensors[name]):
            raise UnsupportedFamily(f"{name} becomes a part of {key} that is not a block of rows and columns; it cannot be followed.")
        places[name] = Place(key=key, region=region)
    return places


def _natural(name: str) -> list[tuple[int, int | str]]:
    return [(0, int(piece)) if piece.isdigit() else (1, piece) for piece in name.split(".")]
