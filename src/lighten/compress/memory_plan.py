"""What a recipe's work holds at its fullest moment, before it begins; and the same held to a limit, or refused at once.

Shape legend: O rows (output features) of the weights that share an input, I columns (input features) of it.
"""

from __future__ import annotations

import ctypes
import gc
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from itertools import groupby
from pathlib import Path

from lighten.cost.memory import kv_cache_bytes, workload_memory
from lighten.cost.workload import Workload
from lighten.errors import ConstraintError, WorkloadError
from lighten.model.spec import Embedding, Linear, ModelSpec, Part, block_name
from lighten.recipe import Recipe, Step
from lighten.recipe.distill import DISTILLING, MEMORIES
from lighten.recipe.predict import apply_step
from lighten.recipe.targets import RUNTIMES
from lighten.units import dtype_bytes, format_bytes

WINDOW = 1024
"""Tokens of a calibration sequence where the model has positions for them: choice, the windows that perplexity is usually measured on."""
BATCH_ROWS = (4, 2, 1)
"""Sequences that run at once: the first where memory allows; choice, larger batches were no faster on 2 cores."""

ROW_BYTES = 30
"""Of each element of the weights that are solved together: seven float32 copies (before, as given, and what the solver makes of it) and two of
codes of a byte. Measured on shapes from 256 × 2560 to 3072 × 768: 28 (tests/test_memory_plan.py measures two of them again)."""
HESSIANS = 5
"""Matrices [I, I] of float32 while one is factorized: over the rows that choose and those that judge, and the factor with its permuted copy. Measured
on the same shapes: 4.7."""
MOMENTS = 2
"""Matrices [I, I] of float32, of which there is a second one for rows that are held out. Counted in `statistics.Moments`."""
ALONE_BYTES = 26
"""Of each element of a weight that is rounded by itself: six float32 copies and two of codes. Counted in `rtn.quantize_rtn` and the report of it,
checked by benchmarks/big_checkpoint.py."""
EXPORT_BYTES, EXPORT_BLOCK_BYTES, EXPORTER_BYTES = 26, 5 * 10**6, 40 * 10**6
"""Of each parameter of a model that is exported, of each block's graph, and of the exporters. Fitted to benchmarks/compress_memory.py: 22 to
25 bytes a parameter of MiniLM and SmolLM2-135M, 4.5 MB a block of narrow BERTs of 2 to 24 blocks."""
RESULT_BYTES = 2
"""Of each parameter while the artifact is run, beside its weights in its own type: what is expanded at once, and what the allocator keeps of it.
Fitted to what benchmarks/compress_memory.py measures on SmolLM2-135M and MiniLM: 0.5 to 2."""
TRAINED_BYTES = 16
"""Of each value that is trained: itself, its gradient and Adam's two moments in float32 (Kingma and Ba 2014, arXiv:1412.6980, algorithm 1)."""
TEXTS, SELF_LENGTH = 32, 512
"""Texts that the original writes side by side, and tokens of each: choice. A product with fewer rows takes hardly less time; a window of tuning."""
SELF_PREFIX = 32
"""Tokens of the calibration text that a text which the original writes begins with: choice, a sentence."""
INSIDE_STATES = 6
"""Hidden states of a token that are alive when attention's output meets its matrix: the residual, the norm's output, queries, keys, values and their
sum. Counted in `transformers`' Llama."""
LOGIT_ELEMENTS, LOGIT_COPIES = 2**23, 6
"""Logits that tuning compares at once (choice: 33 MB of float32 a copy), and copies of them that are alive. Counted in `teacher.Teacher`."""
ROW_TOKENS, ENCODED_TOKENS, RELATED = 512, 128, 16
"""Positions of a row that dense weights are trained on, at most, where none are said (choice: the same as of tuning); of an encoder's, as its
calibration text is cut; and texts whose embeddings are related to each other (choice)."""
HALF_COMPUTED, KEPT_SHARE = 0.75, 0.2
"""Share of float32's activations that bfloat16's take where norms and sums stay in float32, and share of weights, gradients and the optimizer's
memory that the allocator keeps beside them. Fitted to SmolLM2-135M: steps of 1,024 positions held 4.76 GB in float32, 4.27 in bfloat16; 3.57 and
3.40 with recomputed blocks."""
LATER_UNIT_BYTES = 8
"""Of each weight where a step has more than one unit of rows: the gradients so far beside the next one's. Fitted to the same model: 5.71 GB in place
of 4.69."""
DENSE_LOGITS = 2**24
"""Logits that training of dense weights compares at once: choice, 67 MB of float32 a copy; each piece costs a gradient of the whole head."""
SENSITIVITY_WINDOW, SENSITIVITY_BYTES = 512, 16
"""Tokens of a backward pass that measures what rounding costs (choice), and bytes of each of its logits, in the model's type and in float32. Counted
in `sensitivity.measure_sensitivity`."""
STEP_TOKENS = 1024
"""Positions of a step of training, as `distill_scales.TuneSettings` has them."""
RUNNING_BYTES = 96 * 10**6
"""What libraries take when they first work (threads' stacks, products' scratch, modules imported late), measured on SmolLM2-135M and MiniLM."""
BASE_STEP = 32 * 2**20
"""The imports' size is counted in steps of it (choice), so that its jitter of some pages does not change a plan."""


