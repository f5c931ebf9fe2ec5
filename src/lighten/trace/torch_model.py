"""Follow a transformers model from its config alone: built on fake tensors, run once, no weight loaded.

Inputs have no padding. Attention is eager or SDPA as the workload says; "flash" is SDPA that never falls back to a score matrix. Experts
run as transformers runs them by default (grouped products); data-dependent routing is taken as `num_experts_per_tok` for each token.
"""

from __future__ import annotations

import contextlib
import hashlib
import inspect
import json
from collections.abc import Iterator, Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any
from unittest.mock import patch

import torch
from torch._subclasses.fake_tensor import DataDependentOutputException, unset_fake_temporarily

from lighten.cost.workload import Workload
from lighten.errors import ModelError, TraceError, WorkloadError
from lighten.model.low_rank import CORRECTION, RANKS
from lighten.trace.program import Program
from lighten.trace.torch_run import CACHES, Batch, Run, follow_run

if TYPE_CHECKING:
    from transformers import PretrainedConfig

EXPERTS = ("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts")
EXPERTS_PER_TOKEN = ("num_experts_per_tok", "num_experts_per_token", "moe_k", "moe_top_k", "top_k_experts")
"""What configs call the experts of a layer, and those that a token is routed to."""


class TransformersModel:
    """A config and the class that computes it, as `lighten.trace.program.Followed`.

    Args:
        config: a transformers config, or the content of a `config.json`.
        architecture: the class's name; None: the first of `config.architectures`.

    Raises:
        ModelError: no such class, or the config does not make one.
    """

    def __init__(  # noqa: PLR0913 - all but the first name or place the config
        self, config: PretrainedConfig | Mapping[str, Any], architecture: str | None = None, *,
        name: str = "", source: str = "", dtype: str | None = None, folder: Path | None = None, trust_remote_code: bool = False,
    ) -> None:  # fmt: skip
        import transformers

        if isinstance(config, Mapping) and (config.get(RANKS) or config.get(CORRECTION)):
            raise TraceError(f"{source or name}: its linears are exchanged for factors, which its class has not; a formula describes it.")
        self.config = config if isinstance(config, transformers.PretrainedConfig) else _config(config, folder, trust_remote_code)
        self.architecture = architecture or next(iter(self.config.architectures or ()), "") or _default_architecture(self.config)
        self.family = str(self.config.model_type)
        self.name, self.source = name or self.architecture, source
        self.dtype = dtype or _dtype(self.config)
        self._class = _class(self.architecture, self.config, folder, trust_remote_code)
        if not isinstance(self.config, self._class.config_class) and isinstance(_text_config(self.config), self._class.config_class):
            self.config = _text_config(self.config)  # as AutoModel does with the text model of a composite config
        if not isinstance(self.config, self._class.config_class):
            made_of = self._class.config_class.model_type
            raise ModelError(
                f"{source or self.architecture}: model_type {self.family!r} and architecture {self.architecture}, a {made_of}, contradict each other."
            )
        raw = config if isinstance(config, Mapping) else vars(config)
        quantized = raw.get("quantization_config")
        self._notes = (f"its quantization_config is not applied: every weight is counted as {self.dtype}",) if quantized else ()
        self.fingerprint = self._fingerprint()
        takes = self._takes = inspect.signature(self._class.forward).parameters
        self._cache = next((each for each in CACHES if each in takes), None)
        self.seq_len = 16_000 if "input_values" in takes and "input_ids" not in takes else 128
        """What is taken where no length is asked: a second of sound, as most models sample it, or so many tokens."""
        self.is_encoder_decoder = "decoder_input_ids" in takes
        if self._generates():
            self.phases: tuple[str, ...] = ("prefill", "decode", "generate", "train")
        else:
            self.phases = ("encode", "train")

    @property
    def fixed_len(self) -> int | None:
        """Positions of an image, whose size the config says; None where the input's length is free."""
        if self.takes_ids or "pixel_values" not in self._takes:
            return None
        size, patch_size = _image_size(self.config), getattr(self.config, "patch_size", None)
        if size and isinstance(patch_size, int):
            return (size[0] // patch_size) * (size[1] // patch_size) + 1
        return 1

    @property
    def breaks(self) -> tuple[int, ...]:
        """Lengths from which on other operators run: a full window."""
        text = _text_config(self.config)
        found = {getattr(text, name, None) for name in ("sliding_window", "attention_chunk_size", "window_size")}
        return tuple(sorted(each for each in found if isinstance(each, int)))

    def _fingerprint(self) -> str:
        """Of the config as it was given, the class and the versions that build it."""
        import transformers

        said = {name: value for name, value in self.config.to_dict().items() if name not in ("_name_or_path", "transformers_version")}
        text = json.dumps([said, self.architecture, torch.__version__, transformers.__version__], sort_keys=True, default=str)
        return hashlib.sha256(text.encode()).hexdigest()

    def _generates(self) -> bool:
        return self._cache is not None and (self.is_encoder_decoder or getattr(self.config, "is_decoder", False) or not _bidirectional(self.family))

    @property
    def takes_ids(self) -> bool:
        """Whether its input is text; else its input has but the size of its config."""
        return "input_ids" in self._takes or self.is_encoder_decoder

    def follow(self, workload: Workload) -> Program:
        """Its program; see `Followed.follow`."""
        if workload.phase not in self.phases:
            raise WorkloadError(f"{self.name}: phase {workload.phase} does not fit {self.architecture}; its phases: {', '.join(self.phases)}.")
        run = Run(
            build=partial(self._build, workload), inputs=self._inputs, loss=self._loss, infer=self._infer, step=self._step if self._cache else None,
            checkpoint=_enable_checkpointing, selective=_recomputed_attention,
        )  # fmt: skip
        program = follow_run(run, workload, experts=self._experts())
        return replace(program, assumptions=self._notes) if self._notes else program

    def _experts(self) -> tuple[int, int] | None:
        text = _text_config(self.config)
        count = next(
            (n for name in ("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts") if (n := getattr(text, name, None))), None
        )
        met = next(
            (
                k
                for name in ("num_experts_per_tok", "num_experts_per_token", "moe_k", "moe_top_k", "top_k_experts")
                if (k := getattr(text, name, None))
            ),
            None,
        )
        return (int(count), int(met)) if isinstance(count, int) and isinstance(met, int) else None

    def _build(self, workload: Workload) -> torch.nn.Module:
        import transformers
        from transformers.initialization import no_init_weights

        attention = "eager" if workload.attention == "eager" else "sdpa"
        if attention == "sdpa" and not getattr(self._class, "_supports_sdpa", True):
            attention = "eager"
        for each in (self.config, *(value for value in vars(self.config).values() if isinstance(value, transformers.PretrainedConfig))):
            each._attn_implementation = attention
            if workload.attention == "flash":
                for dropout in ("attention_dropout", "attention_probs_dropout_prob", "attn_pdrop"):
                    if hasattr(each, dropout):
                        setattr(each, dropout, 0.0)
        text = _text_config(self.config)
        if getattr(text, "pad_token_id", None) is None:
            text.pad_token_id = 0  # classifiers of several sequences ask for one; inputs have no padding
        with no_init_weights():
            try:
                module: Any = self._class(self.config)
            except DataDependentOutputException:  # its constructor reads a tensor's values, such as the rates of stochastic depth
                with unset_fake_temporarily(), torch.device("meta"):
                    module = self._class(self.config)
                _make_fake(module)
            module.tie_weights()  # part of the initialization that is left out
        return module  # type: ignore[no-any-return]

    # ---- inputs ----

    def _inputs(self, _module: torch.nn.Module, workload: Workload) -> Batch:
        """Token ids, images or audio of the sizes that the config says."""
        batch, length, takes = workload.batch_size, workload.seq_len, self._takes
        config, vision = self.config, getattr(self.config, "vision_config", self.config)
        found: Batch = {}
        if "input_features" in takes and self.is_encoder_decoder:
            frames = int(getattr(config, "max_source_positions", None) or length)
            mels = int(getattr(config, "num_mel_bins", None) or getattr(config, "input_feat_per_channel", None) or 80)
            wide = (batch, mels, 2 * frames) if self.family == "whisper" else (batch, frames, mels)
            found["input_features"] = torch.zeros(wide)
        elif "input_values" in takes and "input_ids" not in takes:
            found["input_values"] = torch.zeros(batch, length)
        elif "input_features" in takes and "input_ids" not in takes:
            mels = getattr(config, "num_mel_bins", None) or getattr(config, "feature_projection_input_dim", None) or 80
            found["input_features"] = torch.zeros(batch, length, mels)
        elif "input_ids" in takes:
            found["input_ids"] = torch.zeros(batch, length, dtype=torch.long)
        if "pixel_values" in takes and (size := _image_size(vision)) and ("input_ids" not in takes or _pairs_image_and_text(self._takes)):
            found["pixel_values"] = torch.zeros(batch, int(getattr(vision, "num_channels", 3)), *size)
        if self.is_encoder_decoder:
            first = 1 if self._has_free_source else length
            target = first if workload.phase in ("prefill", "generate") else workload.target_len or length
            found["decoder_input_ids"] = torch.zeros(batch, target, dtype=torch.long)
        if not found:
            raise TraceError(f"{self.architecture} takes {', '.join(list(takes)[1:6])}: not known how to make them.")
        return found

    def _step(self, module: torch.nn.Module, context: int, workload: Workload) -> Batch:
        """The arguments of the decoding step that gives token `context` + 1: a cache of the tokens before it and one new token."""
        assert self._cache is not None
        batch = workload.batch_size
        kept = context - 1
        ids = torch.zeros(batch, 1, dtype=torch.long)
        if self.is_encoder_decoder:
            new = kept - workload.seq_len + 1 if self._has_free_source else kept  # the decoder's first token, or its prompt, and those it made
            given = self._inputs(module, workload) | {"decoder_input_ids": torch.zeros(batch, new, dtype=torch.long)}
            out = module(**given, use_cache=True)
            encoded = {"encoder_outputs": (out.encoder_last_hidden_state,)}
            return {**encoded, "decoder_input_ids": ids, self._cache: getattr(out, self._cache), "use_cache": True}
        given = {"input_ids": torch.zeros(batch, kept, dtype=torch.long)} if kept else {}
        out = module(**given, use_cache=True, **self._last_logits())
        return {"input_ids": ids, self._cache: getattr(out, self._cache), "use_cache": True}

    @property
    def _has_free_source(self) -> bool:
        """Whether an encoder-decoder's `seq_len` is its source's length; where the source is sound of one length it is the decoder's prompt's."""
        return self.is_encoder_decoder and "input_ids" in self._takes

    def _last_logits(self) -> Batch:
        return {"logits_to_keep": 1} if "logits_to_keep" in self._takes else {}

    # ---- passes ----

    def _infer(self, module: torch.nn.Module, inputs: Batch, workload: Workload) -> Any:
        options: Batch = {}
        if "use_cache" in self._takes and "use_cache" not in inputs:
            options["use_cache"] = workload.phase == "generate"
        if workload.phase in ("generate", "decode"):
            options |= self._last_logits()
        return module(**inputs, **options)

    def _loss(self, module: torch.nn.Module, inputs: Batch) -> torch.Tensor:
        """The model's own loss where it has labels, else the mean of its first output."""
        options: Batch = {"use_cache": False} if "use_cache" in self._takes else {}
        labels = self._labels(inputs)
        out = module(**inputs, **options, **labels)
        loss = getattr(out, "loss", None)
        if loss is None:
            first = out[0] if not hasattr(out, "last_hidden_state") else out.last_hidden_state
            loss = first.mean()
        return loss.mean()  # type: ignore[no-any-return]

    def _labels(self, inputs: Batch) -> Batch:
        batch = next(iter(inputs.values())).shape[0]
        one = torch.zeros(batch, dtype=torch.long)
        if "start_positions" in self._takes and "QuestionAnswering" in self.architecture:
            return {"start_positions": one, "end_positions": one}
        if "labels" not in self._takes:
            return {"return_loss": True} if "return_loss" in self._takes else {}
        if any(kind in self.architecture for kind in ("SequenceClassification", "ImageClassification", "AudioClassification")):
            return {"labels": one}
        return {"labels": inputs.get("decoder_input_ids", inputs.get("input_ids"))}


def _make_fake(module: torch.nn.Module) -> None:
    """Give a module that was built on the meta device tensors of the mode that is on; what its modules share stays shared."""
    made: dict[int, torch.Tensor] = {}
    for store in (each for part in module.modules() for each in (part._parameters, part._buffers)):
        for name, tensor in store.items():
            if tensor is not None:
                if id(tensor) not in made:
                    empty = torch.empty_like(tensor, device="cpu")
                    made[id(tensor)] = torch.nn.Parameter(empty) if isinstance(tensor, torch.nn.Parameter) else empty
                store[name] = made[id(tensor)]  # type: ignore[assignment]


@contextlib.contextmanager
def _recomputed_attention() -> Iterator[None]:
    """The core of attention, from queries, keys and values to their output, keeps its inputs alone and runs again in the backward pass.

    Source: Korthikanti et al. 2022 (arXiv:2205.05198), section 5.
    """
    from torch.utils.checkpoint import checkpoint
    from transformers.modeling_utils import AttentionInterface

    original = AttentionInterface.get_interface

    def recomputed(self: Any, name: str, default: Any) -> Any:
        core = original(self, name, default)

        def attention(module: Any, query: Any, key: Any, value: Any, *args: Any, **kwargs: Any) -> Any:
            if not torch.is_grad_enabled():
                return core(module, query, key, value, *args, **kwargs)
            return checkpoint(core, module, query, key, value, *args, use_reentrant=False, **kwargs)

        return attention

    with patch.object(AttentionInterface, "get_interface", recomputed):
        yield


def _enable_checkpointing(module: Any) -> None:
    enable = getattr(module, "activation_checkpointing_enable", None) or module.gradient_checkpointing_enable  # the name before transformers 5.2
    enable()


def _text_config(config: PretrainedConfig) -> PretrainedConfig:
    """The part of a config that describes text, or its decoder's where there are two."""
    try:
        return config.get_text_config()
    except ValueError:
        return config.get_text_config(decoder=True)


def _config(raw: Mapping[str, Any], folder: Path | None, trust_remote_code: bool) -> PretrainedConfig:
    import transformers

    if "auto_map" in raw and raw.get("model_type") not in transformers.CONFIG_MAPPING:
        if not trust_remote_code or folder is None:
            raise ModelError("config.json asks for code of its own (auto_map), which stays off; --trust-remote-code runs it.")
        return transformers.AutoConfig.from_pretrained(folder, trust_remote_code=True)  # type: ignore[no-any-return]
    model_type = str(raw.get("model_type"))
    if model_type not in transformers.CONFIG_MAPPING:
        raise ModelError(f"model_type {model_type!r} is not known to transformers {transformers.__version__}.")
    fields = {name: value for name, value in raw.items() if name not in ("model_type", "quantization_config", "transformers_version")}
    try:
        return transformers.AutoConfig.for_model(model_type, **json.loads(json.dumps(fields)))
    except Exception as error:  # each config class checks in its own way
        lines = str(error).strip().splitlines() or [""]
        raise ModelError(
            f"config.json of a {model_type} model is refused by transformers: {type(error).__name__}: {lines[-1].strip()[:200]}"
        ) from error


def _class(architecture: str, config: PretrainedConfig, folder: Path | None, trust_remote_code: bool) -> Any:
    import transformers

    if hasattr(transformers, architecture):
        return getattr(transformers, architecture)
    if trust_remote_code and folder is not None and getattr(config, "auto_map", None):
        from transformers.dynamic_module_utils import get_class_from_dynamic_module

        reference = next((value for value in config.auto_map.values() if value.endswith(f".{architecture}")), None)
        if reference:
            return get_class_from_dynamic_module(reference, str(folder))
    raise ModelError(f"architecture {architecture!r} is no class of transformers {transformers.__version__}.")


def _default_architecture(config: PretrainedConfig) -> str:
    from transformers.models.auto import modeling_auto as auto

    for names in (auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES, auto.MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES, auto.MODEL_MAPPING_NAMES):
        found = names.get(config.model_type)
        if found:
            return str(found if isinstance(found, str) else found[0])
    raise ModelError(f"config.json names no architecture, and transformers has no default for model_type {config.model_type!r}.")


def _dtype(config: PretrainedConfig) -> str:
    found = str(getattr(config, "dtype", None) or "float32").removeprefix("torch.")
    return found if found in ("float32", "float16", "bfloat16", "float64") else "float32"


def _bidirectional(model_type: str) -> bool:
    """Whether transformers lists it among the encoders (a masked language model) and does not build it as a decoder by itself."""
    from transformers.models.auto import modeling_auto as auto

    return model_type in auto.MODEL_FOR_MASKED_LM_MAPPING_NAMES


def _image_size(config: Any) -> list[int] | None:
    size = getattr(config, "image_size", None)
    if isinstance(size, list | tuple):
        return [int(each) for each in size]
    return [int(size)] * 2 if isinstance(size, int) else None


def _pairs_image_and_text(takes: Mapping[str, Any]) -> bool:
    """Whether images and text are encoded side by side (CLIP); elsewhere text alone is a whole input."""
    return "return_loss" in takes
