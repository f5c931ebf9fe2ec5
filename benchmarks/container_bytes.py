"""Bytes of description that an artifact has beside its weights, for each tensor or operator: the CONTAINER_BYTES of lighten/recipe/predict.py.

    python benchmarks/container_bytes.py --model .models/minilm .models/smollm2-135m

Each model folder gives a family and an architecture; narrow models of it with random weights are made at several depths and written by each
recipe of RECIPES that the family can take. Description = the artifact's files - weights as their formats store them - side files. It grows in a
straight line with the number of tensors or operators, counted as `artifact_bytes` counts them: the slope between depths is the constant, the
rest is what a graph has once. --wide repeats the measurement at twice the width: a slope that grows with it holds weights, not description.
The last line is one JSON object.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
import torch
import transformers

from lighten.errors import RecipeError
from lighten.formats.artifact import write_artifact
from lighten.model import ModelSpec, read_spec
from lighten.model.read import read_config
from lighten.recipe import Recipe, apply_recipe, parse_recipe
from lighten.recipe.predict import CONTAINER_BASE_BYTES, CONTAINER_BYTES, artifact_bytes

NARROW: dict[str, Any] = {
    "vocab_size": 320, "hidden_size": 64, "num_attention_heads": 4, "intermediate_size": 128, "max_position_embeddings": 64, "head_dim": 16,
}  # fmt: skip
RECIPES = (
    "@ torch",
    "cast(bfloat16) @ torch",
    "quantize(rtn, embeddings=true) @ torch",
    "quantize(rtn, bits=4, group_size=32) @ torch",
    "@ onnxruntime",
    "quantize(dynamic) @ onnxruntime",
    "quantize(dynamic, embeddings=true) @ onnxruntime",
    "@ openvino",
    "cast(float16) @ openvino",
    "quantize(rtn, embeddings=true) @ openvino",
    "quantize(rtn, symmetric=true, embeddings=true) @ openvino",
    "quantize(rtn, bits=4, group_size=32) @ openvino",
    "quantize(dynamic, embeddings=true) @ openvino",
    "quantize(static) @ openvino",
)


@dataclass(frozen=True, kw_only=True)
class Row:
    """One recipe on one family at one width: description bytes by depth, and the straight line through them.

    Attributes:
        per_item: bytes that each further tensor or operator adds.
        once: bytes that none of them explains.
    """

    family: str
    recipe: str
    runtime: str
    width: int
    description_bytes: dict[int, int]
    items: dict[int, int]
    per_item: float
    once: float


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--model", type=Path, nargs="+", required=True, help="folders in Hugging Face format, one a family; their weights are not read"
    )
    parser.add_argument("--depths", type=int, nargs="+", default=[1, 3], help="layers of the narrow models")
    parser.add_argument("--runtime", nargs="+", default=list(CONTAINER_BYTES), choices=CONTAINER_BYTES, help="default: all")
    parser.add_argument("--wide", action="store_true", help="measure at twice the width too")
    args = parser.parse_args(arguments)
    transformers.logging.disable_progress_bar()
    rows = []
    for model in args.model:
        for scale in (1, 2) if args.wide else (1,):
            rows += measure_family(model, args.depths, args.runtime, scale)
    by_runtime = {name: found for name in args.runtime if (found := summary([row for row in rows if row.runtime == name], CONTAINER_BYTES[name]))}
    for name, found in by_runtime.items():
        range_ = f"{found['least']:.0f} to {found['most']:.0f}"
        print(f"{name}: median {found['median_per_item']:.0f} bytes an item ({range_}); predict.py takes {found['taken']}")
    print(json.dumps({"benchmark": "container_bytes", "by_runtime": by_runtime, "rows": [asdict(row) for row in rows]}))


def measure_family(model: Path, depths: Sequence[int], runtimes: Sequence[str], scale: int) -> list[Row]:
    """The rows of one family at one width."""
    with tempfile.TemporaryDirectory(prefix="lighten-container-") as work:
        folders = {depth: write_narrow(read_config(model), depth, scale, Path(work) / f"model-{depth}") for depth in depths}
        rows = []
        for number, text in enumerate(RECIPES):
            if parse_recipe(text).runtime not in runtimes:
                continue
            row = measure_recipe(text, folders, Path(work), number)
            if row:
                rows.append(row)
                print(
                    f"{row.family:6} width {row.width:3}  {text:58} {row.per_item:7.0f} an item + {row.once:7.0f} once  {row.description_bytes}",
                    flush=True,
                )
        return rows


def measure_recipe(text: str, folders: dict[int, Path], work: Path, number: int) -> Row | None:
    """One recipe at every depth; None where the family cannot take it."""
    recipe = parse_recipe(text)
    described, items = {}, {}
    for depth, folder in folders.items():
        spec = read_spec(folder)
        try:
            changed = apply_recipe(recipe, spec)
        except RecipeError:
            return None
        made = write_artifact(folder, recipe, work / f"artifact-{number}-{depth}", calibration=random_batches, exports=work / "exports")
        bare, items[depth] = bare_bytes(recipe, changed)
        described[depth] = made.size_bytes - bare
    depths = list(folders)
    per_item, once = np.polyfit([items[depth] for depth in depths], [described[depth] for depth in depths], 1)
    return Row(
        family=spec.family, recipe=text, runtime=recipe.runtime, width=int(spec.config["hidden_size"]), description_bytes=described, items=items,
        per_item=float(per_item), once=float(once),
    )  # fmt: skip


def bare_bytes(recipe: Recipe, spec: ModelSpec) -> tuple[int, int]:
    """What `artifact_bytes` predicts without any description, and for how many items it would take the constant."""
    with patch.dict(CONTAINER_BASE_BYTES, {recipe.runtime: 0}):
        with patch.dict(CONTAINER_BYTES, {recipe.runtime: 0}):
            bare = artifact_bytes(recipe, spec)
        with patch.dict(CONTAINER_BYTES, {recipe.runtime: 1}):
            return bare, artifact_bytes(recipe, spec) - bare


def write_narrow(config: dict[str, Any], depth: int, scale: int, folder: Path) -> Path:
    """A model of the config's architecture with random weights, `depth` layers and narrow ones."""
    torch.manual_seed(0)
    wider = {key: NARROW[key] * scale for key in ("hidden_size", "intermediate_size", "num_attention_heads")}
    grouped = {"num_key_value_heads": wider["num_attention_heads"] // 2} if "num_key_value_heads" in config else {}
    heads = {} if "head_dim" in config else {"head_dim": None}
    kept = {key: value for key, value in config.items() if key != "quantization_config"}
    narrow = {key: value for key, value in {**kept, **NARROW, **wider, **grouped, **heads, "num_hidden_layers": depth}.items() if value is not None}
    architecture = getattr(transformers, config["architectures"][0])
    module = architecture(architecture.config_class(**narrow))
    for parameter in module.parameters():
        torch.nn.init.normal_(parameter)  # fresh biases are all 0 and norms all 1, which OpenVINO stores once for all
    module.save_pretrained(folder)
    return folder


def random_batches() -> list[dict[str, Any]]:
    """Calibration inputs: the scales that they give take no other room than true ones."""
    random = np.random.default_rng(0)
    return [{"input_ids": random.integers(0, NARROW["vocab_size"], (1, 16)), "attention_mask": np.ones((1, 16), np.int64)} for _ in range(4)]


def summary(rows: Sequence[Row], taken: int) -> dict[str, float] | None:
    """Over the rows of a runtime; None where it has none."""
    if not rows:
        return None
    slopes = [row.per_item for row in rows]
    return {"median_per_item": statistics.median(slopes), "least": min(slopes), "most": max(slopes), "taken": taken}


if __name__ == "__main__":
    main()
