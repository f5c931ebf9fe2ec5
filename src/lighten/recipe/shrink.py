"""Steps that make a model really smaller: fewer inner features, heads, channels of the stream, blocks or experts; their reading on a spec.

Each gives the spec of the smaller model and its config, found by trial (`lighten.recipe.config_trial`), so that whatever reads the config alone
describes the same shapes. Which of them go is their second reading's concern.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from functools import partial
from itertools import accumulate, chain
from math import prod
from typing import Any

from lighten.errors import RecipeError
from lighten.model.low_rank import CORRECTION, RANKS, with_low_rank
from lighten.model.spec import Attention, Conv, Elementwise, Embedding, Linear, ModelSpec, Norm, Part, Table, block_name
from lighten.recipe.config_trial import Wanted, carried, find_config, parts_of
from lighten.recipe.quantize import CALIBRATION, TOKENS
from lighten.recipe.sparse import size_of, with_kept
from lighten.recipe.words import Arguments, Parameter, StepKind, is_number, is_positive, one_of, refuse_quantized

TILE = 8
"""Features that are left are a multiple of this, for tensor cores' sake. Source: NVIDIA, Matrix Multiplication Background User's Guide,
section "Requirements to Use Tensor Cores": multiples of 16 bytes, 8 values of 2 bytes."""

DIVISIBLE = frozenset({
    "llama", "internlm3", "iquestcoder", "gemma2", "vaultgemma", "cwm", "arcee", "gpt_neox", "jais2", "gemma3_text", "hyperclovax", "eurobert",
    "deepseek_v2", "minicpm3", "clip_vision_model", "metaclip_2_vision_model", "chinese_clip_vision_model", "altclip_vision_model", "clip_text_model",
    "metaclip_2_text_model",
})  # fmt: skip
"""`model_type`s whose config class takes a width alone that is a multiple of the number of heads, though its code does not need it. Source:
`validate_architecture` of the classes of transformers 5.23, which tests/test_shrink.py reads again."""

Parts = tuple[Part, ...]


def _kept(count: int, ratio: float) -> int:
    """How many stay where a share goes, rounded up: at least one.

    >>> _kept(8, 0.25), _kept(3, 0.25), _kept(2, 0.9)
    (6, 3, 1)
    """
    return math.ceil(round(count * (1 - ratio), 6))


def kept_features(width: int, ratio: float, multiple: int = TILE) -> int:
    """Features that stay where a share goes, rounded up to whole tiles.

    >>> kept_features(14336, 0.25), kept_features(100, 0.5), kept_features(4, 0.5)
    (10752, 56, 4)
    """
    return min(width, multiple * math.ceil(round(width * (1 - ratio), 6) / multiple))


def _whole(spec: ModelSpec) -> dict[str, Any]:
    """The spec's config, which says each linear of two factors whole."""
    return {name: value for name, value in spec.config.items() if name not in (RANKS, CORRECTION)}


def _base(spec: ModelSpec, step: str) -> Parts:
    """The parts of the spec's config; a linear of two factors is whole among them.

    Raises:
        RecipeError: the config alone does not describe the spec.
    """
    parts = parts_of(_whole(spec), spec.architecture)
    if parts is None or [part.name for part in with_low_rank(parts, spec.config)] != [part.name for part in spec.parts]:
        raise RecipeError(
            f"{step}: the config of {spec.name} ({spec.architecture}) does not describe it by a formula; none of its fields can be changed."
        )
    return parts


def _apply(spec: ModelSpec, step: str, base: Parts, goals: Iterator[Wanted], refusal: str) -> ModelSpec:
    """The spec of the first goal that a config can say.

    Raises:
        RecipeError: none can, or a weight whose shape changes is quantized.
    """
    for wanted in goals:
        found = find_config(_whole(spec), spec.architecture, wanted)
        if found is not None:
            return _replaced(spec, step, *_in_factors(spec, base, found, lambda name: name))
    raise RecipeError(f"{step}: {refusal}")


