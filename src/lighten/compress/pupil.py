"""A module under training and how far its answers are from its teacher's, as one `nn.Module` whose forward gives the loss: what torch's
distributed wrappers, and an optimizer, take.

Shape legend: B rows of a unit, S positions, D width, V vocabulary, N positions that count.
"""

from __future__ import annotations

import importlib
from collections.abc import Iterator, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any, Literal, TypeAlias

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils.checkpoint import checkpoint

from lighten.compress.distances import (
    TopLogits,
    common_heads,
    cosine_distance,
    divergence,
    label_distance,
    pooled,
    relation_distance,
    relational_distance,
    state_distance,
)
from lighten.compress.memory_plan import DENSE_LOGITS
from lighten.compress.skeleton import Skeleton, Source
from lighten.compress.teacher import Sample, among, answer_of_head, counting, through_head
from lighten.errors import RecipeError
from lighten.model.tasks import IGNORED, LABELS

Target = Mapping[str, Tensor]
"""What the teacher answered to a unit, by what it is: `states`, `logits`, `values`, `ids` and `log_sum`, or `embedding`; `layer.0` and on; `q`, `k`
and `v`. [B, ...] each."""

MOST_LAYERS = 4
"""Layers of a stack that the hidden-state loss compares, evenly spread, the last among them: choice, so that what waits on disk stays bounded."""
Kind = Literal["head", "logits", "values", "embeddings"]


@dataclass(frozen=True, kw_only=True)
class Objective:
    """What is to be brought near to what.

    Attributes:
        kind: logits that a head makes of each position's last state; other logits; values that are no logits; pooled states.
        hidden, attention, relational: weights of these losses beside the first.
        labels: weight of the cross-entropy of what is true of a row, or of its positions.
        shifted: a position's label is the next one's, as of a decoder that reads the text it is to write.
        first_token: an embedding is the first position's state, else the mean.
        layers: (student's block, teacher's block) whose states are compared, by their names.
        sizes: mean square of the teacher's states, for each of `layers`.
        attending: (student's block, teacher's block) whose attention is compared; None: none is.
        causal: positions relate to those before them alone.
        answer: the type that a head's base answers with, by `answer_name`.
    """

    kind: Kind
    answer: str = ""
    temperature: float = 1.0
    hidden: float = 0.0
    attention: float = 0.0
    relational: float = 0.0
    labels: float = 0.0
    shifted: bool = False
    first_token: bool = False
    layers: tuple[tuple[str, str], ...] = ()
    sizes: tuple[float, ...] = ()
    attending: tuple[str, str] | None = None
    causal: bool = False


def stacks_of(skeleton: Skeleton) -> dict[str, list[str]]:
    """Names of the blocks of each stack, in order."""
    found: dict[str, list[str]] = {}
    for unit in skeleton.units:
        stack, _, place = unit.name.rpartition(".")
        if place.isdigit():
            found.setdefault(stack, []).append(unit.name)
    return found


def mapped(student: int, teacher: int) -> list[int]:
    """The teacher's layer for each of a student's: the last for the last, evenly spread.

    Source: Jiao et al. 2019 (arXiv:1909.10351), section 4.3, the uniform mapping.

    >>> mapped(3, 12), mapped(2, 5)
    ([3, 7, 11], [2, 4])
    """
    return [int((place + 1) * teacher / student + 0.5) - 1 for place in range(student)]


def match_layers(student: Skeleton, teacher: Skeleton) -> list[tuple[str, str]]:
    """Blocks to compare: at most `MOST_LAYERS` of each stack.

    Raises:
        RecipeError: a stack that the teacher does not have, or deeper than the teacher's.
    """
    theirs, pairs = stacks_of(teacher), []
    for stack, blocks in stacks_of(student).items():
        if len(blocks) > len(theirs.get(stack, ())):
            raise RecipeError(f"distill: the student has {len(blocks)} blocks in {stack} and the original {len(theirs.get(stack, ()))}.")
        partner = [theirs[stack][place] for place in mapped(len(blocks), len(theirs[stack]))]
        pairs += [(blocks[place], partner[place]) for place in mapped(min(MOST_LAYERS, len(blocks)), len(blocks))]
    return pairs


