"""What can be turned to make a workload cheaper, as data: a step of a recipe, or an option of the commands.

Each kind of lever says in which phases it can have an effect and what it would try on a case; whether it has one there, and how much, is for
the estimate to say (`lighten.recipe.advise`). A lever's text is what `lighten estimate` takes.
"""

from __future__ import annotations

import shlex
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Literal

from lighten.cost.passes import training_forward
from lighten.cost.workload import PHASES, Phase
from lighten.device.device import Device
from lighten.device.profile import Profile
from lighten.errors import LightenError
from lighten.model.spec import Attention, Linear, ModelSpec
from lighten.parallel.plan import Plan
from lighten.recipe.case import Case, Target
from lighten.recipe.predict import CACHES_CODES, apply_recipe, compute_dtype
from lighten.recipe.quality import BASELINE, SAME, Quality, quality_of_cache, quality_of_step
from lighten.recipe.recipe import Recipe, Step, parse_recipe
from lighten.recipe.steps import STEPS

Kind = Literal["recipe", "flag"]
INFERENCE: tuple[Phase, ...] = ("encode", "prefill", "decode", "generate")
CACHED: tuple[Phase, ...] = ("decode", "generate")
TRAIN: tuple[Phase, ...] = ("train",)

STEP_ORDER = ("distill", "prune", "shrink", "cast", "quantize")
"""Verbs in the order in which a recipe takes them: what makes weights smaller before what makes them narrower."""
OPTIONS = {"kept_by": "--cache"}
"""Fields whose option has another name than `--` and the field's own."""


@dataclass(frozen=True, kw_only=True)
class Lever:
    """One thing to turn.

    Attributes:
        name: its kind, a key of `LEVERS`.
        steps: what it adds to the recipe, in its text form.
        runtime: of the recipe, where it changes that.
        workload, plan: fields that it sets.
        quality: what it costs; None: not known.
        draft: the model that proposes tokens, which is no part of a case.
    """

    name: str
    steps: str = ""
    runtime: str | None = None
    workload: Mapping[str, Any] = field(default_factory=dict)
    plan: Mapping[str, Any] = field(default_factory=dict)
    quality: Quality | None = None
    draft: str | None = None

    @property
    def kind(self) -> Kind:
        return "recipe" if self.recipe else "flag"

    @property
    def recipe(self) -> str:
        """What it adds to a recipe; empty where it is options alone."""
        return " @ ".join(filter(None, (self.steps, self.runtime))) if self.steps or not self.runtime else f"@ {self.runtime}"

    @property
    def done(self) -> bool:
        """Whether lighten carries it out; False: it is predicted alone."""
        return all((step.verb, step.method) in STEPS for step in parse_recipe(self.steps).steps)

    @property
    def spreads(self) -> bool:
        """Whether it says the whole grid of devices."""
        return "tp" in self.plan

    def flags(self, device: str = "") -> tuple[str, ...]:
        """The options that it sets; those of a plan with the devices that it takes, where the device is named."""
        found: list[str] = ["--draft", self.draft] if self.draft else []
        spread = {name: value for name, value in self.plan.items() if value != FIELDS[name].default}
        if self.spreads and device:
            found += ["--device", f"{device}:{Plan(**self.plan).devices}"]
        for name, value in (*spread.items(), *self.workload.items()):
            found.append(OPTIONS.get(name, f"--{name.replace('_', '-')}"))
            found += [] if value is True else [str(value)]
        return tuple(found)

    def text(self, device: str = "") -> str:
        """What the other commands take: a recipe's text, or options; both where it needs both.

        >>> Lever(name="cast", steps="cast(float16)", workload={"dtype": "float16"}).text()
        "--recipe 'cast(float16)' --dtype float16"
        """
        flags = shlex.join(self.flags(device))
        if not self.recipe:
            return flags
        return f"--recipe {shlex.quote(self.recipe)} {flags}" if flags else self.recipe

    def on(self, case: Case) -> Case:
        """The case with the lever turned.

        Raises:
            LightenError: it does not fit the model or the rest of the case.
        """
        recipe = case.recipe
        if self.recipe:
            own = parse_recipe(self.recipe)
            kept = own if self.runtime else recipe
            recipe = Recipe(steps=(*recipe.steps, *own.steps), runtime=kept.runtime, dtype=kept.dtype, device=kept.device, options=kept.options)
        return replace(case, recipe=recipe, workload=replace(case.workload, **self._workload(case, recipe)), plan=self._plan(case))

    def _workload(self, case: Case, recipe: Recipe) -> dict[str, Any]:
        """Fields that change: those that it sets, and the type where the recipe decides on it."""
        fields = dict(self.workload)
        if self.recipe and "dtype" not in fields and case.workload.dtype == compute_dtype(case.recipe, case.changed):
            fields["dtype"] = compute_dtype(recipe, apply_recipe(recipe, case.spec))
        return fields

    def _plan(self, case: Case) -> Plan:
        return Plan(**self.plan) if self.spreads else replace(case.plan, **self.plan)


