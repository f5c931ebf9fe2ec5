"""Encoder-decoders as `transformers` computes them: T5 (Raffel et al. 2019, arXiv:1910.10683) and BART (Lewis et al. 2019, arXiv:1910.13461)
with their kin, each family an entry of data.

The encoder computes the rows of the source, the decoder those of the tokens; keys and values of cross attention are projected once for the source.
Source of names and order: transformers' modeling files, held to them by tests/test_families.py and tests/test_encoders.py.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

from lighten.errors import ModelError, UnsupportedFamily
from lighten.model.families import _steps as s
from lighten.model.families._family import Family
from lighten.model.families._fields import check_probabilities
from lighten.model.families._steps import Config, Scope, Step, Width
from lighten.model.spec import Embedding, Linear, Part, Rows, Table

# Tables that are looked up twice, tensors that are no parameters, parameters that no checkpoint keeps


class _TableAgain(Embedding):
    """The table of words, looked up for the other side: stored once."""

    def tensors(self) -> dict[str, tuple[int, ...]]:
        return {}


class _Buffer(Table):
    """A tensor that checkpoints keep and that is no parameter."""

    @property
    def parameters(self) -> int:
        return 0


class _Unsaved(Table):
    """Parameters that are computed anew when a model is built, and that no checkpoint keeps."""

    def tensors(self) -> dict[str, tuple[int, ...]]:
        return {}

    @property
    def parameters(self) -> int:
        return sum(math.prod(shape) for shape in self.shapes.values())


def _table_again(name: str, count: Width) -> Step:
    return lambda scope: [
        _TableAgain(
            name=scope.name(name), component="embedding", rows=scope.rows, num_embeddings=scope.size(count), embedding_dim=scope.size("hidden_size")
        )
    ]


def _kept(kind: type[Table], name: str, component: str, *shape: Width) -> Step:
    return lambda scope: [kind(name=scope.name(name), component=component, rows=scope.rows, shapes={scope.name(name): tuple(map(scope.size, shape))})]


def classifier(size: Width) -> tuple[Step, ...]:
    """Two layers on the last end of a sequence."""
    return (
        s.linear("classification_head.dense", "head", size, size, rows="sequence"),
        s.elementwise("classification_head.tanh", "head", size, "tanh", rows="sequence"),
        s.linear("classification_head.out_proj", "head", size, s.labels, rows="sequence"),
    )


# T5


def _inner(config: Config) -> int:
    c = s.positive(config, ("num_attention_heads", "d_kv"))
    return c["num_attention_heads"] * c["d_kv"]


def t5_activation(config: Config) -> tuple[str, bool]:
    """(the MLP's function, whether it is gated) of `feed_forward_proj`: `relu`, `gated-gelu`; a gated gelu is the approximation by tanh.

    Raises:
        ModelError: not a name, alone or after `gated-`.
    """
    name = config.get("feed_forward_proj", "relu")
    words = name.split("-") if isinstance(name, str) else []
    if not words or len(words) > 2 or (len(words) == 2 and words[0] != "gated"):
        raise ModelError(f"config.json: feed_forward_proj={name!r} is not the name of a function, alone or after 'gated-'.")
    return ("gelu_new" if name == "gated-gelu" else words[-1]), len(words) == 2


def _decoder_layers(config: Config) -> int:
    name = "num_decoder_layers" if config.get("num_decoder_layers") is not None else "num_hidden_layers"
    return s.positive(config, (name,))[name]


def _t5_norm(name: str) -> Step:
    return s.norm(name, kind="rmsnorm")


def _t5_attention(at: str, path: str, *, cross: bool = False, causal: bool = False, positions: tuple[Step, ...] = ()) -> tuple[Step, ...]:
    keys = s.on("source", *(s.linear(f"{path}.{name}", "attention", "hidden_size", _inner, bias=False) for name in "kv"))
    own = tuple(s.linear(f"{path}.{name}", "attention", "hidden_size", _inner, bias=False) for name in "kv")
    return (
        _t5_norm(f"{at}.layer_norm"),
        s.linear(f"{path}.q", "attention", "hidden_size", _inner, bias=False),
        *((keys,) if cross else own),
        *positions,
        s.attend(path, dim="d_kv", causal=causal, keys="source" if cross else None),
        s.linear(f"{path}.o", "attention", _inner, "hidden_size", bias=False),
        s.add(f"{path}.add", "attention"),
    )


def _t5_mlp(at: str) -> Step:
    def parts(scope: Scope) -> Iterable[Part]:
        act, gated = t5_activation(scope.config)
        path = f"{at}.DenseReluDense"
        first = "wi_0" if gated else "wi"
        steps = (
            _t5_norm(f"{at}.layer_norm"),
            s.linear(f"{path}.{first}", "mlp", "hidden_size", "d_ff", bias=False),
            s.act(f"{path}.act", "d_ff", kind=act),
            s.when(
                gated,
                s.linear(f"{path}.wi_1", "mlp", "hidden_size", "d_ff", bias=False),
                s.elementwise(f"{path}.multiply", "mlp", "d_ff", "multiply"),
            ),
            s.linear(f"{path}.wo", "mlp", "d_ff", "hidden_size", bias=False),
            s.add(f"{path}.add", "mlp"),
        )
        return s.run(steps, scope)

    return parts


def _is_sparse(scope: Scope, side: Literal["encoder", "decoder"]) -> bool:
    """Whether a block has experts: every so manieth, `num_sparse_…_layers` in all (Fedus et al. 2021, arXiv:2101.03961)."""
    count = scope.config.get(f"num_sparse_{side}_layers")
    layers = _decoder_layers(scope.config) if side == "decoder" else scope.size("num_hidden_layers")
    if isinstance(count, bool) or not isinstance(count, int) or not 0 <= count <= layers:
        raise ModelError(f"config.json: num_sparse_{side}_layers={count!r} is not a number from 0 to {layers}.")
    step = layers // count if count else layers
    return step == 1 or scope.layer % step == 1


def _switch_mlp(at: str, side: Literal["encoder", "decoder"]) -> Step:
    """One expert for each token where the block has experts, else a plain MLP. All tokens are counted: none is over an expert's capacity."""

    def expert(scope: Scope, name: str, sizes: tuple[Width, Width]) -> Linear:
        return Linear(
            name=scope.name(f"{at}.mlp.experts.expert_*.{name}"), component="mlp", rows=scope.rows, in_features=scope.size(sizes[0]),
            out_features=scope.size(sizes[1]), experts=scope.size("num_experts"),
        )  # fmt: skip

    def parts(scope: Scope) -> Iterable[Part]:
        act = str(scope.config.get("dense_act_fn"))
        yield from _t5_norm(f"{at}.layer_norm")(scope)
        if _is_sparse(scope, side):
            yield from s.linear(f"{at}.mlp.router.classifier", "mlp", "hidden_size", "num_experts", bias="router_bias")(scope)
            yield expert(scope, "wi", ("hidden_size", "d_ff"))
            yield from s.act(f"{at}.mlp.act", "d_ff", kind=act)(scope)
            yield expert(scope, "wo", ("d_ff", "hidden_size"))
        else:
            yield from s.linear(f"{at}.mlp.wi", "mlp", "hidden_size", "d_ff", bias=False)(scope)
            yield from s.act(f"{at}.mlp.act", "d_ff", kind=act)(scope)
            yield from s.linear(f"{at}.mlp.wo", "mlp", "d_ff", "hidden_size", bias=False)(scope)
        yield from s.add(f"{at}.mlp.add", "mlp")(scope)

    return parts


@dataclass(frozen=True, kw_only=True)
class T5:
    """A family of T5's kin as data.

    Attributes:
        stem: what the names of its classes begin with.
        heads: ends of the names of the classes that are described.
        positions_in_each: every layer has relative positions of its own, not the first alone (UMT5).
        sparse: some layers have experts.
    """

    stem: str
    heads: tuple[str, ...] = (
        "Model",
        "ForConditionalGeneration",
        "EncoderModel",
        "ForTokenClassification",
        "ForQuestionAnswering",
        "ForSequenceClassification",
    )
    positions_in_each: bool = False
    sparse: bool = False

    def family(self) -> Family:
        """The registry's entry."""
        return Family(describe=self.describe, architectures=tuple(self.stem + head for head in self.heads))

    def describe(self, config: Mapping[str, Any], architecture: str) -> tuple[Part, ...]:
        """The parts in forward order."""
        s.positive(
            config, ("vocab_size", "hidden_size", "d_kv", "d_ff", "num_hidden_layers", "num_attention_heads", "relative_attention_num_buckets")
        )
        check_probabilities(config, ("dropout_rate",))
        head = architecture.removeprefix(self.stem)
        scope = Scope(config=config, base="transformer." if head in ("ForTokenClassification", "ForSequenceClassification") else "")
        if head in ("EncoderModel", "ForTokenClassification"):
            steps = [s.base(s.table("shared", "vocab_size"), *self._encoder())]
        else:
            source = s.on("source", s.table("shared", "vocab_size"), *self._encoder())
            steps = [s.base(source, _table_again("shared", "vocab_size"), *self._decoder())]
        if head == "ForConditionalGeneration":
            steps += [s.on("logits", s.linear("lm_head", "head", "hidden_size", "vocab_size", bias=False, tied_to="shared"))]
        elif head in ("ForTokenClassification", "ForQuestionAnswering"):
            steps += [s.linear("classifier" if head == "ForTokenClassification" else "qa_outputs", "head", "hidden_size", s.labels)]
        elif head == "ForSequenceClassification":
            steps += classifier("hidden_size")
        return tuple(s.run(steps, scope))

    def _positions(self, attention: str) -> Step:
        shape: dict[str, tuple[Width, ...]] = {
            f"{attention}.relative_attention_bias.weight": ("relative_attention_num_buckets", "num_attention_heads"),
        }
        found = s.weights("attention", shape)
        return found if self.positions_in_each else lambda scope: () if scope.layer else found(scope)

    def _encoder(self) -> tuple[Step, ...]:
        mlp = _switch_mlp("layer.1", "encoder") if self.sparse else _t5_mlp("layer.1")
        at = "layer.0.SelfAttention"
        block = (*_t5_attention("layer.0", at, positions=(self._positions(at),)), mlp)
        return s.blocks("encoder.block.{}", "num_hidden_layers", *block), _t5_norm("encoder.final_layer_norm")

    def _decoder(self) -> tuple[Step, ...]:
        mlp = _switch_mlp("layer.2", "decoder") if self.sparse else _t5_mlp("layer.2")
        at = "layer.0.SelfAttention"
        block = (
            *_t5_attention("layer.0", at, causal=True, positions=(self._positions(at),)),
            *_t5_attention("layer.1", "layer.1.EncDecAttention", cross=True),
            mlp,
        )  # fmt: skip
        return s.blocks("decoder.block.{}", _decoder_layers, *block), _t5_norm("decoder.final_layer_norm")


# BART

BART_SIZES = ("vocab_size", "d_model", "encoder_layers", "encoder_attention_heads", "encoder_ffn_dim")
BART_DECODER_SIZES = ("decoder_layers", "decoder_attention_heads", "decoder_ffn_dim")
Side = Literal["encoder", "decoder"]


@dataclass(frozen=True, kw_only=True)
class Bart:
    """A family of BART's kin as data.

    Attributes:
        stem: what the names of its classes begin with.
        heads: ends of the names of the classes that are described.
        norm_first: norms stand before each part of a block, and one after all blocks.
        final_norm: a norm after all blocks.
        embedding_norm: a norm after the embeddings.
        positions: a table with two rows more than positions ("offset") or as many as them ("table"), the same computed and not saved
            with a language-model head ("computed"), or no parameters ("none").
        logits_bias: checkpoints keep the constant bias of the logits.
    """

    stem: str
    heads: tuple[str, ...] = ("Model", "ForConditionalGeneration", "ForCausalLM", "ForQuestionAnswering", "ForSequenceClassification")
    norm_first: bool = False
    final_norm: bool = False
    embedding_norm: bool = True
    positions: Literal["offset", "table", "computed", "none"] = "offset"
    logits_bias: bool = True

    def family(self) -> Family:
        """The registry's entry."""
        return Family(describe=self.describe, architectures=tuple(self.stem + head for head in self.heads))

    def describe(self, config: Mapping[str, Any], architecture: str) -> tuple[Part, ...]:
        """The parts in forward order."""
        head = architecture.removeprefix(self.stem)
        positions = () if self.positions == "none" else ("max_position_embeddings",)
        encoder = () if head == "ForCausalLM" else BART_SIZES[2:]
        s.positive(config, (*BART_SIZES[:2], *encoder, *BART_DECODER_SIZES, *positions))
        check_probabilities(config, ("dropout", "attention_dropout", "activation_dropout"))
        scope = Scope(config=config, base="" if head == "Model" else "model.")
        steps = (s.refuse("use_prompt"), s.base(*self._body(config, head)), *self._head(config, head))
        return tuple(s.run(steps, scope))

    def _body(self, config: Config, head: str) -> tuple[Step, ...]:
        tied = bool(config.get("tie_word_embeddings", True))
        shared = bool(config.get("share_encoder_decoder_embeddings", True))
        generates = head in ("ForConditionalGeneration", "MTModel")
        if head == "ForCausalLM":
            table = s.table("decoder.embed_tokens", "vocab_size" if shared else "decoder_vocab_size", "d_model")
            return table, *self._side("decoder", generates=False, cross=False)
        if shared and tied:
            first, second = s.on("source", s.table("shared", "vocab_size", "d_model")), _table_again("shared", "vocab_size")
        else:
            unused = s.when(shared, s.weights("embedding", {"shared.weight": ("vocab_size", "d_model")}))
            first = s.on("source", unused, s.table("encoder.embed_tokens", "vocab_size", "d_model"))
            second = s.table("decoder.embed_tokens", "vocab_size" if shared else "decoder_vocab_size", "d_model")
        encoder = s.on("source", *self._side("encoder", generates=generates))
        return first, encoder, second, *self._side("decoder", generates=generates)

    def _side(self, side: Side, *, generates: bool, cross: bool = True) -> tuple[Step, ...]:
        rows: Rows = "source" if side == "encoder" else "position"
        tables: dict[str, tuple[Step, ...]] = {
            "offset": (s.table(f"{side}.embed_positions", lambda c: c["max_position_embeddings"] + 2, "d_model", rows=rows),),
            "table": (s.table(f"{side}.embed_positions", "max_position_embeddings", "d_model", rows=rows),),
            "none": (),
        }
        tables["computed"] = tables["table"]
        if generates:
            tables["computed"] = (_kept(_Unsaved, f"{side}.embed_positions.weight", "embedding", "max_position_embeddings", "d_model"),)
        return (
            *tables[self.positions],
            s.add(f"{side}.add", "embedding", "d_model"),
            s.when(self.embedding_norm, s.norm(f"{side}.layernorm_embedding", "d_model")),
            s.blocks(f"{side}.layers.{{}}", f"{side}_layers", *self._block(side, cross)),
            s.when(self.final_norm, s.norm(f"{side}.layer_norm", "d_model")),
        )

    def _block(self, side: Side, cross: bool) -> tuple[Step, ...]:
        width = f"{side}_ffn_dim"
        mlp = (
            s.linear("fc1", "mlp", "d_model", width),
            s.act("activation_fn", width, field="activation_function"),
            s.linear("fc2", "mlp", width, "d_model"),
            s.add("add" if not self.norm_first else "fc2.add", "mlp", "d_model"),
        )
        return (
            *self._normed("self_attn_layer_norm", self._attention("self_attn", side, cross=False)),
            *((self._cross(cross)) if side == "decoder" else ()),
            *self._normed("final_layer_norm", mlp),
        )

    def _cross(self, used: bool) -> tuple[Step, ...]:
        """Attention to the source. A decoder alone has its weights and no use for them."""
        if used:
            return self._normed("encoder_attn_layer_norm", self._attention("encoder_attn", "decoder", cross=True))
        shapes: dict[str, tuple[Width, ...]] = {}
        for name in ("k_proj", "v_proj", "q_proj", "out_proj"):
            shapes |= {f"encoder_attn.{name}.weight": ("d_model", "d_model"), f"encoder_attn.{name}.bias": ("d_model",)}
        return (s.weights("attention", shapes | {f"encoder_attn_layer_norm.{name}": ("d_model",) for name in ("weight", "bias")}),)

    def _normed(self, name: str, steps: tuple[Step, ...]) -> tuple[Step, ...]:
        norm = s.norm(name, "d_model")
        return (norm, *steps) if self.norm_first else (*steps, norm)

    def _attention(self, at: str, side: Side, *, cross: bool) -> tuple[Step, ...]:
        heads = f"{side}_attention_heads"
        keys = tuple(s.linear(f"{at}.{name}_proj", "attention", "d_model", "d_model") for name in "kv")
        return (
            s.linear(f"{at}.q_proj", "attention", "d_model", "d_model"),
            *((s.on("source", *keys),) if cross else keys),
            s.attend(
                at, heads=heads, dim=lambda c: s.divided(c, "d_model", heads), causal=side == "decoder" and not cross,
                keys="source" if cross else None,
            ),
            s.linear(f"{at}.out_proj", "attention", "d_model", "d_model"),
            s.add(f"{at}.add" if self.norm_first else f"add_{at}", "attention", "d_model"),
        )  # fmt: skip

    def _head(self, config: Config, head: str) -> tuple[Step, ...]:
        if head == "Model":
            return ()
        if head == "ForSequenceClassification":
            return classifier("d_model")
        if head == "ForQuestionAnswering":
            return (s.linear("qa_outputs", "head", "d_model", 2),)  # start and end, whatever the config says
        shared = bool(config.get("share_encoder_decoder_embeddings", True))
        vocabulary = "vocab_size" if shared or head == "ForCausalLM" else "decoder_vocab_size"
        table = "shared" if shared and head != "ForCausalLM" else "decoder.embed_tokens"
        if not shared and config.get("tie_word_embeddings", True):
            raise UnsupportedFamily("marian with tied heads and tables of its own for each side has no formula; it can be traced.")
        lm_head = s.linear("lm_head", "head", "d_model", vocabulary, bias=False, tied_to=table)
        kept = self.logits_bias and head != "ForCausalLM"
        return (s.on("logits", lm_head, s.when(kept, _kept(_Buffer, "final_logits_bias", "head", 1, vocabulary))),)


GENERATES = ("Model", "ForConditionalGeneration", "ForCausalLM")

FAMILIES: dict[str, Family] = {
    "t5": T5(stem="T5").family(),
    "mt5": T5(stem="MT5").family(),
    "umt5": T5(stem="UMT5", positions_in_each=True).family(),
    "switch_transformers": T5(
        stem="SwitchTransformers", heads=("Model", "ForConditionalGeneration", "EncoderModel"), sparse=True,
    ).family(),
    "bart": Bart(stem="Bart").family(),
    "mvp": Bart(stem="Mvp").family(),
    "plbart": Bart(stem="PLBart", heads=(*GENERATES, "ForSequenceClassification")).family(),
    "mbart": Bart(stem="MBart", norm_first=True, final_norm=True).family(),
    "pegasus": Bart(stem="Pegasus", heads=GENERATES, norm_first=True, final_norm=True, embedding_norm=False, positions="table").family(),
    "marian": Bart(stem="Marian", heads=("Model", "MTModel", "ForCausalLM"), embedding_norm=False, positions="computed").family(),
    "blenderbot": Bart(stem="Blenderbot", heads=GENERATES, norm_first=True, final_norm=True, embedding_norm=False, positions="table").family(),
    "blenderbot-small": Bart(stem="BlenderbotSmall", heads=GENERATES, positions="table").family(),
    "m2m_100": Bart(
        stem="M2M100", heads=GENERATES[:2], norm_first=True, final_norm=True, embedding_norm=False, positions="none", logits_bias=False,
    ).family(),
}  # fmt: skip
"""`model_type` → its architectures and the function that gives their parts."""
