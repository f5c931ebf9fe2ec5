"""Tasks of lm-eval, the Language Model Evaluation Harness: its documents, prompts, metrics and standard errors, answered by our runtimes.

`lm-eval:NAME` is a task that it has, `lm-eval:FILE.yaml` one that the user wrote for it. Nothing is downloaded: a task's data has to be on this
machine. A figure of which less is better is left out, as is one that has the name of another figure.
"""

from __future__ import annotations

import contextlib
import hashlib
import importlib.util
import io
import json
import math
import re
from collections.abc import Callable, Collection, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from lighten.errors import LightenError, TaskError
from lighten.judge.child import WorkerFailed
from lighten.judge.metrics import Metric
from lighten.judge.quality import Score
from lighten.judge.tokens import Tokenizer
from lighten.model.spec import ModelSpec

PREFIX = "lm-eval:"
MOST_NEW_TOKENS = 256
"""Where a task says nothing else. Source: `max_gen_toks` of lm-eval's own models."""
FEWSHOT_SEED = 1234
"""Of the examples before a question. Source: lm_eval/defaults.py."""

RESAMPLES = 1000
"""Of a bootstrap, where a figure's standard error is by one."""

Ask = Callable[[str, list[Any]], list[Any]]
"""(way, rows) → what the model that is loaded answers to each; see `answers.by_continuations` and `answers.by_prompts`."""


@dataclass(frozen=True, kw_only=True)
class Harness:
    """A task of lm-eval, loaded.

    Attributes:
        task: lm-eval's own.
        figures: name of a figure → where lm-eval's results have it.
        documents: that are asked; the task's first.
    """

    name: str
    task: Any
    figures: dict[str, tuple[str, str]]
    documents: int

    @property
    def metrics(self) -> tuple[Metric, ...]:
        """Its figures in the form of other tasks; they are read off what `answer` tells."""

        def reader(name: str) -> Callable[[Any, Any], Score]:
            return lambda told, _: Score(**told[name])

        return tuple(Metric(name=name, kinds=(), score=reader(name), best=math.inf) for name in self.figures)

    def answer(self, tokenizer: Tokenizer, spec: ModelSpec, ends: Sequence[int], ask: Ask) -> dict[str, dict[str, Any]]:
        """Each figure of the model that answers `ask`, as the fields of a `Score`.

        Raises:
            TaskError: lm-eval fails on it.
        """
        from lm_eval.evaluator import evaluate

        from lighten.judge.harness_model import HarnessModel

        self.task.set_fewshot_seed(seed=FEWSHOT_SEED)
        with _one_line(self.name):
            found = evaluate(
                HarnessModel(tokenizer, spec, ends, ask), {"tasks": {self.name: self.task}}, limit=self.documents, log_samples=False,
                bootstrap_iters=RESAMPLES,
            )  # fmt: skip
        results: dict[str, Any] = found["results"][self.name]
        told = {}
        for name, (metric, by) in self.figures.items():
            error = results.get(f"{metric}_stderr,{by}")
            known = float(error) if isinstance(error, int | float) and math.isfinite(error) else None
            told[name] = asdict(Score(value=float(results[f"{metric},{by}"]), standard_error=known))
        return told


def load_harness(
    said: str, spec: ModelSpec, *, metrics: Sequence[str] = (), taken: Collection[str] = (), most: int, most_written: int
) -> tuple[Harness, str, tuple[str, ...]]:  # fmt: skip
    """What `lm-eval:…` names, a fingerprint of it, and notes on what was left out.

    Args:
        metrics: names of its figures; none: its first.
        taken: names of other figures.
        most, most_written: documents that are asked at most; of tasks where a text is written.

    Raises:
        TaskError: lm-eval is not installed or has no such task; its data is not on this machine; the model is no decoder; a figure that it has not.
    """
    if not spec.is_decoder:
        raise TaskError(f"{said}: lm-eval's tasks ask for texts, which {spec.name} ({spec.architecture}) does not write; decoders do.")
    if importlib.util.find_spec("lm_eval") is None:
        raise TaskError(f"{said} needs lm-eval, which is not installed; pip install 'lighten[lm-eval]'.")
    task = _loaded(said)
    if task.get_config("num_fewshot") is None:
        task.set_config(key="num_fewshot", value=0)
    with _one_line(said):
        documents = list(task.eval_docs)
    count = min(len(documents), most_written if task.OUTPUT_TYPE == "generate_until" else most)
    if count < 2:
        raise TaskError(f"{said} has {len(documents)} documents; a score needs at least 2.")
    able, left = _figures(task, taken)
    if unknown := next((name for name in metrics if name not in able), None):
        raise TaskError(f"{said} has no figure {unknown!r} of which more is better; it has {', '.join(able) or 'none'}.")
    if not able:
        raise TaskError(f"{said} has no figure of which more is better; it has {', '.join(left)}.")
    if len(set(metrics)) < len(metrics):
        raise TaskError(f"metrics {', '.join(metrics)}: one stands there twice.")
    figures = {name: able[name] for name in metrics or list(able)[:1]}
    notes = [f"{count} of {len(documents)} documents are used"] if count < len(documents) else []
    if not metrics and len(able) > 1:
        notes.append(f"scored by {next(iter(figures))}; it also has {', '.join(list(able)[1:])}")
    content = [_version(), task.dump_config(), documents[:count], list(figures)]
    digest = hashlib.sha256(json.dumps(content, default=_plain, sort_keys=True).encode()).hexdigest()[:16]
    return Harness(name=str(task.task_name), task=task, figures=figures, documents=count), digest, tuple(notes)