@dataclass(frozen=True, kw_only=True)
class Unfit:
    """What was thought of and cannot be, and why."""

    text: str
    why: str


@dataclass(frozen=True, kw_only=True)
class LeverKind:
    """A kind of lever.

    Attributes:
        how: what it does, as the first words of a sentence.
        phases: in which it can have an effect.
        propose: the levers of this kind that are worth a try on a case, and what of it cannot be.
        excludes: kinds that cannot be turned with it; its own always.
    """

    how: str
    phases: tuple[Phase, ...]
    propose: Callable[[Case, Target], Iterator[Lever | Unfit]]
    excludes: tuple[str, ...] = ()


# ---- steps of a recipe ----

WIDTHS_BY_ROUNDING = (8, 4, 3, 2)
WIDTHS_BY_CALIBRATION = {"gptq": (4, 3), "awq": (4, 3)}
"""Methods that look at calibration text, and the widths of published rows (quality_ranges.json)."""
GROUP_SIZES = (128, 96, 64, 32)
"""Largest first: the group that divides all rows is taken, for its scales take least room."""
SIXTEEN_BITS = ("bfloat16", "float16")
SPLITS = (1, 2, 4, 8, 16)
"""Sizes of tensor and pipeline parallelism that are tried in inference."""
FIELDS = Plan.__dataclass_fields__
PRUNED_SHARES = (0.25, 0.5)
SMALLEST_WINDOW = 16


def group_size_of(spec: ModelSpec) -> int | str:
    """The largest usual group that divides every row of the linears but the head; `channel` where none does."""
    columns = {part.in_features for part in spec.parts if isinstance(part, Linear) and part.component != "head"}
    return next((size for size in GROUP_SIZES if all(count % size == 0 for count in columns)), "channel")


def _step(text: str) -> Step:
    return parse_recipe(text).steps[0]


def _recipe(name: str, case: Case, text: str, **more: Any) -> Lever:
    return Lever(name=name, steps=text, quality=BASELINE if name == "cast" else quality_of_step(_step(text), case.spec), **more)


def _casts(case: Case, target: Target) -> Iterator[Lever]:
    """The 16-bit type that the device has products of, bfloat16 where none is asked for; from 16 bits on, float8 where the device has that."""
    known = target.peak_flops_per_s if isinstance(target, Device) else dict.fromkeys(SIXTEEN_BITS, 0.0)
    dtype = next((dtype for dtype in SIXTEEN_BITS if dtype in known), None)
    if dtype is not None and case.workload.dtype == "float32":
        if case.workload.dtype != compute_dtype(case.recipe, case.changed):  # it was asked for by name
            yield Lever(name="cast", workload={"dtype": dtype}, quality=BASELINE)
            return
        step = _step(f"cast({dtype})")
        computed = compute_dtype(replace(case.recipe, steps=(*case.recipe.steps, step)), replace(case.changed, dtype=dtype))
        yield _recipe("cast", case, str(step), workload={} if computed == dtype else {"dtype": dtype})
    if "float8" in known and case.workload.dtype in SIXTEEN_BITS:
        cache = {"kv_dtype": case.workload.dtype} if case.workload.phase in CACHED and case.workload.kv_dtype is None else {}
        yield Lever(name="cast", workload={"dtype": "float8_e4m3fn", **cache})


def _quantized(case: Case, target: Target) -> Iterator[Lever]:
    group = group_size_of(case.changed)
    for runtime in _runtimes(target):
        for method, widths in {"rtn": WIDTHS_BY_ROUNDING, **WIDTHS_BY_CALIBRATION}.items():
            if runtime is None or method == "rtn":
                for bits in widths:
                    yield _recipe("quantize", case, f"quantize({method}, bits={bits}, group_size={group})", runtime=runtime)
        if runtime is not None:
            yield _recipe("quantize", case, "quantize(rtn)", runtime=runtime)
            yield _recipe("quantize", case, "quantize(dynamic)", runtime=runtime)


def _other_runtimes(case: Case, target: Target) -> Iterator[Lever]:
    for runtime in _runtimes(target)[1:]:
        yield Lever(name="runtime", runtime=runtime, quality=BASELINE if "float16" in str(runtime) else SAME)


