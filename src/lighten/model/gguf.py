"""Read a `ModelSpec` from a GGUF file: its metadata as a Hugging Face config, its tensors held against the parts of that config's family.

A GGUF file names its tensors in llama.cpp's way and stores each in a type of ggml. Here each part of the family's formula is found again among
them (`blk.3.attn_q.weight` is `model.layers.3.self_attn.q_proj.weight`), takes their type, and has exactly their bytes.

Source: convert_hf_to_gguf.py of llama.cpp (which fields a converter writes, and what it does to tensors), and `TensorNameMap` of the `gguf`
package, against which tests/test_sources.py holds the names.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from lighten.errors import ModelError, UnsupportedFamily
from lighten.model.families import FAMILIES, describe
from lighten.model.ggml_types import GGML_TYPES, PLAIN
from lighten.model.gguf_header import GgufArray, GgufHeader, GgufTensor, read_gguf_header
from lighten.model.read import refuse_absurd
from lighten.model.spec import Embedding, Linear, ModelSpec, Part, Table, TensorSpec, WeightFormat

COMMON = {
    "block_count": "num_hidden_layers", "embedding_length": "hidden_size", "feed_forward_length": "intermediate_size",
    "attention.head_count": "num_attention_heads", "attention.head_count_kv": "num_key_value_heads", "context_length": "max_position_embeddings",
    "attention.layer_norm_rms_epsilon": "rms_norm_eps", "rope.freq_base": "rope_theta",
}  # fmt: skip
"""Metadata key, behind the architecture's name → field of config.json."""

_EXPERTS = {"expert_used_count": "num_experts_per_tok", "expert_feed_forward_length": "moe_intermediate_size"}

BUFFERS = re.compile(r"(rope_freqs|rope_factors_(long|short)|blk\.\d+\.(attn_rot_embd|exp_probs_b))(\.weight|\.bias)?$")
"""Tensors that are no parameters of the model in transformers: rotary factors, and the bias that balances experts."""

GLOBAL = {
    "embed_tokens": "token_embd", "wte": "token_embd", "word_embeddings": "token_embd", "backbone.embeddings": "token_embd", "shared": "token_embd",
    "wpe": "position_embd", "token_type_embeddings": "token_types", "position_embeddings": "position_embd", "embeddings.LayerNorm": "token_embd_norm",
    "norm": "output_norm", "ln_f": "output_norm", "norm_f": "output_norm", "final_layernorm": "output_norm", "lm_head": "output",
    "embed_in": "token_embd", "embed_out": "output", "gpt_neox.final_layer_norm": "output_norm", "word_embeddings_layernorm": "token_embd_norm",
    "encoder.final_layer_norm": "enc.output_norm", "decoder.final_layer_norm": "dec.output_norm",
}  # fmt: skip
"""End of a module's name outside the numbered blocks → name in a GGUF file."""

