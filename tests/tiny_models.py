"""Small random models with tokenizers, saved as `transformers` saves them: a BERT encoder and Llama decoders."""

from __future__ import annotations

import json
from functools import cache
from pathlib import Path
from pydoc_data.topics import topics
from typing import Any

import torch
import transformers
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import BertConfig, LlamaConfig, PretrainedConfig

VOCAB = 320
BERT: dict[str, Any] = {
    "vocab_size": VOCAB, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 64,
    "max_position_embeddings": 128,
}  # fmt: skip
LLAMA: dict[str, Any] = {
    "vocab_size": VOCAB, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2,
    "intermediate_size": 64, "max_position_embeddings": 512, "tie_word_embeddings": True,
}  # fmt: skip
SPREAD = 0.2
"""Standard deviation of the weights: ten times the usual, so that tokens and positions differ well in what comes out."""


def bert_config(architecture: str = "BertModel", **changes: Any) -> BertConfig:
    return BertConfig(architectures=[architecture], initializer_range=SPREAD, **(BERT | changes))


def llama_config(architecture: str = "LlamaForCausalLM", **changes: Any) -> LlamaConfig:
    return LlamaConfig(architectures=[architecture], initializer_range=SPREAD, **(LLAMA | changes))


def config_of(architecture: str, **changes: Any) -> PretrainedConfig:
    return llama_config(architecture, **changes) if architecture.startswith("Llama") else bert_config(architecture, **changes)


def build(config: PretrainedConfig, *, device: str = "cpu", seed: int = 0) -> Any:
    """The module of a config, with eager attention, biases and norms random too, in eval mode."""
    torch.manual_seed(seed)
    config._attn_implementation = "eager"
    with torch.device(device):
        module = getattr(transformers, config.architectures[0])(config)
    if device == "cpu":
        with torch.no_grad():
            for parameter in module.parameters():
                if parameter.ndim == 1:
                    parameter.add_(torch.randn_like(parameter) * 0.1)
    return module.to(config.dtype or torch.float32).eval()


def save(config: PretrainedConfig, folder: Path, **options: Any) -> Path:
    """A model folder of random weights, with its tokenizer."""
    build(config).save_pretrained(folder, **options)
    tokenizer = wordpiece() if config.model_type == "bert" else byte_pairs()
    (folder / "tokenizer.json").write_text(tokenizer.to_str())
    (folder / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "PreTrainedTokenizerFast"}))
    return folder


@cache
def wordpiece() -> Tokenizer:
    """BERT's kind: lower case, pieces of words, [CLS] and [SEP] around a text."""
    tokenizer = Tokenizer(models.WordPiece(unk_token="[UNK]"))
    tokenizer.normalizer, tokenizer.pre_tokenizer = normalizers.BertNormalizer(), pre_tokenizers.BertPreTokenizer()
    special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    tokenizer.train_from_iterator(_prose(), trainers.WordPieceTrainer(vocab_size=VOCAB, special_tokens=special, show_progress=False))
    marks = [(mark, tokenizer.token_to_id(mark)) for mark in ("[CLS]", "[SEP]")]
    tokenizer.post_processor = processors.TemplateProcessing(single="[CLS] $A [SEP]", special_tokens=marks)
    return tokenizer


@cache
def byte_pairs() -> Tokenizer:
    """Llama 3's and SmolLM's kind: pairs of bytes, no marks around a text."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer, tokenizer.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=VOCAB, special_tokens=["<s>", "</s>"], initial_alphabet=alphabet, show_progress=False)
    tokenizer.train_from_iterator(_prose(), trainer)
    return tokenizer


def _prose() -> list[str]:
    return [topics[name] for name in ("assert", "booleans", "break", "continue", "while")]