def _runtimes(target: Target) -> tuple[str | None, ...]:
    """Runtimes, other than the recipe's own, that the machine was probed with."""
    if not isinstance(target, Profile):
        return (None,)
    engines = [name.partition("/") for name in target.engines]
    exported = [(runtime, dtype) for runtime, _, dtype in engines if runtime in ("openvino", "onnxruntime") and dtype != "int8"]
    return (None, *(runtime if dtype == "float32" else f"{runtime}(dtype={dtype})" for runtime, dtype in exported))


def _sparse(case: Case, target: Target) -> Iterator[Lever]:
    yield _recipe("sparse", case, "prune(sparsegpt, pattern=2:4)")


def _narrow(case: Case, target: Target) -> Iterator[Lever]:
    yield from (_recipe("narrow", case, f"shrink(ffn, ratio={share})") for share in PRUNED_SHARES)


def _shallow(case: Case, target: Target) -> Iterator[Lever]:
    yield _recipe("student", case, "shrink(layers, ratio=0.5)")


def _windows(case: Case, target: Target) -> Iterator[Lever]:
    """The largest power of two that is at most half of the context."""
    size = 1 << (_context(case).bit_length() - 2) if _context(case) > 1 else 0
    if size >= SMALLEST_WINDOW and case.spec.is_decoder:
        yield _recipe("window", case, f"shrink(window, size={size})")


def _context(case: Case) -> int:
    asked = case.workload
    return training_forward(case.spec, asked).key_len if asked.phase == "train" else asked.seq_len + asked.new_tokens


# ---- options ----


def _flags(name: str, *settings: Mapping[str, Any], quality: Quality | None = SAME) -> Iterator[Lever]:
    yield from (Lever(name=name, workload=setting, quality=quality) for setting in settings)


def _caches(case: Case, target: Target) -> Iterator[Lever]:
    if any(isinstance(part, Attention) and part.causal for part in case.spec.parts):
        yield Lever(name="cache", workload={"kv_dtype": "float8_e4m3fn"}, quality=quality_of_cache("float8_e4m3fn", case.spec))
        for bits in (8, 4):
            if case.recipe.runtime in CACHES_CODES and case.workload.kv_dtype is None:
                yield _recipe("cache", case, f"quantize(kv, bits={bits})")
            else:
                yield Lever(name="cache", workload={"kv_dtype": f"int{bits}"}, quality=quality_of_cache(f"int{bits}", case.spec))


def _attentions(case: Case, target: Target) -> Iterator[Lever]:
    yield from _flags("attention", *({"attention": name} for name in ("flash", "sdpa") if name != case.workload.attention))


def _recomputes(case: Case, target: Target) -> Iterator[Lever]:
    yield from _flags("recompute", *({"recompute": name} for name in ("selective", "full") if name != case.workload.recompute))


def _losses(case: Case, target: Target) -> Iterator[Lever]:
    yield from _flags("loss", *({"cross_entropy": name} for name in ("chunked", "fused") if name != case.workload.cross_entropy))


def _optimizers(case: Case, target: Target) -> Iterator[Lever]:
    names = (name for name in ("adam8bit", "adafactor", "lion", "muon", "sgd") if name != case.workload.optimizer)
    yield from _flags("optimizer", *({"optimizer": name} for name in names), quality=None)


def _adapters(case: Case, target: Target) -> Iterator[Lever]:
    if case.workload.lora_rank is None and not case.workload.master_weights:
        yield from _flags("adapters", {"lora_rank": 16}, {"lora_rank": 16, "base_bits": 4}, quality=None)


def _mixed(case: Case, target: Target) -> Iterator[Lever]:
    """16-bit training, with float32 masters and without."""
    if case.workload.dtype == "float32":
        yield from _flags("precision", {"dtype": "bfloat16"}, {"dtype": "bfloat16", "master_weights": True}, quality=None)


def _micro_batches(case: Case, target: Target) -> Iterator[Lever]:
    """One sequence at a time; gradients add up to the same step."""
    if isinstance(target, Device) and case.plan.micro_batch_size != 1:
        yield Lever(name="micro-batch", plan={"micro_batch_size": 1}, quality=SAME)


def _plans(case: Case, target: Target) -> Iterator[Lever | Unfit]:
    """Plans over as many devices, and over twice, four and eight times as many: in training the best that a search of all finds, else each."""
    if not isinstance(target, Device):
        return
    for count in (case.plan.devices * more for more in (1, 2, 4, 8)):
        try:
            plans = [_best_plan(case, target, count)] if case.workload.phase == "train" else list(_spreads(count))
        except LightenError as error:
            yield Unfit(text=f"--device {target.name}:{count}", why=str(error))
            continue
        yield from (Lever(name="plan", plan=_fields(plan), quality=SAME) for plan in plans if plan != case.plan)


