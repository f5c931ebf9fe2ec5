"""Tiny random models with task heads, with tokenizers where a test reads a text, and labelled files for them."""

from __future__ import annotations

import csv
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import any_architecture
import tiny_models
import torch
import transformers
from any_architecture import ARCHITECTURES, BERT, GQA, SEQ2SEQ
from tokenizers import Tokenizer, processors

LABELLED: dict[str, Any] = {"num_labels": 3, "id2label": {0: "bad", 1: "so so", 2: "good"}, "label2id": {"bad": 0, "so so": 1, "good": 2}}
DISTILBERT: dict[str, Any] = ARCHITECTURES["distilbert"][2]
MARIAN: dict[str, Any] = SEQ2SEQ | {
    "max_position_embeddings": 64, "pad_token_id": 0, "decoder_start_token_id": 0, "eos_token_id": 1, "forced_eos_token_id": 1,
}  # fmt: skip

HEADS: dict[str, tuple[str, str, dict[str, Any]]] = {
    "bert classes": ("BertConfig", "BertForSequenceClassification", BERT | LABELLED | {"problem_type": "single_label_classification"}),
    "roberta classes": ("RobertaConfig", "RobertaForSequenceClassification", BERT | LABELLED | {"pad_token_id": 1}),
    "distilbert classes": ("DistilBertConfig", "DistilBertForSequenceClassification", DISTILBERT | LABELLED),
    "bert answers": ("BertConfig", "BertForQuestionAnswering", BERT),
    "distilbert answers": ("DistilBertConfig", "DistilBertForQuestionAnswering", DISTILBERT),
    "bert tokens": ("BertConfig", "BertForTokenClassification", BERT | LABELLED),
    "llama classes": ("LlamaConfig", "LlamaForSequenceClassification", GQA | LABELLED | {"pad_token_id": 0}),
    "t5": ("T5Config", "T5ForConditionalGeneration", ARCHITECTURES["t5"][2]),
    "bart": ("BartConfig", "BartForConditionalGeneration", ARCHITECTURES["bart"][2]),
    "marian": ("MarianConfig", "MarianMTModel", MARIAN),
    "vit classes": ("ViTConfig", "ViTForImageClassification", ARCHITECTURES["vit"][2] | LABELLED),
    "whisper": ("WhisperConfig", "WhisperForConditionalGeneration", ARCHITECTURES["whisper"][2]),
}
"""Task → config class, model class, sizes."""

SIDE_FILES = ("preprocessor_config.json", "generation_config.json", "source.spm", "spiece.model")


def save_head(name: str, folder: Path, **changes: Any) -> Path:
    """A model folder with the files that stand beside such a head."""
    config_class, model_class, sizes = HEADS[name]
    config = getattr(transformers, config_class)(architectures=[model_class], **(sizes | changes))
    config.initializer_range = 0.15
    torch.manual_seed(0)
    model = getattr(transformers, model_class)._from_config(config)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 1:
                parameter.add_(0.1 * torch.randn_like(parameter))
    model.save_pretrained(folder)
    for file in SIDE_FILES:
        if not (folder / file).is_file():
            (folder / file).write_text(json.dumps({"file": file}))
    return folder


def inputs(name: str, rows: int = 16) -> Any:
    """Random inputs of the kind that a head's model takes."""
    return any_architecture.calibration({"vit classes": "vit", "whisper": "whisper"}.get(name, "text"), rows)


def pair_tokenizer() -> Tokenizer:
    """BERT's kind, with BERT's marks around one text and around two."""
    found = Tokenizer.from_str(tiny_models.wordpiece().to_str())
    marks = [(mark, found.token_to_id(mark)) for mark in ("[CLS]", "[SEP]")]
    found.post_processor = processors.TemplateProcessing(single="[CLS] $A [SEP]", pair="[CLS] $A [SEP] $B:1 [SEP]:1", special_tokens=marks)
    return found


def target_tokenizer() -> Tokenizer:
    """T5's kind: a mark of the end alone."""
    found = Tokenizer.from_str(tiny_models.wordpiece().to_str())
    found.post_processor = processors.TemplateProcessing(single="$A [SEP]", pair="$A [SEP] $B [SEP]", special_tokens=[("[SEP]", 3)])
    return found


def save_reading(name: str, folder: Path, **changes: Any) -> Path:
    """The same with a tokenizer, and its vocabulary."""
    special = {"decoder_start_token_id": 0, "eos_token_id": 3} if name in ("t5", "bart") else {}
    save_head(name, folder, **({"vocab_size": tiny_models.VOCAB, "max_position_embeddings": 128} | special | changes))
    kind = target_tokenizer() if name in ("t5", "bart", "marian", "llama classes") else pair_tokenizer()
    (folder / "tokenizer.json").write_text(kind.to_str())
    (folder / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "PreTrainedTokenizerFast"}))
    return folder


def save_writing(folder: Path) -> Path:
    """A decoder that writes, with its tokenizer."""
    return tiny_models.save(tiny_models.llama_config(), folder)


def write_rows(path: Path, rows: Sequence[Mapping[str, Any]]) -> Path:
    """A labelled file, of the kind that its name says."""
    if path.suffix == ".jsonl":
        path.write_text("\n".join(map(json.dumps, rows)))
    else:
        with path.open("w", newline="") as file:
            table = csv.DictWriter(file, list(rows[0]), delimiter="\t" if path.suffix == ".tsv" else ",")
            table.writeheader()
            table.writerows(rows)
    return path
