"""factorize: two linears of low rank in the place of one, or beside a quantized one. The reading on a ModelSpec.

A rank is said, or follows from the weights: `energy` is a share of squared singular values, `ratio` a share of the parameters that stay, spread over
the weights by what each rank gains. Before the weights are seen, `energy` stands for no change, the most that can be left; `ratio` for one share
of every weight. Its total is exact: what is chosen then has as many parameters, to one.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

from lighten.errors import RecipeError
from lighten.model.low_rank import CORRECTION, DOWN, RANKS, UP, largest_rank, pair_parameters, with_low_rank
from lighten.model.spec import Linear, ModelSpec
from lighten.recipe.quantize import CALIBRATION, TOKENS
from lighten.recipe.words import TARGETS, Arguments, Parameter, StepKind, is_flag, is_number, is_positive, refuse_quantized, selected_parts

SAID = ("rank", "energy", "ratio")

RANK_TILE = 32
"""Ranks under a budget come in so many at once where there is room for it: choice; groups of codes and kernels want multiples of 32, and a factor of
257 columns can be cut into no group at all."""


def low_rank_parts(spec: ModelSpec, arguments: Arguments) -> list[Linear]:
    """The linears that factorize(svd) exchanges: those that it selects whose factors can be smaller than the weight.

    Raises:
        RecipeError: none; experts; a weight that is quantized, factorized or shared; a rank that leaves no fewer parameters.
    """
    shared = {part.tied_to for part in spec.parts if isinstance(part, Linear) and part.tied_to}
    found: list[Linear] = []
    for part in selected_parts(spec, arguments):
        assert isinstance(part, Linear), "tables are not selected without embeddings"
        refuse_quantized(part, "factorize(svd)")
        _refuse_others(part, spec, "factorize(svd)")
        if part.name in shared:
            raise RecipeError(f"factorize(svd): {part.name} is shared by several layers, which are not exchanged; narrow its targets.")
        if arguments.get("rank", 0) > largest_rank(part):
            raise RecipeError(
                f"factorize(svd, rank={arguments['rank']}): two factors of {part.name}, {part.out_features} by {part.in_features}, are smaller than "
                f"the weight up to rank {largest_rank(part)}; use that or less, or narrow its targets."
            )
        if largest_rank(part):
            found.append(part)
    if not found:
        raise RecipeError(f"factorize(svd): no weight of {spec.name} that it selects has factors that are smaller than the weight.")
    return found


def _refuse_others(part: Linear, spec: ModelSpec, step: str) -> None:
    if part.experts > 1 or type(part).tensors is not Linear.tensors:
        raise RecipeError(f"{step}: {part.name} is no linear of its own (experts, or a weight in another form); narrow its targets.")
    if part.name.rpartition(".")[0] in spec.config.get(RANKS, {}) and part.name.endswith((f".{DOWN}", f".{UP}")):
        raise RecipeError(f"{step}: {part.name} is a factor already; narrow its targets.")


def rank_units(parts: list[Linear], ratio: float) -> dict[str, int]:
    """How many ranks of each weight come and go together: `RANK_TILE` where its even share of the budget is two of them or more, else one; one of
    all where the budget does not pay for that.

    >>> wide, small = (Linear(name=str(size), component="mlp", out_features=size, in_features=size) for size in (512, 96))
    >>> rank_units([wide, small], 0.5)
    {'512': 32, '96': 1}
    """
    units = {part.name: RANK_TILE if _affordable(part, ratio) >= 2 * RANK_TILE else 1 for part in parts}
    least = sum(pair_parameters(part, units[part.name]) for part in parts)
    return units if least <= _budget(parts, ratio) else dict.fromkeys(units, 1)


def spread_evenly(parts: list[Linear], ratio: float) -> dict[str, int]:
    """Ranks that leave at most `ratio` of the parts' weights: the same share of each, and a unit more as long as there is room, in forward order.

    Raises:
        RecipeError: even rank 1 of each is more.
    """
    units = rank_units(parts, ratio)
    step = {part.name: pair_parameters(part, units[part.name]) for part in parts}
    most = {part.name: largest_rank(part) // units[part.name] for part in parts}
    budget, least = _budget(parts, ratio), sum(step.values())
    if least > budget:
        raise RecipeError(
            f"factorize(svd, ratio={ratio}): rank 1 of all {len(parts)} weights is {least} parameters, and {budget} are allowed; use a larger ratio."
        )
    counts = {part.name: max(1, min(most[part.name], _affordable(part, ratio) // units[part.name])) for part in parts}
    left = budget - sum(step[name] * count for name, count in counts.items())
    for name in reversed(counts):  # small weights took more than their share by their first rank
        less = min(counts[name] - 1, max(0, -(left // step[name])))
        counts[name] -= less
        left += less * step[name]
    for name in counts:
        more = min(1, most[name] - counts[name], left // step[name])
        counts[name] += more
        left -= more * step[name]
    return {name: units[name] * count for name, count in counts.items()}


def _budget(parts: list[Linear], ratio: float) -> int:
    return int(ratio * sum(part.in_features * part.out_features for part in parts))


def _affordable(part: Linear, ratio: float) -> int:
    """The ranks that `ratio` of a weight's elements pay for."""
    return int(ratio * part.in_features * part.out_features) // pair_parameters(part, 1)


