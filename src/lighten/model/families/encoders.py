"""Encoders of BERT's kin (Devlin et al. 2018, arXiv:1810.04805) as `transformers` computes them: one builder, each family an entry of data.

Source of names and order: transformers' modeling files, held to them by tests/test_families.py.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from lighten.errors import ModelError
from lighten.model.families import _encoder_blocks as blocks
from lighten.model.families import _steps as s
from lighten.model.families._family import Family
from lighten.model.families._fields import check_probabilities
from lighten.model.families._steps import Config, Scope, Step, Width
from lighten.model.spec import Part, Rows

SIZES = ("vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size", "max_position_embeddings")
CAUSAL = ("ForCausalLM", "LMHeadModel", "Decoder")
"""Heads of which only the positions that are asked for are computed."""


@dataclass(frozen=True, kw_only=True)
class Block:
    """Names of a block's modules, and whether a norm stands before each half or after its residual addition."""

    query: str = "attention.self.query"
    key: str = "attention.self.key"
    value: str = "attention.self.value"
    attention: str = "attention.self"
    output: str = "attention.output.dense"
    attention_norm: str = "attention.output.LayerNorm"
    up: str = "intermediate.dense"
    act: str = "intermediate.intermediate_act_fn"
    down: str = "output.dense"
    mlp_norm: str = "output.LayerNorm"
    norm_first: bool = False
    mlp_width: Width = "intermediate_size"
    act_field: str = "hidden_act"

    def steps(self) -> tuple[Step, ...]:
        """The block's steps in forward order."""
        attention = (
            *(s.linear(name, "attention", "hidden_size", "hidden_size") for name in (self.query, self.key, self.value)),
            s.attend(self.attention),
            s.linear(self.output, "attention", "hidden_size", "hidden_size"),
            s.add(_beside(self.output if self.norm_first else self.attention_norm, "add"), "attention"),
        )
        mlp = (
            s.linear(self.up, "mlp", "hidden_size", self.mlp_width),
            s.act(self.act, self.mlp_width, field=self.act_field),
            s.linear(self.down, "mlp", self.mlp_width, "hidden_size"),
            s.add(_beside(self.down if self.norm_first else self.mlp_norm, "add"), "mlp"),
        )
        norms = s.norm(self.attention_norm), s.norm(self.mlp_norm)
        if self.norm_first:
            return (norms[0], *attention, norms[1], *mlp)
        return (*attention, norms[0], *mlp, norms[1])


@dataclass(frozen=True, kw_only=True)
class Encoder:
    """A family as data.

    Attributes:
        stem: what the names of its classes begin with; empty where `heads` has whole names.
        prefix: the path of the model without head in a checkpoint of one with a head.
        heads: end of a class's name → its steps after the blocks.
        embeddings: steps before the blocks.
        block: steps of a block.
        path: where block `{}` is.
        after: steps after the blocks in every class.
        sizes: fields that must be there.
        bare: ends of names of the classes that have no head.
    """

    stem: str
    prefix: str
    heads: Mapping[str, tuple[Step, ...]]
    embeddings: tuple[Step, ...]
    block: tuple[Step, ...] = field(default_factory=lambda: Block().steps())
    path: str = "encoder.layer.{}"
    after: tuple[Step, ...] = ()
    sizes: tuple[str, ...] = SIZES
    bare: tuple[str, ...] = ("Model",)

    def family(self) -> Family:
        """The registry's entry."""
        return Family(describe=self.describe, architectures=tuple(self.stem + head for head in self.heads))

    def describe(self, config: Mapping[str, Any], architecture: str) -> tuple[Part, ...]:
        """The parts in forward order."""
        s.positive(config, self.sizes)
        check_probabilities(config, ("hidden_dropout_prob", "attention_probs_dropout_prob", "dropout", "attention_dropout"))
        head = architecture.removeprefix(self.stem)
        scope = Scope(config=config, base="" if head in self.bare else f"{self.prefix}.")
        body = s.base(s.refuse("add_cross_attention"), *self.embeddings, s.blocks(self.path, "num_hidden_layers", *self.block), *self.after)
        top = s.on("logits" if head in CAUSAL else "token", *self.heads[head])
        return tuple(s.run((body, top), scope))


def _beside(name: str, other: str) -> str:
    """`attention.output.add` of `attention.output.LayerNorm`."""
    return ".".join((*name.split(".")[:-1], other))


