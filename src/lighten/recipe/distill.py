"""Steps that train dense weights until the model answers as the original does: their arguments, and what they make of a ModelSpec (nothing).

The student is the model as the steps before left it, pruned or with fewer layers; the teacher is the original.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from lighten.errors import RecipeError
from lighten.model.spec import Embedding, Linear, ModelSpec
from lighten.model.tasks import has_head, task_of
from lighten.recipe.quantize import CALIBRATION
from lighten.recipe.words import Arguments, Parameter, StepKind, is_count, is_flag, is_number, is_positive, one_of

STEPS_WITHOUT_BUDGET = 100
"""Optimizer steps where no budget is given: choice, some 200,000 positions, minutes of two cores for 135 M parameters."""
LEARNING_RATES: Mapping[str, float] = {"adamw": 1e-4, "adam": 1e-4, "sgd": 0.1, "adafactor": 3e-3, "lion": 1e-5}
"""Where none is given, by optimizer. Choices: Adam's is a tenth of what models of this size are trained from nothing with; Lion's a tenth of Adam's
(arXiv:2302.06675, section 5: 3 to 10 times smaller); Adafactor's is a share of a weight's root mean square (arXiv:1804.04235, section 8);
SGD's goes with gradients whose norm is clipped at 1."""
EMBEDDING_RATES: Mapping[str, float] = {**LEARNING_RATES, "adamw": 5e-4, "adam": 5e-4, "lion": 5e-5}
"""Of embedding models, which are small: three blocks of MiniLM kept .51 of the neighbours after two minutes with 5e-4 and with 1e-3, .48 with 1e-4;
SmolLM2 lost by more than 1e-4 (benchmarks/LOG.md)."""
MEMORIES: Mapping[str, int] = {"adamw": 2, "adam": 2, "sgd": 1, "adafactor": 1, "lion": 1}
"""Numbers that an optimizer remembers of each weight; Adafactor's are fewer."""
BUDGETS = ("steps", "train_tokens", "minutes")
PARALLEL = ("none", "ddp", "fsdp")
MOST_TEMPERATURE = 100.0
"""Choice: softened by more, all distributions are even."""


def _is_weight(value: Any) -> bool:
    return is_number(value) and 0 <= value < 1e6


_WEIGHT = "a number from 0 on; 0 leaves it out"
TRAINING: Mapping[str, Parameter] = {
    "steps": Parameter(accepts=is_positive, says=f"a number of optimizer steps; {STEPS_WITHOUT_BUDGET} where no budget is given"),
    "train_tokens": Parameter(accepts=is_positive, says="a number of positions to train on, in place of steps"),
    "minutes": Parameter(
        accepts=lambda v: is_number(v) and 0 < v < 1e6, says="a number of minutes that the step may take, in place of steps", at_most=True
    ),
    "optimizer": one_of(*LEARNING_RATES, default="adamw"),
    "learning_rate": Parameter(accepts=lambda v: is_number(v) and 0 < v < 1, says="a number between 0 and 1; without it by optimizer and method"),
    "schedule": one_of("linear", "cosine", default="linear"),
    "batch_tokens": Parameter(accepts=is_positive, says="a number of positions of a step, of all processes together", default=2048),
    "seq_len": Parameter(accepts=lambda v: is_positive(v) and v > 1, says="a number of positions of a sequence; without it 512 or fewer"),
    "dtype": one_of("float32", "bfloat16", default="float32"),
    "recompute": Parameter(accepts=is_flag, says="true or false", default=False),
    "embeddings": Parameter(accepts=is_flag, says="true or false", default=True),
    "parallel": one_of(*PARALLEL, default="none"),
    "seed": Parameter(accepts=is_count, says="a whole number from 0 on", default=0),
}


def check_budget(arguments: Arguments) -> str | None:
    given = [name for name in BUDGETS if name in arguments]
    return f"give at most one of {', '.join(BUDGETS)}; given: {', '.join(given)}." if len(given) > 1 else None


