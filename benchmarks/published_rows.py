"""Published rows as the tool's own types: a row's model, device, plan and workload, and the grade of what is predicted for it.

Rows are those of training.csv and inference.csv: one figure a row, with the sizes of its model and its source. What a row does not say is
never guessed in silence: it is named in `unsaid`, which widens the predicted range, or the row is not gradable, which is counted by reason.

A model is found in this order: the architecture that its name means (`KINDS`); any architecture of `GENERIC` that its columns fit; of all of
these the one whose parameters are nearest to the published ones. Columns that are empty are filled from `SHAPES` (public models' configs) or,
where the size alone is known, from a typical decoder of that size.
"""

from __future__ import annotations

import csv
import math
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, replace
from functools import lru_cache
from pathlib import Path
from typing import Any

from lighten.cost.operators import Forward, forward_operators
from lighten.cost.workload import Recompute, Workload
from lighten.device.catalog import match_device
from lighten.device.device import Device, Link
from lighten.errors import LightenError
from lighten.model.families import describe
from lighten.model.families._config import complete
from lighten.model.spec import Linear, ModelSpec, Part
from lighten.parallel.plan import Plan

Row = Mapping[str, str]
COLUMNS = {
    "layers": "num_hidden_layers", "hidden": "hidden_size", "heads": "num_attention_heads", "kv_heads": "num_key_value_heads",
    "head_dim": "head_dim", "ffn": "intermediate_size", "vocab": "vocab_size",
}  # fmt: skip
"""Column → the config's field."""
IN_NOTES = re.compile(r"\b(layers|hidden|heads|head_dim|vocab) (\d+)|\b(\d+) (layers|heads)\b")
"""Sizes that a row gives in its note: "layers 6" or "105 layers"."""


@dataclass(frozen=True, kw_only=True)
class Kind:
    """An architecture that models' names mean.

    Attributes:
        names: of the models, from the start.
        fields: of the config, beyond the row's columns: facts of the kind, with their source.
        from_row: more of them, from the row.
        beside: what published counts of the kind hold beside parameters: what it is, and how many values.
    """

    names: str
    model_type: str
    architecture: str
    fields: Mapping[str, Any] = field(default_factory=dict)
    from_row: Callable[[Row], dict[str, Any]] = lambda row: {}
    beside: Callable[[ModelSpec], tuple[str, int]] | None = None


def _selection_bias(spec: ModelSpec) -> tuple[str, int]:
    mixtures = spec.config["num_hidden_layers"] - spec.config["first_k_dense_replace"]
    return "with the biases of the experts' selection, which are buffers", mixtures * spec.config["n_routed_experts"]


def _pair_heads(spec: ModelSpec) -> tuple[str, int]:
    hidden = spec.config["hidden_size"]
    return "with the pooler and the head for pairs of sentences", hidden * hidden + hidden + 2 * hidden + 2


def _deepseek(row: Row) -> dict[str, Any]:
    width = row.get("moe_ffn") or row.get("ffn")
    return {"moe_intermediate_size": int(width)} if width else {}


def _experts(row: Row) -> dict[str, Any]:
    return {"num_local_experts": int(row["n_experts"]), "num_experts_per_tok": int(row["top_k"])} if row.get("n_experts") else {}


def _qwen_experts(row: Row) -> dict[str, Any]:
    width = row.get("moe_ffn") or row.get("ffn")
    experts = {"num_experts": int(row["n_experts"]), "num_experts_per_tok": int(row["top_k"])} if row.get("n_experts") else {}
    return experts | ({"moe_intermediate_size": int(width)} if width else {})


def _llama4(row: Row) -> dict[str, Any]:
    # Scout's layers all have experts, Maverick's every second; dense layers are twice as wide. Source: the published config.json of each
    step = 2 if (row.get("n_experts") or "") == "128" else 1
    return _experts(row) | {"interleave_moe_layer_step": step, "intermediate_size_mlp": 2 * int(row.get("ffn") or 8192)}


def _positions(row: Row) -> dict[str, Any]:
    found = re.search(r"max_seq (\d+)", row["model"])
    return {"n_positions": int(found[1])} if found else {"n_positions": count_of(row, "seq_len") or 2048}