def embeddings(
    *, size: Width = "hidden_size", types: bool = True, per_token: bool = False, normed: bool = True, project: str | None = None,
) -> tuple[Step, ...]:  # fmt: skip
    """Words, token types and positions (and ERNIE's task types, where `use_task_id` says so) added up and normalized.

    Args:
        per_token: positions are looked up for each token, as their numbers depend on the padding (RoBERTa).
        project: the linear that follows where tables are not as wide as the model.
    """

    found = (
        s.table("embeddings.word_embeddings", "vocab_size", size),
        s.when(types, s.table("embeddings.token_type_embeddings", "type_vocab_size", size)),
        s.table("embeddings.position_embeddings", "max_position_embeddings", size, rows="token" if per_token else "position"),
        s.when("use_task_id", s.table("embeddings.task_type_embeddings", "task_type_vocab_size", size)),
        s.add("embeddings.add", "embedding", size, flops=types + 1),
        s.when(normed, s.norm("embeddings.LayerNorm", size)),
    )
    if project is None:
        return found
    return (*found, s.when(lambda c: c[str(size)] != c["hidden_size"], s.linear(project, "embedding", size, "hidden_size")))


def dense(name: str, outputs: Width = "hidden_size", inputs: Width = "hidden_size", **more: Any) -> Step:
    """A linear of a head."""
    return s.linear(name, "head", inputs, outputs, **more)


WORDS = "embeddings.word_embeddings"
POOLER: tuple[Step, ...] = (
    s.base(
        s.linear("pooler.dense", "pooler", "hidden_size", "hidden_size", rows="sequence"),
        s.elementwise("pooler.activation", "pooler", "hidden_size", "tanh", rows="sequence"),
    ),
)
TOKENS = (dense("classifier", s.labels),)
SPANS = (dense("qa_outputs", s.labels),)
POOLED = (*POOLER, dense("classifier", s.labels, rows="sequence"))
NEXT_SENTENCE = dense("cls.seq_relationship", 2, rows="sequence")


def bert_lm(words: str = WORDS, size: Width = "hidden_size", act: str = "hidden_act") -> tuple[Step, ...]:
    """BERT's masked-language head: transform, norm, the tied table with a bias one level up."""
    at = "cls.predictions"
    return (
        dense(f"{at}.transform.dense", size),
        s.act(f"{at}.transform.transform_act_fn", size, field=act, component="head"),
        s.norm(f"{at}.transform.LayerNorm", size, component="head"),
        s.vocabulary_head(f"{at}.decoder", size, shared_bias=f"{at}.bias", tied_to=words),
    )


def roberta_lm(size: Width = "hidden_size", act: str | None = None) -> tuple[Step, ...]:
    """RoBERTa's masked-language head."""
    return (
        dense("lm_head.dense", size),
        s.act("lm_head.gelu", size, field=act, component="head"),
        s.norm("lm_head.layer_norm", size, component="head"),
        s.vocabulary_head("lm_head.decoder", size, shared_bias="lm_head.bias", tied_to=WORDS),
    )


def first_token(act: str = "tanh", *, name: str = "classifier", field: str | None = None) -> tuple[Step, ...]:
    """A head of two layers on the first token."""
    inner: Step
    if field is None and act == "tanh":
        inner = s.elementwise(f"{name}.activation", "head", "hidden_size", "tanh", rows="sequence")
    else:
        inner = s.act(f"{name}.activation", "hidden_size", field=field, kind=act, component="head", rows="sequence")
    return (dense(f"{name}.dense", rows="sequence"), inner, dense(f"{name}.out_proj", s.labels, rows="sequence"))


ROBERTA_HEADS: dict[str, tuple[Step, ...]] = {
    "Model": POOLER, "ForMaskedLM": roberta_lm(), "ForCausalLM": roberta_lm(), "ForSequenceClassification": first_token(),
    "ForTokenClassification": TOKENS, "ForQuestionAnswering": SPANS,
}  # fmt: skip
BERT_HEADS: dict[str, tuple[Step, ...]] = {
    "Model": POOLER, "ForMaskedLM": bert_lm(), "ForSequenceClassification": POOLED, "ForTokenClassification": TOKENS,
    "ForQuestionAnswering": SPANS,
}  # fmt: skip
POOLED_HEADS: dict[str, tuple[Step, ...]] = {
    "Model": POOLER, "ForMaskedLM": (*POOLER, *bert_lm()), "ForSequenceClassification": POOLED, "ForTokenClassification": (*POOLER, *TOKENS),
    "ForQuestionAnswering": (*POOLER, *SPANS),
}  # fmt: skip
"""Heads of models that pool whether a head reads it or not."""
PRETRAINING: dict[str, tuple[Step, ...]] = {
    "ForPreTraining": (*POOLER, *bert_lm(), NEXT_SENTENCE),
    "ForNextSentencePrediction": (*POOLER, NEXT_SENTENCE),
}
ELECTRA_HEADS: dict[str, tuple[Step, ...]] = {
    "Model": (),
    "ForMaskedLM": (
        dense("generator_predictions.dense", "embedding_size"),
        s.act("generator_predictions.activation", "embedding_size", component="head"),
        s.norm("generator_predictions.LayerNorm", "embedding_size", component="head"),
        dense("generator_lm_head", "vocab_size", "embedding_size", tied_to=WORDS),
    ),
    "ForSequenceClassification": first_token("gelu"),
    "ForTokenClassification": TOKENS,
    "ForQuestionAnswering": SPANS,
}  # fmt: skip
ELECTRA_HEADS_BY_ACT = ELECTRA_HEADS | {"ForSequenceClassification": first_token(field="hidden_act")}


