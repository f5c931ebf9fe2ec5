"""Tensors that checkpoints hold and their architecture does not: transformers leaves them out when it loads, and so does `lighten`, with a note.

Source: `_keys_to_ignore_on_load_unexpected` of transformers' model classes. Where it names the layer of one released model
(`model.layers.61` of DeepSeek-V3's 61 layers) the number is the config's own here.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from lighten.model.quantized import quantization_leftover
from lighten.model.spec import Part, TensorSpec
from lighten.units import dtype_bytes

NEXT_TOKEN_LAYERS = ("axk1", "deepseek_v3", "deepseek_v32", "glm4_moe", "glm4_moe_lite", "hy_v3", "mimo_v2_flash")
"""`model_type` of the models whose checkpoints number the blocks of multi-token prediction (arXiv:2412.19437, section 2.2) after the others."""


@dataclass(frozen=True, kw_only=True)
class Kind:
    """One kind of tensor that is left out.

    Attributes:
        what: for people.
        name: an expression that its tensors' names hold.
        types: `model_type`s that have it; None: any.
        rank: dimensions of such a tensor; None: any.
    """

    what: str
    name: str
    types: tuple[str, ...] | None = None
    rank: int | None = None

    def has(self, tensor: TensorSpec, model_type: str) -> bool:
        if (self.types is not None and model_type not in self.types) or self.rank not in (None, len(tensor.shape)):
            return False
        return re.search(self.name, tensor.name) is not None


CONSTANTS = Kind(what="numbers of positions and of segments", name=r"(position_ids|embeddings\.token_type_ids)$")
KINDS = (
    CONSTANTS,
    Kind(what="multi-token prediction", name=r"(^|\.)mtp(_\w+)?\."),
    Kind(what="rotary frequencies", name=r"(^|\.)(original_)?inv_freq$"),
    Kind(what="masks of attention", name=r"(^|\.)(attn|attention|crossattention)\.bias$", rank=4),
    Kind(what="masks of attention", name=r"(^|\.)masked_bias$"),
    Kind(what="relative positions' indices", name=r"(^|\.)relative_position_index$"),
    Kind(what="counters of batches", name=r"(^|\.)num_batches_tracked$"),
    Kind(what="versions", name=r"^(model\.)?(encoder|decoder)\.version$"),
    Kind(
        what="relative positions of cross attention", name=r"^decoder\.block\.0\.layer\.1\.EncDecAttention\.relative_attention_bias\.weight$",
        types=("t5", "mt5", "umt5", "longt5"),
    ),
    Kind(what="a pooler that the architecture does not use", name=r"^(bert|roberta|xlm-roberta|roberta_xl|electra|camembert|bros)\.pooler\.dense\."),
    Kind(what="the head of next-sentence prediction", name=r"^cls\.seq_relationship\.", types=("bert",)),
    Kind(what="unused positions", name=r"^deberta\.embeddings\.position_embeddings\.weight$", types=("deberta", "deberta-v2")),
    Kind(what="the head of masked prediction", name=r"^(mask|lm)_predictions\.", types=("deberta", "deberta-v2")),
    Kind(what="computed positions", name=r"^model\.(encoder|decoder)\.embed_positions\.weight$", types=("marian",)),
    Kind(what="unused positions", name=r"^esm\.embeddings\.position_embeddings\.weight$", types=("esm",)),
)  # fmt: skip
"""Tried in this order on each tensor that the architecture does not call for; `CONSTANTS`, which follow from the config, get no note."""


@dataclass(frozen=True, kw_only=True)
class LeftOut:
    """Names of the tensors that are left out, and a note on each kind of them."""

    names: frozenset[str]
    notes: tuple[str, ...]


def left_out(config: Mapping[str, Any], parts: tuple[Part, ...], strangers: Iterable[TensorSpec]) -> LeftOut:
    """Those of `strangers`, which the architecture does not call for, that transformers leaves out too.

    What it does not know stays a contradiction.
    """
    strangers = tuple(strangers)
    beside = quantization_leftover(parts, strangers)
    kind_of = _kinds(config)
    found: dict[str, list[TensorSpec]] = {}
    for tensor in strangers:
        what = "what the quantization stores beside its weights" if tensor.name in beside else kind_of(tensor)
        if what is not None:
            found.setdefault(what, []).append(tensor)
    names = frozenset(tensor.name for tensors in found.values() for tensor in tensors)
    return LeftOut(names=names, notes=tuple(_note(what, tensors) for what, tensors in found.items() if what != CONSTANTS.what))


def _kinds(config: Mapping[str, Any]) -> Callable[[TensorSpec], str | None]:
    model_type, layers = str(config.get("model_type")), config.get("num_hidden_layers")
    more = config.get("num_nextn_predict_layers", 1)
    known = model_type in NEXT_TOKEN_LAYERS and isinstance(layers, int) and isinstance(more, int)
    extra = range(layers, layers + more) if known and isinstance(layers, int) and isinstance(more, int) else range(0)

    def kind(tensor: TensorSpec) -> str | None:
        numbered = re.match(r"model\.layers\.(\d+)\.", tensor.name)
        if numbered and int(numbered[1]) in extra:
            return "multi-token prediction"
        return next((each.what for each in KINDS if each.has(tensor, model_type)), None)

    return kind


def _note(what: str, tensors: list[TensorSpec]) -> str:
    size = sum(round(tensor.elements * dtype_bytes(tensor.dtype)) for tensor in tensors)
    return f"{len(tensors)} tensor{'s' if len(tensors) > 1 else ''} of {size} bytes left out: {what}"
