"""A model of ours as lm-eval asks one: it makes tokens of its requests here, and a child that has the model loaded answers them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from lm_eval.api.model import TemplateLM
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window

from lighten.errors import TaskError
from lighten.judge.harness import MOST_NEW_TOKENS, Ask
from lighten.judge.tokens import Tokenizer
from lighten.model.spec import ModelSpec

_LONGEST = 2048
"""Tokens at once of a model that has no limit of its own. Source: `_DEFAULT_MAX_LENGTH` of lm_eval/models/huggingface.py."""


class HarnessModel(TemplateLM):  # type: ignore[misc]  # lm-eval has no types
    """Every method is lm-eval's; its base class has their shapes."""

    def __init__(self, tokenizer: Tokenizer, spec: ModelSpec, ends: Sequence[int], ask: Ask) -> None:
        super().__init__()
        self._tokenizer, self._spec, self._ends, self._ask = tokenizer, spec, list(ends), ask
        self.max_length = min(spec.max_positions or _LONGEST, _LONGEST)

    @property
    def eot_token_id(self) -> int:
        return self._ends[0] if self._ends else 0

    @property
    def prefix_token_id(self) -> int:
        first = self._spec.config.get("bos_token_id")
        return first if isinstance(first, int) else self.eot_token_id

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **_: Any) -> list[int]:
        if add_special_tokens is False:
            return list(self._tokenizer.encode(string, marks=False).ids)
        return self._tokenizer.prompt(string)

    def loglikelihood(self, requests: list[Any], disable_tqdm: bool = True) -> list[tuple[float, bool]]:
        found: list[tuple[float, bool]] = super().loglikelihood(requests, disable_tqdm=disable_tqdm)
        return found

    def _loglikelihood_tokens(self, requests: list[Any], **_: Any) -> list[tuple[float, bool]]:
        rows = [[(context + new)[-(self.max_length + 1) :], min(len(new), self.max_length)] for _, context, new in requests]
        return [(float(likelihood), bool(greedy)) for likelihood, greedy in self._ask("continuations", rows)]

    def loglikelihood_rolling(self, requests: list[Any], disable_tqdm: bool = True) -> list[float]:
        found = []
        for request in requests:
            pieces = get_rolling_token_windows(self.tok_encode(request.args[0]), self.prefix_token_id, self.max_length, context_len=1)
            told = self._loglikelihood_tokens([(None, *make_disjoint_window(piece)) for piece in pieces])
            found.append(sum(likelihood for likelihood, _ in told))
        return found

    def generate_until(self, requests: list[Any], disable_tqdm: bool = True) -> list[str]:
        rows = []
        for request in requests:
            text, options = request.args
            if options.get("do_sample") and options.get("temperature", 1.0) > 0:
                raise TaskError("the task asks for texts that are drawn at random; a comparison needs those that are the likeliest.")
            until = options.get("until") or []
            new = int(options.get("max_gen_toks", MOST_NEW_TOKENS))
            if new >= self.max_length:
                raise TaskError(f"the task asks for {new} new tokens, and {self._spec.name} has {self.max_length} positions.")
            rows.append([self.tok_encode(text)[-(self.max_length - new) :], new, [until] if isinstance(until, str) else list(until)])
        return [str(text) for text in self._ask("prompts", rows)]