def roberta(stem: str, prefix: str = "roberta") -> Encoder:
    """A model that differs from RoBERTa (Liu et al. 2019, arXiv:1907.11692) in nothing but its name."""
    return Encoder(stem=stem, prefix=prefix, heads=ROBERTA_HEADS, embeddings=embeddings(per_token=True), sizes=(*SIZES, "type_vocab_size"))


FLAT_POOLER: tuple[Step, ...] = (
    s.base(
        s.linear("pooler", "pooler", "hidden_size", "hidden_size", rows="sequence"),
        s.elementwise("pooler_activation", "pooler", "hidden_size", "tanh", rows="sequence"),
    ),
)
MOBILE_POOLER: tuple[Step, ...] = (s.when("classifier_activation", *POOLER),)
ALBERT_LM: tuple[Step, ...] = (
    dense("predictions.dense", "embedding_size"),
    s.act("predictions.activation", "embedding_size", field="hidden_act", component="head"),
    s.norm("predictions.LayerNorm", "embedding_size", component="head"),
    s.vocabulary_head("predictions.decoder", "embedding_size", shared_bias="predictions.bias", tied_to=WORDS),
)
REMBERT_LM: tuple[Step, ...] = (
    dense("cls.predictions.dense", "output_embedding_size"),
    s.act("cls.predictions.activation", "output_embedding_size", field="hidden_act", component="head"),
    s.norm("cls.predictions.LayerNorm", "output_embedding_size", component="head"),
    dense("cls.predictions.decoder", "vocab_size", "output_embedding_size"),
)

NOMIC_HEADS: dict[str, tuple[Step, ...]] = {
    "Model": (),
    "ForMaskedLM": (*bert_lm()[:2], s.norm("cls.predictions.transform.layer_norm", component="head"), bert_lm()[3]),
    "ForSequenceClassification": POOLED,
    "ForTokenClassification": TOKENS,
}


def after_attention() -> tuple[Step, ...]:
    """A post-norm block's steps after its output projection."""
    whole = Block().steps()
    return whole[5:]


def _types(config: Config) -> bool:
    """Whether there are token types: `type_vocab_size` may be 0, yet not be missing."""
    value = config.get("type_vocab_size")
    if isinstance(value, bool) or not isinstance(value, int) or value < 0:
        found = "is missing" if value is None else f"= {value!r}"
        raise ModelError(f"config.json of a {config.get('model_type')} model needs type_vocab_size, 0 or more; type_vocab_size {found}.")
    return value > 0


def _embedding_size(config: Config) -> int:
    field_name = "embedding_size" if config.get("embedding_size") is not None else "hidden_size"
    return s.positive(config, (field_name,))[field_name]


def deberta_embeddings() -> tuple[Step, ...]:
    """Words, positions and types where there are such, and the table of relative positions."""

    def rows(config: Config) -> int:
        return 2 * blocks.position_span(config)

    def normed(config: Config) -> bool:
        return "layer_norm" in str(config.get("norm_rel_ebd", "none")).lower()

    return (
        s.table("embeddings.word_embeddings", "vocab_size", _embedding_size),
        s.when("position_biased_input", s.table("embeddings.position_embeddings", "max_position_embeddings", _embedding_size, rows="position")),
        s.when(_types, s.table("embeddings.token_type_embeddings", "type_vocab_size", _embedding_size)),
        s.add("embeddings.add", "embedding", _embedding_size),
        s.when(
            lambda c: _embedding_size(c) != c["hidden_size"],
            s.linear("embeddings.embed_proj", "embedding", _embedding_size, "hidden_size", bias=False),
        ),
        s.norm("embeddings.LayerNorm"),
        s.when("relative_attention", s.weights("attention", {"encoder.rel_embeddings.weight": (rows, "hidden_size")})),
        s.when(normed, s.when("relative_attention", blocks.position_norm("encoder.LayerNorm"))),
        s.when(normed, s.when(lambda c: not c.get("relative_attention"), s.weights("norm", {
            "encoder.LayerNorm.weight": ("hidden_size",), "encoder.LayerNorm.bias": ("hidden_size",),
        }))),
    )  # fmt: skip


def _pooler_size(config: Config) -> int:
    field_name = "pooler_hidden_size" if config.get("pooler_hidden_size") is not None else "hidden_size"
    return s.positive(config, (field_name,))[field_name]


