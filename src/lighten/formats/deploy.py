"""What makes an artifact's folder one that can be handed on: a script that runs it by its runtime alone, a card, and the original's license."""

from __future__ import annotations

import re
import shutil
from collections.abc import Mapping
from importlib import resources
from pathlib import Path
from typing import Any

from lighten.errors import ModelError
from lighten.formats.settings import onnxruntime_settings, openvino_settings
from lighten.model import ModelSpec
from lighten.model.families._fields import label_count
from lighten.model.pooling import pools_first_token
from lighten.model.tasks import class_name, runs_with_head, takes_token_types, task_of
from lighten.model.text_ends import end_tokens, longest_text
from lighten.recipe import Recipe
from lighten.recipe.predict import compute_dtype
from lighten.recipe.targets import RUNTIMES
from lighten.units import format_bytes, format_count, format_seconds

SCRIPT, CARD, ORIGINAL_CARD = "run.py", "README.md", "original/README.md"
LICENSES = ("LICENSE*", "LICENCE*", "NOTICE*", "COPYING*", "USE_POLICY*")
WRITTEN = 256
"""Positions that a decoder's script fills: enough to see that it works."""
_FRONT = re.compile(r"\A---\n(.*?)\n---\n", re.DOTALL)


def write_script(folder: Path, recipe: Recipe, spec: ModelSpec, source: Path) -> bool:
    """`run.py` beside an artifact; whether there is one: what reads no text, or pools in another way, has none.

    Args:
        spec: of the artifact.
        source: the original's folder, whose description of pooling counts.
    """
    place = resources.files("lighten.formats") / "run_scripts" / f"{recipe.runtime.removesuffix('-compile')}_{_kind(spec, recipe.runtime)}.template"
    if not place.is_file() or not (folder / "tokenizer.json").is_file():
        return False
    try:
        first = not spec.is_decoder and pools_first_token(source)
    except ModelError:
        return False
    dtype = compute_dtype(recipe, spec)
    words = {
        "LENGTH": str(min(WRITTEN, spec.max_positions or WRITTEN) if spec.is_decoder else longest_text(source, spec)),
        "DTYPE": dtype, "DEVICE": recipe.device or "cpu", "ENDS": str(set(end_tokens(source)) or "()"),
        "POOLED": "hidden[:, 0]" if first else "(hidden * mask[..., None]).sum(1) / mask.sum(1, keepdims=True)",
        "KIND": str(spec.architecture), "NAMES": str([class_name(number, spec.config) for number in range(label_count(spec.config))]),
        "TYPES": 'inputs["token_type_ids"] = np.array([text.type_ids for text in texts])' if takes_token_types(spec) else "",
        "OPTIONS": str(_options(recipe, dtype, decoder=spec.is_decoder)),
    }  # fmt: skip
    text = re.sub(r"\b(" + "|".join(words) + r")\b", lambda found: words[found[0]], place.read_text(encoding="utf-8"))
    (folder / SCRIPT).write_text(text, encoding="utf-8")
    return True


def _kind(spec: ModelSpec, runtime: str) -> str:
    if spec.is_decoder:
        return "decoder"
    if runs_with_head(spec) and RUNTIMES[runtime].heads and task_of(spec) is not None:
        return "answerer" if task_of(spec) == "span" else "classifier"
    return "encoder"


def _options(recipe: Recipe, dtype: str, *, decoder: bool) -> Mapping[str, Any]:
    if recipe.runtime == "openvino":
        return openvino_settings(dtype, activations=recipe.activations, decoder=decoder)
    return onnxruntime_settings(dynamic=recipe.activations == "dynamic") if recipe.runtime == "onnxruntime" else {}


def is_about(path: Path, folder: Path) -> bool:
    """Whether a file of an artifact is for people, and no part of what a runtime reads."""
    place = path.relative_to(folder)
    if len(place.parts) > 1:
        return place.parts[0] == Path(ORIGINAL_CARD).parent.name
    return place.name in (SCRIPT, CARD) or any(place.match(pattern) for pattern in LICENSES)