@dataclass(frozen=True, kw_only=True)
class MemoryPlan:
    """How a run keeps to its memory.

    Attributes:
        limit_bytes: what was asked for.
        batch_rows: calibration sequences that run at once.
        buffer_bytes: waiting activations that stay in memory; the others lie on disk. None: all stay.
        blocks_once: each block runs once, and what all sequences hold inside of it waits in memory; else it runs once for each of its inputs.
        compute_dtype: type that calibration computes in; None: the walk's own choice.
        runs_result: there is room to run the artifact once it is written.
        parts: what the fullest moment holds, by what holds it, in bytes.
    """

    limit_bytes: int | None
    batch_rows: int
    buffer_bytes: int | None
    blocks_once: bool
    compute_dtype: str | None
    runs_result: bool
    parts: Mapping[str, int]

    @property
    def peak_bytes(self) -> int:
        return sum(self.parts.values())


def plan_memory(
    spec: ModelSpec, recipe: Recipe, *, base_bytes: int, limit_bytes: int | None = None, fixed: tuple[int, str | None] | None = None
) -> MemoryPlan:
    """The plan of a run: with `limit_bytes`, the first of the ways to work that keeps to it.

    In this order: everything at its usual size; blocks that run more than once; waiting activations on disk; fewer sequences at once; calibration in
    bfloat16.

    Args:
        base_bytes: what the process holds before the work begins.
        fixed: `batch_rows` and `compute_dtype` of the run that is gone on with.

    Raises:
        ConstraintError: none does; what the least takes is said.
    """
    base = -(-base_bytes // BASE_STEP) * BASE_STEP
    ways = [fixed] if fixed else [(rows, dtype) for dtype in dict.fromkeys((None, _narrower(spec))) for rows in BATCH_ROWS]
    plans = [_limited(_plan(spec, recipe, base, rows, dtype, once), limit_bytes) for rows, dtype in ways for once in (True, False)]
    kept = next((plan for plan in plans if _fits(plan, base, limit_bytes)), None)
    if kept is not None:
        return _with_result(kept, spec, recipe, base)
    least = min(plans, key=lambda plan: plan.peak_bytes)
    takes = ", ".join(f"{what} {format_bytes(size)}" for what, size in least.parts.items() if size)
    raise ConstraintError(
        f"memory {format_bytes(limit_bytes)} cannot be kept: {recipe} on {spec.name} takes at least {format_bytes(least.peak_bytes)} ({takes})."
    )


def _fits(plan: MemoryPlan, base: int, limit_bytes: int | None) -> bool:
    """Within the limit; without one, blocks run once where all takes no more than half of what the machine has free."""
    if limit_bytes is not None:
        return plan.peak_bytes <= limit_bytes
    free = _available_bytes()
    return not plan.blocks_once or free is None or plan.peak_bytes <= base + free // 2


def _limited(plan: MemoryPlan, limit_bytes: int | None) -> MemoryPlan:
    """The same with as many waiting activations on disk as the limit asks for; where blocks run once, all are in memory inside of one."""
    waiting = plan.parts.get("activations that wait", 0)
    if limit_bytes is None or plan.blocks_once or plan.peak_bytes <= limit_bytes:
        return replace(plan, limit_bytes=limit_bytes)
    left = max(0, min(waiting, limit_bytes - (plan.peak_bytes - waiting)))
    return replace(plan, limit_bytes=limit_bytes, buffer_bytes=left, parts={**plan.parts, "activations that wait": left})


def _with_result(plan: MemoryPlan, spec: ModelSpec, recipe: Recipe, base: int) -> MemoryPlan:
    """The same, and the artifact is run where that fits: within the limit, or within half of what the machine has free."""
    if recipe.runtime not in ("torch", "torch-compile"):
        return replace(plan, runs_result=RUNTIMES[recipe.runtime].exported)
    taken = round((dtype_bytes(run_dtype(_after(spec, recipe))) + RESULT_BYTES) * spec.total_parameters)
    parts = {"imports": base, "libraries at work": RUNNING_BYTES, "the artifact while it is run": taken}
    free = _available_bytes()
    most = plan.limit_bytes or (None if free is None else base + free // 2)
    if most is not None and sum(parts.values()) > most:
        return plan
    return replace(plan, runs_result=True, parts=max(plan.parts, parts, key=lambda found: sum(found.values())))


def _narrower(spec: ModelSpec) -> str | None:
    return None if spec.dtype == "bfloat16" else "bfloat16"


def _plan(spec: ModelSpec, recipe: Recipe, base: int, rows: int, dtype: str | None, once: bool) -> MemoryPlan:
    """The fullest of the recipe's moments: each step that walks the blocks, and the writing."""
    moments = [_writing(spec, recipe)]
    for step in recipe.steps:
        if step.calibrated and RUNTIMES[recipe.runtime].exported is False:
            dense = (step.verb, step.method) in DISTILLING
            tuning = _training(spec, step) if dense else _tuning(spec, step, rows, dtype)
            moments.append(tuning if step.verb == "distill" else _walking(spec, step, rows, dtype, once))
            moments += [_sensing(spec, step, rows)] if step.method == "auto" else []
        spec = apply_step(step, spec, recipe.runtime)
    fullest = max(moments, key=lambda parts: sum(parts.values()))
    parts = {"imports": base, "libraries at work": RUNNING_BYTES, **fullest}
    return MemoryPlan(limit_bytes=None, batch_rows=rows, buffer_bytes=None, blocks_once=once, compute_dtype=dtype, runs_result=False, parts=parts)


def _writing(spec: ModelSpec, recipe: Recipe) -> dict[str, int]:
    """One tensor at a time; an exported model whole."""
    if RUNTIMES[recipe.runtime].exported:
        graph = EXPORTER_BYTES + EXPORT_BLOCK_BYTES * len(_blocks(spec))
        return {"the exported model": EXPORT_BYTES * spec.total_parameters, "its graph": graph}
    after = _after(spec, recipe)
    stored = {part.name: part.weight for part in spec.parts if isinstance(part, Linear | Embedding)}
    changed = {part.name for part in after.parts if isinstance(part, Linear | Embedding) and part.weight != stored.get(part.name)}
    pruned = any(step.verb in ("prune", "cast") for step in recipe.steps)
    sizes = [_largest(part) * (ALONE_BYTES if pruned or part.name in changed else 8) for part in spec.parts]
    return {"the largest weight": max(sizes, default=0)}


def _after(spec: ModelSpec, recipe: Recipe) -> ModelSpec:
    for step in recipe.steps:
        spec = apply_step(step, spec, recipe.runtime)
    return spec


def run_dtype(spec: ModelSpec) -> str:
    """The type that an artifact is run in to compare its output: its own, but not all of PyTorch's operators take float16 on a CPU."""
    return "float32" if spec.dtype == "float16" else spec.dtype


def _walking(spec: ModelSpec, step: Step, rows: int, dtype: str | None, once: bool) -> dict[str, int]:
    """A pass over the blocks, at the fuller of two moments: a block runs while second moments are summed, or its weights are solved."""
    computed = dtype or ("bfloat16" if spec.dtype == "bfloat16" else "float32")
    wide = dtype_bytes(computed)
    blocks = _blocks(spec)
    outside = sum(round(part.parameters * wide) for part in spec.parts if block_name(part) is None and part.component != "head")
    held = max((round(sum(part.parameters for part in parts) * (wide + 1)) for parts in blocks.values()), default=0)
    inputs = [group for parts in blocks.values() for group in _inputs(parts)]
    columns = max((columns for columns, _ in inputs), default=0)
    running = _running(spec, step, rows, computed) + 4 * MOMENTS * columns**2
    solving = max((ROW_BYTES * together * columns + 4 * HESSIANS * columns**2 for columns, together in inputs), default=0)
    tables = max((ALONE_BYTES * part.parameters for part in spec.parts if isinstance(part, Embedding) and step["embeddings"]), default=0)
    return {
        "weights outside of the blocks": outside, "a block": held, "activations that wait": _waiting(spec, step, wide, once),
        "a block at work": max(running, solving, tables - held),
    }  # fmt: skip


def _tuning(spec: ModelSpec, step: Step, rows: int, dtype: str | None) -> dict[str, int]:
    """A pass that trains: codes or what stands for them, one input a block, and a block whose weights are made while it runs and again while its
    gradients are."""
    wide = dtype_bytes(dtype or ("bfloat16" if spec.dtype == "bfloat16" else "float32"))
    blocks = _blocks(spec)
    inside = [part for parts in blocks.values() for part in parts]
    matrices = [part for part in inside if isinstance(part, Linear)]
    scales = sum(part.experts * part.weight.scales(part.out_features, part.in_features) for part in matrices if part.weight.bits is not None)
    trained = sum(part.parameters for part in matrices) if step.method == "qat" else 0
    generating = {
        "weights while it writes": round(spec.total_parameters * wide),
        "its cache": kv_cache_bytes(spec, batch_size=TEXTS, context_len=SELF_LENGTH, dtype=dtype or spec.dtype),
    } if step["self_tokens"] else {}  # fmt: skip
    hidden = next((part.embedding_dim for part in spec.parts if isinstance(part, Embedding)), 0)
    training = {
        "weights outside of the blocks": sum(round(part.parameters * wide) for part in spec.parts if block_name(part) is None),
        "codes": sum(part.parameters for part in inside), "what is trained": TRAINED_BYTES * (scales + trained),
        "inputs of the blocks": round(len(blocks) * STEP_TOKENS * hidden * wide),
        "its answers": 4 * LOGIT_COPIES * min(LOGIT_ELEMENTS, STEP_TOKENS * _answers(spec)),
        "a block at work": 12 * max((sum(part.parameters for part in parts) for parts in blocks.values()), default=0)
        + 3 * _running(spec, step, min(rows, 2), dtype or "float32"),
    }  # fmt: skip
    return max(training, generating, key=lambda parts: sum(parts.values()))


def _training(spec: ModelSpec, step: Step) -> dict[str, int]:
    """A step that trains dense weights in float32: the activations of one unit of rows, and logits piece by piece with a gradient of the head."""
    usual = ROW_TOKENS if spec.is_decoder else ENCODED_TOKENS
    length = step["seq_len"] or min(usual, spec.fixed_len or spec.max_positions or usual)
    rows = RELATED if step.method == "embeddings" else max(1, min(STEP_TOKENS, step["batch_tokens"]) // length)
    later = LATER_UNIT_BYTES * spec.total_parameters if step["batch_tokens"] >= 2 * rows * length else 0
    answers = min(DENSE_LOGITS, rows * length * _answers(spec))
    head = max((part.in_features * part.out_features for part in spec.parts if isinstance(part, Linear) and part.component == "head"), default=0)
    states = 4 * spec.total_parameters * (2 + MEMORIES[step["optimizer"]])
    inside = _activations(spec, rows, length) * (HALF_COMPUTED if step["dtype"] == "bfloat16" else 1)
    blocks = max(1, len(_blocks(spec)))
    hidden = next((part.embedding_dim for part in spec.parts if isinstance(part, Embedding)), 0)
    kept = 4 * rows * length * hidden * blocks + inside / blocks if step["recompute"] else inside
    return {
        "weights, gradients and the optimizer's memory": states, "what the allocator keeps": round(KEPT_SHARE * states),
        "the original's head": 4 * head, "its answers": 4 * LOGIT_COPIES * answers + 8 * head, "what a step computes": round(kept),
        "gradients of earlier rows": later,
    }  # fmt: skip


def _activations(spec: ModelSpec, rows: int, length: int) -> int:
    """What a pass keeps for its backward pass in float32, without its logits."""
    try:
        found = workload_memory(spec, Workload(phase="train", batch_size=rows, seq_len=length, dtype="float32", optimizer="adamw"))
    except WorkloadError:
        return rows * length * 64 * max((part.out_features for part in spec.parts if isinstance(part, Linear)), default=0)
    return max(0, found.activations - 8 * rows * length * _answers(spec))


def _sensing(spec: ModelSpec, step: Step, rows: int) -> dict[str, int]:
    """A backward pass in bfloat16 that tells what the rounding of each weight costs: what lies outside of the blocks stays, with its gradients."""
    outside = sum(part.parameters for part in spec.parts if block_name(part) is None and not (isinstance(part, Linear) and part.tied_to))
    block = max((sum(part.parameters for part in parts) for parts in _blocks(spec).values()), default=0)
    return {
        "weights outside of the blocks": 2 * outside, "their gradients": 4 * outside,
        "its answers": SENSITIVITY_BYTES * SENSITIVITY_WINDOW * _answers(spec), "the largest weight": 8 * max(map(_largest, spec.parts), default=0),
        "a block at work": 12 * block + 3 * _running(spec, step, min(rows, 1), "bfloat16"),
    }  # fmt: skip


def _answers(spec: ModelSpec) -> int:
    """Logits of a position; 0 of a model without a head."""
    return max((part.out_features for part in spec.parts if isinstance(part, Linear) and part.component == "head"), default=0)


def _blocks(spec: ModelSpec) -> dict[str, list[Part]]:
    """The parts of each numbered block."""
    found: dict[str, list[Part]] = {}
    for part in spec.parts:
        if (block := block_name(part)) is not None:
            found.setdefault(block, []).append(part)
    return found


def _inputs(parts: list[Part]) -> Iterator[tuple[int, int]]:
    """(I, O together) of the linears of a block that are given the same input, as far as the order of its parts tells."""
    linears = [part for part in parts if isinstance(part, Linear)]
    for (_, columns), group in groupby(linears, key=lambda part: (part.component, part.in_features)):
        yield columns, sum(part.out_features for part in group)


def _running(spec: ModelSpec, step: Step, rows: int, dtype: str) -> int:
    """Activations of a batch inside the model, by the estimate of a forward pass."""
    length = max(2, min(WINDOW, spec.fixed_len or spec.max_positions or WINDOW))
    rows = max(1, min(rows, -(-(step["tokens"] or 0) // length)))
    generates = spec.is_decoder or spec.is_encoder_decoder  # the first token of it: a forward with logits at the last position alone
    try:
        workload = Workload(
            phase="generate" if generates else "encode", batch_size=rows, seq_len=length - generates, new_tokens=int(generates), dtype=dtype,
        )  # fmt: skip
        found = workload_memory(spec, workload)
    except WorkloadError:
        return round(rows * length * dtype_bytes(dtype) * 16 * max((part.out_features for part in spec.parts if isinstance(part, Linear)), default=0))
    return found.activations + found.temporary


def _waiting(spec: ModelSpec, step: Step, wide: float, once: bool) -> int:
    """Hidden states of all calibration tokens, an encoder-decoder's of both; where a block runs once, what is alive inside of it at its fullest."""
    hidden = next((part.embedding_dim for part in spec.parts if isinstance(part, Embedding)), 0)
    widest = max((part.in_features for part in spec.parts if isinstance(part, Linear) and block_name(part) is not None), default=0)
    inside = max(INSIDE_STATES * hidden, widest + 3 * hidden) if once else hidden
    return round((2 if spec.is_encoder_decoder else 1) * (step["tokens"] or 0) * inside * wide)


def _largest(part: Part) -> int:
    """Elements of a part's largest tensor."""
    sizes = []
    for shape in part.tensors().values():
        size = 1
        for length in shape:
            size *= length
        sizes.append(size)
    return max(sizes, default=0)


# the process


def import_class(architecture: str) -> None:
    """Import what runs a model, so that it counts as imports; a class that `transformers` has not is refused by whoever runs it."""
    import transformers

    getattr(transformers, architecture, None)


def rss_bytes() -> int | None:
    """What this process holds now; None where the system does not tell."""
    return _status("VmRSS:")


def peak_rss_bytes() -> int | None:
    """The most that it has held since it began, or since `reset_peak`."""
    return _status("VmHWM:")


def _available_bytes() -> int | None:
    """What the machine can still give; None where it does not tell."""
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
    except OSError:
        return None
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable:")), None)


def reset_peak() -> None:
    """Count the peak from now on, where the system can."""
    try:
        Path("/proc/self/clear_refs").write_text("5")  # Linux: Documentation/filesystems/proc.rst
    except OSError:
        return


def release_free() -> None:
    """Give the system back what was freed between blocks that are in use; glibc keeps it, and a walk over a model grows by 20 MB a block."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None) if sys.platform == "linux" else None
    if trim is not None:
        trim(0)


def _status(name: str) -> int | None:
    try:
        lines = Path("/proc/self/status").read_text().splitlines()
    except OSError:
        return None
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith(name)), None)


LARGE_BLOCK = 2**20
"""Memory blocks from so many bytes on are given back as soon as they are free (choice); glibc's own bound rises to 32 MB while it runs, and what
lies between stays with the process in pieces."""
M_MMAP_THRESHOLD = -3
"""Source: malloc.h of glibc."""
M_TRIM_THRESHOLD = -1
"""Source: malloc.h of glibc."""
KEPT_BLOCK, NO_TRIM = 2**30, -1
"""Blocks up to so many bytes (choice: more than an activation takes), and all free memory (mallopt(3): -1), stay with the process while it trains.
Training frees and takes the same blocks in each step; with glibc's own bounds the system cleared their pages anew each time: 1.2 of 6 seconds of a
step of SmolLM2-135M, 1,024 positions on one core."""


@contextmanager
def reusing_memory() -> Iterator[None]:
    """Keep freed blocks for the next step while this lasts; not under a limit, which they would count to."""
    if sys.platform != "linux":
        yield
        return
    import resource

    if resource.getrlimit(resource.RLIMIT_DATA)[0] != resource.RLIM_INFINITY:
        yield
        return
    set_bound = ctypes.CDLL(None).mallopt
    set_bound(M_MMAP_THRESHOLD, KEPT_BLOCK)
    set_bound(M_TRIM_THRESHOLD, NO_TRIM)
    try:
        yield
    finally:
        set_bound(M_MMAP_THRESHOLD, LARGE_BLOCK)
        set_bound(M_TRIM_THRESHOLD, LARGE_BLOCK)
        gc.collect()  # a trained module and what wraps it hold each other
        release_free()


@contextmanager
def keeping_limit(limit_bytes: int | None) -> Iterator[None]:
    """Have the system refuse memory beyond a limit while this lasts, and give free blocks back at once. None: nothing.

    What is limited is private memory (RLIMIT_DATA): what the process has of it may grow by as much as its resident size is under the limit.

    Raises:
        ConstraintError: in place of the error that a refused allocation gives.
    """
    if limit_bytes is None or sys.platform != "linux":
        yield
        return
    import resource

    ctypes.CDLL(None).mallopt(M_MMAP_THRESHOLD, LARGE_BLOCK)
    before = resource.getrlimit(resource.RLIMIT_DATA)
    used, held = _status("VmData:") or 0, rss_bytes() or 0
    most = used + max(limit_bytes - held, 0)
    if before[1] != resource.RLIM_INFINITY:
        most = min(most, before[1])
    resource.setrlimit(resource.RLIMIT_DATA, (most, before[1]))
    try:
        yield
    except (MemoryError, RuntimeError, OSError) as error:
        if isinstance(error, MemoryError) or "allocate memory" in str(error):
            raise ConstraintError(f"memory {format_bytes(limit_bytes)} was reached, and the system gave no more; allow more.") from error
        raise
    finally:
        resource.setrlimit(resource.RLIMIT_DATA, before)
