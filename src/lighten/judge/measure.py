"""Measure a model or an artifact: latency beside the original's, peak memory, size, and quality against the original on held-out text."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from lighten.cost import Workload
from lighten.errors import ModelError, WorkloadError
from lighten.formats.artifact import fingerprint, folder_bytes, read_artifact
from lighten.judge.child import Child, WorkerFailed
from lighten.judge.latency import Latency, time_beside
from lighten.judge.probe import fit_classifier, similarities
from lighten.judge.quality import Score, TokenScores, embedding_fidelity, language_fidelity
from lighten.judge.task import Task, written_rows
from lighten.judge.text import Example, Text
from lighten.judge.tokens import Tokenizer
from lighten.model import ModelSpec
from lighten.model.read import SIDE_FILES, read_config, weight_files
from lighten.model.text_ends import end_tokens
from lighten.recipe import Recipe
from lighten.recipe.options import Batching, Speculation

MOST_TEXTS = 1000
WINDOW_TOKENS = 512
MOST_WINDOWS = 16
TIMED_TEXTS = 256
"""Texts of one run at most where texts have lengths of their own: some batches, in some seconds of a small encoder on two cores. Choice."""
PROMPTS = 64
"""Prompts of the text at most, for each sequence of a batch: more than the runs of one measurement."""
PROXY_TEXTS = 128
PROXY_WINDOWS = 3
"""What a proxy of quality is measured on, of the calibration text: some seconds, with standard errors of one or two per cent."""
AT_ONCE = {"head": 256, "words": 50, "writing": 10, "continuations": 64, "prompts": 5}
"""Rows of a task that a child answers before it is asked for more: what one answer takes stays within its time."""
REFERENCE_BYTES = 1_000_000_000
"""Disk that the original's logits may take while candidates are compared with them."""


@dataclass(frozen=True, kw_only=True)
class Target:
    """What runs: a folder, by a runtime, in a type, with int8 activations or without, and how its recipe batches or speculates."""

    folder: Path
    runtime: str
    dtype: str
    size_bytes: int
    activations: Literal["dynamic", "static"] | None = None
    speculation: Speculation | None = None
    batching: Batching = "padded"
    device: str = "cpu"


@dataclass(frozen=True, kw_only=True)
class Measurement:
    """What one target was measured at.

    Attributes:
        precision: what it really ran in, as the runtime tells.
        cold_start_s: from the start of loading to ready, imports included.
        texts_per_s: where texts have lengths of their own; None else.
        prompts: what was gone on with, or encoded: tokens at random, or of a text.
        original_quality: the original's own figures of the task; the others compare with it.
    """

    size_bytes: int
    peak_memory_bytes: int | None
    latency: Latency
    throughput: float
    precision: str
    runtime_version: str
    cold_start_s: float
    quality: dict[str, Score]
    texts_per_s: float | None = None
    prompts: Literal["random", "text"] = "random"
    original_quality: dict[str, Score] = field(default_factory=dict)

    def as_json(self) -> dict[str, Any]:
        """The form of `choice.json` and `lighten measure --json`."""
        first, median, third = self.latency.quartiles
        accepted = self.latency.accepted
        return {
            "size_bytes": self.size_bytes, "peak_memory_bytes": self.peak_memory_bytes, "latency_s": median, "latency_q1_s": first,
            "latency_q3_s": third, "time_to_first_token_s": self.latency.first_s, "throughput": self.throughput, "speedup": self.latency.speedup,
            "original_latency_s": self.latency.baseline_s, "cold_start_s": self.cold_start_s,
            "precision": self.precision, "runtime_version": self.runtime_version,
            "texts_per_second": self.texts_per_s, "prompts": self.prompts,
            "accepted": accepted and (accepted.accepted / accepted.proposed if accepted.proposed else 0.0),
            "tokens_per_pass": accepted and accepted.tokens / max(accepted.passes, 1),
            "quality": {name: asdict(score) for name, score in self.quality.items()},
            "original_quality": {name: asdict(score) for name, score in self.original_quality.items()},
        }  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class Limits:
    """Of each child process."""

    threads: int
    memory_bytes: int
    timeout_s: float


@dataclass(frozen=True, kw_only=True)
class Part:
    """The text that quality is measured on, and how much of it at most: passages of an encoder, windows of a decoder."""

    texts: tuple[str, ...]
    passages: int
    windows: int
    name: str


