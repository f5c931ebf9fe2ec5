"""Options of a runtime beside its type: other ways to compute the same with the same weights. A recipe carries them after the runtime's name.

@ openvino(dtype=bfloat16, batching=sorted)
@ torch(speculate=prompt-lookup, draft_tokens=4)
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any, Literal

from lighten.cost.workload import Workload
from lighten.errors import LightenError, RecipeError
from lighten.model import read_spec
from lighten.model.spec import Attention, Embedding, Linear, ModelSpec, Scan
from lighten.recipe.words import Parameter, is_positive, one_of

Batching = Literal["padded", "sorted", "bucketed"]
BATCHINGS: tuple[Batching, ...] = ("padded", "sorted", "bucketed")
PROMPT_LOOKUP = "prompt-lookup"
MOST_PROPOSED = 16
"""Tokens a round at most; the paper's best are 3 to 7."""
DRAFT_TOKENS = 4
"""Where nothing is said: in the middle of the paper's best (Leviathan et al. 2022, figure 3: 3 to 7)."""
PHASES = ("decode", "generate")


def _is_draft(value: Any) -> bool:
    return isinstance(value, str) and bool(value.strip())


OPTIONS: dict[str, Parameter] = {
    "batching": one_of(*BATCHINGS),
    "speculate": Parameter(accepts=_is_draft, says=f"{PROMPT_LOOKUP}, or the folder of a draft model"),
    "draft_tokens": Parameter(
        accepts=lambda value: is_positive(value) and value <= MOST_PROPOSED, says=f"a number of tokens from 1 to {MOST_PROPOSED}",
    ),
}  # fmt: skip
"""Option → its values; which runtime takes which is said in `RUNTIMES`."""


@dataclass(frozen=True, kw_only=True)
class Speculation:
    """Greedy decoding with proposals: several are checked in one pass, and those that the model would have said itself stay.

    Attributes:
        draft: what proposes: `prompt-lookup` (what followed the newest tokens when they stood in the text before), or the folder of a smaller model.
        tokens: proposals a round at most.
    """

    draft: str
    tokens: int

    @property
    def is_model(self) -> bool:
        """Whether a second model proposes."""
        return self.draft != PROMPT_LOOKUP


def check_options(runtime: str, known: tuple[str, ...], given: Mapping[str, Any]) -> None:
    """Raises:
    RecipeError: an option that the runtime has not, a value that is not possible, or one that nothing comes of.
    """
    if unknown := set(given) - set(known):
        raise RecipeError(f"runtime {runtime}: no option {', '.join(sorted(unknown))}; options: {', '.join(['dtype', 'device', *known])}.")
    for name, value in given.items():
        if not OPTIONS[name].accepts(value):
            raise RecipeError(f"runtime {runtime}: {name}={value!r} is not possible; {name} is {OPTIONS[name].says}.")
    if "draft_tokens" in given and "speculate" not in given:
        raise RecipeError(f"runtime {runtime}: draft_tokens={given['draft_tokens']} has no effect without speculate.")


def speculation_of(options: Mapping[str, Any]) -> Speculation | None:
    """What options say of proposals; None: nothing."""
    draft = options.get("speculate")
    if draft is None:
        return None
    return Speculation(draft=str(draft), tokens=int(options.get("draft_tokens", DRAFT_TOKENS)))


def check_model(options: Mapping[str, Any], spec: ModelSpec, *, coded_cache: bool) -> None:
    """Raises:
    RecipeError: options that this model cannot take.
    """
    if "batching" in options and (spec.is_decoder or spec.is_encoder_decoder):
        raise RecipeError(f"batching={options['batching']} is of encoders; {spec.name} writes text, and a batch of prompts has one length.")
    said = speculation_of(options)
    if said is None:
        return
    what = f"speculate={said.draft}"
    if not spec.is_decoder:
        raise RecipeError(f"{what} is of decoders; {spec.name} is none.")
    if coded_cache:
        raise RecipeError(f"{what} cuts the cache back, which quantize(kv)'s cannot be; leave one of them out.")
    if any(isinstance(part, Scan) or (isinstance(part, Attention) and part.window is not None) for part in spec.parts):
        raise RecipeError(f"{what} cuts the cache back, which that of {spec.name} cannot be: it has sliding windows or states.")
    if said.is_model:
        _check_draft(Path(said.draft), spec)


def _check_draft(folder: Path, spec: ModelSpec) -> None:
    draft = draft_spec(folder)
    if not draft.is_decoder:
        raise RecipeError(f"speculate={folder}: {draft.name} is no decoder alone; a draft has to be one.")
    if problem := misfit(draft, spec):
        raise RecipeError(f"speculate={folder} {problem}")


def misfit(draft: ModelSpec, spec: ModelSpec) -> str | None:
    """Why a decoder is no draft of another, to be said after its name; None: it may be one."""
    if draft.total_parameters >= spec.total_parameters:
        sizes = f"{draft.total_parameters:,} parameters against {spec.total_parameters:,}"
        return f"is no smaller than {spec.name}: {sizes}; a draft has to be faster than its model."
    if (mine := vocabulary(draft)) != (other := vocabulary(spec)):
        return f"has {mine:,} tokens, {spec.name} has {other:,}; a draft has to have the model's vocabulary."
    return None


@lru_cache(maxsize=4)
def draft_spec(folder: Path) -> ModelSpec:
    """The model of a draft's folder, which may be an artifact.

    Raises:
        RecipeError: there is none, or none that can be read.
    """
    if not folder.is_dir():
        raise RecipeError(f"speculate={folder}: no such folder; it is {OPTIONS['speculate'].says}.")
    try:
        return read_spec(folder if any(folder.glob("*.safetensors")) else folder / "config.json")
    except LightenError as error:
        raise RecipeError(f"speculate={folder}: {error}") from error


def vocabulary(spec: ModelSpec) -> int:
    """Tokens that a model tells apart: outputs of its head, or rows of its largest table where it has none."""
    heads = [part.out_features for part in spec.parts if isinstance(part, Linear) and part.component == "head"]
    tables = [part.num_embeddings for part in spec.parts if isinstance(part, Embedding) and part.rows in ("token", "source")]
    return max(heads or tables, default=0)


def check_effect(options: Mapping[str, Any], workload: Workload) -> None:
    """Raises:
    RecipeError: an option that nothing comes of in this workload.
    """
    if "batching" in options and not workload.lengths:
        raise RecipeError(f"batching={options['batching']} has no effect where all texts have one length; measure with --lengths text.")
    if "speculate" in options and workload.phase not in PHASES:
        said = f"speculate={options['speculate']} has no effect in phase {workload.phase}"
        raise RecipeError(f"{said}; it has one in: {', '.join(PHASES)} (--new-tokens N).")
