"""(no program) The one evaluator of benchmarks/compression.py: perplexity and divergence of dense weights, whoever made them.

Legend: T positions of a window, V tokens of the vocabulary.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from lighten.judge.quality import Score, TokenScores, language_fidelity

Ids = NDArray[np.int64]


@dataclass(frozen=True, kw_only=True)
class Evaluator:
    """Scores weights in the original's architecture on fixed windows, beside the original's own logits.

    Attributes:
        model: the original's folder; its config builds the module.
        windows: [windows, length] token ids of the test part.
        dtype: the type that weights and activations are computed in.
        cache: a folder that keeps the original's logits between calls.
        architecture: a folder whose config builds the module of other weights than the original's; None: the original's.
    """

    model: Path
    windows: Ids
    dtype: torch.dtype
    cache: Path
    architecture: Path | None = None

    def scores(self, weights: Mapping[str, Tensor] | None, *, int8_inputs: frozenset[str] = frozenset()) -> dict[str, Score]:
        """`language_fidelity` of the weights (None: the original's own) against the original in the same type.

        Args:
            weights: every tensor of the original by its name.
            int8_inputs: modules whose input is rounded to 8 bits, each token by its own scale: `round_per_token`.
        """
        reference_file = self._reference()
        reference = np.load(reference_file, mmap_mode="r")
        module = self._module(weights)
        with round_inputs(module, int8_inputs), torch.inference_mode():
            pairs = [self._window(module, ids, reference[number]) for number, ids in enumerate(self.windows)]
        return language_fidelity([before for before, _ in pairs], [after for _, after in pairs])

    def _window(self, module: nn.Module, ids: Ids, kept: NDArray[Any]) -> tuple[TokenScores, TokenScores]:
        targets = torch.from_numpy(ids[1:])
        return token_scores(_stored(kept, self.dtype), self._logits(module, ids), targets)

    def _logits(self, module: nn.Module, ids: Ids) -> Tensor:
        logits: Tensor = module(input_ids=torch.from_numpy(ids[None])).logits[0, :-1]
        return logits

    def _module(self, weights: Mapping[str, Tensor] | None) -> nn.Module:
        from transformers import AutoConfig, AutoModelForCausalLM

        if weights is None:
            original: nn.Module = AutoModelForCausalLM.from_pretrained(self.model, dtype=self.dtype)
            return original.eval()
        config = AutoConfig.from_pretrained(self.architecture or self.model)
        config.__dict__.pop("quantization_config", None)  # the weights are dense
        if "lm_head.weight" in weights:  # a rotation makes the head a weight of its own
            config.tie_word_embeddings = False
        module: nn.Module = AutoModelForCausalLM.from_config(config, dtype=self.dtype)
        outcome = module.load_state_dict({name: tensor.to(self.dtype) for name, tensor in weights.items()}, strict=False)
        missing = [name for name in outcome.missing_keys if name != "lm_head.weight" or not module.config.tie_word_embeddings]  # type: ignore[union-attr]
        if missing or outcome.unexpected_keys:
            raise ValueError(f"the weights lack {missing[:3]} and bring {outcome.unexpected_keys[:3]} that {self.model} does not have.")
        return module.eval()

    def _reference(self) -> Path:
        """The original's logits of all windows, in a file: [windows, T, V], bf16 as its bits."""
        state = [(file.name, file.stat().st_size, file.stat().st_mtime_ns) for file in sorted(self.model.glob("*.safetensors"))]
        digest = hashlib.sha256(json.dumps([state, str(self.dtype)]).encode() + self.windows.tobytes()).hexdigest()[:16]
        file = self.cache / f"reference-{digest}.npy"
        if file.exists():
            return file
        self.cache.mkdir(parents=True, exist_ok=True)
        partial, kept = file.with_suffix(".partial"), None
        module = self._module(None)
        with torch.inference_mode():
            for number, ids in enumerate(self.windows):
                logits = self._logits(module, ids)
                raw = logits.view(torch.int16) if self.dtype == torch.bfloat16 else logits
                if kept is None:
                    shape = (len(self.windows), *logits.shape)
                    kept = np.lib.format.open_memmap(partial, mode="w+", dtype=raw.numpy().dtype, shape=shape)
                kept[number] = raw.numpy()
        partial.rename(file)
        return file


def _stored(kept: NDArray[Any], dtype: torch.dtype) -> Tensor:
    tensor = torch.from_numpy(np.array(kept))
    return tensor.view(torch.bfloat16) if dtype == torch.bfloat16 else tensor


def token_scores(reference: Tensor, candidate: Tensor, targets: Tensor) -> tuple[TokenScores, TokenScores]:
    """What `lighten.judge.quality.score_window` gives for the original and for the candidate, by torch in float32 and so in a tenth of the time.

    Args:
        reference, candidate: [T, V] logits.
        targets: [T], the tokens that truly follow.
    """
    parts = [_chunk_scores(reference[rows].float(), candidate[rows].float(), targets[rows]) for rows in _chunks(len(targets))]
    before, after, kl, top1 = (torch.cat(column).numpy() for column in zip(*parts, strict=True))
    return TokenScores(log_likelihood=before), TokenScores(log_likelihood=after, kl=kl, top1=top1)


def _chunk_scores(reference: Tensor, candidate: Tensor, targets: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    p, q = reference.log_softmax(1), candidate.log_softmax(1)
    before, after = (logs.gather(1, targets[:, None])[:, 0].double() for logs in (p, q))
    kl = (p.exp() * (p - q)).sum(1).double().clamp(min=0)
    chosen = reference.gather(1, candidate.argmax(1, keepdim=True))[:, 0]
    return before, after, kl, chosen == reference.amax(1)


def _chunks(rows: int, size: int = 256) -> Iterator[slice]:
    return (slice(start, start + size) for start in range(0, rows, size))


def round_per_token(x: Tensor) -> Tensor:
    """x rounded to int8 and back, each row by its own symmetric scale max|x| / 127: what dynamic per-token int8 activations lose."""
    scale = x.abs().amax(-1, keepdim=True).clamp(min=1e-12) / 127
    return (x / scale).round().clamp(-128, 127) * scale


@contextmanager
def round_inputs(module: nn.Module, names: frozenset[str]) -> Iterator[None]:
    """Inside, the named modules see `round_per_token` of their inputs."""
    hook: Callable[[nn.Module, tuple[Tensor, ...]], tuple[Tensor, ...]] = lambda _, inputs: (round_per_token(inputs[0]), *inputs[1:])  # noqa: E731
    found = {name: part for name, part in module.named_modules() if name in names}
    if missing := sorted(names - found.keys()):
        raise ValueError(f"{len(missing)} modules to round the inputs of are not in the model, {missing[0]} for one.")
    handles = [part.register_forward_pre_hook(hook) for part in found.values()]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def most_values(weight: Tensor, group_size: int | None, rows: int = 64) -> int:
    """The most distinct values in any group of the first rows: at most 2**bits, whatever a tool says of its width."""
    first = weight[:rows].reshape(-1, group_size or weight.shape[1])
    ordered = first.sort(dim=1).values
    return int(((ordered[:, 1:] != ordered[:, :-1]).sum(1) + 1).max())