DEBERTA_HEADS: dict[str, tuple[Step, ...]] = {
    "Model": (),
    "ForMaskedLM": (
        s.when("legacy", *bert_lm(size=_embedding_size)),
        s.when(
            lambda c: not c.get("legacy"),
            dense("lm_predictions.lm_head.dense"),
            s.act("lm_predictions.lm_head.transform_act_fn", "hidden_size", field="hidden_act", component="head"),
            s.norm("lm_predictions.lm_head.LayerNorm", component="head"),
            s.vocabulary_head(
                "lm_predictions.lm_head.decoder", "hidden_size", shared_bias="lm_predictions.lm_head.bias", tied_to=WORDS, own_bias=False,
                always_tied=True,
            ),
        ),
    ),
    "ForSequenceClassification": (
        s.linear("pooler.dense", "pooler", _pooler_size, _pooler_size, rows="sequence"),
        s.act("pooler.activation", _pooler_size, field="pooler_hidden_act", component="pooler", rows="sequence"),
        dense("classifier", s.labels, _pooler_size, rows="sequence"),
    ),
    "ForTokenClassification": TOKENS,
    "ForQuestionAnswering": SPANS,
}  # fmt: skip


def modernbert_window(scope: Scope) -> int | None:
    """`local_attention` keys around each query on local layers, itself beside them; every third layer sees all unless `layer_types` says so."""
    types = scope.config.get("layer_types")
    every = scope.config.get("global_attn_every_n_layers", 3)
    if types is not None and (not isinstance(types, list) or len(types) < scope.size("num_hidden_layers")):
        raise ModelError("config.json: layer_types is not a list of num_hidden_layers names.")
    if types is None and (isinstance(every, bool) or not isinstance(every, int) or every < 1):
        raise ModelError(f"config.json: global_attn_every_n_layers={every!r} is not a positive whole number.")
    local = types[scope.layer] == "sliding_attention" if types is not None else bool(scope.layer % every)
    return 2 * (scope.size("local_attention") // 2) + 1 if local else None


def modernbert_head() -> tuple[Step, ...]:
    """Dense, activation and norm of every head."""
    return (
        dense("head.dense", bias="classifier_bias"),
        s.act("head.act", "hidden_size", field="classifier_activation", component="head"),
        s.norm("head.norm", component="head", bias="norm_bias"),
    )


def splinter_head() -> tuple[Step, ...]:
    """Question-aware span selection: the start and the end of the answer to one question (Ram et al. 2021, arXiv:2101.00438)."""
    found: list[Step] = []
    transforms: tuple[tuple[str, Rows], ...] = (("query_start", "sequence"), ("query_end", "sequence"), ("start", "token"), ("end", "token"))
    for name, rows in transforms:
        at = f"splinter_qass.{name}_transform"
        found += [
            s.on(
                rows, dense(f"{at}.dense"), s.act(f"{at}.act_fn", "hidden_size", kind="gelu", component="head"),
                s.norm(f"{at}.LayerNorm", component="head"),
            )
        ]  # fmt: skip
    for name in ("start", "end"):
        found += [
            dense(f"splinter_qass.{name}_classifier", bias=False, rows="sequence"),
            s.product(f"splinter_qass.{name}", 1, "hidden_size", "key", component="head"),
        ]
    return tuple(found)


def squeezebert_block() -> tuple[Step, ...]:
    """A post-norm block whose linears are grouped convolutions of width 1 (Iandola et al. 2020, arXiv:2006.11316)."""

    def conv(name: str, component: str, sizes: tuple[Width, Width], groups: str) -> Step:
        return blocks.convolution(name, component, sizes, 1, groups=groups)

    square: tuple[Width, Width] = ("hidden_size", "hidden_size")
    return (
        *(conv(f"attention.{name}", "attention", square, f"{name[0]}_groups") for name in ("query", "key", "value")),
        s.attend("attention", causal=False),
        conv("post_attention.conv1d", "attention", square, "post_attention_groups"),
        s.add("post_attention.add", "attention"),
        s.norm("post_attention.layernorm"),
        conv("intermediate.conv1d", "mlp", ("hidden_size", "intermediate_size"), "intermediate_groups"),
        s.act("intermediate.act", "intermediate_size", field="hidden_act"),
        conv("output.conv1d", "mlp", ("intermediate_size", "hidden_size"), "output_groups"),
        s.add("output.add", "mlp"),
        s.norm("output.layernorm"),
    )


def _own_head_dim(config: Config) -> int:
    return s.positive(config, ("head_dim",))["head_dim"] if config.get("head_dim") is not None else s.head_dim(config)


def _kv_heads(config: Config) -> int:
    heads = s.positive(config, ("num_attention_heads",))["num_attention_heads"]
    if config.get("num_key_value_heads") is None:
        return heads
    found = s.positive(config, ("num_key_value_heads",))["num_key_value_heads"]
    if heads % found:
        raise ModelError(f"config.json: num_attention_heads={heads} is not a multiple of num_key_value_heads={found}.")
    return found


def eurobert_block() -> tuple[Step, ...]:
    """A Llama block that sees both ways (Boizard et al. 2025, arXiv:2503.05500)."""

    def queries(config: Config) -> int:
        return int(config["num_attention_heads"]) * _own_head_dim(config)

    def keys(config: Config) -> int:
        return _kv_heads(config) * _own_head_dim(config)

    return (
        s.norm("input_layernorm", kind="rmsnorm"),
        s.linear("self_attn.q_proj", "attention", "hidden_size", queries, bias="attention_bias"),
        s.linear("self_attn.k_proj", "attention", "hidden_size", keys, bias="attention_bias"),
        s.linear("self_attn.v_proj", "attention", "hidden_size", keys, bias="attention_bias"),
        s.elementwise("self_attn.rotary", "attention", lambda c: queries(c) + keys(c), "rotary", 3),
        s.attend("self_attn", dim=_own_head_dim, kv_heads=_kv_heads, causal=False),
        s.linear("self_attn.o_proj", "attention", queries, "hidden_size", bias="attention_bias"),
        s.add("self_attn.add", "attention"),
        s.norm("post_attention_layernorm", kind="rmsnorm"),
        s.linear("mlp.gate_proj", "mlp", "hidden_size", "intermediate_size", bias="mlp_bias"),
        s.act("mlp.act_fn", "intermediate_size", field="hidden_act"),
        s.linear("mlp.up_proj", "mlp", "hidden_size", "intermediate_size", bias="mlp_bias"),
        s.elementwise("mlp.multiply", "mlp", "intermediate_size", "multiply"),
        s.linear("mlp.down_proj", "mlp", "intermediate_size", "hidden_size", bias="mlp_bias"),
        s.add("mlp.add", "mlp"),
    )


EUROBERT_CLASSIFIER = (dense("dense"), s.act("activation", "hidden_size", kind="gelu", component="head"), dense("classifier", s.labels))


def eurobert_classifier(scope: Scope) -> list[Part]:
    """Two layers on one row a sequence; on every token where their answers are averaged ("late")."""
    late = scope.config.get("classifier_pooling") == "late"
    return s.run(EUROBERT_CLASSIFIER, scope if late else replace(scope, rows="sequence"))


def xlm(stem: str, check: Step) -> Encoder:
    """XLM (Lample & Conneau 2019, arXiv:1901.07291), an encoder or causal; modules carry their layer's number."""

    def languages(config: Config) -> bool:
        count = config.get("n_langs", 1)
        return isinstance(count, int) and count > 1 and bool(config.get("use_lang_emb"))

    def wide(config: Config) -> int:
        return 4 * int(config["hidden_size"])

    def gelu(scope: Scope) -> list[Part]:
        return list(s.act("ffns.{}.act", wide, kind="gelu" if scope.config.get("gelu_activation") else "relu")(scope))

    return Encoder(
        stem=stem, prefix="transformer", path="", bare=("Model",),
        sizes=("vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads", "max_position_embeddings"),
        embeddings=(
            check, s.refuse("asm"), s.refuse("is_encoder", False),
            s.table("embeddings", "vocab_size"), s.table("position_embeddings", "max_position_embeddings", rows="position"),
            s.when(languages, s.table("lang_embeddings", "n_langs")), s.add("add", "embedding"), s.norm("layer_norm_emb"),
        ),
        block=(
            *(s.linear("attentions.{}." + name, "attention", "hidden_size", "hidden_size") for name in ("q_lin", "k_lin", "v_lin")),
            s.attend("attentions.{}", causal="causal"),
            s.linear("attentions.{}.out_lin", "attention", "hidden_size", "hidden_size"),
            s.add("attentions.{}.add", "attention"),
            s.norm("layer_norm1.{}"),
            s.linear("ffns.{}.lin1", "mlp", "hidden_size", wide),
            gelu,
            s.linear("ffns.{}.lin2", "mlp", wide, "hidden_size"),
            s.add("ffns.{}.add", "mlp"),
            s.norm("layer_norm2.{}"),
        ),
        heads={
            "Model": (),
            "WithLMHeadModel": (dense("pred_layer.proj", "vocab_size", tied_to="embeddings"),),
            "ForSequenceClassification": (
                s.refuse("summary_use_proj", False), s.refuse("summary_proj_to_labels", False),
                dense("sequence_summary.summary", s.labels, rows="sequence"),
            ),
            "ForTokenClassification": TOKENS,
            "ForQuestionAnsweringSimple": SPANS,
        },
    )  # fmt: skip


ENCODERS: dict[str, Encoder] = {
    "roberta": roberta("Roberta"),
    "xlm-roberta": roberta("XLMRoberta"),
    "camembert": roberta("Camembert"),
    "data2vec-text": roberta("Data2VecText", "data2vec_text"),
    "roberta-prelayernorm": Encoder(
        stem="RobertaPreLayerNorm", prefix="roberta_prelayernorm", heads=ROBERTA_HEADS, embeddings=embeddings(per_token=True),
        block=Block(attention_norm="attention.LayerNorm", mlp_norm="intermediate.LayerNorm", norm_first=True).steps(),
        after=(s.norm("LayerNorm"),), sizes=(*SIZES, "type_vocab_size"),
    ),
    "xlm-roberta-xl": Encoder(
        stem="XLMRobertaXL", prefix="roberta", heads=ROBERTA_HEADS, embeddings=embeddings(per_token=True, normed=False),
        block=Block(attention_norm="attention.self_attn_layer_norm", mlp_norm="LayerNorm", norm_first=True).steps(),
        after=(s.norm("encoder.LayerNorm"),), sizes=(*SIZES, "type_vocab_size"),
    ),
    "distilbert": Encoder(
        stem="DistilBert", prefix="distilbert", embeddings=embeddings(types=False), path="transformer.layer.{}",
        block=Block(
            query="attention.q_lin", key="attention.k_lin", value="attention.v_lin", attention="attention", output="attention.out_lin",
            attention_norm="sa_layer_norm", up="ffn.lin1", act="ffn.activation", down="ffn.lin2", mlp_norm="output_layer_norm",
            mlp_width="hidden_dim", act_field="activation",
        ).steps(),
        heads={
            "Model": (),
            "ForMaskedLM": (
                dense("vocab_transform"), s.act("activation", "hidden_size", field="activation", component="head"),
                s.norm("vocab_layer_norm", component="head"), dense("vocab_projector", "vocab_size", tied_to=WORDS),
            ),
            "ForSequenceClassification": (
                dense("pre_classifier", rows="sequence"), s.act("relu", "hidden_size", kind="relu", component="head", rows="sequence"),
                dense("classifier", s.labels, rows="sequence"),
            ),
            "ForTokenClassification": TOKENS,
            "ForQuestionAnswering": SPANS,
        },
        sizes=("vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads", "hidden_dim", "max_position_embeddings"),
    ),
    "electra": Encoder(
        stem="Electra", prefix="electra", embeddings=embeddings(size="embedding_size", project="embeddings_project"),
        heads=ELECTRA_HEADS | {
            "ForCausalLM": ELECTRA_HEADS["ForMaskedLM"],
            "ForPreTraining": (
                dense("discriminator_predictions.dense"),
                s.act("discriminator_predictions.activation", "hidden_size", field="hidden_act", component="head"),
                dense("discriminator_predictions.dense_prediction", 1),
            ),
        },
        sizes=(*SIZES, "type_vocab_size", "embedding_size"),
    ),
    "mpnet": Encoder(
        stem="MPNet", prefix="mpnet", embeddings=(
            *embeddings(types=False, per_token=True),
            s.weights("attention", {"encoder.relative_attention_bias.weight": ("relative_attention_num_buckets", "num_attention_heads")}),
        ),
        block=Block(
            query="attention.attn.q", key="attention.attn.k", value="attention.attn.v", attention="attention.attn", output="attention.attn.o",
            attention_norm="attention.LayerNorm",
        ).steps(),
        heads={name: steps for name, steps in ROBERTA_HEADS.items() if name != "ForCausalLM"},
    ),
    "ernie": Encoder(
        stem="Ernie", prefix="ernie", heads=BERT_HEADS | PRETRAINING | {"ForCausalLM": bert_lm()}, sizes=(*SIZES, "type_vocab_size"),
        embeddings=embeddings(),
    ),
    "megatron-bert": Encoder(
        stem="MegatronBert", prefix="bert", heads=BERT_HEADS | PRETRAINING | {"ForCausalLM": bert_lm()}, embeddings=embeddings(normed=False),
        block=Block(attention_norm="attention.ln", mlp_norm="ln", norm_first=True).steps(), after=(s.norm("encoder.ln"),),
        sizes=(*SIZES, "type_vocab_size"),
    ),
    "bert-generation": Encoder(
        stem="BertGeneration", prefix="bert", embeddings=embeddings(types=False), bare=("Encoder",), heads={
            "Encoder": (),
            "Decoder": (s.vocabulary_head("lm_head.decoder", "hidden_size", shared_bias="lm_head.bias", tied_to=WORDS),),
        },
    ),
    "albert": Encoder(
        stem="Albert", prefix="albert",
        embeddings=(
            *embeddings(size="embedding_size"),
            s.linear("encoder.embedding_hidden_mapping_in", "embedding", "embedding_size", "hidden_size"),
        ),
        block=(),
        after=(
            blocks.albert_layers(
                Block(
                    query="attention.query", key="attention.key", value="attention.value", attention="attention", output="attention.dense",
                    attention_norm="attention.LayerNorm", up="ffn", act="activation", down="ffn_output", mlp_norm="full_layer_layer_norm",
                ).steps()
            ),
        ),
        heads={
            "Model": FLAT_POOLER,
            "ForMaskedLM": ALBERT_LM,
            "ForSequenceClassification": (*FLAT_POOLER, dense("classifier", s.labels, rows="sequence")),
            "ForTokenClassification": TOKENS,
            "ForQuestionAnswering": SPANS,
            "ForPreTraining": (*FLAT_POOLER, *ALBERT_LM, dense("sop_classifier.classifier", s.labels, rows="sequence")),
        },
        sizes=(*SIZES, "type_vocab_size", "embedding_size"),
    ),
    "deberta": Encoder(
        stem="Deberta", prefix="deberta", embeddings=deberta_embeddings(), heads=DEBERTA_HEADS,
        block=(*blocks.deberta_attention(), *after_attention()),
    ),
    "deberta-v2": Encoder(
        stem="DebertaV2", prefix="deberta", embeddings=deberta_embeddings(), heads=DEBERTA_HEADS,
        block=(
            *blocks.deberta_v2_attention(), *after_attention(),
            s.when(lambda c: bool(c.get("conv_kernel_size")), blocks.after_first_block("encoder.conv")),
        ),
    ),
    "modernbert": Encoder(
        stem="ModernBert", prefix="model", path="layers.{}",
        embeddings=(s.table("embeddings.tok_embeddings", "vocab_size"), s.norm("embeddings.norm", bias="norm_bias")),
        block=(
            s.unless_first(s.norm("attn_norm", bias="norm_bias")),
            s.linear("attn.Wqkv", "attention", "hidden_size", lambda c: 3 * c["hidden_size"], bias="attention_bias"),
            s.elementwise("attn.rotary", "attention", lambda c: 2 * c["hidden_size"], "rotary", 3),
            s.attend("attn", causal=False, window=modernbert_window),
            s.linear("attn.Wo", "attention", "hidden_size", "hidden_size", bias="attention_bias"),
            s.add("attn.add", "attention"),
            s.norm("mlp_norm", bias="norm_bias"),
            s.linear("mlp.Wi", "mlp", "hidden_size", lambda c: 2 * c["intermediate_size"], bias="mlp_bias"),
            s.act("mlp.act", "intermediate_size", field="hidden_activation"),
            s.elementwise("mlp.multiply", "mlp", "intermediate_size", "multiply"),
            s.linear("mlp.Wo", "mlp", "intermediate_size", "hidden_size", bias="mlp_bias"),
            s.add("mlp.add", "mlp"),
        ),
        after=(s.norm("final_norm", bias="norm_bias"),),
        heads={
            "Model": (),
            "ForMaskedLM": (*modernbert_head(), dense("decoder", "vocab_size", bias="decoder_bias", tied_to="embeddings.tok_embeddings")),
            "ForSequenceClassification": (s.on("sequence", *modernbert_head(), dense("classifier", s.labels)),),
            "ForTokenClassification": (*modernbert_head(), dense("classifier", s.labels)),
            "ForQuestionAnswering": (*modernbert_head(), dense("classifier", s.labels)),
        },
    ),
    "mobilebert": Encoder(
        stem="MobileBert", prefix="mobilebert", block=blocks.mobilebert_block(),
        embeddings=(
            s.table("embeddings.word_embeddings", "vocab_size", "embedding_size"),
            s.linear(
                "embeddings.embedding_transformation", "embedding", blocks.trigram_width, "hidden_size"
            ),
            s.table("embeddings.position_embeddings", "max_position_embeddings", rows="position"),
            s.table("embeddings.token_type_embeddings", "type_vocab_size"),
            s.add("embeddings.add", "embedding", flops=2),
            blocks.mobilebert_norm("embeddings.LayerNorm", "hidden_size"),
        ),
        heads={
            "Model": MOBILE_POOLER,
            "ForMaskedLM": (*bert_lm()[:3], blocks.mobilebert_vocabulary),
            "ForSequenceClassification": (*MOBILE_POOLER, POOLED[-1]),
            "ForTokenClassification": TOKENS,
            "ForQuestionAnswering": SPANS,
            "ForPreTraining": (*MOBILE_POOLER, *bert_lm()[:3], blocks.mobilebert_vocabulary, NEXT_SENTENCE),
            "ForNextSentencePrediction": (*MOBILE_POOLER, NEXT_SENTENCE),
        },
        sizes=(*SIZES, "type_vocab_size", "embedding_size", "true_hidden_size", "intra_bottleneck_size"),
    ),
    "convbert": Encoder(
        stem="ConvBert", prefix="convbert", embeddings=embeddings(size="embedding_size", project="embeddings_project"), heads=ELECTRA_HEADS_BY_ACT,
        block=(*blocks.convbert_attention(), *after_attention()), sizes=(*SIZES, "type_vocab_size", "embedding_size"),
    ),
    "layoutlm": Encoder(
        stem="LayoutLM", prefix="layoutlm",
        heads={name: steps for name, steps in POOLED_HEADS.items() if name != "ForQuestionAnswering"},
        sizes=(*SIZES, "type_vocab_size", "max_2d_position_embeddings"),
        embeddings=(
            s.table("embeddings.word_embeddings", "vocab_size"),
            s.table("embeddings.position_embeddings", "max_position_embeddings", rows="position"),
            *(s.table(f"embeddings.{axis}_position_embeddings", "max_2d_position_embeddings") for axis in "xyhw"),
            s.table("embeddings.token_type_embeddings", "type_vocab_size"),
            s.add("embeddings.add", "embedding", flops=8),
            s.norm("embeddings.LayerNorm"),
        ),
    ),
    "rembert": Encoder(
        stem="RemBert", prefix="rembert",
        embeddings=(
            *embeddings(size="input_embedding_size"),
            s.linear("encoder.embedding_hidden_mapping_in", "embedding", "input_embedding_size", "hidden_size"),
        ),
        heads=BERT_HEADS | {"ForMaskedLM": REMBERT_LM, "ForCausalLM": REMBERT_LM},
        sizes=(*SIZES, "type_vocab_size", "input_embedding_size", "output_embedding_size"),
    ),
    "splinter": Encoder(
        stem="Splinter", prefix="splinter", embeddings=embeddings(), sizes=(*SIZES, "type_vocab_size"),
        heads={"Model": (), "ForQuestionAnswering": splinter_head()},
    ),
    "squeezebert": Encoder(
        stem="SqueezeBert", prefix="transformer", embeddings=embeddings(size="embedding_size"), path="encoder.layers.{}",
        block=squeezebert_block(), heads=POOLED_HEADS, sizes=(*SIZES, "type_vocab_size", "embedding_size"),
    ),
    "nystromformer": Encoder(
        stem="Nystromformer", prefix="nystromformer", sizes=(*SIZES, "type_vocab_size"),
        embeddings=(
            s.table("embeddings.word_embeddings", "vocab_size"),
            s.table("embeddings.token_type_embeddings", "type_vocab_size"),
            s.table("embeddings.position_embeddings", lambda c: c["max_position_embeddings"] + 2, rows="position"),
            s.add("embeddings.add", "embedding", flops=2),
            s.norm("embeddings.LayerNorm"),
        ),
        block=(
            blocks.full_attention_only,
            *(s.linear(f"attention.self.{name}", "attention", "hidden_size", "hidden_size") for name in ("query", "key", "value")),
            s.attend("attention.self", causal=False),
            blocks.value_convolution,
            s.linear("attention.output.dense", "attention", "hidden_size", "hidden_size"),
            *after_attention(),
        ),
        heads={
            "Model": (), "ForMaskedLM": bert_lm(), "ForSequenceClassification": first_token(field="hidden_act"), "ForTokenClassification": TOKENS,
            "ForQuestionAnswering": SPANS,
        },
    ),
    "eurobert": Encoder(
        stem="EuroBert", prefix="model", path="layers.{}", embeddings=(s.table("embed_tokens", "vocab_size"),), block=eurobert_block(),
        after=(s.norm("norm", kind="rmsnorm"),),
        heads={
            "Model": (), "ForMaskedLM": (dense("lm_head", "vocab_size", bias="mlp_bias", tied_to="embed_tokens"),), "ForTokenClassification": TOKENS,
            "ForSequenceClassification": (eurobert_classifier,),
        },
    ),
    "nomic_bert": Encoder(
        stem="NomicBert", prefix="nomic_bert", path="encoder.layers.{}", sizes=(*SIZES, "type_vocab_size"),
        embeddings=(
            s.table("embeddings.word_embeddings", "vocab_size"),
            s.table("embeddings.token_type_embeddings", "type_vocab_size"),
            s.add("embeddings.add", "embedding"),
            s.norm("emb_ln"),
        ),
        block=(
            s.linear("attn.Wqkv", "attention", "hidden_size", lambda c: 3 * c["hidden_size"], bias=False),
            s.elementwise("attn.rotary", "attention", lambda c: 2 * c["hidden_size"], "rotary", 3),
            s.attend("attn", causal=False),
            s.linear("attn.out_proj", "attention", "hidden_size", "hidden_size", bias=False),
            s.add("add_attention", "attention"),
            s.norm("norm1"),
            s.linear("mlp.fc12", "mlp", "hidden_size", "intermediate_size", bias=False),
            s.act("mlp.act", "intermediate_size", field="hidden_act"),
            s.linear("mlp.fc11", "mlp", "hidden_size", "intermediate_size", bias=False),
            s.elementwise("mlp.multiply", "mlp", "intermediate_size", "multiply"),
            s.linear("mlp.fc2", "mlp", "intermediate_size", "hidden_size", bias=False),
            s.add("add_mlp", "mlp"),
            s.norm("norm2"),
        ),
        heads=NOMIC_HEADS,
    ),
    "xlm": xlm("XLM", s.refuse("pre_norm")),
    "flaubert": xlm("Flaubert", s.refuse("pre_norm")),
}  # fmt: skip
"""`model_type` → the family as data."""

FAMILIES: dict[str, Family] = {model_type: encoder.family() for model_type, encoder in ENCODERS.items()}
