"""What a task's answers are scored by: the metrics that exist, each with its standard error, and the user's own.

Where a library has a metric, it is the library's: scikit-learn, SciPy, sacrebleu, rouge-score. A mean over examples has the standard error
deviation / √N. Of all others it is the deviation over `RESAMPLES` bootstrap samples of the examples, drawn with a fixed seed (Efron 1979); bleu
and chrf are resampled by sacrebleu itself, as often as it is used to.
"""

from __future__ import annotations

import hashlib
import importlib.util
import inspect
import json
import math
import re
import string
import warnings
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np

from lighten.errors import TaskError
from lighten.judge.quality import Score

Kind = Literal["classes", "values", "spans", "texts"]
"""What is answered: a class by its name, a number, a part of a context, a text."""
KINDS: tuple[Kind, ...] = ("classes", "values", "spans", "texts")

RESAMPLES = 200
"""Of a bootstrap: choice; the standard error of a standard error is then a twentieth."""
SEED = 0
_SACREBLEU_RESAMPLES = 1000
_Z_95 = 1.96
"""Half width of a normal 95 % range, which sacrebleu tells, in standard errors."""


@dataclass(frozen=True, kw_only=True)
class Metric:
    """A figure of answers. More is better, of all of them.

    Attributes:
        kinds: of the answers that it scores.
        score: (predictions, references) → the figure; a reference of a span or text is the list of what is right.
        package: what must be installed for it.
        best: the most that it can be.
        digest: of the file that a user's own is in.
    """

    name: str
    kinds: tuple[Kind, ...]
    score: Callable[[Sequence[Any], Sequence[Any]], Score]
    package: str | None = None
    best: float = 1.0
    digest: str = ""


# ---- means over examples ----


def _mean_of(each: Callable[[Any, Any], float]) -> Callable[[Sequence[Any], Sequence[Any]], Score]:
    def score(predictions: Sequence[Any], references: Sequence[Any]) -> Score:
        found = np.array([each(*pair) for pair in zip(predictions, references, strict=True)], np.float64)
        error = float(found.std(ddof=1)) / math.sqrt(len(found)) if len(found) > 1 else None
        return Score(value=float(found.mean()), standard_error=error)

    return score


def plain_words(text: str) -> list[str]:
    """The words of an answer without case, punctuation and articles.

    Source: `normalize_answer` of SQuAD's evaluate-v1.1.py (arXiv:1606.05250).

    >>> plain_words("The  Eiffel-Tower!")
    ['eiffeltower']
    """
    kept = "".join(letter for letter in text.lower() if letter not in string.punctuation)
    return re.sub(r"\b(a|an|the)\b", " ", kept).split()


def exact_match(prediction: str, references: Sequence[str]) -> float:
    """1 where a prediction has the words of one of the references, else 0.

    >>> exact_match("the cat", ["A cat.", "dog"]), exact_match("", [])
    (1.0, 1.0)
    """
    return float(any(plain_words(prediction) == plain_words(each) for each in references or [""]))


def squad_f1(prediction: str, references: Sequence[str]) -> float:
    """The harmonic mean of precision and recall of words, against the reference that gives most; of no words 1 where the other has none too.

    Written here: its 10 lines are no reason for a package. Source: `f1_score` of SQuAD's evaluate-v1.1.py and, for no answer, evaluate-v2.0.py.

    >>> round(squad_f1("a black cat", ["the cat", "cats"]), 3)
    0.667
    """

    def against(reference: str) -> float:
        own, other = plain_words(prediction), plain_words(reference)
        if not own or not other:
            return float(own == other)
        same = sum((Counter(own) & Counter(other)).values())
        return 2 * same / (len(own) + len(other))

    return max(map(against, references or [""]))


def _rouge(name: str) -> Callable[[Sequence[Any], Sequence[Any]], Score]:
    """The F-measure of rouge-score, words stemmed, against the reference that gives most."""

    def score(predictions: Sequence[Any], references: Sequence[Any]) -> Score:
        from rouge_score.rouge_scorer import RougeScorer

        scorer = RougeScorer([name], use_stemmer=True)
        return _mean_of(lambda said, right: float(scorer.score_multi(right, said)[name].fmeasure))(predictions, references)

    return score