def _best_plan(case: Case, target: Device, count: int) -> Plan:
    """The fastest that fits, with the recomputation that the case has and nothing in the host's memory."""
    from lighten.parallel.search import Asked, search_plans  # which no other lever needs
    from lighten.parallel.step_time import Stack

    fixed = {"recompute": case.workload.recompute, "offload": "none"}
    stack = Stack() if case.stack is None else Stack(software=case.stack)  # type: ignore[arg-type]
    asked = Asked(spec=case.changed, workload=case.workload, device=target, count=count, fixed=fixed, stack=stack)
    return search_plans(asked, top=1).best[0].plan


def _spreads(count: int) -> Iterator[Plan]:
    """Ways of inference over so many devices: copies, or one copy over all."""
    sizes = [size for size in SPLITS if count % size == 0]
    yield Plan(dp=count)
    yield from (Plan(tp=tp, pp=count // tp) for tp in sizes if count // tp in sizes and count > 1)


def _fields(plan: Plan) -> dict[str, Any]:
    """The sizes of a plan, all of them said, and what else of it is not its default."""
    sizes = ("tp", "pp", "dp")
    others = {name: value for name in FIELDS if name not in sizes and (value := getattr(plan, name)) != FIELDS[name].default}
    return {name: getattr(plan, name) for name in sizes} | others


def _none(case: Case, target: Target) -> Iterator[Lever]:
    """Made by the advice itself: they depend on what fits, or on a second model."""
    yield from ()


LEVERS: dict[str, LeverKind] = {
    "cast": LeverKind(how="narrower weights and activations", phases=INFERENCE, propose=_casts, excludes=("sparse",)),
    "quantize": LeverKind(how="narrower weights", phases=INFERENCE, propose=_quantized, excludes=("sparse", "runtime")),
    "runtime": LeverKind(how="a runtime with faster kernels", phases=INFERENCE, propose=_other_runtimes, excludes=("quantize",)),
    "sparse": LeverKind(how="2 of each 4 weights", phases=INFERENCE, propose=_sparse, excludes=("quantize", "cast")),
    "narrow": LeverKind(how="fewer inner features in each feed-forward layer", phases=PHASES, propose=_narrow),
    "student": LeverKind(how="half of the blocks", phases=PHASES, propose=_shallow),
    "window": LeverKind(how="each token sees the last ones alone", phases=("prefill", "decode", "generate", "train"), propose=_windows),
    "cache": LeverKind(how="narrower cached keys and values", phases=CACHED, propose=_caches),
    "attention": LeverKind(how="attention without the score matrix in memory", phases=PHASES, propose=_attentions),
    "batch": LeverKind(how="more sequences at once share one reading of the weights", phases=INFERENCE, propose=_none),
    "draft": LeverKind(how="a draft proposes tokens and the model checks them in one pass", phases=CACHED, propose=_none),
    "recompute": LeverKind(how="activations are made again in the backward pass instead of being kept", phases=TRAIN, propose=_recomputes),
    "loss": LeverKind(how="the loss is taken without all logits at once", phases=TRAIN, propose=_losses),
    "optimizer": LeverKind(how="an optimizer of less state", phases=TRAIN, propose=_optimizers),
    "precision": LeverKind(how="16-bit weights, activations and gradients", phases=TRAIN, propose=_mixed, excludes=("adapters",)),
    "adapters": LeverKind(how="small adapters are trained, the rest is frozen", phases=TRAIN, propose=_adapters, excludes=("precision",)),
    "micro-batch": LeverKind(how="one sequence at a time, gradients summed", phases=TRAIN, propose=_micro_batches),
    "plan": LeverKind(how="the model and the work spread over devices", phases=PHASES, propose=_plans, excludes=("micro-batch",)),
}
"""Kind of lever → what it is. `lighten advise` tries all of them; tests/test_advise.py holds each to its phases and its text."""


def propose(case: Case, target: Target) -> Iterator[Lever | Unfit]:
    """The levers to try, of every kind that can have an effect in the case's phase."""
    for kind in LEVERS.values():
        if case.workload.phase in kind.phases:
            yield from kind.propose(case, target)


def compatible(one: Lever, other: Lever) -> bool:
    """Whether two levers can be turned at once."""
    return one.name != other.name and other.name not in LEVERS[one.name].excludes and one.name not in LEVERS[other.name].excludes