class Watching:
    """States that some blocks give, and what one block's attention is given, while a module runs inside of a `with` block.

    Attributes:
        states: block → [B, S, D].
        attended: queries, keys and values, [B, S, D] each, of the block's first attention; empty where its code calls none of torch's.
    """

    def __init__(self, module: nn.Module, blocks: tuple[str, ...], attending: str | None) -> None:
        self.states: dict[str, Tensor] = {}
        self.attended: tuple[Tensor, ...] = ()
        self._module, self._blocks, self._attending = module, blocks, attending
        self._hooks: list[Any] = []
        self._mode = _Attention(self._attend)
        self._inside = False

    def __enter__(self) -> Watching:
        for name in dict.fromkeys(self._blocks):
            self._hooks.append(self._module.get_submodule(name).register_forward_hook(self._keeper(name)))
        if self._attending is not None:
            block = self._module.get_submodule(self._attending)
            self._hooks.append(block.register_forward_pre_hook(lambda *_: self._within(True)))
            self._hooks.append(block.register_forward_hook(lambda *_: self._within(False)))
            self._mode.__enter__()  # type: ignore[no-untyped-call]
        return self

    def __exit__(self, *error: object) -> None:
        if self._attending is not None:
            self._mode.__exit__(*error)  # type: ignore[no-untyped-call]
        for hook in self._hooks:
            hook.remove()

    def _keeper(self, name: str) -> Any:
        def keep(module: nn.Module, given: Any, answer: Any) -> None:
            self.states[name] = answer[0] if isinstance(answer, tuple | list) else answer

        return keep

    def _within(self, inside: bool) -> None:
        self._inside = inside

    def _attend(self, vectors: tuple[Tensor, ...]) -> None:
        if self._inside and not self.attended:
            self.attended = tuple(each.transpose(1, 2).flatten(2) for each in vectors)


class _Attention(TorchFunctionMode):
    """Tells what torch's attention is given: queries, keys and values, [B, heads, S, head width] each."""

    def __init__(self, tell: Any) -> None:
        super().__init__()
        self._tell = tell

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is nn.functional.scaled_dot_product_attention:
            given = [args[place] if len(args) > place else kwargs[name] for place, name in enumerate(("query", "key", "value"))]
            self._tell(tuple(given))
        return func(*args, **kwargs)


class TeacherHead:
    """The teacher's way from last states to logits, with its own tensors.

    Args:
        skeleton: the teacher's, without weights; what lies outside of its base is loaded, and stays.
        answer: the type that its base answers with, as `answer_name` says it.
        words: the tokens whose logits are compared, by its own ids; empty: all.
    """

    def __init__(self, skeleton: Skeleton, source: Source, answer: str, words: Sequence[int] = ()) -> None:
        self._module: Any = skeleton.module
        self._words = torch.tensor(words) if words else None
        self._base: nn.Module = getattr(self._module, self._module.base_model_prefix)
        self._answer = type_of(answer)
        inside = {id(part) for part in self._base.modules()}
        self._outside = [part for part in self._module.modules() if id(part) not in inside]
        for part in self._outside:
            skeleton.load_own(part, source)

    @property
    def tensors(self) -> list[Tensor]:
        """All that it computes with."""
        own = [tensor for part in self._outside for tensor in [*part._parameters.values(), *part._buffers.values()]]
        return [tensor for tensor in own if tensor is not None and not tensor.is_meta]

    def logits(self, states: Tensor) -> Tensor:
        """[N, D] → [N, V]."""
        with torch.no_grad():
            return among(through_head(self._module, self._base, self._answer, states), self._words)


