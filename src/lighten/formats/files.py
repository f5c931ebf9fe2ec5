"""Names of the files that artifacts hold; writers and runtimes agree on them here, and neither imports the other's libraries for it."""

from __future__ import annotations

SAFETENSORS = "model.safetensors"
SPARSE = "sparse.safetensors"
"""Weights without their zeros (`bitmask`): a name that loaders who do not know them do not look for."""
ONNX = "model.onnx"
ORT = "model.ort"
OPENVINO = "openvino_model.xml"
GGUF = "model.gguf"
CTRANSLATE2 = "ctranslate2"
"""A folder: its model has a config.json of its own."""


def shard(number: int, count: int, whole: str = SAFETENSORS) -> str:
    """The name of one of several files of weights, numbered from 1, as Hugging Face numbers them. whole: the name of a single one.

    >>> shard(2, 13)
    'model-00002-of-00013.safetensors'
    """
    stem, _, kind = whole.partition(".")
    return f"{stem}-{number:05}-of-{count:05}.{kind}"


def index(whole: str = SAFETENSORS) -> str:
    """The file that says which shard has which tensor."""
    return f"{whole}.index.json"
