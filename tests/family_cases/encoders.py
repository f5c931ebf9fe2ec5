"""Tiny encoders of BERT's kin."""

from __future__ import annotations

from typing import Any

TINY: dict[str, Any] = {
    "vocab_size": 320, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 48, "max_position_embeddings": 64,
}  # fmt: skip
UNTIED: dict[str, Any] = TINY | {
    "tie_word_embeddings": False, "hidden_act": "relu", "type_vocab_size": 3, "is_decoder": True, "num_attention_heads": 2,
}  # fmt: skip
BOTH = [TINY, UNTIED]
TOKENS: dict[str, Any] = dict.fromkeys(("pad_token_id", "bos_token_id", "eos_token_id", "cls_token_id", "sep_token_id", "mask_token_id"), 0)
"""Special tokens within the tiny vocabulary."""
BOTTLENECK: dict[str, Any] = {"embedding_size": 16, "true_hidden_size": 16, "intra_bottleneck_size": 16, "num_feedforward_networks": 3}
XLM_TINY: dict[str, Any] = {"vocab_size": 320, "emb_dim": 32, "n_layers": 2, "n_heads": 4, "max_position_embeddings": 64}
XLM: list[dict[str, Any]] = [
    XLM_TINY, XLM_TINY | {"n_langs": 3, "causal": True, "gelu_activation": False, "tie_word_embeddings": False, "n_heads": 2},
]  # fmt: skip

CASES: dict[str, list[dict[str, Any]]] = {
    "roberta": BOTH,
    "xlm-roberta": BOTH,
    "camembert": BOTH,
    "data2vec-text": BOTH,
    "roberta-prelayernorm": BOTH,
    "xlm-roberta-xl": BOTH,
    "distilbert": [
        {"vocab_size": 320, "dim": 32, "n_layers": 2, "n_heads": 4, "hidden_dim": 48, "max_position_embeddings": 64},
        {
            "vocab_size": 320, "dim": 32, "n_layers": 3, "n_heads": 2, "hidden_dim": 40, "max_position_embeddings": 64, "activation": "relu",
            "sinusoidal_pos_embds": True, "tie_word_embeddings": False,
        },
    ],
    "electra": [TINY | {"embedding_size": 16}, UNTIED | {"embedding_size": 32}],
    "mpnet": [TINY, {**UNTIED, "relative_attention_num_buckets": 16}],
    "ernie": [TINY | {"use_task_id": True, "task_type_vocab_size": 3}, UNTIED],
    "megatron-bert": BOTH,
    "bert-generation": BOTH,
    "albert": [
        TINY | {"embedding_size": 16, "num_hidden_layers": 3},
        TINY | {
            "embedding_size": 32, "num_hidden_layers": 5, "num_hidden_groups": 2, "inner_group_num": 2, "tie_word_embeddings": False,
            "hidden_act": "relu", "type_vocab_size": 3,
        },
    ],
    "deberta": [
        TINY | {"relative_attention": True, "pos_att_type": ["c2p", "p2c"], "position_biased_input": False},
        TINY | {"tie_word_embeddings": False, "type_vocab_size": 2, "hidden_act": "relu", "pooler_hidden_size": 32, "embedding_size": 16},
        TINY | {"relative_attention": True, "pos_att_type": "p2c", "legacy": False, "max_relative_positions": 80},
    ],
    "deberta-v2": [
        TINY | {
            "relative_attention": True, "pos_att_type": "p2c|c2p", "position_biased_input": False, "position_buckets": 8, "share_att_key": True,
            "norm_rel_ebd": "layer_norm", "conv_kernel_size": 3, "conv_act": "gelu",
        },
        TINY | {"type_vocab_size": 2, "hidden_act": "relu", "embedding_size": 16},
        TINY | {
            "relative_attention": True, "pos_att_type": ["c2p", "p2c"], "legacy": False, "max_relative_positions": 5,
            "conv_kernel_size": 5, "conv_groups": 4,
        },
        TINY | {"relative_attention": True, "pos_att_type": ["p2c"]},
    ],
    "modernbert": [
        TINY | TOKENS | {"num_hidden_layers": 4, "local_attention": 8},
        TINY | TOKENS | {
            "attention_bias": True, "mlp_bias": True, "norm_bias": True, "decoder_bias": False, "classifier_bias": True, "tie_word_embeddings": False,
            "hidden_activation": "relu", "classifier_pooling": "mean", "layer_types": ["sliding_attention", "full_attention"],
        },
    ],
    "mobilebert": [
        TINY | BOTTLENECK,
        TINY | BOTTLENECK | {
            "use_bottleneck_attention": True, "normalization_type": "layer_norm", "trigram_input": False, "num_feedforward_networks": 1,
            "tie_word_embeddings": False, "classifier_activation": False,
        },
        TINY | BOTTLENECK | {"key_query_shared_bottleneck": False, "true_hidden_size": 32, "intra_bottleneck_size": 32},
    ],
    "convbert": [TINY | {"embedding_size": 16}, TINY | {"embedding_size": 32, "head_ratio": 8, "conv_kernel_size": 5, "tie_word_embeddings": False}],
    "layoutlm": [TINY | {"max_2d_position_embeddings": 40}, TINY | {"tie_word_embeddings": False, "hidden_act": "relu"}],
    "rembert": [TINY | {"input_embedding_size": 16, "output_embedding_size": 24}, TINY | {"input_embedding_size": 32, "output_embedding_size": 8}],
    "splinter": [TINY, TINY | {"hidden_act": "relu", "type_vocab_size": 3}],
    "squeezebert": [
        TINY | {"embedding_size": 32}, TINY | {"embedding_size": 32, "q_groups": 2, "output_groups": 1, "post_attention_groups": 4},
    ],
    "nystromformer": [TINY, TINY | {"conv_kernel_size": 5, "tie_word_embeddings": False}],
    "eurobert": [
        TINY | TOKENS | {"num_key_value_heads": 2},
        TINY | TOKENS | {"attention_bias": True, "mlp_bias": True, "tie_word_embeddings": True, "classifier_pooling": "bos", "head_dim": 16},
    ],
    "nomic_bert": [TINY | TOKENS, TINY | TOKENS | {"type_vocab_size": 3, "hidden_act": "gelu"}],
}  # fmt: skip
"""model_type → changes that make its config tiny."""