def training_steps(arguments: Arguments, *, step_tokens: int) -> int | None:
    """Optimizer steps that the budget allows; None where it is a time, which measured steps turn into a number.

    Args:
        step_tokens: positions of a step.

    >>> training_steps({"train_tokens": 5000}, step_tokens=2048), training_steps({}, step_tokens=1), training_steps({"minutes": 2}, step_tokens=1)
    (2, 100, None)
    """
    if "minutes" in arguments:
        return None
    if "train_tokens" in arguments:
        return max(1, int(arguments["train_tokens"]) // step_tokens)
    return int(arguments.get("steps", STEPS_WITHOUT_BUDGET))


def learning_rate(method: str, arguments: Arguments) -> float:
    """The highest of a training.

    >>> adamw = {"optimizer": "adamw"}
    >>> learning_rate("logits", adamw), learning_rate("embeddings", adamw), learning_rate("embeddings", adamw | {"learning_rate": 0.01})
    (0.0001, 0.0005, 0.01)
    """
    usual = EMBEDDING_RATES if method == "embeddings" else LEARNING_RATES
    return float(arguments.get("learning_rate") or usual[arguments["optimizer"]])


def span_tokens(arguments: Arguments) -> int:
    """Tokens of the spans that a step of distill(embeddings) takes beside the text's rows."""
    given = arguments.get("span_tokens")
    return int(arguments["tokens"] if given is None else given)


def _predict(method: str) -> Callable[[ModelSpec, Arguments], ModelSpec]:
    """The spec stays: shapes, formats and zeros are kept, the numbers change.

    Raises:
        RecipeError: quantized weights, answers of another kind, or a way to work that does not fit the model.
    """

    def predict(spec: ModelSpec, arguments: Arguments) -> ModelSpec:
        said = f"distill({method})"
        for part in spec.parts:
            if isinstance(part, Linear | Embedding) and part.weight.bits is not None:
                raise RecipeError(
                    f"{said} trains dense weights and {part.name} is quantized to {part.weight.bits} bits; put it before quantize, or use "
                    "distill(scales) or distill(qat)."
                )
        has_logits = has_head(spec)
        if method == "logits" and not has_logits:
            raise RecipeError(f"{said}: {spec.name} ({spec.architecture}) has no head that gives logits; use distill(embeddings).")
        if method == "embeddings" and has_logits:
            raise RecipeError(f"{said}: {spec.name} ({spec.architecture}) gives logits and no embeddings; use distill(logits).")
        if arguments.get("labels") and task_of(spec) is None:
            raise RecipeError(
                f"{said}: labels={arguments['labels']} is for classes, values, answers to questions and texts that are written, and {spec.name} "
                f"({spec.architecture}) gives none of them; leave labels out."
            )
        if arguments.get("self_tokens") and not spec.is_decoder:
            raise RecipeError(f"{said}: self_tokens are written by a decoder, and {spec.name} is none; leave them out.")
        if arguments.get("span_tokens") and spec.fixed_len:
            raise RecipeError(f"{said}: span_tokens are cut from text, and {spec.name} reads none; leave them out.")
        if arguments.get("parallel") == "fsdp":
            _refuse_fsdp(said, spec, arguments)
        return spec

    return predict


def _refuse_fsdp(said: str, spec: ModelSpec, arguments: Arguments) -> None:
    if any(isinstance(part, Linear) and part.experts > 1 for part in spec.parts):
        raise RecipeError(f"{said}: parallel=fsdp needs each weight in each pass, and {spec.name} chooses among experts; use parallel=ddp.")
    if arguments.get("optimizer") == "adafactor":
        raise RecipeError(f"{said}: adafactor keeps statistics of whole matrices, which parallel=fsdp cuts; use parallel=ddp or optimizer=adamw.")


DISTILLING: dict[tuple[str, str], StepKind] = {
    ("distill", "logits"): StepKind(
        parameters={
            **TRAINING,
            "temperature": Parameter(accepts=lambda v: is_number(v) and 0 < v <= MOST_TEMPERATURE, says="a number above 0 up to 100", default=1.0),
            "top_k": Parameter(accepts=is_count, says="a number of the original's largest logits that are kept for each position; 0: all", default=0),
            "hidden": Parameter(accepts=_is_weight, says=f"weight of the hidden-state loss, {_WEIGHT}", default=0.0),
            "attention": Parameter(accepts=_is_weight, says=f"weight of the attention loss, {_WEIGHT}", default=0.0),
            "labels": Parameter(accepts=_is_weight, says=f"weight of the cross-entropy of a labelled file's labels, {_WEIGHT}", default=0.0),
            "self_tokens": Parameter(accepts=is_count, says="a number of tokens that the original writes to be trained on, or 0", default=0),
            **CALIBRATION,
        },
        predict=_predict("logits"), check=check_budget, calibrated=True,
    ),
    ("distill", "embeddings"): StepKind(
        parameters={
            **TRAINING,
            "relational": Parameter(accepts=_is_weight, says=f"weight of the relational loss, {_WEIGHT}", default=1.0),
            "hidden": Parameter(accepts=_is_weight, says=f"weight of the hidden-state loss, {_WEIGHT}", default=0.0),
            "span_tokens": Parameter(
                accepts=is_count, says="a number of tokens of spans of the text, trained on beside its rows; 0: none; without it as many as tokens"
            ),
            **CALIBRATION,
        },
        predict=_predict("embeddings"), check=check_budget, calibrated=True,
    ),
}  # fmt: skip
"""(verb, method) → its kind: logits after Hinton et al. 2015 (arXiv:1503.02531); embeddings by their cosine and by their distances from each other,
Park et al. 2019 (arXiv:1904.05068)."""