MLA = {
    "qk_nope_head_dim": 128, "qk_rope_head_dim": 64, "v_head_dim": 128, "kv_lora_rank": 512, "n_shared_experts": 1, "attention_bias": False,
    "norm_topk_prob": True,
}  # fmt: skip
DEEPSEEK_V3 = MLA | {
    "q_lora_rank": 1536, "first_k_dense_replace": 3, "n_routed_experts": 256, "num_experts_per_tok": 8, "n_group": 8, "topk_group": 4,
    "intermediate_size": 18432,
}  # fmt: skip
"""arXiv:2412.19437, section 4.2."""
DEEPSEEK_V2 = MLA | {
    "q_lora_rank": 1536, "first_k_dense_replace": 1, "n_routed_experts": 160, "n_shared_experts": 2, "num_experts_per_tok": 6, "n_group": 8,
    "topk_group": 3, "intermediate_size": 12288, "moe_intermediate_size": 1536, "num_hidden_layers": 60, "hidden_size": 5120,
    "num_attention_heads": 128, "vocab_size": 102400,
}  # fmt: skip
"""arXiv:2405.04434, section 3.1.2."""
DEEPSEEK_V2_LITE = DEEPSEEK_V2 | {
    "q_lora_rank": None, "n_routed_experts": 64, "n_group": 1, "topk_group": 1, "intermediate_size": 10944, "moe_intermediate_size": 1408,
    "num_hidden_layers": 27, "hidden_size": 2048, "num_attention_heads": 16,
}  # fmt: skip
"""arXiv:2405.04434, appendix B.1; its dense layer's width is that of its config.json."""
NEMOTRON_3 = {
    "num_attention_heads": 32, "num_key_value_heads": 2, "head_dim": 128, "mamba_head_dim": 64, "n_groups": 8, "ssm_state_size": 128,
    "vocab_size": 131072, "n_shared_experts": 1, "tie_word_embeddings": False,
}  # fmt: skip
NEMOTRON_3_NANO = NEMOTRON_3 | {
    "hidden_size": 2688, "num_hidden_layers": 52, "mamba_num_heads": 64, "moe_intermediate_size": 1856, "n_routed_experts": 128,
    "moe_shared_expert_intermediate_size": 3712, "num_experts_per_tok": 6, "hybrid_override_pattern": "MEMEM*E" * 6 + "MEMEMEMEME",
}  # fmt: skip
"""The published config.json, but for the order of its blocks; its count is the published 31.6 B, of which a token meets 3.6 B."""
NEMOTRON_3_SUPER = NEMOTRON_3 | {
    "hidden_size": 4096, "num_hidden_layers": 88, "mamba_num_heads": 128, "moe_intermediate_size": 2688, "n_routed_experts": 512,
    "moe_latent_size": 1024, "moe_shared_expert_intermediate_size": 5376, "num_experts_per_tok": 22,
    "hybrid_override_pattern": "MEMEM*EMEME" * 8,
}  # fmt: skip
"""The published config.json, but for the order of its blocks; its count is the published 120.6 B, of which a token meets 12.7 B."""
BERT_LARGE = {
    "num_hidden_layers": 24, "hidden_size": 1024, "num_attention_heads": 16, "intermediate_size": 4096, "vocab_size": 30522,
    "max_position_embeddings": 512, "type_vocab_size": 2,
}  # fmt: skip
"""arXiv:1810.04805, section 3; the vocabulary is the published file's."""

KINDS = (
    Kind(names=r"DeepSeek-V2-Lite", model_type="deepseek_v2", architecture="DeepseekV2ForCausalLM", fields=DEEPSEEK_V2_LITE),
    Kind(names=r"DeepSeek-V2", model_type="deepseek_v2", architecture="DeepseekV2ForCausalLM", fields=DEEPSEEK_V2),
    Kind(
        names=r"DeepSeek-V3|Kimi-K2",
        model_type="deepseek_v3",
        architecture="DeepseekV3ForCausalLM",
        fields=DEEPSEEK_V3,
        from_row=_deepseek,
        beside=_selection_bias,
    ),
    Kind(names=r"(Code|Tiny|tiny-|MPT-)?(?i:llama)(?!.?4)|InternLM", model_type="llama", architecture="LlamaForCausalLM"),
    Kind(names=r"(?i:llama).?4", model_type="llama4_text", architecture="Llama4ForCausalLM", from_row=_llama4),
    Kind(names=r"(?i:gemma).?3", model_type="gemma3_text", architecture="Gemma3ForCausalLM"),
    Kind(names=r"(?i:mistral)", model_type="mistral", architecture="MistralForCausalLM"),
    Kind(names=r"Mixtral", model_type="mixtral", architecture="MixtralForCausalLM", from_row=_experts),
    Kind(names=r"Qwen3-\d+B-A", model_type="qwen3_moe", architecture="Qwen3MoeForCausalLM", from_row=_qwen_experts),
    Kind(names=r"Qwen3", model_type="qwen3", architecture="Qwen3ForCausalLM"),
    Kind(names=r"Qwen", model_type="qwen2", architecture="Qwen2ForCausalLM"),  # the first Qwen's blocks are Qwen2's with a key for each head
    Kind(names=r"(?i:gpt-oss)", model_type="gpt_oss", architecture="GptOssForCausalLM", from_row=_experts),
    Kind(names=r"Gemma2|gemma-2-", model_type="gemma2", architecture="Gemma2ForCausalLM"),
    Kind(names=r"(?i:gemma)-\d+[bB]", model_type="gemma", architecture="GemmaForCausalLM"),
    Kind(names=r"(?i:phi)-3", model_type="phi3", architecture="Phi3ForCausalLM"),
    Kind(names=r"(?i:phi)-\d", model_type="phi", architecture="PhiForCausalLM"),
    Kind(names=r"Pythia|StableLM-3B|(?i:stablelm)-(base-)?alpha", model_type="gpt_neox", architecture="GPTNeoXForCausalLM"),
    # llm-foundry's benchmarks: biases, learned positions and a tied head, which is GPT-2
    Kind(names=r"MPT|MT-NLG|GPT3|GPT-\d+B|BLOOM-candidate-GPT", model_type="gpt2", architecture="GPT2LMHeadModel", from_row=_positions),
    Kind(names=r"OPT", model_type="opt", architecture="OPTForCausalLM", fields={"max_position_embeddings": 2048}),
    Kind(names=r"Falcon-7B", model_type="falcon", architecture="FalconForCausalLM", fields={"multi_query": True, "new_decoder_architecture": False}),
    Kind(names=r"Falcon", model_type="falcon", architecture="FalconForCausalLM", fields={"new_decoder_architecture": True}),
    Kind(names=r"Nemotron.?3.?Nano", model_type="nemotron_h", architecture="NemotronHForCausalLM", fields=NEMOTRON_3_NANO),
    Kind(names=r"Nemotron.?3.?Super", model_type="nemotron_h", architecture="NemotronHForCausalLM", fields=NEMOTRON_3_SUPER),
    Kind(names=r"Nemotron", model_type="nemotron", architecture="NemotronForCausalLM"),
    Kind(names=r"BERT-large", model_type="bert", architecture="BertForMaskedLM", fields=BERT_LARGE, beside=_pair_heads),
)
"""What a model's name means; the first that matches."""