class Judge:
    """Measures targets against one original, which it keeps loaded and paused between measurements.

    Args:
        original: the model folder that quality and speed are held against, run by torch in float32.
        work: a folder for the original's outputs; they are computed once.
        task: what quality is measured on beside the agreement with the original.
    """

    def __init__(  # noqa: PLR0913 - what is measured, on what, within what
        self, original: Path, spec: ModelSpec, text: Text, workload: Workload, limits: Limits, work: Path, task: Task | None = None
    ) -> None:
        self.task = task
        self._classify: Any = None
        self.original, self.spec, self.workload, self.limits, self.work = original, spec, workload, limits, work
        self.test = Part(texts=text.test, passages=MOST_TEXTS, windows=MOST_WINDOWS, name=text.fingerprint)
        self.small = Part(texts=text.calibration, passages=PROXY_TEXTS, windows=PROXY_WINDOWS, name=f"{text.fingerprint} calibration")
        self._baseline: Child | None = None

    def close(self) -> None:
        """End the original's process."""
        if self._baseline is not None:
            self._baseline.close()
            self._baseline = None

    def measure(self, target: Target) -> Measurement:
        """Load and run a target in a process of its own.

        Raises:
            WorkerFailed: it crashed, hung or grew too large.
            LightenError: it cannot be run or judged.
        """
        with self.child(target) as child:
            loaded = self.load(child, target)
            before, baseline = self._baseline, self._original()
            try:
                prompts = self.prompts(target)
                latency = time_beside(
                    child, baseline, self.workload, timeout_s=self.limits.timeout_s, warm=baseline is before, prompts=prompts
                )  # fmt: skip
                told = child.ask("describe", timeout_s=self.limits.timeout_s)
                quality = self.quality(child, target)
            except WorkerFailed as error:
                if baseline.alive:
                    raise
                raise WorkerFailed(f"the original beside it: {error}") from error
        median = latency.quartiles[1]
        return Measurement(
            size_bytes=target.size_bytes, peak_memory_bytes=told["peak_memory_bytes"], latency=latency, throughput=self.workload.tokens / median,
            precision=told["precision"], runtime_version=told["version"], cold_start_s=loaded["seconds"], quality=quality,
            texts_per_s=len(self.workload.lengths) / median if self.workload.lengths else None, prompts="text" if prompts else "random",
            original_quality=self._originals_scores(),
        )  # fmt: skip

    def measure_original(self) -> Measurement:
        """The original itself, by torch in float32: its own yardstick."""
        return self.measure(self.original_target())

    def profile(self, target: Target) -> dict[str, Any]:
        """What the operators of one run of a target take, in a process of its own: an `OperatorProfile` as JSON.

        Raises:
            WorkerFailed: it crashed, hung or grew too large.
            LightenError: its runtime has no profiler, or it cannot be run.
        """
        workload = {key: getattr(self.workload, key) for key in ("phase", "batch_size", "seq_len", "new_tokens")}
        with self.child(target) as child:
            return child.ask("profile", timeout_s=self.limits.timeout_s, **self._loading(target), workload=workload)

    def original_target(self) -> Target:
        return Target(folder=self.original, runtime="torch", dtype="float32", size_bytes=model_bytes(self.original))

    def child(self, target: Target) -> Child:
        """A process for a target."""
        return Child(runtime=target.runtime, threads=self.limits.threads, memory_bytes=self.limits.memory_bytes)

    def load(self, child: Child, target: Target) -> dict[str, Any]:
        """Load a target in its process."""
        return child.ask("load", timeout_s=self.limits.timeout_s, **self._loading(target))

    def _loading(self, target: Target) -> dict[str, Any]:
        return {
            "folder": str(target.folder), "original": str(self.original), "runtime": target.runtime,
            "setup": {
                "dtype": target.dtype, "threads": self.limits.threads, "activations": target.activations, "device": target.device,
                "batching": target.batching, "speculation": target.speculation and asdict(target.speculation),
            },
        }  # fmt: skip

    def prompts(self, *targets: Target) -> Path | None:
        """Tokens of the text's test part as prompts, where one of the targets speculates: what a text repeats decides on what is accepted. None:
        random tokens do.

        Raises:
            TextError: the text has fewer tokens than one run takes.
        """
        if all(target.speculation is None for target in targets):
            return None
        path = self._reference("prompts.npy", self.test)
        if not path.is_file():
            wanted = PROMPTS * self.workload.batch_size
            np.save(path, Tokenizer(self.original).windows(self.test.texts, count=wanted, length=self.workload.seq_len))
        return path

    def _original(self) -> Child:
        """The original's process, a new one where the last died."""
        if self._baseline is not None and self._baseline.alive:
            return self._baseline
        self.close()
        with ExitStack() as stack:
            child = stack.enter_context(self.child(self.original_target()))
            self.load(child, self.original_target())
            child.pause()
            stack.pop_all()
        self._baseline = child
        return child

    def quality(self, child: Child, target: Target, part: Part | None = None) -> dict[str, Score]:
        """Held against the original, on held-out text, or on another part of it; and what it answers to the task, where that is not another part."""
        if part is None and self.task is not None:
            return self._agreement(child, target, self.test) | self.task.scores(self._answers(child, target.folder))
        return self._agreement(child, target, part or self.test)

    def _agreement(self, child: Child, target: Target, part: Part) -> dict[str, Score]:
        if not self.spec.is_decoder:
            return self._embedding(child, target.folder, part)
        if (target.folder / "config.json").is_file() and (size := read_config(target.folder).get("vocab_size")) != self.spec.config["vocab_size"]:
            if self.task is not None and part is self.test:  # a text's score needs no common tokens
                return {}
            raise ModelError(
                f"{target.folder} has {size} tokens and its original {self.spec.config['vocab_size']}: what they answer cannot be compared token by "
                "token; measure what else the recipe does without shrink(vocab)."
            )
        return self._language(child, part)

    def _embedding(self, child: Child, folder: Path, part: Part) -> dict[str, Score]:
        """folder: of the target, whose own tokenizer cuts the texts where it has one."""
        reference = self._reference("embeddings.npy", part)
        if not reference.is_file():
            self._by_original(lambda original: self._embed(original, self.original, reference, part.texts[: part.passages], self.workload.seq_len))
        own = self.work / f"candidate-{os.getpid()}.npy"
        self._embed(child, self._tokenizer_of(folder), own, part.texts[: part.passages], self.workload.seq_len)
        scores = embedding_fidelity(np.load(reference), np.load(own))
        own.unlink()
        return scores

    def _tokenizer_of(self, folder: Path) -> Path:
        return folder if (folder / "tokenizer.json").is_file() else self.original

    # ---- the task ----

    def _originals_scores(self) -> dict[str, Score]:
        if self.task is None:
            return {}
        held = self._reference("answers.json", self.test, self.task.fingerprint)
        if not held.is_file():
            self._by_original(lambda original: _write_whole(held, self._answers(original, self.original)))
        return self.task.scores(json.loads(held.read_text()))

    def _answers(self, child: Child, folder: Path) -> Any:
        """What a loaded target says to each row of the task, in the form that the task scores."""
        task, tokenizer = self.task, self._tokenizer_of(folder)
        assert task is not None, "asked for where there is one"
        if task.way == "embeddings":
            return self._answers_by_embeddings(child, tokenizer, task)
        ends = end_tokens(self.original)
        if task.harness is not None:
            return task.harness.answer(
                Tokenizer(tokenizer), self.spec, ends,
                lambda way, rows: self._ask(child, tokenizer, {"way": way, "rows": rows, "ends": ends}),
            )  # fmt: skip
        return self._ask(child, tokenizer, written_rows(task) | {"ends": ends})

    def _ask(self, child: Child, tokenizer: Path, asked: dict[str, Any]) -> list[Any]:
        """The answer of a loaded target to each of the rows."""
        held = self.work / f"asked-{os.getpid()}.json"
        _write_whole(held, asked)
        found: list[Any] = []
        for start in range(0, len(asked["rows"]), AT_ONCE[asked["way"]]):
            found += child.ask(
                "answer", timeout_s=self.limits.timeout_s, rows=str(held), start=start, stop=start + AT_ONCE[asked["way"]],
                tokenizer=str(tokenizer), batch_size=self.workload.batch_size,
            )["answers"]  # fmt: skip
        held.unlink()
        return found

    def _answers_by_embeddings(self, child: Child, tokenizer: Path, task: Task) -> list[Any]:
        held = self._reference("fit.npy", self.test, task.fingerprint)
        if task.fit and self._classify is None:
            if not held.is_file():
                self._by_original(lambda original: self._embed(original, self.original, held, _columns(task.fit), task.length))
            self._classify = fit_classifier(np.split(np.load(held), len(task.fit[0].texts)), task.fitted)
        own = self.work / f"candidate-{os.getpid()}.npy"
        self._embed(child, tokenizer, own, _columns(task.rows), task.length)
        embeddings = np.split(np.load(own), len(task.rows[0].texts))
        own.unlink()
        return list(self._classify(embeddings)) if task.fit else similarities(embeddings)

    def _embed(self, child: Child, tokenizer: Path, out: Path, texts: Sequence[str], seq_len: int) -> None:
        beside = out.with_suffix(".part.npy")
        child.ask(
            "embed", timeout_s=self.limits.timeout_s, texts=texts, tokenizer=str(tokenizer),
            batch_size=self.workload.batch_size, seq_len=seq_len, out=str(beside), own_lengths=bool(self.workload.lengths),
        )  # fmt: skip
        beside.replace(out)

    def _language(self, child: Child, part: Part) -> dict[str, Score]:
        windows, logits, scores = (self._reference(name, part) for name in ("windows.npy", "logits.npy", "scores.json"))
        if not scores.is_file():
            np.save(windows, self._windows(part))

            def write(original: Child) -> None:
                answer = original.ask("score", timeout_s=self.limits.timeout_s, windows=str(windows), reference=str(logits), write=True)
                beside = scores.with_suffix(".part")
                beside.write_text(json.dumps(answer["windows"]))
                beside.replace(scores)

            self._by_original(write)
        answer = child.ask("score", timeout_s=self.limits.timeout_s, windows=str(windows), reference=str(logits), write=False)
        return language_fidelity(_token_scores(json.loads(scores.read_text())), _token_scores(answer["windows"]))

    def _windows(self, part: Part) -> NDArray[np.int64]:
        length = min(WINDOW_TOKENS, self.spec.max_positions or WINDOW_TOKENS)
        fits = max(2, REFERENCE_BYTES // (length * int(self.spec.config["vocab_size"]) * 4))
        return Tokenizer(self.original).windows(part.texts, count=min(part.windows, fits), length=length)

    def _by_original(self, do: Any) -> None:
        original = self._original()
        original.resume()
        do(original)
        original.pause()

    def _reference(self, name: str, part: Part, more: str = "") -> Path:
        self.work.mkdir(parents=True, exist_ok=True)
        key = f"{fingerprint(self.original)}{part.name}{self.workload.batch_size}x{self.workload.seq_len}{more}"
        return self.work / f"original-{hashlib.sha256(key.encode()).hexdigest()[:12]}-{name}"


def own_lengths(workload: Workload, model: Path, text: Text) -> Workload:
    """The workload of encoding the text's first test passages, each as long as the model's tokenizer makes it, `seq_len` tokens at most.

    Raises:
        WorkloadError: the phase is another.
    """
    if workload.phase != "encode":
        raise WorkloadError(f"--lengths text has no effect in phase {workload.phase}: a batch of prompts has one length; it has one in: encode.")
    lengths = Tokenizer(model).lengths(text.test[:TIMED_TEXTS], length=workload.seq_len)
    return replace(workload, lengths=lengths)


def _columns(rows: Sequence[Example]) -> list[str]:
    """First texts of all rows, then second texts."""
    return [row.texts[place] for place in range(len(rows[0].texts)) for row in rows]


def _write_whole(path: Path, content: Any) -> None:
    beside = path.with_suffix(".part")
    beside.write_text(json.dumps(content))
    beside.replace(path)


def model_bytes(folder: Path) -> int:
    """Bytes of a model folder's weights and of the side files that an artifact would carry."""
    side = sum((folder / name).stat().st_size for name in SIDE_FILES if (folder / name).is_file())
    return side + sum(path.stat().st_size for path in weight_files(folder))


def artifact_target(folder: Path) -> Target:
    """The target that an artifact folder is."""
    made = read_artifact(folder)
    return recipe_target(folder, made.recipe, dtype=made.dtype, size_bytes=folder_bytes(folder))


def recipe_target(folder: Path, recipe: Recipe, *, dtype: str, size_bytes: int) -> Target:
    """A folder, run as a recipe says."""
    return Target(
        folder=folder, runtime=recipe.runtime, dtype=dtype, size_bytes=size_bytes, activations=recipe.activations, speculation=recipe.speculation,
        batching=recipe.batching, device=recipe.device or "cpu",
    )  # fmt: skip


def _token_scores(windows: Sequence[dict[str, Any]]) -> list[TokenScores]:
    def array(value: Any) -> Any:
        return None if value is None else np.array(value)

    return [TokenScores(log_likelihood=array(w["log_likelihood"]), kl=array(w["kl"]), top1=array(w["top1"])) for w in windows]