def _in_factors(spec: ModelSpec, base: Parts, found: tuple[Mapping[str, Any], Parts], origin: Callable[[str], str]) -> tuple[dict[str, Any], Parts]:
    """A smaller config and its parts, with each linear that was two factors as two factors again, of the rank that they had.

    A pair keeps its rank where it is no smaller than the weight any more: what is not lost by one step is not lost by another.

    Args:
        base: the parts before.
        found: config and parts, all linears whole.
        origin: the name that a part had.
    """
    config, parts = dict(found[0]), found[1]
    for word in (RANKS, CORRECTION):
        before = spec.config.get(word, {})
        if said := {part.name: before[old] for part in parts if isinstance(part, Linear) and (old := origin(part.name)) in before}:
            config[word] = said
    return config, carried(spec, with_low_rank(base, spec.config), with_low_rank(parts, config), origin)


def _replaced(spec: ModelSpec, step: str, config: Mapping[str, Any], parts: Parts) -> ModelSpec:
    """With other parts; of the zeros of pruned weights as large a share is taken to stay as there was, until they are counted."""

    def counted(before: Part, after: Part) -> Part:
        if not isinstance(after, Linear | Embedding) or before.tensors() == after.tensors():
            return after
        refuse_quantized(after, step)
        if after.weight.kept is None:
            return replace(after, weight=replace(after.weight, pattern=None))
        (rows, columns), size = size_of(after), prod(size_of(before)) if isinstance(before, Linear | Embedding) else 1
        kept = round(after.weight.kept / size * rows * columns)
        return replace(after, weight=with_kept(replace(after.weight, pattern=None), rows, columns, kept))

    return replace(spec, config=config, parts=tuple(map(counted, spec.parts, parts)), tensors=None)


def _all_stay(step: str, spec: ModelSpec, arguments: Arguments, what: str) -> RecipeError:
    return RecipeError(f"{step}: ratio={arguments['ratio']} of {spec.name}'s {what} leaves all of them.")


# feed-forward layers


@dataclass(frozen=True, kw_only=True)
class _FeedForward:
    """One pair of projections: the places of its parts in the spec, from the first projection into `width` features to the one back."""

    first: int
    last: int
    width: int


def _feed_forwards(parts: Parts) -> Iterator[_FeedForward]:
    """Each `mlp` projection back to the hidden state, with the projections since the last one that lead into its input, alone or side by side."""
    open_: dict[str | None, list[int]] = {}
    for index, part in enumerate(parts):
        if not isinstance(part, Linear) or part.component != "mlp":
            continue
        before = open_.setdefault(block_name(part), [])
        into = [place for place in before if _leads_into(parts[place], part)]
        if into:
            yield _FeedForward(first=into[0], last=index, width=part.in_features)
            before.clear()
        else:
            before.append(index)


def _leads_into(first: Part, last: Linear) -> bool:
    widths = (last.in_features, 2 * last.in_features)  # gate and up in one
    same = isinstance(first, Linear) and first.experts == last.experts
    return same and isinstance(first, Linear) and first.in_features == last.out_features and first.out_features in widths


def _predict_ffn(spec: ModelSpec, arguments: Arguments) -> ModelSpec:
    """Each feed-forward layer, an expert too, loses a share of its inner features; attention and the hidden state stay as they are."""
    step, base = "shrink(ffn)", _base(spec, "shrink(ffn)")
    layers = list(_feed_forwards(base))
    if not layers:
        raise RecipeError(f"{step}: {spec.name} has no feed-forward layers whose inner features can be told.")
    kept = {layer.width: kept_features(layer.width, float(arguments["ratio"])) for layer in layers}
    if all(width == count for width, count in kept.items()):
        raise _all_stay(step, spec, arguments, f"{_listed(kept)} inner features, in whole tiles of {TILE},")
    parts = list(base)
    for layer in layers:
        for index in range(layer.first, layer.last + 1):
            parts[index] = _narrowed(parts[index], layer.width, kept[layer.width], last=index == layer.last)
    wanted = tuple(parts)
    goal = Wanted(changes=kept, explicit=tuple(kept.values()), fits=lambda found: found == wanted)
    return _apply(spec, step, base, iter([goal]), f"no field of {spec.name}'s config says its {_listed(kept)} inner features alone.")