class LeftOut(Exception):
    """A row that says nothing of parameters, files or caches, or not enough."""


def kind_of(name: str) -> Kind:
    for kind in KINDS:
        if re.match(kind.names, name):
            return kind
    raise LeftOut(f"no kind of model is known for {name!r}")


def spec_of(row: Row, extra: Mapping[str, Any] | None = None) -> ModelSpec:
    """The model that a row's columns describe.

    Raises:
        LeftOut: columns that its kind needs are empty.
        LightenError: its kind has no formula.
    """
    kind = kind_of(row["model"])
    config: dict[str, Any] = {"model_type": kind.model_type} | dict(extra or {})
    in_note = {after or before: value or count for after, value, count, before in IN_NOTES.findall(row.get("note", ""))}
    if {"heads", "head_dim"} <= in_note.keys():
        in_note.setdefault("hidden", str(int(in_note["heads"]) * int(in_note["head_dim"])))
    for column, name in COLUMNS.items():
        value = row.get(column) or in_note.get(column)
        if value and value.isdigit():
            config[name] = int(value)
    if row.get("tied_embeddings"):
        config["tie_word_embeddings"] = row["tied_embeddings"] == "True"
    config |= kind.from_row(row) | dict(kind.fields)
    if "hidden_size" in config and "num_hidden_layers" in config:
        config.setdefault("num_attention_heads", max(1, config["hidden_size"] // 64))
        config.setdefault("intermediate_size", 4 * config["hidden_size"])
    missing = [name for name in ("num_hidden_layers", "hidden_size", "num_attention_heads", "vocab_size") if name not in config]
    if missing:
        raise LeftOut(f"the row does not give {', '.join(missing)}")
    for own, name in OWN_NAMES.get(kind.model_type, {}).items():
        config[own] = config[name]
    architecture = kind.architecture
    return ModelSpec(
        name=row["model"], family=kind.model_type, architecture=architecture, source="", dtype="bfloat16", config=config,
        parts=describe(config, architecture),
    )  # fmt: skip


OWN_NAMES = {
    "gpt2": {"n_layer": "num_hidden_layers", "n_embd": "hidden_size", "n_head": "num_attention_heads", "n_inner": "intermediate_size"},
    "opt": {"ffn_dim": "intermediate_size", "word_embed_proj_dim": "hidden_size"},
    "falcon": {"num_kv_heads": "num_key_value_heads"},
}
"""Families whose config has names of its own."""


# ---- rows of any kind ----


class NotGradable(LeftOut):
    """A row that lacks what a prediction needs; the text says what."""


@dataclass(frozen=True, kw_only=True)
class Grade:
    """One prediction held against one published figure.

    Attributes:
        id, file: the row's id, and the name of its file.
        kind: training_time, training_memory, decode, prefill, serving or fits.
        source, framework, device, parallelism: what errors are shown by.
        predicted, low, high: in base units; of `fits`: 1.0 it fits, 0.0 it does not. None where the row was not gradable.
        truth: the published figure, in the same unit.
        fitted: the row's source was among those that constants were fitted on.
        left_out: why the row was not gradable; empty where it was.
    """

    id: str
    file: str
    kind: str
    source: str
    framework: str
    device: str
    parallelism: str
    predicted: float | None = None
    low: float | None = None
    high: float | None = None
    truth: float | None = None
    fitted: bool = True
    left_out: str = ""


def read_rows(path: Path) -> list[Row]:
    """The rows of a file.

    Raises:
        NotGradable: not a table in UTF-8 with a header that has `id`, `model` and `hardware`.
    """
    try:
        with path.open(newline="", encoding="utf-8-sig") as file:  # a byte order mark is what spreadsheets write
            reader = csv.DictReader(file)
            missing = [name for name in ("id", "model", "hardware") if name not in (reader.fieldnames or ())]
            if missing:
                raise NotGradable(f"its header has no column {', '.join(missing)}")
            return [{name: value or "" for name, value in row.items() if name} for row in reader]
    except (UnicodeDecodeError, csv.Error) as error:
        raise NotGradable("it is no table of comma-separated text in UTF-8") from error


def number(row: Row, column: str) -> float | None:
    """The column's number; None where it is empty.

    Raises:
        NotGradable: it holds something else than a number that is finite and not negative.
    """
    text = (row.get(column) or "").strip()
    if not text:
        return None
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not math.isfinite(value) or value < 0:
        raise NotGradable(f"{column} {text!r} is not a number")
    return value


def count_of(row: Row, column: str) -> int | None:
    """The column's whole positive number; None where it is empty.

    Raises:
        NotGradable: it holds something else.
    """
    value = number(row, column)
    if value is None:
        return None
    if value != int(value) or value < 1:
        raise NotGradable(f"{column} {row[column]!r} is not a whole positive number")
    return int(value)


# ---- models ----

SHAPES: tuple[tuple[str, Mapping[str, int]], ...] = (
    (r"falcon.?180b", {"layers": 80, "hidden": 14848, "heads": 232, "kv_heads": 8, "head_dim": 64, "ffn": 59392, "vocab": 65024}),
    (r"gpt-?j.?6b", {"layers": 28, "hidden": 4096, "heads": 16, "kv_heads": 16, "head_dim": 256, "ffn": 16384, "vocab": 50400}),
    (r"deepseek.*33b", {"layers": 62, "hidden": 7168, "heads": 56, "kv_heads": 8, "head_dim": 128, "ffn": 19200, "vocab": 32256}),
    (r"open.?llama.?3b", {"layers": 26, "hidden": 3200, "heads": 32, "kv_heads": 32, "head_dim": 100, "ffn": 8640, "vocab": 32000}),
    (r"gemma.?3.12b", {"layers": 48, "hidden": 3840, "heads": 16, "kv_heads": 8, "head_dim": 256, "ffn": 15360, "vocab": 262208}),
    (r"gemma.?3.27b", {"layers": 62, "hidden": 5376, "heads": 32, "kv_heads": 16, "head_dim": 128, "ffn": 21504, "vocab": 262208}),
    (r"llama.?4.scout", {
        "layers": 48, "hidden": 5120, "heads": 40, "kv_heads": 8, "head_dim": 128, "ffn": 8192, "vocab": 202048, "n_experts": 16, "top_k": 1,
    }),
    (r"llama.?4.maverick", {
        "layers": 48, "hidden": 5120, "heads": 40, "kv_heads": 8, "head_dim": 128, "ffn": 8192, "vocab": 202048, "n_experts": 128, "top_k": 1,
    }),
)  # fmt: skip
"""Names of public models, in any case → the sizes of their published config.json, for rows that leave these out."""

GENERIC: tuple[tuple[str, str, Mapping[str, Any]], ...] = (
    ("llama", "LlamaForCausalLM", {"tie_word_embeddings": False}),
    ("llama", "LlamaForCausalLM", {"tie_word_embeddings": True}),
    ("gpt_neox", "GPTNeoXForCausalLM", {"tie_word_embeddings": False}),
    ("gpt_neox", "GPTNeoXForCausalLM", {"tie_word_embeddings": True}),
    ("gpt2", "GPT2LMHeadModel", {}),
    ("nemotron", "NemotronForCausalLM", {"tie_word_embeddings": False}),
    ("qwen2", "Qwen2ForCausalLM", {"tie_word_embeddings": False}),
)
"""Dense decoders that a shape may mean: gated or not, tied or not, learned positions or not, few or as many key heads as queries."""
GENERIC_MIXTURES: tuple[tuple[str, str, Mapping[str, Any]], ...] = (
    ("mixtral", "MixtralForCausalLM", {}),
    ("qwen3_moe", "Qwen3MoeForCausalLM", {}),
    ("gpt_oss", "GptOssForCausalLM", {}),
    ("glm4_moe", "Glm4MoeForCausalLM", {"n_shared_experts": 1, "first_k_dense_replace": 1}),
    ("deepseek_v2", "DeepseekV2ForCausalLM", DEEPSEEK_V2_LITE),
    ("deepseek_v3", "DeepseekV3ForCausalLM", DEEPSEEK_V3),
)
"""Mixtures that a shape may mean: experts alone, with shared ones, with latent attention."""
NEAR = 0.03
"""How far the parameters of the architecture that a name means may be from the published ones before others are tried."""
LATENT = ("deepseek_v2", "deepseek_v3")


def spec_of_row(row: Row) -> tuple[ModelSpec, tuple[str, ...]]:
    """The model of a row, and what the row did not say of it.

    Raises:
        NotGradable: neither its shape nor its size is given.
    """
    columns = ("model", "family", "note", "tied_embeddings", "params_total", "params_active", *COLUMNS, "n_experts", "top_k", "moe_ffn")
    size_hint = ("seq_len",) if row.get("layers") else ("seq_len", "flops_per_token_implied_g", "ep")
    return _spec(tuple((name, row.get(name) or "") for name in (*columns, *size_hint)))


@lru_cache(maxsize=4096)
def _spec(items: tuple[tuple[str, str], ...]) -> tuple[ModelSpec, tuple[str, ...]]:
    row = dict(items)
    unsaid: tuple[str, ...] = ()
    if not row["layers"] or not row["hidden"]:
        if known := _by_name(row):
            return known, ()
        row, unsaid = _filled(row)
    hidden, heads = count_of(row, "hidden"), count_of(row, "heads")
    if hidden and heads and hidden % heads and not row["head_dim"]:
        row, unsaid = row | {"heads": "", "kv_heads": ""}, ("shape",)  # heads that do not divide the width: as many as of 128 values
    found = [spec for spec in _candidates(row) if spec is not None]
    if not found:
        raise NotGradable(f"no architecture fits the sizes of {row['model']!r}")
    if not unsaid and _distance(row, found[0]) <= NEAR:
        return found[0], unsaid
    return min(found, key=lambda spec: _distance(row, spec)), unsaid


def _by_name(row: Row) -> ModelSpec | None:
    """The public model that a name means, with all of its sizes; None where the name says less."""
    try:
        return spec_of(row)
    except (LightenError, LeftOut):
        return None


def _distance(row: Row, spec: ModelSpec) -> float:
    """How far a model's parameters are from the published ones; 0 where none are published."""
    pairs = ((number(row, "params_total"), spec.total_parameters), (number(row, "params_active"), spec.active_parameters))
    return sum(abs(math.log(ours / published)) for published, ours in pairs if published)


def _candidates(row: Row) -> Iterable[ModelSpec | None]:
    for name in (row["model"], row["family"]):
        try:
            named = spec_of({**row, "model": name})
        except (LightenError, LeftOut):
            continue
        if row["n_experts"] and named.active_parameters == named.total_parameters:
            continue  # a dense member of a family, where the row has experts
        yield named
        break
    if re.search(r"\bbert\b", f"{row['model']} {row['family']}".lower().replace("-", " ")):
        yield _made(row, "bert", "BertForMaskedLM", {"max_position_embeddings": 512, "type_vocab_size": 2})
        return
    for model_type, architecture, fields in GENERIC_MIXTURES if row["n_experts"] else GENERIC:
        if model_type in LATENT and row["kv_heads"]:
            continue  # latent attention has no heads of keys
        yield _made(row, model_type, architecture, fields)


def _made(row: Row, model_type: str, architecture: str, fields: Mapping[str, Any]) -> ModelSpec | None:
    """A model of one architecture with a row's sizes; None where they do not fit it."""
    config: dict[str, Any] = dict(fields) | {"model_type": model_type}
    for column, name in COLUMNS.items():
        if value := count_of(row, column):
            config[name] = value
    if experts := count_of(row, "n_experts"):
        chosen = count_of(row, "top_k") or 1
        config |= {"num_local_experts": experts, "num_experts": experts, "n_routed_experts": experts, "num_experts_per_tok": chosen}
        width = count_of(row, "moe_ffn") or count_of(row, "ffn")
        config["moe_intermediate_size"] = width
        if model_type in ("mixtral", "gpt_oss"):
            config["intermediate_size"] = width
    if row.get("tied_embeddings"):
        config["tie_word_embeddings"] = row["tied_embeddings"] == "True"
    config.setdefault("vocab_size", 32000)
    config.setdefault("num_attention_heads", max(1, config["hidden_size"] // 128))
    config.setdefault("intermediate_size", 4 * config["hidden_size"])
    for own, name in OWN_NAMES.get(model_type, {}).items():
        if name in config:
            config[own] = config[name]
    if model_type == "gpt2":
        config |= _positions(row)
    try:
        parts = describe(config, architecture)
    except (LightenError, KeyError, TypeError, ValueError, ZeroDivisionError):
        return None
    return ModelSpec(name=row["model"], family=model_type, architecture=architecture, source="", dtype="bfloat16", config=config, parts=parts)


def _filled(row: Row) -> tuple[dict[str, str], tuple[str, ...]]:
    """The row with sizes of its public model, else of a typical decoder of its number of parameters."""
    text = f"{row['model']} {row['family']}".lower()
    for names, shape in SHAPES:
        if re.search(names, text):
            return dict(row) | {name: str(value) for name, value in shape.items() if not row.get(name)}, ()
    total, active = _sizes(row)
    sized = dict(row) | {"params_total": str(total), "params_active": str(active) if active < total else ""}
    return sized | {name: str(value) for name, value in _typical(row, total, active).items() if not row.get(name)}, ("shape",)


def _sizes(row: Row) -> tuple[float, float]:
    """Parameters, and those that a token meets: of the columns, the name (`30B-A3B`), or the row's own FLOPs for each token."""
    text = row["model"]
    billions = re.search(r"(?<![a-zA-Z\d.])(\d+(?:\.\d+)?)\s*[bB]\b", text.replace("_", " ").replace("-", " "))
    chosen = re.search(r"[aA](\d+(?:\.\d+)?)\s*[bB]\b", text)
    total = number(row, "params_total") or (float(billions[1]) * 1e9 if billions else None)
    active = number(row, "params_active") or (float(chosen[1]) * 1e9 if chosen else None)
    flops = number(row, "flops_per_token_implied_g")
    if active is None and flops:
        active = flops * 1e9 / 6 / 1.1  # of which a tenth is attention's, at common lengths
        if not (count_of(row, "ep") or 1) > 1:
            active = min(active, total) if total else active
    if total is None and active is None:
        raise NotGradable("the row gives neither the model's shape nor its number of parameters")
    if total is None:
        assert active is not None
        total = active * (MIXTURE_RATIO if (count_of(row, "ep") or 1) > 1 else 1)
    return total, active or total


MIXTURE_RATIO = 9
"""Parameters for each that a token meets, of a mixture whose size is not said: between 30B-A3B and 671B-A37B."""


def _typical(row: Row, total: float, active: float) -> dict[str, int]:
    """Sizes of a decoder with so many parameters: gated, head_dim 128, layers and width as of Llama 1 to 3 (width / layers about 100)."""
    vocab = count_of(row, "vocab") or 128256
    hidden = count_of(row, "hidden") or max(256, round((active * 100 / 13) ** (1 / 3) / 128) * 128)
    if active < 0.7 * total:
        experts, chosen = 128, 8
        layers = count_of(row, "layers") or max(4, round(hidden / 75))
        rest = layers * 2.5 * hidden * hidden + 2 * vocab * hidden
        width = max(128, round(max(total - rest, 0.5 * total) / (layers * experts * 3 * hidden) / 128) * 128)
        more = {"n_experts": experts, "top_k": chosen, "moe_ffn": width, "ffn": width}
    else:
        ffn = count_of(row, "ffn") or round(3.5 * hidden / 128) * 128
        gated = ffn < 3.9 * hidden  # four times the width is of ungated blocks
        block = 2.5 * hidden * hidden + 3 * hidden * ffn if gated else 4 * hidden * hidden + 2 * hidden * ffn
        layers = count_of(row, "layers") or max(2, round((total - (2 if gated else 1) * vocab * hidden) / block))
        more = {"ffn": ffn}
    heads = max(1, hidden // 128)
    ungated = (more["ffn"] >= 3.9 * hidden) and "n_experts" not in more
    grouped = heads if ungated or total < 7.5e9 else next(size for size in (8, 4, 2, 1) if heads % size == 0)
    return more | {"layers": layers, "hidden": hidden, "heads": heads, "kv_heads": grouped, "head_dim": 128, "vocab": vocab}


# ---- devices ----


def device_of_row(row: Row) -> Device:
    """The device that a row's `hardware` means.

    Raises:
        NotGradable: the catalogue has none such.
    """
    found = match_device(row["hardware"])
    if found is None:
        raise NotGradable(f"device {row['hardware']!r} is not in the catalogue")
    return with_network(found, row.get("interconnect") or "")


def joined(device: Device, devices: int) -> tuple[Device, bool]:
    """The device with a link that joins so many, and whether that had to be added since none is known: `OUTSIDE` is then its speed."""
    if devices == 1 or (device.links and any(link.devices is None or link.devices >= devices for link in device.links)):
        return device, False
    return replace(device, links=(*device.links, Link(name="not stated", bytes_per_s=OUTSIDE, devices=None))), True


OUTSIDE = 12.5e9
"""Bytes per second of a device's network where none is known: 100 Gb/s."""
PER_NODE = 8
"""Devices of a node, where a row gives a node's network and not how many share it."""


def with_network(device: Device, interconnect: str) -> Device:
    """The device with the network between nodes that a row states, such as `8x HDR IB` or `1600Gbps RoCE/node`."""
    bits = network_bits_per_s(interconnect)
    inner = [link for link in device.links if link.devices is not None]
    if bits is None or not inner:
        return device
    outer = Link(name=interconnect, bytes_per_s=bits / 8, devices=None)
    return replace(device, links=(*inner, outer))


RATES = {"hdr": 200e9, "ndr": 400e9, "edr": 100e9, "omni-path": 100e9, "xdr": 800e9}
"""Names of network links → bits per second of one port. Source: InfiniBand Trade Association's roadmap (4x ports); Intel's Omni-Path 100 series."""


def network_bits_per_s(text: str) -> float | None:
    """Bits per second between nodes that one device has, as a row's text says; None where it does not."""
    text = text.lower()
    if found := re.search(r"(\d+)\s*gb(?:ps|/s|it/s)?\s*(?:per|/)\s*gpu", text):
        return float(found[1]) * 1e9
    if found := re.search(r"(\d+)\s*x\s*(\d+)\s*gb", text):
        return float(found[1]) * float(found[2]) * 1e9 / PER_NODE
    if found := re.search(r"(\d+)\s*x\s*(" + "|".join(RATES) + ")", text):
        return float(found[1]) * RATES[found[2]] / PER_NODE
    if found := re.search(r"(\d+)\s*gb(?:ps|/s)?\b[^;,]*/\s*node", text):
        return float(found[1]) * 1e9 / PER_NODE
    return None


# ---- training ----


@dataclass(frozen=True, kw_only=True)
class TrainingCase:
    """A row of training as the tool's own types.

    Attributes:
        linear_dtype: the type that products of weights run in, where it is not the workload's.
        software: fused, compiled, eager or None where the framework's name does not tell (`lighten.parallel.step_time`).
        early: from before attention in one kernel.
        chunked_loss: it takes the loss in pieces.
        unsaid: what the row leaves out: recompute, batch, plan, software, shape, length, precision, network, power.
    """

    spec: ModelSpec
    workload: Workload
    plan: Plan
    device: Device
    linear_dtype: str
    software: str | None
    early: bool
    chunked_loss: bool
    unsaid: tuple[str, ...]

    @property
    def tokens(self) -> int:
        return self.workload.batch_size * self.workload.seq_len


PRECISIONS: tuple[tuple[str, str, str], ...] = (
    (r"fp4", "bfloat16", "float4"),
    (r"fp8|int8(?!\?)", "bfloat16", "float8"),
    (r"tf32", "float32", "tf32"),
    (r"fp16|float16|half", "float16", "float16"),
    (r"bf16|bfloat16", "bfloat16", "bfloat16"),
    (r"fp32|float32", "float32", "float32"),
)
"""What a row's `precision` says → the type of activations, and the type that products of weights run in."""


def types_of(row: Row) -> tuple[str, str]:
    """Type of activations, and type of the products of weights.

    Raises:
        NotGradable: the precision is none of those known.
    """
    text = (row.get("precision") or "").lower()
    if not text:
        return "bfloat16", "bfloat16"
    for pattern, activations, products in PRECISIONS:
        if re.search(pattern, text.split("+")[0]):
            return activations, products
    raise NotGradable(f"precision {row['precision']!r} is not known")


SOFTWARE: tuple[tuple[str, str], ...] = (
    (r"deepspeed", "compiled"),
    (r"eager|peft|\btrl\b|litgpt (\d|config)|litgpt$|hugging|\bhf\b|axolotl|unsloth|torchtune", "eager"),
    (r"megatron|nemo|maxtext|transformer.?engine|apex|flash-?att|colossal|internal|neuronx|\bjax\b|gaudi|optimum", "fused"),
    (r"fsdp|composer|foundry|torchtitan|compile|thunder|lit-?gpt|accelerate|fairscale|nanogpt|nanochat|olmo|levanter", "compiled"),
)
"""Words of a framework's name → its kind: operators run one by one; written kernels for whole blocks; compiled or sharded by PyTorch."""
EARLY = r"20(1\d|2[012])\b|megatron-deepspeed"
"""Software from before attention in one kernel: a year up to 2022, or a fork that stood still then."""
CHUNKED = r"lit-?gpt|torchtune|liger|unsloth"
"""Software whose loss is taken in pieces. Source: litgpt's `chunked_cross_entropy`, torchtune's `CEWithChunkedOutputLoss`, Liger Kernel."""
FLASH = r"flash|\bfa2?\b|sdpa"


def software_of(row: Row) -> tuple[str | None, bool]:
    """The kind of software that a framework's name means (None: it does not tell), and whether it is from before attention in one kernel."""
    text = (row.get("framework") or "").lower()
    kind = next((kind for pattern, kind in SOFTWARE if re.search(pattern, text)), None)
    early = bool(re.search(EARLY, text)) and not re.search(FLASH, text)
    return kind, early


def _recompute_of(row: Row) -> tuple[Recompute, bool]:
    text = (row.get("act_ckpt") or "").lower()
    if text in ("full", "selective", "none"):
        return text, True  # type: ignore[return-value]
    return ("full", True) if text == "recipe default" else ("none", False)


ZERO = {0: "none", 1: "zero1", 2: "zero2", 3: "zero3"}


def _shard_of(row: Row) -> str:
    stage = number(row, "zero_stage")
    if stage is not None:
        return ZERO.get(int(stage), "none")
    text = (row.get("shard_strategy") or "").lower()
    if "fsdp" in text or "full_shard" in text or "zero3" in text:
        return "zero3"
    return "zero1" if "distributed" in text and "optimizer" in text else "none"


def plan_of_row(row: Row) -> tuple[Plan, tuple[str, ...]]:
    """How a row's work is spread, and what of that it leaves out.

    Raises:
        NotGradable: devices that the sizes do not multiply out to, or no plan at all for many devices of limited memory.
        WorkloadError: a plan that contradicts itself.
    """
    devices = count_of(row, "n_gpus")
    said = {name: count_of(row, name) for name in ("tp", "pp", "cp", "dp", "ep")}
    if devices is None and said["dp"] is None:
        raise NotGradable("the row does not give the number of devices")
    tp, pp, cp = (said[name] or 1 for name in ("tp", "pp", "cp"))
    unsaid: tuple[str, ...] = ()
    known = said["tp"] is not None or said["pp"] is not None
    inner = tp * pp * cp
    dp = devices // inner if devices and devices % inner == 0 else said["dp"] or 1  # where devices contradict the sizes, these are trusted
    shard = _shard_of(row)
    if not known and dp > 1:
        unsaid = ("plan",)
        shard = "zero3" if shard == "none" and not row.get("shard_strategy") else shard
    ep = said["ep"] or 1
    if (dp * cp) % ep:
        ep = math.gcd(dp * cp, ep)
    stages = count_of(row, "vp") or 1
    if pp > 1 and count_of(row, "vp") is None:
        unsaid = (*unsaid, "schedule")
        stages = TYPICAL_STAGES if "interleav" in (row.get("note") or "").lower() else 1
    micro = count_of(row, "micro_batch")
    early = software_of(row)[1]  # before sequence parallelism was there, it was not used
    split_positions = row.get("seq_parallel") == "True" or (row.get("seq_parallel") != "False" and not early)
    return Plan(
        dp=dp, tp=tp, pp=pp, cp=cp, ep=ep, shard=shard if dp * cp > 1 else "none",  # type: ignore[arg-type]
        sequence_parallel=tp > 1 and split_positions, schedule="interleaved" if pp > 1 and stages > 1 else "1f1b",
        virtual_stages=stages if pp > 1 else 1, micro_batch_size=micro,
    ), unsaid  # fmt: skip


DROPOUTS = ("resid_pdrop", "embd_pdrop", "attn_pdrop", "attention_dropout", "hidden_dropout", "dropout")


@lru_cache(maxsize=1024)
def _as_pretrained(spec: _Same) -> ModelSpec:
    """The decoder without the dropouts of its class's defaults, and with one kernel for GELU: as large models are trained."""
    known = spec.spec
    config = dict(known.config) | dict.fromkeys(DROPOUTS, 0.0)
    for name in ("activation_function", "hidden_act"):
        if "gelu" in str(complete(config).get(name)):
            config[name] = "gelu"
    return replace(known, config=config, parts=describe(config, known.architecture))


class _Same:
    """A spec as a key: the same object is equal to itself."""

    def __init__(self, spec: ModelSpec) -> None:
        self.spec = spec

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Same) and other.spec is self.spec

    def __hash__(self) -> int:
        return id(self.spec)


def training_case(row: Row) -> TrainingCase:
    """A row of training.csv as the tool's own types.

    Raises:
        NotGradable, LeftOut, LightenError: what is missing, or does not fit together.
    """
    spec, unsaid = spec_of_row(row)
    spec = _as_pretrained(_Same(spec)) if spec.is_decoder else spec
    plan, no_plan = plan_of_row(row)
    device, no_network = joined(device_of_row(row), plan.devices)
    dtype, products = types_of(row)
    software, early = software_of(row)
    recompute, said = _recompute_of(row)
    seq_len = count_of(row, "seq_len")
    batch, plan, no_batch = _batch_of(row, plan, seq_len or DEFAULT_LEN, spread="plan" not in no_plan)
    missing = {
        "shape": bool(unsaid), "plan": "plan" in no_plan, "schedule": "schedule" in no_plan, "batch": no_batch, "recompute": not said,
        "length": seq_len is None or bool(re.search("varies|padding", row.get("note") or "")), "network": no_network, "software": software is None,
        "precision": not row.get("precision"), "power": bool(re.search(r"\d+w\b", row["hardware"].lower())),
    }  # fmt: skip
    adapters = row.get("method") in ("lora", "qlora", "dora")
    workload = Workload(
        phase="train", batch_size=batch, seq_len=seq_len or DEFAULT_LEN, dtype=dtype, optimizer=_optimizer_of(row), recompute=recompute,
        attention="eager" if early else "flash", lora_rank=LORA_RANK if adapters else None,
        base_bits=(4 if "nf4" in row.get("precision", "") or row.get("method") == "qlora" else None) if adapters else None,
        master_weights=not adapters and dtype != "float32" and not _is_pure(row, software),
    )  # fmt: skip
    return TrainingCase(
        spec=spec, workload=workload, plan=plan, device=device, linear_dtype=products, software=software, early=early,
        chunked_loss=bool(re.search(CHUNKED, (row.get("framework") or "").lower())),
        unsaid=tuple(name for name, is_missing in missing.items() if is_missing),
    )  # fmt: skip


TYPICAL_STAGES = 2
"""Pieces of a device's layers where a row says that its schedule is interleaved and not how many there are."""


def _is_pure(row: Row, software: str | None) -> bool:
    """Whether all is kept in 16 bits: said by the precision, by an optimizer of 8 bits, or since plain PyTorch's `bf16` is that."""
    text = (row.get("precision") or "").lower()
    return "true" in text or "8bit" in (row.get("optimizer") or "").lower() or (software == "eager" and "amp" not in text)


DEFAULT_LEN = 2048
"""Tokens of a sequence where a row gives none: the range is widened for it."""
LORA_RANK = 8
DEFAULT_MICRO_TOKENS = 8192
"""Tokens of one forward pass of one rank where a row gives no batch: enough that products are large."""


def _optimizer_of(row: Row) -> str:
    text = (row.get("optimizer") or "").lower()
    return "adam8bit" if "8bit" in text else "adamw"


def _batch_of(row: Row, plan: Plan, seq_len: int, *, spread: bool) -> tuple[int, Plan, bool]:
    """Sequences of a step, the plan with a micro-batch that divides them, and whether the row leaves it open."""
    batch = count_of(row, "global_batch_seqs")
    tokens = number(row, "global_batch_tokens")
    micro, accumulated = plan.micro_batch_size, count_of(row, "grad_accum")
    if batch is None and tokens:
        batch = max(1, round(tokens / seq_len))
    if "micro_iter" in row.get("note", "") or "micro-iteration" in row.get("note", ""):
        accumulated, batch = 1, None  # its time is of one micro-batch
    unsaid = batch is None and (micro is None or (accumulated is None and plan.pp > 1))
    if batch is None:
        micro = micro or max(1, round(DEFAULT_MICRO_TOKENS * plan.cp * plan.tp / seq_len))
        batch = micro * plan.dp * (accumulated or (4 * plan.pp if plan.pp > 1 else 1))
    share = max(1, round(batch / plan.dp))
    if micro is None:
        most = max(1, round(DEFAULT_MICRO_TOKENS * plan.cp / seq_len)) if spread else share  # a plan that is not said is taken as one without waits
        micro = next(size for size in range(min(share, most), 0, -1) if share % size == 0)
        unsaid = True
    share = max(1, round(share / micro)) * micro
    return share * plan.dp, replace(plan, micro_batch_size=micro), unsaid


# ---- what a row says of its time ----


def flops_per_token(row: Row, case: TrainingCase) -> tuple[float, tuple[str, ...]]:
    """Model FLOPs of one token's training by the row's own counting, and what it leaves open of that.

    6 · parameters that a token meets, without the table of tokens + attention: 12 · layers · heads · head_dim · seq_len in full
    """
    implied = number(row, "flops_per_token_implied_g")
    if implied:
        return implied * 1e9, ()
    convention = row.get("attn_flops_convention_inferred") or ""
    spec, length = case.spec, case.workload.seq_len
    full, causal, linear = model_flops(spec, length)
    if convention.startswith("causal"):
        return linear + causal, ()
    if convention.startswith("none"):
        return linear, ()
    known = convention.startswith("full")
    return linear + full, () if known or full < 0.1 * linear else ("flops",)


def model_flops(spec: ModelSpec, seq_len: int) -> tuple[float, float, float]:
    """FLOPs of one token's forward and backward pass: attention in full, attention under the causal mask, and products of weights."""
    ops = forward_operators(spec, Forward(batch_size=1, query_len=seq_len, key_len=seq_len), "bfloat16")
    attention = sum(op.matmul_flops for op in ops if op.kind == "attention")
    masked = sum(op.causal_flops for op in ops if op.kind == "attention")
    linear = sum(op.matmul_flops * _chosen_share(part) for part, op in zip(spec.parts, ops, strict=True) if op.kind != "attention")
    return 3 * attention / seq_len, 3 * masked / seq_len, 3 * linear / seq_len


def _chosen_share(part: Part) -> float:
    """What of an operator's products is asked for: less than all where a class computes experts that no row is routed to."""
    return getattr(part, "routed", part.experts_per_row) / part.experts_per_row if isinstance(part, Linear) else 1.0


def step_seconds(row: Row, case: TrainingCase) -> tuple[float, tuple[str, ...]]:
    """The published time of a step of the case's tokens, from the best figure that the row has, and what it leaves open.

    Raises:
        NotGradable: no figure of time.
    """
    devices = case.plan.devices
    published = count_of(row, "n_gpus") or devices
    batch_said = bool(row.get("global_batch_seqs") or row.get("global_batch_tokens")) or "batch" not in case.unsaid
    if (seconds := number(row, "step_time_s")) and batch_said:
        if not row.get("seq_len") or re.search("varies|longest", row.get("note") or ""):
            raise NotGradable("a step's tokens are not known: its sequences' lengths are not given, or vary")
        return seconds, ()
    if rate := number(row, "tokens_per_s_per_gpu"):
        return case.tokens / devices / rate, ()
    if rate := number(row, "tokens_per_s"):
        return case.tokens / devices / (rate / published), ()
    if rate := number(row, "samples_per_s"):
        return case.workload.batch_size / devices / (rate / published), ()
    if achieved := number(row, "tflops_per_gpu"):
        flops, unsaid = flops_per_token(row, case)
        kind = row.get("tflops_kind") or "model"
        if "under-estimate" in kind:
            raise NotGradable("its FLOPs per second are of a counting that its source says is wrong")
        if kind.startswith("hardware"):
            flops *= 4 / 3 if case.workload.recompute == "full" else 1
        return case.tokens / devices * flops / (achieved * 1e12), unsaid
    if share := number(row, "mfu_pct"):
        flops, unsaid = flops_per_token(row, case)
        return case.tokens / devices * flops / (share / 100 * case.device.peak(case.workload.dtype)), unsaid
    if share := number(row, "hfu_pct"):
        flops, unsaid = flops_per_token(row, case)
        flops *= 4 / 3 if case.workload.recompute == "full" else 1
        return case.tokens / devices * flops / (share / 100 * case.device.peak(case.workload.dtype)), unsaid
    raise NotGradable("the row gives no time")
