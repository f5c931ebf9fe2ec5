"""Structured removal on sixteen architectures: a smaller folder that transformers loads, and that is the masked original where only zeros went.

Oracles: transformers' own classes, which load what was written; brute-force least squares; a search of all choices on small cases.

Faults put in by hand, each caught: a group's columns taken in the wrong order where a Conv1D holds queries, keys and values; the weight of an RMSNorm
left as it was over fewer channels; heads removed without the others that share their key; a refit by the moments of the columns that go; layers
numbered in the order of their influence; the router's rows left in their old order; the first block's table of positions lost with it.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from any_architecture import ARCHITECTURES, calibration, save_architecture
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from torch import Tensor

from lighten.compress.checkpoint import Checkpoint
from lighten.compress.graph import record_graph
from lighten.compress.journal import Journal
from lighten.compress.shrink import plan_cuts
from lighten.compress.skeleton import Skeleton
from lighten.compress.structured import DAMPING, group_costs, keep_groups, refit
from lighten.compress.walk import Done, LayerReport, do_recipe
from lighten.errors import LightenError, RecipeError
from lighten.formats.artifact import Work, write_artifact
from lighten.formats.safetensors_folder import write_folder
from lighten.model.families import FAMILIES
from lighten.model.read import read_config
from lighten.model.source import read_spec
from lighten.model.spec import Linear, ModelSpec
from lighten.recipe import apply_recipe, parse_recipe
from lighten.recipe.predict import artifact_bytes
from lighten.recipe.shrink import DIVISIBLE, kept_features, spread_evenly

Folders = dict[str, Path]
METHODS = {
    "ffn": "shrink(ffn, ratio=0.5)",
    "heads": "shrink(heads, ratio=0.5)",
    "width": "shrink(width, ratio=0.5)",
    "layers": "shrink(layers, ratio=0.5)",
    "experts": "shrink(experts, ratio=0.5)",
}
DERIVED = {"phi", "gpt2", "gpt_neox", "bert", "roberta", "distilbert", "bart", "vit", "whisper"}
"""Configs without a field for the size of a head."""
REFUSED: dict[str, dict[str, str]] = {
    "ffn": {"mamba": "mamba has no feed-forward layers whose inner features can be told"},
    "heads": {
        "mamba": "mamba has no attention heads",
        **{name: "takes the size of a head from its width and the number of heads, so heads cannot go alone; shrink\\(width\\) takes" for name in DERIVED},
    },
    "width": {"mamba": "no fields of mamba's config say its width of 64 channels alone, or its width and heads"},
    "layers": {},
    "experts": {name: "has no experts" for name in ARCHITECTURES if name != "mixtral"},
}
LAYERNORM = DERIVED
"""Norms whose mean is taken off: zeros among their channels count."""
POSTNORM = {"bert", "roberta", "distilbert", "bart"}
"""A block that adds nothing still normalizes."""


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Folders:
    root = tmp_path_factory.mktemp("architectures")
    return {name: save_architecture(name, root / name) for name in ARCHITECTURES}


@contextmanager
def done(folder: Path, name: str, text: str, work: Path, *, resume: bool = False, **options: Any) -> Iterator[Done]:
    source = options.pop("calibration", calibration(name))
    with Journal.open(work, {}, resume=resume) as journal:
        yield do_recipe(Checkpoint(folder), read_spec(folder), parse_recipe(text), folder, journal, calibration=source, batch_rows=2, **options)


def write(folder: Path, name: str, text: str, out: Path, **options: Any) -> list[LayerReport]:
    """Carry a recipe out into a folder."""
    out.mkdir(parents=True)
    reports: list[LayerReport] = []

    def seen(result: Done) -> Iterator[tuple[str, Any]]:
        for key, weight, report in result.weights:
            reports.extend([report] if report is not None else [])
            yield key, weight

    with done(folder, name, text, out.parent / f"{out.name}.work", **options) as result:
        write_folder(seen(result), result.spec, folder, out)
    return reports


def load(folder: Path) -> Any:
    """The class that its config names, by transformers alone."""
    kind = getattr(transformers, read_config(folder)["architectures"][0])
    model, said = kind.from_pretrained(folder, output_loading_info=True, dtype=torch.float32, attn_implementation="eager")
    assert not any(said[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys", "error_msgs"))
    return model.eval()


def output(folder: Path, name: str, rows: int | None = None) -> Tensor:
    batch = {key: torch.from_numpy(value[:rows]) for key, value in calibration(name)(0)[0].items()}
    model = load(folder)
    if model.config.is_encoder_decoder and "decoder_input_ids" not in batch:
        batch["decoder_input_ids"] = batch["input_ids"]
    with torch.no_grad():
        found = model(**batch)
    value = found.logits if hasattr(found, "logits") else found[0]
    assert isinstance(value, Tensor)
    return value


def tensors_of(folder: Path) -> dict[str, Tensor]:
    return load_file(folder / "model.safetensors")


def with_tensors(folder: Path, out: Path, tensors: Mapping[str, Tensor]) -> Path:
    out.mkdir(parents=True)
    shutil.copy(folder / "config.json", out / "config.json")
    save_file({key: value.contiguous() for key, value in tensors.items()}, out / "model.safetensors", metadata={"format": "pt"})
    return out


def with_zeros(folder: Path, text: str, out: Path) -> Path:
    """The model with zeros wherever some channels lie, as many of each set as the recipe removes."""
    spec = read_spec(folder)
    after = apply_recipe(parse_recipe(text), spec)
    tensors = tensors_of(folder)
    places = Skeleton(spec.config, {key: tuple(value.shape) for key, value in tensors.items()}, dtype=torch.float32).places
    draw = np.random.default_rng(5)
    for cut in plan_cuts(record_graph(spec.config), places, spec, after, "shrink"):
        gone = torch.from_numpy(draw.permutation(cut.set.channels)[cut.kept :])
        for end in cut.set.ends:
            tensors[end.name] = tensors[end.name].index_fill(end.axis, torch.isin(end.channel, gone).nonzero().flatten(), 0)
    return with_tensors(folder, out, tensors)


def with_idle_block(folder: Path, out: Path, number: int) -> Path:
    """The model with a block of each stack that adds nothing to the stream."""
    spec, tensors = read_spec(folder), tensors_of(folder)
    for part in spec.parts:
        inner = isinstance(part, Linear) and (part.component == "attention" or part.in_features != 64)
        if isinstance(part, Linear) and inner and f".{number}." in part.name and any(piece in part.name for piece in BACK):
            for key in part.tensors():
                tensors[key] = torch.zeros_like(tensors[key])
    return with_tensors(folder, out, tensors)


BACK = ("o_proj", "down_proj", "out_proj", "c_proj", "fc2", ".o", ".wo", "w2", "output.dense", "attention.dense", "dense_4h_to_h", "self_attn.dense")
"""What writes to the stream, as the sixteen name it."""


def relative(found: Tensor, expected: Tensor) -> float:
    return float(torch.linalg.vector_norm(found - expected) / torch.linalg.vector_norm(expected))


# ---- the contract ----


@pytest.mark.parametrize("what", METHODS)
@pytest.mark.parametrize("name", ARCHITECTURES)
def test_a_smaller_folder_is_loaded_by_transformers_and_is_the_predicted_one(folders: Folders, tmp_path: Path, name: str, what: str) -> None:
    """Or the step is refused in one line before any work."""
    folder, text = folders[name], METHODS[what]
    if name in REFUSED[what]:
        with pytest.raises(RecipeError, match=REFUSED[what][name]), done(folder, name, text, tmp_path / "work"):
            pass
        assert not list((tmp_path / "work").glob("pass-*"))
        return
    reports = write(folder, name, text, tmp_path / "out")
    assert torch.isfinite(output(tmp_path / "out", name, 2)).all()
    before, after, predicted = read_spec(folder), read_spec(tmp_path / "out"), apply_recipe(parse_recipe(text), read_spec(folder))
    assert after.total_parameters == predicted.total_parameters < before.total_parameters
    assert {tensor.name: tensor.shape for tensor in after.tensors or ()} == shapes(predicted)
    assert after.weight_bytes() == predicted.weight_bytes() == sum(value.nbytes for value in tensors_of(tmp_path / "out").values())
    assert all((report.shape is None) == (report.relative_error is not None) for report in reports)


def shapes(spec: ModelSpec) -> dict[str, tuple[int, ...]]:
    return {key: shape for part in spec.parts for key, shape in part.tensors().items()}


@pytest.mark.parametrize("what", ["ffn", "heads", "width"])
@pytest.mark.parametrize("name", ARCHITECTURES)
def test_where_only_zeros_go_nothing_changes(folders: Folders, tmp_path: Path, name: str, what: str) -> None:
    if name in REFUSED[what] or (what == "width" and name in LAYERNORM):
        pytest.skip("refused, or zeros among its channels count in its norms")
    zeros = with_zeros(folders[name], METHODS[what], tmp_path / "zeros")
    write(zeros, name, METHODS[what], tmp_path / "out")
    assert relative(output(tmp_path / "out", name), output(zeros, name)) < 1e-5


@pytest.mark.parametrize("name", sorted(ARCHITECTURES.keys() - POSTNORM - {"mamba"}))
def test_blocks_that_add_nothing_go_and_nothing_changes(folders: Folders, tmp_path: Path, name: str) -> None:
    for number in (0, 1):
        idle = with_idle_block(folders[name], tmp_path / f"idle{number}", number)
        write(idle, name, METHODS["layers"], tmp_path / f"out{number}")
        assert relative(output(tmp_path / f"out{number}", name), output(idle, name)) < 1e-5