BLOCK: dict[str, str | tuple[str, ...]] = {
    # norms
    "input_layernorm": "attn_norm", "ln_1": "attn_norm", "ln_mlp": "attn_norm", "ln_attn": "attn_norm_2", "norm": "attn_norm",
    "post_attention_layernorm": "ffn_norm", "pre_feedforward_layernorm": "ffn_norm", "ln_2": "ffn_norm",
    "post_feedforward_layernorm": "post_ffw_norm", "self_attn.q_norm": "attn_q_norm", "self_attn.k_norm": "attn_k_norm",
    "self_attn.q_a_layernorm": "attn_q_a_norm", "self_attn.kv_a_layernorm": "attn_kv_a_norm",
    "attention.output.LayerNorm": "attn_output_norm", "output.LayerNorm": "layer_output_norm",
    # attention
    "self_attn.q_proj": "attn_q", "self_attn.k_proj": "attn_k", "self_attn.v_proj": "attn_v", "self_attn.o_proj": "attn_output",
    "self_attn.dense": "attn_output", "self_attn.qkv_proj": "attn_qkv", "attn.c_attn": "attn_qkv", "attn.c_proj": "attn_output",
    "attention.query_key_value": "attn_qkv", "attention.dense": "attn_output", "self_attention.query_key_value": "attn_qkv",
    "self_attention.dense": "attn_output", "self_attn.q_a_proj": "attn_q_a",
    "self_attn.q_b_proj": "attn_q_b", "self_attn.kv_a_proj_with_mqa": "attn_kv_a_mqa", "self_attn.kv_b_proj": ("attn_k_b", "attn_v_b"),
    "attention.self.query": "attn_q", "attention.self.key": "attn_k", "attention.self.value": "attn_v", "attention.output.dense": "attn_output",
    # feed-forward
    "mlp.gate_proj": "ffn_gate", "mlp.up_proj": "ffn_up", "mlp.down_proj": "ffn_down", "mlp.gate_up_proj": "ffn_up", "mlp.fc1": "ffn_up",
    "mlp.fc2": "ffn_down", "mlp.c_fc": "ffn_up", "mlp.c_proj": "ffn_down", "mlp.dense_h_to_4h": "ffn_up", "mlp.dense_4h_to_h": "ffn_down",
    "intermediate.dense": "ffn_up", "output.dense": "ffn_down",
    # experts
    "mlp.gate": "ffn_gate_inp", "mlp.experts.gate_up_proj": ("ffn_gate_exps", "ffn_up_exps"), "mlp.experts.down_proj": "ffn_down_exps",
    "mlp.experts.*.gate_proj": "ffn_gate_exps", "mlp.experts.*.up_proj": "ffn_up_exps", "mlp.experts.*.down_proj": "ffn_down_exps",
    "mlp.experts.*.w1": "ffn_gate_exps", "mlp.experts.*.w3": "ffn_up_exps", "mlp.experts.*.w2": "ffn_down_exps",
    "mlp.shared_expert.gate_proj": "ffn_gate_shexp", "mlp.shared_expert.up_proj": "ffn_up_shexp", "mlp.shared_expert.down_proj": "ffn_down_shexp",
    "mlp.shared_experts.gate_proj": "ffn_gate_shexp", "mlp.shared_experts.up_proj": "ffn_up_shexp", "mlp.shared_experts.down_proj": "ffn_down_shexp",
    "mlp.shared_expert_gate": "ffn_gate_inp_shexp", "mlp.gate.e_score_correction_bias": "exp_probs_b.bias",
    # state space
    "mixer.in_proj": "ssm_in", "mixer.conv1d": "ssm_conv1d", "mixer.x_proj": "ssm_x", "mixer.dt_proj": "ssm_dt", "mixer.A_log": "ssm_a",
    "mixer.D": "ssm_d", "mixer.out_proj": "ssm_out",
    # encoder-decoder
    "SelfAttention.q": "attn_q", "SelfAttention.k": "attn_k", "SelfAttention.v": "attn_v", "SelfAttention.o": "attn_o",
    "SelfAttention.relative_attention_bias": "attn_rel_b", "EncDecAttention.q": "cross_attn_q", "EncDecAttention.k": "cross_attn_k",
    "EncDecAttention.v": "cross_attn_v", "EncDecAttention.o": "cross_attn_o", "DenseReluDense.wi_0": "ffn_gate", "DenseReluDense.wi_1": "ffn_up",
    "DenseReluDense.wi": "ffn_up", "DenseReluDense.wo": "ffn_down",
}  # fmt: skip
"""Name of a module inside a numbered block → name in a GGUF file, or the tensors that its weight was split into."""


@dataclass(frozen=True, kw_only=True)
class Source:
    """What a translation reads from: the metadata of one architecture, and the tensors by name."""

    path: Path
    architecture: str
    metadata: Mapping[str, Any]
    tensors: Mapping[str, GgufTensor]

    def get(self, key: str) -> Any:
        """An entry behind the architecture's name; of an array the one value that all layers share.

        Raises:
            ModelError: an array whose values differ, as in models whose layers are not alike.
        """
        value = self.metadata.get(f"{self.architecture}.{key}")
        if isinstance(value, GgufArray):
            values = set(value.values or ())
            if len(values) != 1:
                raise ModelError(f"{self.path}: {self.architecture}.{key} differs between layers, which no formula of this architecture describes.")
            return values.pop()
        return value

    def rows(self, name: str) -> int | None:
        """Rows of a tensor that may be missing."""
        return self.tensors[name].shape[0] if name in self.tensors else None

    def has(self, name: str) -> bool:
        return name in self.tensors


