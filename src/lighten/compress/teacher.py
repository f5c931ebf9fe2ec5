"""How far a module is from what it was: the original's answers to some samples, and the distance of another's answers from them.

Three kinds, by what the model gives:
- a head that maps each position by itself to logits: KL(original ‖ student) of the next token, mean over positions. Only the states that
  enter the head are kept, on disk; both heads' logits are made in pieces and never live as a whole.
- logits of another make (a classifier, a reader of answers, a decoder with a head of its own way): the same KL on whole logits.
- values (a classifier of one label) or hidden states alone (an encoder): squared error over the original's mean square, of states also of their mean
  over each text.

Shape legend: B rows of a sample, S positions, D width, V vocabulary, N positions that count.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryFile
from typing import Any, Literal

import torch
from torch import Tensor, nn

from lighten.compress.memory_plan import LOGIT_ELEMENTS, release_free
from lighten.compress.skeleton import Skeleton, Source
from lighten.compress.student import with_tensors
from lighten.errors import RecipeError
from lighten.model.tasks import IGNORED

Sample = Mapping[str, Tensor]


@dataclass(frozen=True, kw_only=True)
class Head:
    """What leads from the last hidden states to logits.

    Attributes:
        base: the submodule that gives the states.
        answer: the type that it answers with.
        tensors: the original's parameters outside of the base, (module, name) → value.
    """

    base: nn.Module
    answer: type[Any]
    tensors: tuple[tuple[nn.Module, str, Tensor], ...]


class Teacher:
    """The original's answers, until the end of a `with` block.

    Args:
        skeleton: used for a moment, and left without weights.
        source: the original's tensors.
        samples: what the model is called with.
        folder: where the answers are kept.
    """

    def __init__(self, skeleton: Skeleton, source: Source, samples: Sequence[Sample], folder: Path) -> None:
        self.module: Any = skeleton.module
        self._samples = samples
        self._file = TemporaryFile(dir=folder)  # noqa: SIM115 - closed by __exit__
        self._places: list[tuple[int, torch.Size, torch.dtype]] = []
        with _loading(skeleton, source), torch.no_grad():
            self._head = find_head(self.module, samples[0])
            self.kind: Literal["head", "logits", "hidden"] = "head"
            if self._head is None:
                self.kind = "logits" if answer_of_head(self.module, self.module(**samples[0]))[1] else "hidden"
            for sample in samples:
                self._keep(self._states(sample))
        skeleton.drop(self.module)

    def __enter__(self) -> Teacher:
        return self

    def __exit__(self, *_: object) -> None:
        """Give the disk back."""
        self._file.close()

    def distance(self, index: int) -> float:
        """The module's distance from the original on one sample, as it is now."""
        with torch.no_grad():
            return self._compare(index, self._states(self._samples[index]))[0]

    def descend(self, index: int) -> float:
        """The same, and its gradients are added to the leaves that the module's weights come from."""
        states = self._states(self._samples[index])
        distance, gradient = self._compare(index, states.detach())
        states.backward(gradient)  # type: ignore[no-untyped-call]
        return distance

    def _states(self, sample: Sample) -> Tensor:
        """[B, S, D] what enters the head, or is answered."""
        if self._head is None:
            return answer_of_head(self.module, self.module(**sample))[0]
        found: Tensor = self._head.base(**sample).last_hidden_state
        return found

    def _compare(self, index: int, states: Tensor) -> tuple[float, Tensor]:
        """The distance and its gradient in the states."""
        original = self._kept(index)
        counts = counting(self._samples[index], states)
        if self._head is not None:
            return self._through_heads(states, original, counts)
        with torch.enable_grad():
            leaf = states.detach().requires_grad_()
            if self.kind == "logits":
                loss = _divergence(original[counts].float(), leaf[counts].float())
            else:
                loss = _state_error(original.float(), leaf.float(), counts)
            (gradient,) = torch.autograd.grad(loss, leaf)
        return float(loss.detach()), gradient

    def _through_heads(self, states: Tensor, original: Tensor, counts: Tensor) -> tuple[float, Tensor]:
        release_free()  # what the blocks left, before the logits' own
        ours, theirs = states[counts], original[counts]
        total, gradient, first = 0.0, torch.empty_like(ours), 0
        piece = 16
        while first < len(ours):
            part = slice(first, first + piece)
            with with_tensors(self._head.tensors):  # type: ignore[union-attr]
                target = torch.log_softmax(self._logits(theirs[part]).float(), -1)
            with torch.enable_grad():
                leaf = ours[part].detach().requires_grad_()
                logits = self._logits(leaf)
            found = torch.log_softmax(logits.detach().float(), -1)
            share = target.exp()
            total += float((share * (target - found)).sum())
            pull = found.exp_().sub_(share).div_(len(ours))
            (gradient[part],) = torch.autograd.grad(logits, leaf, pull.to(logits.dtype))
            first, piece = first + piece, max(1, LOGIT_ELEMENTS // logits.shape[-1])
        whole = torch.zeros_like(states)
        whole[counts] = gradient
        return total / len(ours), whole

    def _logits(self, states: Tensor) -> Tensor:
        """[N, D] → [N, V] by the module's own way, with the head that it has now."""
        assert self._head is not None
        return through_head(self.module, self._head.base, self._head.answer, states)

    def _keep(self, states: Tensor) -> None:
        self._places.append((self._file.tell(), states.shape, states.dtype))
        self._file.write(states.contiguous().view(torch.uint8).numpy().tobytes())

    def _kept(self, index: int) -> Tensor:
        start, shape, dtype = self._places[index]
        self._file.seek(start)
        data = bytearray(self._file.read(dtype.itemsize * math.prod(shape)))
        return torch.frombuffer(data, dtype=dtype).reshape(shape)


def answer_of_head(module: Any, answer: Any) -> tuple[Tensor, bool]:
    """What a model answers, and whether it is logits, of which one choice is made along the last dimension; else values, or last states.

    An extractive reader's two are [B, 2, S]: where an answer starts, and where it ends. Labels that hold side by side are [..., L, 2], each with the
    logit 0 of its being false, whose softmax is the sigmoid.

    Raises:
        RecipeError: the model answers with none of these.
    """
    if getattr(answer, "start_logits", None) is not None:
        return torch.stack([answer.start_logits, answer.end_logits], 1), True
    logits: Tensor | None = getattr(answer, "logits", None)
    if logits is None:
        states: Tensor | None = getattr(answer, "last_hidden_state", None)
        if states is None:
            raise RecipeError(f"{type(module).__name__} answers with {', '.join(answer)}; logits or last hidden states are compared here.")
        return states, False
    problem = getattr(module.config, "problem_type", None)
    if problem == "multi_label_classification":
        return torch.stack([torch.zeros_like(logits), logits], -1), True
    return logits, logits.shape[-1] > 1 and problem != "regression"


def find_head(module: Any, sample: Sample) -> Head | None:
    """The head, where logits of each position come from that position's last hidden state alone; tried on a short piece."""
    base = getattr(module, module.base_model_prefix or " ", None)
    special = getattr(module.config, "problem_type", None) in ("multi_label_classification", "regression")
    if base is None or base is module or "input_ids" not in sample or special:
        return None
    answers: list[Any] = []
    short = {name: value[:1, :8] if value.ndim == 2 else value[:1] for name, value in sample.items()}
    hook = base.register_forward_hook(lambda _, __, answer: answers.append(answer))
    try:
        logits = getattr(module(**short), "logits", None)
    finally:
        hook.remove()
    states = getattr(answers[0], "last_hidden_state", None) if answers else None
    if logits is None or states is None or logits.ndim != 3 or logits.shape[:2] != states.shape[:2] or logits.shape[2] == 1:
        return None
    try:
        again = through_head(module, base, type(answers[0]), states[0])
    except (AttributeError, TypeError, ValueError, IndexError, RuntimeError):  # the head asks for more than the last hidden states
        return None
    if not torch.equal(again, logits[0]):
        return None
    inside = {id(part) for part in base.modules()}
    outside = [
        (part, name, parameter)
        for part in module.modules()
        if id(part) not in inside
        for name, parameter in part._parameters.items()
        if parameter is not None
    ]
    return Head(base=base, answer=type(answers[0]), tensors=tuple(outside))


def through_head(module: Any, base: nn.Module, answer: type[Any], states: Tensor) -> Tensor:
    """[N, D] → [N, V]: the module run with an answer in its base's place."""
    ids = torch.zeros(1, len(states), dtype=torch.long)
    with _instead(base, answer(last_hidden_state=states[None])):
        found: Tensor = module(input_ids=ids).logits
    return found[0]


def among(logits: Tensor, words: Tensor | None) -> Tensor:
    """[..., V] → [..., kept] the logits of some tokens alone, whose softmax is the distribution given that it is one of them; None: of all."""
    return logits if words is None else logits.index_select(-1, words)


@contextmanager
def _instead(base: nn.Module, answer: Any) -> Iterator[None]:
    own = base.__dict__.get("forward")
    base.forward = lambda *args, **kwargs: answer
    try:
        yield
    finally:
        if own is None:
            del base.__dict__["forward"]
        else:
            base.forward = own


@contextmanager
def _loading(skeleton: Skeleton, source: Source) -> Iterator[None]:
    """The module can be called; each unit's weights are in memory only while it runs, all others all the time."""
    units = [unit.module for unit in skeleton.units if isinstance(unit.module, nn.Module) and list(unit.module.children())]
    blocks = {id(unit) for unit in units}
    for module in [*skeleton.outside(), *(unit.module for unit in skeleton.units if id(unit.module) not in blocks)]:
        skeleton.load(module, source)
    hooks = []
    for unit in units:
        hooks.append(unit.register_forward_pre_hook(lambda module, _: skeleton.load(module, source)))
        hooks.append(unit.register_forward_hook(lambda module, *_: skeleton.drop(module)))
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def counting(sample: Sample, states: Tensor) -> Tensor:
    """Which answers count: all, but for positions that the sample masks, or a decoder's that have no label where there are labels. A boolean over
    their leading dimensions."""
    mask = sample.get("decoder_attention_mask", sample.get("attention_mask") if "decoder_input_ids" not in sample else None)
    if mask is None and "decoder_input_ids" in sample and "labels" in sample:
        mask = sample["labels"] != IGNORED
    if mask is None or states.ndim != 3 or mask.shape != states.shape[:2]:
        return torch.ones(states.shape[:-1], dtype=torch.bool)
    return mask.bool()


def _divergence(original: Tensor, ours: Tensor) -> Tensor:
    target = torch.log_softmax(original, -1)
    return (target.exp() * (target - torch.log_softmax(ours, -1))).sum(-1).mean()


def _state_error(original: Tensor, ours: Tensor, counts: Tensor) -> Tensor:
    if original.ndim != 3:
        return (ours - original).square().mean() / original.square().mean()
    each = (ours - original)[counts].square().mean() / original[counts].square().mean()
    weight = counts.float()[..., None] / counts.sum(1).clamp(min=1)[:, None, None]
    means = (original * weight).sum(1)
    return each + ((ours * weight).sum(1) - means).square().mean() / means.square().mean()