def copy_licenses(source: Path, folder: Path) -> list[str]:
    """The original's licenses, as they are; its own card goes into `original/`. The names of what was copied."""
    found = sorted({path.name for pattern in LICENSES for path in source.glob(pattern) if path.is_file()})
    for name in found:
        shutil.copyfile(source / name, folder / name)
    if (source / CARD).is_file():
        (folder / ORIGINAL_CARD).parent.mkdir(exist_ok=True)
        shutil.copyfile(source / CARD, folder / ORIGINAL_CARD)
        found.append(ORIGINAL_CARD)
    return found


def license_of(source: Path) -> str | None:
    """The license that the original's card names in its front matter; None: it names none.

    >>> license_of(Path("/no/such/folder")) is None
    True
    """
    try:
        found = _FRONT.match((source / CARD).read_text(encoding="utf-8", errors="replace"))
    except OSError:
        return None
    said = re.search(r"^license:\s*(\S+)\s*$", found[1], re.MULTILINE) if found else None
    return said[1] if said else None


def write_card(
    folder: Path, recipe: Recipe, spec: ModelSpec, source: Path, manifest: Mapping[str, Any], measured: Mapping[str, Any] | None = None
) -> None:
    """`README.md`: what this is, its figures predicted and measured, and how to run it.

    Args:
        spec: of the artifact.
        manifest: the content of `lighten.json`.
        measured: what `choose` measured of it: a trial's record, with `workload`, and the baseline's figures under `original`; None: nothing.
    """
    name, license_ = source.resolve().name, license_of(source)
    front = ["---", *([f"license: {license_}"] if license_ else []), f"base_model: {name}", "tags: [lighten]", "---", ""]
    rows: list[tuple[str, str, str, str]] = [("size", format_bytes(manifest["predicted"]["size_bytes"]), format_bytes(manifest["size_bytes"]), "")]
    if measured:
        own, original = measured["measured"], measured["original"]
        rows = [
            (title, show(measured["predicted"].get(key)), show(own.get(key)), show(original.get(key)))
            for title, key, show in (
                ("size", "size_bytes", format_bytes), ("peak memory", "peak_memory_bytes", format_bytes), ("latency", "latency_s", format_seconds)
            )
        ]  # fmt: skip
        for metric, score in own["quality"].items():
            error = score["standard_error"]
            rows.append((metric.replace("_", " "), "", f"{score['value']:.4g}" + (f" ± {error:.2g}" if error else ""), ""))
    lines = [
        *front, f"# {name}, made lighter", "",
        f"`{recipe}`", "",
        f"Made by lighten {manifest['lighten']} from {name} ({format_count(spec.total_parameters)} parameters here), to run by {recipe.runtime}.", "",
        "| | predicted | measured | original |", "|---|---|---|---|",
        *(f"| {title} | {predicted} | {own} | {original} |" for title, predicted, own, original in rows), "",
    ]  # fmt: skip
    if measured:
        asked = measured["workload"]
        more = f", {asked['new_tokens']} new tokens" if asked["new_tokens"] else ""
        each = f"{asked['batch_size']} × {asked['seq_len']} tokens"
        if asked.get("lengths"):
            each = f"{len(asked['lengths'])} texts of their own lengths, {asked['batch_size']} at once, {asked['seq_len']} tokens at most"
        said = f"Latency: {asked['phase']}, {each}{more}."
        lines += [f"{said} `lighten measure` on this folder measures it again beside the original.", ""]
    if (folder / SCRIPT).is_file():
        lines += [f"Run it: `python {SCRIPT}`; the file's first line says what it needs.", ""]
    if (folder / SCRIPT).is_file() and recipe.options:
        said = ", ".join(f"{name}={value}" for name, value in recipe.options)
        lines += [f"`{SCRIPT}` gives the same without {said}: figures that were measured with it are of lighten's own loop.", ""]
    if license_:
        said = f", and its card is in [{ORIGINAL_CARD}]({ORIGINAL_CARD})" if (folder / ORIGINAL_CARD).is_file() else ""
        lines += [f"The original's license is {license_}; it holds for what was made from it{said}.", ""]
    (folder / CARD).write_text("\n".join(lines), encoding="utf-8")