# ---- of all examples together ----


def bootstrapped(whole: Callable[[list[Any], list[Any]], float]) -> Callable[[Sequence[Any], Sequence[Any]], Score]:
    """A figure of all examples with the deviation over resamples; those of which the figure is not defined do not count."""

    def score(predictions: Sequence[Any], references: Sequence[Any]) -> Score:
        value = whole(list(predictions), list(references))
        if len(references) < 2:
            return Score(value=value, standard_error=None)
        draws = np.random.default_rng(SEED).integers(0, len(references), (RESAMPLES, len(references))).tolist()
        found = [whole([predictions[place] for place in draw], [references[place] for place in draw]) for draw in draws]
        known = [each for each in found if math.isfinite(each)]
        return Score(value=value, standard_error=float(np.std(known, ddof=1)) if len(known) > 1 else None)

    return score


def _f1(predictions: list[Any], references: list[Any]) -> float:
    from sklearn.metrics import f1_score

    return float(f1_score(references, predictions, average="macro", zero_division=0.0))


def _matthews(predictions: list[Any], references: list[Any]) -> float:
    from sklearn.metrics import matthews_corrcoef

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # a resample of one class
        return float(matthews_corrcoef(references, predictions))


def _correlation(name: str) -> Callable[[list[Any], list[Any]], float]:
    """SciPy's; where the answers are all the same, of which no correlation is defined, 0."""

    def whole(predictions: list[Any], references: list[Any]) -> float:
        from scipy import stats

        if len(set(references)) < 2:
            return math.nan
        if len(set(predictions)) < 2:
            return 0.0
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # answers that hardly differ
            found = getattr(stats, name)(predictions, references).statistic
        return float(found)

    return whole


def _sacrebleu(name: str) -> Callable[[Sequence[Any], Sequence[Any]], Score]:
    """From 0 to 100, as sacrebleu gives it."""

    def score(predictions: Sequence[Any], references: Sequence[Any]) -> Score:
        import sacrebleu

        metric = getattr(sacrebleu, name)()
        most = max(map(len, references))
        columns = [[each[min(place, len(each) - 1)] for each in references] for place in range(most)]  # the last one again where one has fewer
        found = metric.corpus_score(list(predictions), columns, n_bootstrap=_SACREBLEU_RESAMPLES if len(references) > 1 else 1)
        said = json.loads(found.format(width=6, signature=str(metric.get_signature()), is_json=True))
        error = float(said.get("confidence_var", 0.0)) / _Z_95 if len(references) > 1 else None
        return Score(value=float(found.score), standard_error=error)

    return score


_LABELS: tuple[Kind, ...] = ("classes",)
_SAID: tuple[Kind, ...] = ("spans", "texts")
METRICS: dict[str, Metric] = {
    found.name: found
    for found in (
        Metric(name="accuracy", kinds=_LABELS, score=_mean_of(lambda said, right: float(said == right))),
        Metric(name="f1", kinds=_LABELS, score=bootstrapped(_f1), package="sklearn"),
        Metric(name="matthews", kinds=_LABELS, score=bootstrapped(_matthews), package="sklearn"),
        Metric(name="spearman", kinds=("values",), score=bootstrapped(_correlation("spearmanr")), package="scipy"),
        Metric(name="pearson", kinds=("values",), score=bootstrapped(_correlation("pearsonr")), package="scipy"),
        Metric(name="exact_match", kinds=_SAID, score=_mean_of(exact_match)),
        Metric(name="squad_f1", kinds=_SAID, score=_mean_of(squad_f1)),
        Metric(name="rouge1", kinds=("texts",), score=_rouge("rouge1"), package="rouge_score"),
        Metric(name="rouge2", kinds=("texts",), score=_rouge("rouge2"), package="rouge_score"),
        Metric(name="rougeL", kinds=("texts",), score=_rouge("rougeL"), package="rouge_score"),
        Metric(name="bleu", kinds=("texts",), score=_sacrebleu("BLEU"), package="sacrebleu", best=100.0),
        Metric(name="chrf", kinds=("texts",), score=_sacrebleu("CHRF"), package="sacrebleu", best=100.0),
    )
}
"""By the names that `--metric` takes; each of which more is better."""
_INSTALLED_AS = {"sklearn": "scikit-learn", "scipy": "scikit-learn", "rouge_score": "rouge-score"}
_FIGURE = re.compile(r"[A-Za-z_][A-Za-z_0-9]*")