def _narrowed(part: Part, width: int, kept: int, *, last: bool) -> Part:
    if isinstance(part, Linear):
        if last:
            return replace(part, in_features=kept)
        return replace(part, out_features=part.out_features // width * kept) if part.out_features in (width, 2 * width) else part
    if isinstance(part, Elementwise | Norm) and part.size % width == 0:  # of several experts at once, a multiple
        return replace(part, size=part.size // width * kept)
    return part


def _listed(sizes: Mapping[int, int]) -> str:
    return " and ".join(map(str, sizes))


# heads


def _predict_heads(spec: ModelSpec, arguments: Arguments) -> ModelSpec:
    """Whole groups of heads that share a key and value head go; of several query heads over one of those, query heads."""
    step, base = "shrink(heads)", _base(spec, "shrink(heads)")
    found = [part for part in base if isinstance(part, Attention)]
    if not found:
        raise RecipeError(f"{step}: {spec.name} has no attention heads.")
    kept = {(part.num_attention_heads, part.num_key_value_heads): _kept_heads(spec, part, base, arguments["ratio"]) for part in found}
    if all(before == after for before, after in kept.items()):
        raise _all_stay(step, spec, arguments, f"{' and '.join(f'{heads} heads in {groups} groups' for heads, groups in kept)}")
    changes = {old: new for before, after in kept.items() for old, new in zip(before, after, strict=True) if old != new}
    goal = Wanted(changes=changes, explicit=tuple({part.head_dim for part in found}), fits=lambda parts: _has_heads(base, parts, kept))
    refusal = (
        f"{spec.family} takes the size of a head from its width and the number of heads, so heads cannot go alone; shrink(width) takes heads with "
        "it, shrink(ffn) and shrink(layers) leave them."
    )
    return _apply(spec, step, base, iter([goal]), refusal)


def _kept_heads(spec: ModelSpec, part: Attention, parts: Parts, ratio: float) -> tuple[int, int]:
    """(query heads, key and value heads) that stay."""
    heads, groups = part.num_attention_heads, part.num_key_value_heads
    each, units = (heads // groups, groups) if groups > 1 else (1, heads)
    width = stream_width(parts)
    bound = spec.family in DIVISIBLE and width % heads == 0
    kept = next(count for count in range(_kept(units, ratio), units + 1) if not bound or width % (count * each) == 0)
    return kept * each, kept if groups > 1 else 1


def _has_heads(base: Parts, parts: Parts, kept: Mapping[tuple[int, int], tuple[int, int]]) -> bool:
    """Whether attention alone changed, and in its heads alone."""

    def as_wanted(before: Part, after: Part) -> bool:
        if isinstance(before, Attention):
            heads, groups = kept[before.num_attention_heads, before.num_key_value_heads]
            return after == replace(before, num_attention_heads=heads, num_key_value_heads=groups)
        if isinstance(before, Norm) and isinstance(after, Norm):
            return after == replace(before, groups=after.groups)
        if isinstance(before, Linear) and isinstance(after, Linear) and before.component == "attention":
            inputs = after == replace(before, in_features=after.in_features)
            return inputs or after == replace(before, out_features=after.out_features, bias=after.bias)
        return before == after or (before.component == "attention" and isinstance(before, Elementwise | Table))

    return _alike(base, parts, as_wanted)


def _alike(base: Parts, parts: Parts, as_wanted: Callable[[Part, Part], bool]) -> bool:
    """Whether each part is that of the same name, and of its kind, as it is wanted."""
    return len(base) == len(parts) and all(
        type(before) is type(after) and before.name == after.name and as_wanted(before, after) for before, after in zip(base, parts, strict=True)
    )


# width


def stream_width(parts: Parts) -> int:
    """Channels of the stream that the blocks add to: what attention's projections read; of a model without, the embedding's."""
    linears = (part.in_features for part in parts if isinstance(part, Linear) and part.component == "attention")
    return next(chain(linears, (part.embedding_dim for part in parts if isinstance(part, Embedding))), 0)


def _predict_width(spec: ModelSpec, arguments: Arguments) -> ModelSpec:
    """The stream between the blocks loses channels, and each norm's eps rises as the sum of squares is over fewer; where a head's size follows
    from the width, as many heads go with them."""
    step, base = "shrink(width)", _base(spec, "shrink(width)")
    before, ratio = stream_width(base), float(arguments["ratio"])
    goals = list(_width_goals(spec, base, before, ratio))
    if not goals:
        raise _all_stay(step, spec, arguments, f"{before} channels")
    refusal = f"no fields of {spec.name}'s config say its width of {before} channels alone, or its width and heads."
    smaller = _apply(spec, step, base, (goal for _, goal in goals), refusal)
    return replace(smaller, config=_scaled_eps(smaller.config, before / stream_width(smaller.parts)))


def _width_goals(spec: ModelSpec, base: Parts, before: int, ratio: float) -> Iterator[tuple[int, Wanted]]:
    """The width alone, then with heads of the size that they have."""
    attentions = [part for part in base if isinstance(part, Attention)]
    counts = [part.num_attention_heads for part in attentions] if spec.family in DIVISIBLE else []
    inner = [layer.width for layer in _feed_forwards(base)]
    sizes = tuple({*(part.head_dim for part in attentions), *inner})
    alone = kept_features(before, ratio, math.lcm(TILE, *(count for count in counts if before % count == 0)))
    if alone < before:
        yield alone, Wanted(changes={before: alone}, explicit=sizes, fits=lambda parts: _has_width(base, parts, before, alone))
    heads = {(part.num_attention_heads, part.num_key_value_heads) for part in attentions}
    units = math.gcd(*(count for pair in heads for count in pair)) if heads else 0
    kept = _kept(units, ratio)
    if 0 < kept < units and before % units == 0:
        after = before // units * kept
        changes = {before: after} | {count: count // units * kept for pair in heads for count in pair}
        yield after, Wanted(changes=changes, explicit=tuple(set(inner)), fits=lambda parts: _has_width(base, parts, before, after, heads=True))


def _has_width(base: Parts, parts: Parts, before: int, after: int, *, heads: bool = False) -> bool:
    """Whether sizes of the width changed, all in proportion, and nothing else but the heads where they may."""

    def fits(old: int, new: int) -> bool:
        return old == new or old * after == new * before

    def as_wanted(one: Part, other: Part) -> bool:
        if isinstance(one, Attention) and isinstance(other, Attention):
            if not heads:
                return one == other
            counts = {"num_attention_heads": other.num_attention_heads, "num_key_value_heads": other.num_key_value_heads}
            share = all(getattr(one, name) * after == new * before for name, new in counts.items())
            return share and other == replace(one, **counts)  # type: ignore[arg-type]
        if not isinstance(one, Linear | Embedding | Norm | Conv | Table | Elementwise):
            return one == other
        shapes = list(zip(one.tensors().items(), other.tensors().items(), strict=False))
        same = len(one.tensors()) == len(other.tensors()) and all(name == new_name for (name, _), (new_name, _) in shapes)
        return same and all(len(old) == len(new) and all(map(fits, old, new)) for (_, old), (_, new) in shapes)

    widths = [[layer.width for layer in _feed_forwards(each)] for each in (base, parts)]
    return _alike(base, parts, as_wanted) and widths[0] == widths[1] and stream_width(parts) == after


def _scaled_eps(config: Mapping[str, Any], factor: float) -> dict[str, Any]:
    """What norms add to the mean square, such as `rms_norm_eps` and `layer_norm_epsilon`: by this name transformers' configs know it."""
    return {
        name: _scaled_eps(value, factor) if isinstance(value, Mapping)
        else value * factor if isinstance(value, float) and re.search(r"(^|_)eps(ilon)?$", name) else value
        for name, value in config.items()
    }  # fmt: skip


# layers


def stacks_of(parts: Parts) -> dict[str, list[str]]:
    """The names of the numbered blocks by the list that they lie in, such as `encoder.block`, in forward order."""
    found: dict[str, dict[str, None]] = {}
    for part in parts:
        if (block := block_name(part)) is not None:
            found.setdefault(block.rpartition(".")[0], {})[block] = None
    return {stack: list(blocks) for stack, blocks in found.items()}


def kept_count(count: int, arguments: Arguments) -> int:
    """Blocks of a stack that stay; a stack that has no more than `keep` stays whole."""
    return min(count, int(arguments["keep"])) if "keep" in arguments else _kept(count, float(arguments["ratio"]))


def spread_evenly(count: int, kept: int) -> tuple[int, ...]:
    """Numbers of the blocks that stay where they are spread evenly, the first and the last among them.

    >>> spread_evenly(6, 3), spread_evenly(4, 1)
    ((0, 2, 5), (0,))
    """
    return tuple(index * (count - 1) // max(kept - 1, 1) for index in range(kept))


def _predict_layers(spec: ModelSpec, arguments: Arguments) -> ModelSpec:
    """So many blocks of each stack. Where measuring decides, those that are spread evenly stand for them here.

    Raises:
        RecipeError: more blocks are to stay than any stack has, or as `keep_blocks`.
    """
    stacks = stacks_of(_base(spec, "shrink(layers)"))
    most = max(map(len, stacks.values()), default=0)
    if arguments.get("keep", 0) > most:
        raise RecipeError(f"shrink(layers): keep={arguments['keep']} is more than the {most} blocks of {spec.name}: no step makes a model larger.")
    kept = {}
    for stack, blocks in stacks.items():
        count = kept_count(len(blocks), arguments)
        kept[stack] = tuple(range(count)) if arguments["by"] == "last" else spread_evenly(len(blocks), count)
    return keep_blocks(spec, kept)


def keep_blocks(spec: ModelSpec, kept: Mapping[str, tuple[int, ...]]) -> ModelSpec:
    """The spec with some blocks of each stack alone, numbered anew.

    Args:
        kept: by stack, as `stacks_of` names it: places in the stack, rising.

    Raises:
        RecipeError: all stay, the blocks differ in width, or the config cannot say the result.
    """
    step, base = "shrink(layers)", _base(spec, "shrink(layers)")
    stacks = stacks_of(base)
    if all(len(kept[stack]) == len(blocks) for stack, blocks in stacks.items()):
        raise RecipeError(f"{step}: all of {spec.name}'s {' and '.join(str(len(blocks)) for blocks in stacks.values()) or 'no'} blocks would stay.")
    _refuse_unequal(stacks, base, step)
    names = {name for part in (*base, *spec.parts) for name in (part.name, *part.tensors())}
    renamed = {f"{stack}.{new}": stacks[stack][old] for stack, places in kept.items() for new, old in enumerate(places)}
    origin = partial(origin_of, renamed=renamed, known=names)
    shapes = {name: shape for part in base for name, shape in part.tensors().items()}
    attentions = {part.name: part for part in base if isinstance(part, Attention)}

    def fits(parts: Parts) -> bool:
        same = {stack: len(blocks) for stack, blocks in stacks_of(parts).items()} == {stack: len(places) for stack, places in kept.items()}
        own = (pair for part in parts for pair in part.tensors().items())
        return (
            same and all(shapes.get(origin(name)) == shape for name, shape in own)
            and all(replace(attentions[origin(part.name)], name=part.name) == part for part in parts if isinstance(part, Attention))
        )  # fmt: skip

    config = _whole(spec)
    for stack, places in kept.items():
        config = _sliced_lists(config, len(stacks[stack]), places)
    wanted = Wanted(changes={len(stacks[stack]): len(places) for stack, places in kept.items()}, explicit=(), fits=fits)
    found = find_config(config, spec.architecture, wanted)
    if found is None:
        which = "; ".join(f"{stack} {', '.join(map(str, places))}" for stack, places in kept.items())
        raise RecipeError(f"{step}: no fields of {spec.name}'s config say its number of blocks alone ({which} would stay).")
    smaller, parts = _in_factors(spec, base, found, origin)
    return replace(spec, config=smaller, parts=parts, tensors=None)


def _refuse_unequal(stacks: Mapping[str, list[str]], base: Parts, step: str) -> None:
    """Raises:
    RecipeError: a stack of blocks of different widths, as pyramids have them.
    """
    widths: dict[str, int] = {}
    for part in base:
        if isinstance(part, Linear) and (block := block_name(part)) is not None:
            widths.setdefault(block, part.in_features)
    for stack, blocks in stacks.items():
        if len({widths.get(block) for block in blocks}) > 1:
            raise RecipeError(f"{step}: the blocks of {stack} have different widths; a stack of equal blocks can lose some.")


def origin_of(name: str, renamed: Mapping[str, str], known: set[str]) -> str:
    """The name that a part or tensor had before the blocks were numbered anew; what the first block alone has keeps its own."""
    for stop in accumulate(len(piece) + 1 for piece in name.split(".")):
        block = name[: stop - 1]
        if block in renamed:
            old = renamed[block] + name[stop - 1 :]
            return old if old in known else name
    return name


def _sliced_lists(config: Mapping[str, Any], count: int, places: tuple[int, ...]) -> dict[str, Any]:
    """A config whose lists with an entry a block have those of the blocks that stay; lists of tokens have none."""

    def sliced(name: str, value: Any) -> Any:
        if isinstance(value, Mapping):
            return _sliced_lists(value, count, places)
        per_block = isinstance(value, list) and len(value) == count and "token" not in name and name != "architectures"
        return [value[place] for place in places] if per_block else value

    return {name: sliced(name, value) for name, value in config.items()}


def _check_layers(arguments: Arguments) -> str | None:
    given = [name for name in ("ratio", "keep") if name in arguments]
    if len(given) != 1:
        return f"give exactly one of ratio and keep; given: {', '.join(given) or 'none'}."
    if arguments["by"] != "influence" and arguments["tokens"] != TOKENS:
        return f"tokens={arguments['tokens']} has no effect with by={arguments['by']}, which looks at none."
    return None


# experts


def _predict_experts(spec: ModelSpec, arguments: Arguments) -> ModelSpec:
    """Each layer of experts keeps so many; a token meets as many as before."""
    step, base = "shrink(experts)", _base(spec, "shrink(experts)")
    routed = [part for part in base if isinstance(part, Linear) and part.experts > 1]
    if not routed:
        raise RecipeError(f"{step}: {spec.name} has no experts.")
    kept = {part.experts: _kept(part.experts, float(arguments["ratio"])) for part in routed}
    if all(before == after for before, after in kept.items()):
        raise _all_stay(step, spec, arguments, f"{_listed(kept)} experts")
    for part in routed:
        if kept[part.experts] < (least := max(2, part.experts_per_row)):
            raise RecipeError(
                f"{step}: ratio={arguments['ratio']} leaves {kept[part.experts]} of {part.experts} experts; at least {least} have to stay, "
                f"for a token meets {part.experts_per_row} and a router chooses."
            )
    changes = {old: new for old, new in kept.items() if old != new}
    goal = Wanted(changes=changes, explicit=(), fits=lambda parts: _has_experts(base, parts, kept))
    return _apply(spec, step, base, iter([goal]), f"no field of {spec.name}'s config says its {_listed(kept)} experts alone.")


def _has_experts(base: Parts, parts: Parts, kept: Mapping[int, int]) -> bool:
    """Whether experts, and what has a row for each of them, changed alone."""

    def as_wanted(before: Part, after: Part) -> bool:
        if isinstance(before, Linear) and before.experts > 1:
            return after == replace(before, experts=kept[before.experts])
        if isinstance(before, Linear | Conv | Embedding | Norm | Table):
            old, new = list(before.tensors().values()), list(after.tensors().values())
            sizes = zip(chain.from_iterable(old), chain.from_iterable(new), strict=False)
            return list(map(len, old)) == list(map(len, new)) and all(other in (size, kept.get(size)) for size, other in sizes)
        return before == after or isinstance(before, Elementwise)

    return _alike(base, parts, as_wanted)


_RATIO = {"ratio": Parameter(accepts=lambda v: is_number(v) and 0 < v < 1, says="the share that goes, between 0 and 1", default=0.25)}


def _kind(predict: Callable[[ModelSpec, Arguments], ModelSpec]) -> StepKind:
    return StepKind(parameters={**_RATIO, **CALIBRATION}, predict=predict, calibrated=True)


SHRINKING: dict[tuple[str, str], StepKind] = {
    ("shrink", "ffn"): _kind(_predict_ffn),
    ("shrink", "heads"): _kind(_predict_heads),
    ("shrink", "width"): _kind(_predict_width),
    ("shrink", "layers"): StepKind(
        parameters={
            "ratio": replace(_RATIO["ratio"], default=None),
            "keep": Parameter(accepts=is_positive, says="a number of blocks of each stack that stay"),
            "by": one_of("influence", "even", "last", default="influence"), **CALIBRATION,
        },
        predict=_predict_layers, check=_check_layers, calibrated=True,
    ),
    ("shrink", "experts"): _kind(_predict_experts),
}  # fmt: skip
"""(verb, method) → its kind."""