@dataclass(frozen=True, kw_only=True)
class Translation:
    """How one architecture of GGUF is called in transformers.

    Attributes:
        fields: further metadata keys → fields of config.json.
        more: fields that follow from several entries or from which tensors there are.
        names: names inside a block that differ from `BLOCK`.
        ties: its models share the head's weight with the embedding, which some converters store twice.
    """

    model_type: str
    architecture: str
    fields: Mapping[str, str] = field(default_factory=dict)
    more: Callable[[Source], dict[str, Any]] = lambda _: {}
    names: Mapping[str, str | tuple[str, ...]] = field(default_factory=dict)
    ties: bool = False


def _llama(source: Source) -> dict[str, Any]:
    return {
        "head_dim": source.get("attention.key_length") or source.get("rope.dimension_count"),
        "attention_bias": source.has("blk.0.attn_output.bias"), "mlp_bias": source.has("blk.0.ffn_gate.bias"),
    }  # fmt: skip


def _falcon(source: Source) -> dict[str, Any]:
    kv_heads = source.get("attention.head_count_kv") or source.get("attention.head_count")
    return {
        "new_decoder_architecture": source.has("blk.0.attn_norm_2.weight"), "num_kv_heads": kv_heads, "multi_query": kv_heads == 1,
        "parallel_attn": True, "alibi": False, "bias": source.has("blk.0.attn_qkv.bias"), "ffn_hidden_size": source.get("feed_forward_length"),
    }  # fmt: skip


def _experts(source: Source) -> dict[str, Any]:
    gate, shared = source.tensors.get("blk.0.ffn_gate_exps.weight"), source.rows("blk.0.ffn_gate_shexp.weight")
    found: dict[str, Any] = {"num_experts": source.get("expert_count"), "decoder_sparse_step": 1, "mlp_only_layers": []}
    if gate is not None and source.get("expert_feed_forward_length") is None:
        found["moe_intermediate_size"] = gate.shape[1]
    return found | ({"shared_expert_intermediate_size": shared} if shared else {})


def _deepseek(source: Source) -> dict[str, Any]:
    rope = source.get("rope.dimension_count") or 0
    key = source.get("attention.key_length_mla") or source.get("attention.key_length") or 0  # the first where latent attention is stored absorbed
    value = source.get("attention.value_length_mla") or source.get("attention.value_length")
    return {"qk_nope_head_dim": key - rope, "v_head_dim": value, "head_dim": None, "q_lora_rank": source.get("attention.q_lora_rank")}


