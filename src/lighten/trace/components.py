"""Which component a module's figures are summed under, by its path."""

from __future__ import annotations

import re

_RULES = (
    ("head", r"(^|\.)(lm_head|classifier|score|qa_outputs|cls|embed_out|output_projection|proj_out|predictions|lm_predictions|generator_\w+)(\.|$)"),
    ("pooler", r"(^|\.)pooler(\.|$)"),
    ("norm", r"(^|[._])(layer_?norm\w*|norm\d*|ln_?\w*|rms_?norm|\w+_norm|\w*LayerNorm)$"),
    ("attention", r"attn|attention|(^|\.)(query|key|value|q_proj|k_proj|v_proj|o_proj|qkv)(\.|$)"),
    (
        "mlp",
        r"mlp|ffn|feed_forward|feedforward|experts|intermediate|(^|\.)(fc\d?|dense(_\d+)?|dense_h_to_4h|dense_4h_to_h|output|DenseReluDense|block_sparse_moe)(\.|$)",
    ),
    ("embedding", r"embed|(^|\.)(wte|wpe|shared|patch)"),
)


def component_of(path: str) -> str:
    """embedding, attention, mlp, norm, pooler, head; `other` where the path tells none of them.

    >>> component_of("model.layers.3.self_attn.q_proj"), component_of("model.layers.3.input_layernorm"), component_of("conv1")
    ('attention', 'norm', 'other')
    """
    path = path.replace("/", ".").removeprefix("_torch_params.")
    leaf = path.rpartition(".")[2]
    for component, rule in _RULES:
        if re.search(rule, leaf if component == "norm" else path):
            return component
    return "other"