def _loaded(said: str) -> Any:
    """lm-eval's task."""
    import datasets
    from lm_eval.tasks import TaskManager

    name = said.removeprefix(PREFIX)
    path = Path(name)
    if path.suffix in (".yaml", ".yml") and not path.is_file():
        raise TaskError(f"{said}: no file {path}.")
    before = datasets.config.HF_HUB_OFFLINE
    datasets.config.HF_HUB_OFFLINE = True
    try:
        with _one_line(said):
            manager = TaskManager()
            if not path.is_file() and name not in manager.all_tasks:
                raise TaskError(f"{said}: lm-eval {_version()} has no task {name!r}; `lm-eval ls tasks` lists them, FILE.yaml names your own.")
            found = manager.load([name])
    finally:
        datasets.config.HF_HUB_OFFLINE = before
    tasks: dict[str, Any] = found["tasks"]
    if found.get("groups") or len(tasks) != 1:
        some = ", ".join(sorted(tasks)[:3])
        raise TaskError(f"{said} is a group of {len(tasks)} tasks; name one of them, such as {some}.")
    return next(iter(tasks.values()))


def _figures(task: Any, taken: Collection[str]) -> tuple[dict[str, tuple[str, str]], list[str]]:
    """Figure → (metric, filter) in lm-eval's order, and the names of what is left out."""
    better: dict[str, Any] = task.higher_is_better()
    filters = [each.name for each in task._filters]  # it has no other way to tell
    found, left = {}, []
    for metric in task.aggregation():
        for by in filters:
            name = re.sub(r"\W", "_", metric if len(filters) == 1 else f"{metric}_{by}")
            if better.get(metric) and name not in taken:
                found[name] = (metric, by)
            else:
                left.append(name)
    return found, left


@contextlib.contextmanager
def _one_line(said: str) -> Any:
    """lm-eval and what it reads with print progress and fail in their own ways; here it is one error of one line.

    Raises:
        TaskError: whatever went wrong, but for what the child that answers fails of.
    """
    try:
        with contextlib.redirect_stderr(io.StringIO()), contextlib.redirect_stdout(io.StringIO()):
            yield
    except (LightenError, WorkerFailed):
        raise
    except Exception as error:
        offline = "offline" in str(error).lower() or isinstance(error, ConnectionError)
        more = "; its data is not on this machine: load it once where there is a network, or name a task of local files" if offline else ""
        first = next((line.strip() for line in str(error).splitlines() if line.strip()), "no message")
        raise TaskError(f"{said}: lm-eval failed ({type(error).__name__}: {first[:200]}){more}.") from error


def _version() -> str:
    from importlib.metadata import version

    return version("lm_eval")


def _plain(value: Any) -> str:
    """What JSON has no form for, without an address in it."""
    return str(getattr(value, "__name__", type(value).__name__))


def resolved(task: Path) -> Path:
    """A task's file by its whole path; a task of lm-eval by its name, or by the whole path of the user's.

    >>> resolved(Path("lm-eval:arc_easy"))
    PosixPath('lm-eval:arc_easy')
    """
    said = str(task)
    if not said.startswith(PREFIX):
        return task.resolve()
    own = Path(said.removeprefix(PREFIX))
    return Path(f"{PREFIX}{own.resolve()}") if own.is_file() else task