def find_metric(said: str, kind: Kind, taken: Sequence[str] = ()) -> Metric:
    """The metric of a name, or of FILE.py:function, whose file is run.

    Args:
        taken: names of other figures, which a user's own must not have.

    Raises:
        TaskError: none of that name, one that does not score such answers, one that is not installed; a file that cannot be run, or has no such
            function of two arguments.
    """
    if ".py:" in said:
        return _own(said, kind, {*taken, *METRICS})
    fitting = [name for name, metric in METRICS.items() if kind in metric.kinds]
    if said not in METRICS:
        raise TaskError(f"metric {said!r} does not exist; of {kind} there are {', '.join(fitting)}, or your own as FILE.py:function.")
    metric = METRICS[said]
    if kind not in metric.kinds:
        raise TaskError(f"metric {said} scores {' and '.join(metric.kinds)}, and the task's answers are {kind}; of these: {', '.join(fitting)}.")
    require_package(metric.package, f"metric {said}")
    return metric


def require_package(name: str | None, what: str) -> None:
    """Raises:
    TaskError: it is not installed.
    """
    if name is not None and importlib.util.find_spec(name) is None:
        raise TaskError(f"{what} needs {_INSTALLED_AS.get(name, name)}, which is not installed; pip install 'lighten[tasks]'.")


def _own(said: str, kind: Kind, taken: set[str]) -> Metric:
    """The user's function in the user's file."""
    place, _, name = said.rpartition(":")
    path = Path(place)
    if not path.is_file():
        raise TaskError(f"metric {said}: no file {place}.")
    if not _FIGURE.fullmatch(name):
        raise TaskError(f"metric {said}: {name!r} is no name of a function; say FILE.py:function.")
    if name in taken:
        raise TaskError(f"metric {said}: {name} is the name of another figure; call the function otherwise.")
    loader = importlib.util.spec_from_file_location(f"lighten_metric_{path.stem}", path)
    assert loader is not None, "its name ends in .py"
    assert loader.loader is not None, "and has a loader"
    module = importlib.util.module_from_spec(loader)
    try:
        loader.loader.exec_module(module)
    except Exception as error:
        raise TaskError(f"metric {said}: running the file failed ({_said(error)}).") from error
    function = getattr(module, name, None)
    if not callable(function):
        able = sorted(each for each, value in vars(module).items() if inspect.isfunction(value) and not each.startswith("_"))
        raise TaskError(f"metric {said}: the file has no function {name}; it has {', '.join(able) or 'none'}.")

    def whole(predictions: list[Any], references: list[Any]) -> float:
        try:
            found = function(predictions, [each[0] for each in references] if kind == "texts" else references)
            return float(found)
        except Exception as error:
            raise TaskError(f"metric {said} failed on {len(references)} examples ({_said(error)}).") from error

    def score(predictions: Sequence[Any], references: Sequence[Any]) -> Score:
        value = whole(list(predictions), list(references))
        if not math.isfinite(value):
            raise TaskError(f"metric {said} gave {value} on {len(references)} examples, which nothing can be compared with.")
        return bootstrapped(whole)(predictions, references)

    return Metric(name=name, kinds=(kind,), score=score, best=math.inf, digest=hashlib.sha256(path.read_bytes()).hexdigest())


def _said(error: Exception) -> str:
    first = next((line.strip() for line in str(error).splitlines() if line.strip()), "no message")
    return f"{type(error).__name__}: {first}"[:300]