def with_ranks(spec: ModelSpec, ranks: Mapping[str, int]) -> ModelSpec:
    """The spec with these linears factorized."""
    if not ranks:
        return spec
    parts = with_low_rank(spec.parts, {RANKS: dict(ranks)})
    return replace(spec, parts=parts, config={**spec.config, RANKS: {**spec.config.get(RANKS, {}), **ranks}}, tensors=None)


def _predict_svd(spec: ModelSpec, arguments: Arguments) -> ModelSpec:
    parts = low_rank_parts(spec, arguments)
    if "rank" in arguments:
        return with_ranks(spec, {part.name: arguments["rank"] for part in parts})
    return with_ranks(spec, spread_evenly(parts, arguments["ratio"])) if "ratio" in arguments else spec


def _check_svd(arguments: Arguments) -> str | None:
    given = [name for name in SAID if name in arguments]
    if len(given) != 1:
        return f"give exactly one of {', '.join(SAID)}; given: {', '.join(given) or 'none'}."
    if not arguments["weighted"] and arguments["tokens"] != TOKENS:
        return f"tokens={arguments['tokens']} has no effect with weighted=false, which looks at no text."
    return None


# beside a quantized weight


def corrected_parts(spec: ModelSpec, arguments: Arguments) -> list[Linear]:
    """The quantized linears that factorize(correction) puts two others beside.

    Raises:
        RecipeError: none; experts; 8-bit activations or types of ggml; one that is corrected already; a rank above that of the weight.
    """
    step, rank = "factorize(correction)", arguments["rank"]
    found = [part for part in selected_parts(spec, arguments) if isinstance(part, Linear) and part.weight.bits is not None]
    if not found:
        raise RecipeError(f"{step} makes up for what quantizing lost, and nothing that it selects in {spec.name} is; put it after quantize.")
    for part in found:
        _refuse_others(part, spec, step)
        if part.weight.activations or part.weight.ggml_type:
            what = "8-bit activations" if part.weight.activations else f"ggml's {part.weight.ggml_type}"
            raise RecipeError(f"{step}: {part.name} has {what}, beside which no correction is computed; it takes codes with activations=none.")
        if part.name in spec.config.get(CORRECTION, {}):
            raise RecipeError(f"{step}: {part.name} is corrected already; one correction is all that a weight takes.")
        if rank > min(part.in_features, part.out_features):
            most = min(part.in_features, part.out_features)
            raise RecipeError(f"{step}: rank={rank} is more than {part.name} has, whose rank is at most {most}; use less, or narrow its targets.")
    return found


def _predict_correction(spec: ModelSpec, arguments: Arguments) -> ModelSpec:
    ranks = {part.name: arguments["rank"] for part in corrected_parts(spec, arguments)}
    parts = with_low_rank(spec.parts, {CORRECTION: ranks})
    return replace(spec, parts=parts, config={**spec.config, CORRECTION: {**spec.config.get(CORRECTION, {}), **ranks}}, tensors=None)


def _share(says: str) -> Parameter:
    return Parameter(accepts=lambda value: is_number(value) and 0 < value < 1, says=says)


RANK = Parameter(accepts=is_positive, says="a positive number")

FACTORIZING: dict[tuple[str, str], StepKind] = {
    ("factorize", "svd"): StepKind(
        parameters={
            "rank": RANK,
            "energy": _share("the share of squared singular values that stays at least, between 0 and 1"),
            "ratio": _share("the share of parameters that stays at most, between 0 and 1"),
            "weighted": Parameter(accepts=is_flag, says="true or false", default=True), **TARGETS, **CALIBRATION,
        },
        predict=_predict_svd, check=_check_svd,
    ),
    ("factorize", "correction"): StepKind(
        parameters={"rank": replace(RANK, default=16), **TARGETS, **CALIBRATION}, predict=_predict_correction, calibrated=True,
    ),
}  # fmt: skip
"""(verb, method) → its kind. svd: weighted as SVD-LLM (arXiv:2403.07378), or plain; correction: LQER (arXiv:2402.02446), EoRA (arXiv:2410.21271)."""
