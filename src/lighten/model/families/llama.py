"""Llama (Touvron et al. 2023, arXiv:2307.09288) as `transformers` computes it: grouped-query attention, gated MLP, RMSNorm, rotary positions."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from lighten.model.families import decoders
from lighten.model.families._config import complete
from lighten.model.spec import Part

ARCHITECTURES = ("LlamaForCausalLM", "LlamaModel")
"""Those that can be compressed and run; its classifiers have a formula alone."""

FAMILIES = {"llama": decoders.FAMILIES["llama"]}


def describe(config: Mapping[str, Any], architecture: str) -> tuple[Part, ...]:
    """Parts of a Llama decoder, with its head where the architecture has one, of a config that may leave out what its class has a default for."""
    return FAMILIES["llama"].describe(complete({"model_type": "llama", **config}), architecture)