def answer_name(answer: type[Any]) -> str:
    return f"{answer.__module__}:{answer.__qualname__}"


def type_of(name: str) -> type[Any]:
    module, _, kind = name.partition(":")
    found: type[Any] = getattr(importlib.import_module(module), kind)
    return found


class Pupil(nn.Module):
    """The student, and its distance from a teacher's answers.

    Args:
        model: float32, all its weights in memory.
        head: the teacher's, where the objective's kind is head and whole distributions are compared.
        widths: widths of the teacher's states by the key of a `Target`, where they are not the student's: what projects the one to the other is
            trained beside it and dropped.
        dtype: the type that products are computed in; parameters stay float32.
        recompute: names of blocks that run again in the backward pass instead of keeping what they computed (Chen et al. 2016, arXiv:1604.06174).
    """

    def __init__(  # noqa: PLR0913 - what is trained, what it is held to, and how it computes
        self, model: Any, objective: Objective, *, head: TeacherHead | None = None, widths: Mapping[str, tuple[int, int]] | None = None,
        dtype: torch.dtype = torch.float32, recompute: Sequence[str] = (), seed: int = 0,
    ) -> None:  # fmt: skip
        super().__init__()
        self.model = model
        self.objective, self._dtype = objective, dtype
        self._head = head
        generator = torch.Generator().manual_seed(seed)
        self.projections = nn.ModuleDict({
            key.replace(".", "_"): _projection(ours, theirs, generator) for key, (ours, theirs) in sorted((widths or {}).items())
        })  # fmt: skip
        for name in recompute:
            _recompute(model.get_submodule(name))

    def forward(self, sample: Sample, target: Target) -> tuple[Tensor, Tensor, Tensor]:
        """The whole loss; without gradients the first distance with that from the labels; and how many rows' likeliest classes are the true ones.
        Distances are means over what counts in the unit."""
        said = self.objective
        blocks = tuple(ours for ours, _ in said.layers) if said.hidden else ()
        with self._computing(), Watching(self.model, blocks, said.attending[0] if said.attending and said.attention else None) as seen:
            answer, counts = self._answer(sample)
            distance = self._distance(answer, counts, sample, target)
        loss = distance
        if blocks:
            each = [self._state_distance(place, seen.states[name], sample, target) for place, name in enumerate(blocks)]
            loss = loss + said.hidden * torch.stack(each).mean()
        if said.attending and said.attention:
            loss = loss + said.attention * self._attention_distance(seen.attended, sample, target)
        return loss, distance.detach(), _right(answer, sample)

    def _computing(self) -> Any:
        return torch.autocast("cpu", dtype=self._dtype) if self._dtype != torch.float32 else nullcontext()

    def _answer(self, sample: Sample) -> tuple[Tensor, Tensor]:
        """What is compared, and which of it counts."""
        found = answer_of(self.model, sample, self.objective)
        counts = counting(sample, found)
        return (pooled(found, counts, first_token=self.objective.first_token), counts) if self.objective.kind == "embeddings" else (found, counts)

    def _distance(self, answer: Tensor, counts: Tensor, sample: Sample, target: Target) -> Tensor:
        """From the teacher's answers, and by its weight from the labels: an answer without a label has the first alone."""
        said = self.objective
        if said.kind == "embeddings":
            near = self._project("embedding", answer)
            found = cosine_distance(target["embedding"], near)
            return found + said.relational * relational_distance(target["embedding"], answer) if said.relational else found
        labels = _labels(sample, counts, said)[counts] if said.labels else None
        answer = answer[counts]
        theirs = _top(target, counts) if "ids" in target else target["states" if said.kind == "head" else "logits"][counts]
        if said.kind == "head":
            learning = torch.is_grad_enabled()
            whole = _ThroughHead.apply(answer, self, (theirs, labels), learning, *self._head_parameters())  # type: ignore[no-untyped-call]
            return whole / len(answer)  # type: ignore[no-any-return]
        if said.kind == "values":
            distance = nn.functional.mse_loss(answer.float(), theirs.float(), reduction="sum") / answer.shape[-1]  # type: ignore[union-attr]
        else:
            distance = divergence(theirs, answer, temperature=said.temperature)
        if labels is not None:
            distance = distance + said.labels * label_distance(answer, labels)
        return distance / len(answer)

    def _head_parameters(self) -> list[Tensor]:
        """What leads from last states to logits, and is trained."""
        inside = {id(part) for part in self._base.modules()}
        outside = [part for part in self.model.modules() if id(part) not in inside]
        return [found for part in outside for found in part._parameters.values() if found is not None and found.requires_grad]

    @property
    def _base(self) -> nn.Module:
        found: nn.Module = getattr(self.model, self.model.base_model_prefix)
        return found

    def head_pieces(self, states: Tensor, theirs: Tensor | TopLogits, labels: Tensor | None) -> Iterator[tuple[Tensor, Tensor, slice]]:
        """(states as a leaf, sum of distances, rows) of pieces of [N, D], so that few logits live at once.

        Args:
            labels: [N]; None: they do not count.
        """
        first, piece = 0, 16
        answer = type_of(self.objective.answer)
        while first < len(states):
            part = slice(first, first + piece)
            with torch.autocast("cpu", enabled=self._dtype != torch.float32, dtype=torch.bfloat16, cache_enabled=False):
                if isinstance(theirs, TopLogits):
                    held: Tensor | TopLogits = TopLogits(values=theirs.values[part], ids=theirs.ids[part], log_sum=theirs.log_sum[part])
                else:
                    assert self._head is not None, "states are compared through the teacher's head"
                    held = self._head.logits(theirs[part])
                leaf = states[part].detach().requires_grad_()
                logits = through_head(self.model, self._base, answer, leaf)
                distance = divergence(held, logits, temperature=self.objective.temperature)
                if labels is not None:
                    distance = distance + self.objective.labels * label_distance(logits, labels[part])
                yield leaf, distance, part
            first, piece = first + piece, max(1, DENSE_LOGITS // logits.shape[-1])

    def _project(self, key: str, found: Tensor) -> Tensor:
        name = key.replace(".", "_")
        return self.projections[name](found.float()) if name in self.projections else found

    def _state_distance(self, place: int, states: Tensor, sample: Sample, target: Target) -> Tensor:
        ours = self._project(f"layer.{place}", states)
        return state_distance(target[f"layer.{place}"], ours, _state_counts(sample, states), size=self.objective.sizes[place])

    def _attention_distance(self, attended: tuple[Tensor, ...], sample: Sample, target: Target) -> Tensor:
        said, each = self.objective, []
        for key, ours in zip("qkv", attended, strict=True):
            theirs = target[key]
            heads = common_heads(theirs.shape[-1], ours.shape[-1], at_most=12)
            each.append(relation_distance(theirs, ours, _state_counts(sample, ours), heads=heads, causal=said.causal))
        return torch.stack(each).mean()


HeldTo: TypeAlias = tuple[Tensor | TopLogits, Tensor | None]
"""The teacher's answers, and labels."""


class _ThroughHead(torch.autograd.Function):
    """Sum of the distances of [N, D] states' logits, whose gradients in the states and in the head's weights are made beside it, piece by piece."""

    @staticmethod
    def forward(ctx: Any, states: Tensor, pupil: Pupil, held_to: HeldTo, learning: bool, *weights: Tensor) -> Tensor:
        total = torch.zeros(())
        gradients: list[Tensor | None] = [None] * len(weights)
        pulls = torch.empty_like(states)
        with torch.enable_grad() if learning else nullcontext():
            for leaf, distance, part in pupil.head_pieces(states, *held_to):
                total += distance.detach()
                if learning:
                    pulls[part], *found = torch.autograd.grad(distance, [leaf, *weights], allow_unused=True)
                    gradients = [new if old is None else old if new is None else old.add_(new) for old, new in zip(gradients, found, strict=True)]
        if learning:
            ctx.save_for_backward(pulls, *gradients)
        return total

    @staticmethod
    def backward(ctx: Any, pull: Tensor) -> tuple[Tensor | None, ...]:
        states, *gradients = ctx.saved_tensors
        return states * pull, None, None, None, *(None if each is None else each * pull for each in gradients)


def answer_of(model: Any, sample: Sample, objective: Objective) -> Tensor:
    """What a model answers, as far as the objective looks at it: [B, S, D] states that enter its head, or logits, or values, or last states.

    Raises:
        RecipeError: it gives none of them.
    """
    given = without_labels(sample)
    if objective.kind == "head":
        states: Tensor = getattr(model, model.base_model_prefix)(**given).last_hidden_state
        return states
    answer = model(**given)
    if objective.kind != "embeddings":
        return answer_of_head(model, answer)[0]
    found: Tensor | None = getattr(answer, "last_hidden_state", None)
    if found is None:
        raise RecipeError(f"distill compares last hidden states, and {type(model).__name__} answers with {', '.join(answer)}.")
    return found


def without_labels(sample: Sample) -> Sample:
    """What a model is called with."""
    return {name: value for name, value in sample.items() if name not in LABELS}


def _labels(sample: Sample, counts: Tensor, said: Objective) -> Tensor:
    """What is true of each answer, in the shape of `counts`; `IGNORED`, or of values not a number, where nothing is known."""
    if "start_positions" in sample:
        return torch.stack([sample["start_positions"], sample["end_positions"]], 1)
    found = sample.get("labels")
    if found is None:
        return torch.full(counts.shape, float("nan")) if said.kind == "values" else torch.full(counts.shape, IGNORED)
    if said.kind == "values":
        return found.float()
    if said.shifted:
        return torch.cat([found[:, 1:], torch.full_like(found[:, :1], IGNORED)], 1)
    return found


def _right(answer: Tensor, sample: Sample) -> Tensor:
    """Rows whose likeliest class is the true one; 0 of answers that are no classes."""
    labels = sample.get("labels")
    if labels is None or not has_classes(sample) or answer.ndim != 2:
        return torch.zeros(())
    return (answer.argmax(-1) == labels).sum().float()


def has_classes(sample: Sample) -> bool:
    """Whether a class is known of each row."""
    labels = sample.get("labels")
    return labels is not None and labels.ndim == 1 and not labels.is_floating_point()


def _top(target: Target, counts: Tensor) -> TopLogits:
    return TopLogits(values=target["values"][counts], ids=target["ids"][counts], log_sum=target["log_sum"][counts])


def _state_counts(sample: Sample, states: Tensor) -> Tensor:
    """Which positions of a block's states count: an encoder-decoder's encoder by the one mask, its decoder by the other."""
    for name in ("attention_mask", "decoder_attention_mask"):
        mask = sample.get(name)
        if mask is not None and mask.shape == states.shape[:2]:
            return mask.bool()
    return torch.ones(states.shape[:2], dtype=torch.bool)


def _projection(ours: int, theirs: int, generator: torch.Generator) -> nn.Linear:
    """[ours] → [theirs], keeping sizes: choice, rows of a normal distribution of variance 1 / ours."""
    found = nn.Linear(ours, theirs, bias=False)
    with torch.no_grad():
        found.weight.normal_(std=ours**-0.5, generator=generator)
    return found


def _recompute(block: nn.Module) -> None:
    original = block.forward

    def forward(*args: Any, **kwargs: Any) -> Any:
        if not torch.is_grad_enabled():
            return original(*args, **kwargs)
        return checkpoint(original, *args, use_reentrant=False, preserve_rng_state=False, **kwargs)

    block.forward = forward