NEEDS_VALUES: dict[str, list[dict[str, Any]]] = {
    "deberta": [
        TINY | {"relative_attention": True, "pos_att_type": ["c2p", "p2c"], "position_biased_input": False},
        TINY | {"tie_word_embeddings": False, "type_vocab_size": 2, "hidden_act": "relu", "pooler_hidden_size": 32, "embedding_size": 16},
        TINY | {"relative_attention": True, "pos_att_type": "p2c", "legacy": False, "max_relative_positions": 80},
    ],
    "deberta-v2": [
        TINY | {
            "relative_attention": True, "pos_att_type": "p2c|c2p", "position_biased_input": False, "position_buckets": 8, "share_att_key": True,
            "norm_rel_ebd": "layer_norm", "conv_kernel_size": 3, "conv_act": "gelu",
        },
        TINY | {"type_vocab_size": 2, "hidden_act": "relu", "embedding_size": 16},
        TINY | {
            "relative_attention": True, "pos_att_type": ["c2p", "p2c"], "legacy": False, "max_relative_positions": 5,
            "conv_kernel_size": 5, "conv_groups": 4,
        },
        TINY | {"relative_attention": True, "pos_att_type": ["p2c"]},
    ],
    "modernbert": [
        TINY | TOKENS | {"num_hidden_layers": 4, "local_attention": 8},
        TINY | TOKENS | {
            "attention_bias": True, "mlp_bias": True, "norm_bias": True, "decoder_bias": False, "classifier_bias": True, "tie_word_embeddings": False,
            "hidden_activation": "relu", "classifier_pooling": "mean", "layer_types": ["sliding_attention", "full_attention"],
        },
    ],
    "xlm": XLM,
    "flaubert": XLM,
}  # fmt: skip
"""Models that transformers builds or runs by their tensors' values, or whose tables go through modules as arguments: tests/test_encoders.py runs
them on real tensors."""
CASES |= {model_type: [] for model_type in NEEDS_VALUES}