def _mamba(source: Source) -> dict[str, Any]:
    inner, hidden = source.get("ssm.inner_size") or 0, source.get("embedding_length") or 1
    return {"expand": inner // hidden, "intermediate_size": inner, "use_bias": source.has("blk.0.ssm_in.bias"), "use_conv_bias": True}


def _t5(source: Source) -> dict[str, Any]:
    gated = source.has("enc.blk.0.ffn_gate.weight")
    return {
        "d_ff": source.get("feed_forward_length"), "feed_forward_proj": "gated-gelu" if gated else "relu",
        "num_decoder_layers": source.get("decoder_block_count") or source.get("block_count"),
    }  # fmt: skip


def _bert(source: Source) -> dict[str, Any]:
    return {"type_vocab_size": source.rows("token_types.weight"), "max_position_embeddings": source.rows("position_embd.weight")}


_HEAD_DIM = {"attention.key_length": "head_dim"}
_WINDOW = {"attention.sliding_window": "sliding_window"}
_FOUR_NORMS: dict[str, str | tuple[str, ...]] = {"post_attention_layernorm": "post_attention_norm"}
_DEEPSEEK = Translation(
    model_type="deepseek_v2", architecture="DeepseekV2ForCausalLM", more=_deepseek,
    fields={
        "attention.kv_lora_rank": "kv_lora_rank", "rope.dimension_count": "qk_rope_head_dim", "expert_count": "n_routed_experts",
        "expert_shared_count": "n_shared_experts", "leading_dense_block_count": "first_k_dense_replace", "expert_group_count": "n_group",
        "expert_group_used_count": "topk_group", **_EXPERTS,
    },
)  # fmt: skip

TRANSLATIONS = {
    "llama": Translation(model_type="llama", architecture="LlamaForCausalLM", more=_llama),
    "qwen2": Translation(model_type="qwen2", architecture="Qwen2ForCausalLM"),
    "qwen3": Translation(model_type="qwen3", architecture="Qwen3ForCausalLM", fields=_HEAD_DIM),
    "gemma": Translation(model_type="gemma", architecture="GemmaForCausalLM", ties=True, fields=_HEAD_DIM),
    "gemma2": Translation(model_type="gemma2", architecture="Gemma2ForCausalLM", ties=True, fields=_HEAD_DIM | _WINDOW, names=_FOUR_NORMS),
    "gemma3": Translation(model_type="gemma3_text", architecture="Gemma3ForCausalLM", ties=True, fields=_HEAD_DIM | _WINDOW, names=_FOUR_NORMS),
    "phi2": Translation(model_type="phi", architecture="PhiForCausalLM"),
    "phi3": Translation(model_type="phi3", architecture="Phi3ForCausalLM", fields=_WINDOW),
    "gpt2": Translation(model_type="gpt2", architecture="GPT2LMHeadModel", ties=True),
    "falcon": Translation(model_type="falcon", architecture="FalconForCausalLM", ties=True, more=_falcon),
    "stablelm": Translation(
        model_type="stablelm", architecture="StableLmForCausalLM",
        more=lambda source: {
            "use_qkv_bias": source.has("blk.0.attn_q.bias"), "use_parallel_residual": bool(source.get("use_parallel_residual")),
            "qk_layernorm": source.has("blk.0.attn_q_norm.weight"),
        },
    ),
    "starcoder2": Translation(
        model_type="starcoder2", architecture="Starcoder2ForCausalLM", more=lambda source: {"use_bias": source.has("blk.0.attn_q.bias")}
    ),
    "qwen2moe": Translation(model_type="qwen2_moe", architecture="Qwen2MoeForCausalLM", fields=_EXPERTS, more=_experts),
    "qwen3moe": Translation(model_type="qwen3_moe", architecture="Qwen3MoeForCausalLM", fields=_EXPERTS | _HEAD_DIM, more=_experts),
    "deepseek2": _DEEPSEEK,
    "bert": Translation(model_type="bert", architecture="BertModel", more=_bert),
    "t5": Translation(
        model_type="t5", architecture="T5ForConditionalGeneration", more=_t5,
        fields={"attention.key_length": "d_kv", "attention.relative_buckets_count": "relative_attention_num_buckets"},
    ),
    "granite": Translation(
        model_type="granite", architecture="GraniteForCausalLM",
        more=lambda source: {"attention_bias": source.has("blk.0.attn_output.bias"), "mlp_bias": source.has("blk.0.ffn_gate.bias")},
    ),
    "smollm3": Translation(model_type="smollm3", architecture="SmolLM3ForCausalLM"),
    "olmo": Translation(model_type="olmo", architecture="OlmoForCausalLM"),
    "olmo2": Translation(model_type="olmo2", architecture="Olmo2ForCausalLM", names=_FOUR_NORMS),
    "olmoe": Translation(model_type="olmoe", architecture="OlmoeForCausalLM", fields=_EXPERTS, more=_experts),
    "nemotron": Translation(model_type="nemotron", architecture="NemotronForCausalLM"),
    "command-r": Translation(model_type="cohere", architecture="CohereForCausalLM", ties=True),
    "bloom": Translation(model_type="bloom", architecture="BloomForCausalLM", ties=True),
    "gptneox": Translation(
        model_type="gpt_neox", architecture="GPTNeoXForCausalLM",
        more=lambda source: {"use_parallel_residual": bool(source.get("use_parallel_residual"))},
    ),
    "mamba": Translation(
        model_type="mamba", architecture="MambaForCausalLM", ties=True, more=_mamba,
        fields={"ssm.state_size": "state_size", "ssm.conv_kernel": "conv_kernel", "ssm.time_step_rank": "time_step_rank"},
    ),
}  # fmt: skip
"""`general.architecture` → its name in transformers."""

_MIXTRAL = Translation(
    model_type="mixtral", architecture="MixtralForCausalLM",
    fields={"expert_count": "num_local_experts", "expert_used_count": "num_experts_per_tok"} | _HEAD_DIM,
)  # fmt: skip


def read_gguf(path: Path) -> ModelSpec:
    """The spec of a GGUF file, or of all files that a split one belongs to.

    Each matrix keeps the type of ggml that it is stored in. Its `dtype` is the type of most elements where that is not quantized (a file of
    F16 or BF16), else that of its vectors, in which llama.cpp computes (float32).
    `weight_bytes()` is the sum of its tensors' bytes, buffers (`rope_freqs`) excepted.

    Raises:
        ModelError: an unreadable header, missing parts of a split file, metadata that lacks fields, or tensors that contradict it.
        UnsupportedFamily: an architecture without a translation or without a formula.
    """
    headers = _with_its_splits(read_gguf_header(path))
    tensors = {tensor.name: tensor for header in headers for tensor in header.tensors}
    metadata = headers[0].metadata
    name = metadata.get("general.architecture")
    source = Source(path=path, architecture=str(name), metadata=metadata, tensors=tensors)
    translation = _translation(source)
    config = _config(source, translation)
    refuse_absurd(config, str(path))
    parts = describe(config, translation.architecture)
    left_out = [part for part in parts if part.component == "pooler" and part.tensors()] if translation.model_type == "bert" else []
    parts = tuple(part for part in parts if not left_out or part.component != "pooler")
    return _spec(source, translation, config, parts, left_out)


def _with_its_splits(header: GgufHeader) -> list[GgufHeader]:
    """The header, and those of the other files of a split model, the first file's before them.

    Source: gguf-split of llama.cpp: `NAME-00001-of-00003.gguf`, metadata in the first file.
    """
    count = header.metadata.get("split.count", 1)
    if not isinstance(count, int) or count <= 1:
        return [header]
    stem = re.sub(r"-\d{5}-of-\d{5}\.gguf$", "", header.path.name)
    names = [f"{stem}-{number:05d}-of-{count:05d}.gguf" for number in range(1, count + 1)]
    missing = [name for name in names if not (header.path.parent / name).is_file()]
    if missing:
        raise ModelError(f"{header.path}: one of {count} files of a model, of which {len(missing)} are missing: {', '.join(missing[:3])}.")
    return [read_gguf_header(header.path.parent / name) for name in names]


def _translation(source: Source) -> Translation:
    if source.architecture == "llama" and source.get("expert_count"):
        return _MIXTRAL
    if source.architecture == "deepseek2" and any(name.endswith("exp_probs_b.bias") for name in source.tensors):
        return replace(_DEEPSEEK, model_type="deepseek_v3", architecture="DeepseekV3ForCausalLM")
    found = TRANSLATIONS.get(source.architecture)
    if found is None or found.model_type not in FAMILIES:
        known = [name for name, each in TRANSLATIONS.items() if each.model_type in FAMILIES]
        raise UnsupportedFamily(f"{source.path}: a GGUF file of architecture {source.architecture!r} has no formula; these have: {', '.join(known)}.")
    return found


def _config(source: Source, translation: Translation) -> dict[str, Any]:
    """The config.json that the metadata and the tensors amount to."""
    found = {name: source.get(key) for key, name in (COMMON | dict(translation.fields)).items()}
    if not source.metadata.get(f"{source.architecture}.attention.sliding_window"):  # llama.cpp's converter says no window as 0
        found.pop("sliding_window", None)
    vocabulary = source.rows("token_embd.weight")
    if vocabulary is None:
        raise ModelError(f"{source.path}: no tensor token_embd.weight; a language model's GGUF file has one.")
    found |= {
        "model_type": translation.model_type, "architectures": [translation.architecture], "vocab_size": vocabulary,
        "tie_word_embeddings": not source.has("output.weight"),
    }  # fmt: skip
    return {key: value for key, value in (found | translation.more(source)).items() if value is not None}


@dataclass(frozen=True, kw_only=True)
class _Weight:
    """A tensor of a part: its name in transformers, `*` in it for all experts, and its shape with the experts first."""

    module: str
    leaf: str
    shape: tuple[int, ...]

    @property
    def name(self) -> str:
        return f"{self.module}.{self.leaf}" if self.leaf else self.module


def _weights(part: Part) -> Iterator[_Weight]:
    """The tensors of a part, those of its experts as one."""
    seen: dict[str, list[tuple[int, ...]]] = {}
    starred = re.escape(part.name).replace(r"\*", r"\d+")
    for name, shape in part.tensors().items():
        key = re.sub(f"^{starred}", lambda _: part.name, name) if "*" in part.name else name
        seen.setdefault(key, []).append(shape)
    for name, shapes in seen.items():
        module, _, leaf = name.rpartition(".")
        if leaf not in ("weight", "bias"):
            module, leaf = name, ""
        yield _Weight(module=module, leaf=leaf, shape=shapes[0] if len(shapes) == 1 else (len(shapes), *shapes[0]))


def gguf_names(module: str, leaf: str, names: Mapping[str, str | tuple[str, ...]]) -> list[tuple[str, ...]]:
    """What a tensor of transformers may be called in a GGUF file: one name, or the names of the pieces that it was split into.

    >>> gguf_names("model.layers.3.self_attn.q_proj", "weight", {})
    [('blk.3.attn_q.weight',)]
    """
    numbered = re.match(r"(?:(?:.*\.)?(encoder|decoder)\.)?(?:.*?\.)??(?:layers|h|layer|block)\.(\d+)\.(?:layer\.\d+\.)?(.+)$", module)
    end = f".{leaf}" if leaf else ""
    if numbered is None:
        known = [name for suffix, name in GLOBAL.items() if module == suffix or module.endswith(f".{suffix}")]
        return [(known[-1] + end,)] if known else []
    side, number, inner = numbered.groups()
    inner = inner.replace("block_sparse_moe.", "mlp.")
    stacked = "block" in module.split(".") and side  # of an encoder-decoder; the encoder alone has plain names
    prefix = f"{side[:3]}.blk.{number}" if stacked else f"blk.{number}"
    if inner.endswith("layer_norm"):
        return [(f"{prefix}.{_t5_norm(module)}{end}",)]
    bases = names.get(inner) or BLOCK.get(inner)
    if bases is None:
        return []
    whole = [("attn_kv_b",)] if inner == "self_attn.kv_b_proj" else []
    each = [*whole, (bases,) if isinstance(bases, str) else bases]
    return [tuple(f"{prefix}.{base}{end}" for base in group) for group in each]


def _t5_norm(module: str) -> str:
    """The norm before a T5 block's attention, cross attention or feed-forward, which it numbers."""
    place = int(module.split(".layer.")[1].split(".")[0])
    last = 1 if module.startswith("encoder") else 2
    return "ffn_norm" if place == last else ("attn_norm", "cross_attn_norm")[place]


def _spec(source: Source, translation: Translation, config: dict[str, Any], parts: tuple[Part, ...], left_out: list[Part]) -> ModelSpec:
    found = {weight: _find(weight, source, translation) for part in parts for weight in _weights(part)}
    used = {tensor.name for pieces in found.values() for tensor in pieces}
    buffers = [tensor for tensor in source.tensors.values() if tensor.name not in used and BUFFERS.match(tensor.name)]
    strangers = [name for name in source.tensors if name not in used and not BUFFERS.match(name)]
    wrong = [line for weight, pieces in found.items() if (line := _contradiction(weight, pieces, parts))]
    wrong += [f"{name} is not in the architecture" for name in strangers]
    if wrong:
        more = f"; and {len(wrong) - 3} more" if len(wrong) > 3 else ""
        raise ModelError(f"{source.path}: metadata and tensors contradict each other: {'; '.join(wrong[:3])}{more}.")
    vectors = _vector_type(source, parts, found)
    formats = {part.name: _format(pieces) for part in parts for weight in _weights(part)
               if _is_matrix(part, weight) and (pieces := found[weight])}  # fmt: skip
    parts = tuple(_typed_table(source, part, found) if isinstance(part, Table) else _stored(part, formats) for part in parts)
    notes: tuple[str, ...] = (f"read as {translation.architecture}, a config made from the file's metadata",)
    if left_out:
        notes += ("without a pooler, which GGUF files of BERT leave out",)
    if translation.ties and source.has("output.weight"):
        notes += ("output.weight is stored beside token_embd.weight, which the original shares: it counts as parameters of its own",)
    spec = ModelSpec(
        name=str(source.metadata.get("general.name") or source.path.stem), family=translation.model_type, architecture=translation.architecture,
        source=str(source.path), dtype=_most(source, used) or vectors, vector_dtype=vectors,
        config=config, parts=parts, notes=notes, other_bytes=sum(tensor.bytes for tensor in buffers),
        tensors=tuple(TensorSpec(name=t.name, shape=t.shape, dtype=PLAIN.get(t.type, t.type)) for t in source.tensors.values() if t.name in used),
    )  # fmt: skip
    stored = sum(source.tensors[name].bytes for name in used)
    if spec.weight_bytes() != stored:
        raise ModelError(
            f"{source.path}: its tensors take {stored} bytes, {spec.weight_bytes()} as the parts of {translation.architecture} have them."
        )
    return spec


def _find(weight: _Weight, source: Source, translation: Translation) -> list[GgufTensor]:
    for group in gguf_names(weight.module, weight.leaf, translation.names):
        pieces = [source.tensors[name] for name in group if name in source.tensors]
        if len(pieces) == len(group):
            return pieces
    return []


def _contradiction(weight: _Weight, pieces: list[GgufTensor], parts: tuple[Part, ...]) -> str:
    if not pieces:
        return f"{weight.name} is missing"
    shapes = [piece.shape for piece in pieces]
    expected = tuple(size for size in weight.shape if size != 1)
    given = tuple(size for size in shapes[0] if size != 1)
    turned = expected[::-1] if any(isinstance(part, Linear) and part.transposed and part.name == weight.module for part in parts) else expected
    fits = given in (expected, turned) if len(pieces) == 1 else sum(map(math.prod, shapes)) == math.prod(weight.shape)
    names = " and ".join(piece.name for piece in pieces)
    return "" if fits else f"{names} is {' and '.join(str(list(shape)) for shape in shapes)}, the metadata says {list(weight.shape)}"


def _is_matrix(part: Part, weight: _Weight) -> bool:
    return isinstance(part, Linear | Embedding) and weight.leaf == "weight"


def _vector_type(source: Source, parts: tuple[Part, ...], found: Mapping[_Weight, list[GgufTensor]]) -> str:
    """The one type of all tensors that are neither matrices nor tables, which keep a type of their own."""
    own = [weight for part in parts if not isinstance(part, Table) for weight in _weights(part) if not _is_matrix(part, weight)]
    types = {piece.type for weight in own for piece in found[weight]}
    if len(types) > 1 or not types <= set(PLAIN):
        raise ModelError(f"{source.path}: its vectors are of the types {', '.join(sorted(types))}; one type that is not quantized is described.")
    return PLAIN[types.pop()] if types else "float32"


def _most(source: Source, used: set[str]) -> str | None:
    """The type of most elements; None where that is a quantized one."""
    counts: dict[str, int] = {}
    for name in used:
        counts[source.tensors[name].type] = counts.get(source.tensors[name].type, 0) + source.tensors[name].elements
    return PLAIN.get(max(counts, key=counts.__getitem__)) if counts else None


def _typed_table(source: Source, table: Table, found: Mapping[_Weight, list[GgufTensor]]) -> Table:
    types = {piece.type for weight in _weights(table) for piece in found[weight]}
    if len(types) != 1 or not types <= set(PLAIN):
        raise ModelError(f"{source.path}: {table.name} is of the types {', '.join(sorted(types))}; one type that is not quantized is described.")
    return replace(table, dtype=PLAIN[types.pop()])


def _format(pieces: list[GgufTensor]) -> WeightFormat:
    names = {piece.type for piece in pieces}
    if len(names) > 1:
        raise ModelError(f"{' and '.join(piece.name for piece in pieces)} are one weight in two types, {', '.join(sorted(names))}.")
    name = names.pop()
    if name in PLAIN:
        return WeightFormat(dtype=PLAIN[name])
    kind = GGML_TYPES[name]
    return WeightFormat(bits=kind.bits, group_size=kind.block, ggml_type=name)


def _stored(part: Part, formats: Mapping[str, WeightFormat]) -> Part:
    name = (part.tied_to if isinstance(part, Linear) else None) or part.name
    return replace(part, weight=formats[name]) if isinstance(part, Linear | Embedding) and name in formats else part
