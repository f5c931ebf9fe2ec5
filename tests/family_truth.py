"""What transformers itself makes of a config: parameters by checkpoint name, and the FLOPs that PyTorch counts in one forward pass."""

from __future__ import annotations

import contextlib
import inspect
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
import transformers
from torch._subclasses.fake_tensor import DataDependentOutputException, FakeTensorMode, unset_fake_temporarily
from torch.utils.flop_counter import FlopCounterMode
from transformers import PretrainedConfig, PreTrainedModel

from lighten.model.families import describe
from lighten.model.spec import ModelSpec


@contextlib.contextmanager
def fake_tensors() -> Iterator[None]:
    """Tensors without memory. They have no values: transformers would assume packed sequences, which plain positions are not, and its
    truncated normal distributions would look at what they drew; weights that have no values are not drawn."""
    with (
        FakeTensorMode(allow_non_fake_inputs=True),
        patch("transformers.masking_utils.find_packed_sequence_indices", lambda position_ids: None),
        patch.object(PreTrainedModel, "initialize_weights", lambda self: None),
    ):
        yield


def build(config: PretrainedConfig, architecture: str) -> PreTrainedModel:
    """The module, in eval mode, with eager attention and batched experts, which PyTorch's counter sees in full."""
    for each in (config, *(value for value in vars(config).values() if isinstance(value, PretrainedConfig))):
        each._attn_implementation = "eager"
        each._experts_implementation = "batched_mm"
    model: PreTrainedModel = getattr(transformers, architecture)(config)
    return model.eval()


def build_fake(config: PretrainedConfig, architecture: str) -> PreTrainedModel:
    """The module on fake tensors; by way of the meta device where its constructor reads the values of a tensor (stochastic depth's rates)."""
    try:
        return build(config, architecture)
    except DataDependentOutputException:
        with unset_fake_temporarily(), torch.device("meta"):
            model = build(config, architecture)
    made: dict[int, torch.Tensor] = {}  # by the id of the one that it stands for: what modules share stays shared
    for store in (each for module in model.modules() for each in (module._parameters, module._buffers)):
        for name, tensor in store.items():
            if tensor is not None and id(tensor) not in made:
                empty = torch.empty_like(tensor, device="cpu")
                made[id(tensor)] = torch.nn.Parameter(empty) if isinstance(tensor, torch.nn.Parameter) else empty
            if tensor is not None:
                store[name] = made[id(tensor)]
    return model


def inputs(model: PreTrainedModel, batch: int, length: int) -> dict[str, torch.Tensor]:
    """What its forward takes: token ids of `length`, of an encoder-decoder for both sides; images or audio of its own size."""
    takes = inspect.signature(model.forward).parameters
    found: dict[str, torch.Tensor] = {}
    ids = torch.zeros(batch, length, dtype=torch.long)
    vision = getattr(model.config, "vision_config", model.config)
    if "input_features" in takes:
        found["input_features"] = torch.zeros(batch, *_features(model.config))
    elif "input_values" in takes:
        found["input_values"] = torch.zeros(batch, *_audio(model.config))
    elif "input_ids" in takes:
        found["input_ids"] = ids
    if "pixel_values" in takes and getattr(vision, "image_size", None):
        size = vision.image_size if isinstance(vision.image_size, list | tuple) else [vision.image_size] * 2
        frames = [vision.num_frames] if hasattr(vision, "num_frames") else []
        found["pixel_values"] = torch.zeros(batch, *frames, getattr(vision, "num_channels", 3), *size)
    if "decoder_input_ids" in takes:
        found["decoder_input_ids"] = ids
    return found


def _features(config: Any) -> tuple[int, int]:
    """Sizes of the longest audio that the model takes: mel bins and frames, or frames and features (Speech2Text)."""
    if hasattr(config, "input_feat_per_channel"):
        return config.max_source_positions, config.input_feat_per_channel * config.input_channels
    return config.num_mel_bins, 2 * config.max_source_positions


def _audio(config: Any) -> tuple[int, ...]:
    """Sizes of the longest audio that the model takes: frames and mel bins, or samples."""
    if hasattr(config, "num_mel_bins"):
        return config.max_length, config.num_mel_bins
    samples = config.max_position_embeddings
    for kernel, stride in ((3, 2), (7, 3), (127, 64)):  # Moonshine's convolutions, the last first
        samples = (samples - 1) * stride + kernel
    return (samples,)


def truth(config: PretrainedConfig, architecture: str, *, batch: int = 2, length: int = 24) -> tuple[dict[str, tuple[int, ...]], int]:
    """(parameter name → shape, a tied one once; matmul FLOPs of one forward pass without a cache)."""
    with fake_tensors():
        model = build_fake(config, architecture)
        given = inputs(model, batch, length)
        counter = FlopCounterMode(display=False)
        options: dict[str, Any] = {"use_cache": False} if "use_cache" in inspect.signature(model.forward).parameters else {}
        with torch.no_grad(), counter:
            model(**given, **options)
        return {name: tuple(parameter.shape) for name, parameter in model.named_parameters()}, counter.get_total_flops()


def save(config: PretrainedConfig, architecture: str, folder: Path) -> Path:
    """The folder that `save_pretrained` writes, random weights in it: its names are those of checkpoints."""
    torch.manual_seed(0)
    model = build(config, architecture)
    model.save_pretrained(folder)
    return folder


def spec_of(config: PretrainedConfig, architecture: str) -> ModelSpec:
    """What the formula makes of the config alone."""
    raw = config.to_dict()
    return ModelSpec(
        name=architecture, family=config.model_type, architecture=architecture, source="", dtype="float32",
        config=raw, parts=describe(raw, architecture),
    )  # fmt: skip
