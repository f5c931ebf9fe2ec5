"""The answer of a search: `choice.json`, and the chosen artifact in its place."""

from __future__ import annotations

import json
import os
import shutil
import time
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from lighten import __version__
from lighten.choose.request import Asked
from lighten.choose.search import Answer
from lighten.choose.trial import Bench
from lighten.errors import OutputError
from lighten.formats.artifact import MANIFEST
from lighten.formats.deploy import write_card
from lighten.judge.child import WorkerFailed
from lighten.judge.measure import MOST_TEXTS
from lighten.recipe import apply_recipe, parse_recipe


def hand_over(asked: Asked, bench: Bench, answers: Sequence[Answer]) -> dict[str, Any]:
    """Put the artifact into its place and write `choice.json`: the first answer, and what others say under `elsewhere`."""
    request, first = asked.request, answers[0]
    try:
        _keep_artifact(asked, bench, first)
    finally:
        bench.close()
    spec = asked.spec
    choice = {
        "lighten": __version__, "command": request.command,
        "model": {
            "name": spec.name, "family": spec.family, "source": str(request.model), "dtype": spec.dtype, "parameters": spec.total_parameters,
        },
        "workload": asdict(request.workload), "require": list(request.require), "objective": asked.objective.figure, "goal": asked.objective.verb,
        "quality_metric": asked.metric,
        "text": {
            "source": asked.text.source, "calibration_texts": len(asked.text.calibration), "test_texts": min(len(asked.text.test), MOST_TEXTS),
        },
        "task": asked.task.as_json() if asked.task else None,
        "seconds": round(time.monotonic() - asked.start, 1), **first.document, "elsewhere": [answer.document for answer in answers[1:]],
    }  # fmt: skip
    write_beside(request.out / "choice.json", json.dumps(choice, indent=1) + "\n")
    shutil.rmtree(bench.work, ignore_errors=True)
    return choice


def _keep_artifact(asked: Asked, bench: Bench, answer: Answer) -> None:
    """Put the chosen artifact into its place, built again where no run left it; where nothing is chosen, none stays there."""
    place, gone, chosen = asked.request.out / "artifact", bench.work / "replaced", answer.chosen
    if chosen and _trial_of(place) == chosen["id"]:
        return
    held = _built(asked, bench, answer) if chosen else None
    shutil.rmtree(gone, ignore_errors=True)
    if place.exists():
        bench.work.mkdir(exist_ok=True)
        os.replace(place, gone)  # at once, where a removal may be cut off
    if held:
        os.replace(held, place)


def _built(asked: Asked, bench: Bench, answer: Answer) -> Path:
    """The folder of the chosen artifact, its manifest naming the trial, its card what was measured.

    Raises:
        OutputError: it had to be built again, and that failed.
    """
    chosen = answer.chosen
    assert chosen is not None, "asked for where something was chosen"
    recipe = parse_recipe(f"{chosen['recipe']} @ {chosen['runtime']}")
    held: Path = bench.work / "artifacts" / chosen["id"]
    if not held.exists():
        asked.log("writing the chosen artifact")
        try:
            bench.write(recipe, held)
        except WorkerFailed as error:
            raise OutputError(f"{asked.request.out / 'artifact'} could not be written: {error}.") from error
    manifest = json.loads((held / MANIFEST).read_text())
    measured = chosen | {"original": answer.baseline["measured"], "workload": asdict(asked.request.workload)}
    write_card(held, recipe, apply_recipe(recipe, asked.spec), asked.request.model, manifest, measured)
    write_beside(held / MANIFEST, json.dumps(manifest | {"trial": chosen["id"]}, indent=1) + "\n")
    return held


def _trial_of(artifact: Path) -> str | None:
    """The id of the trial whose artifact lies in a folder; None where none does."""
    try:
        manifest = json.loads((artifact / MANIFEST).read_text())
        return str(manifest["trial"])
    except (OSError, ValueError, KeyError, TypeError):
        return None


def write_beside(path: Path, content: str) -> None:
    """Write a file beside its place, then rename it: whoever reads sees the old or the new one, whole.

    Raises:
        OutputError: it cannot be written.
    """
    beside = path.with_name(f".{path.name}.part")
    try:
        beside.write_text(content)
        os.replace(beside, path)
    except OSError as error:
        beside.unlink(missing_ok=True)
        raise OutputError(f"{path} cannot be written: {error.strerror}.") from error
