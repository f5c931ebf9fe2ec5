"""Recipes of several verbs: any order, one journal, zeros and shapes that survive to the end, and the same bytes after an end at any step.

Faults put in by hand, each caught: tuning after a quantization that compares with the original's blocks by their old numbers; zeros that training or
a refit fills.
"""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import pytest
from any_architecture import calibration, save_architecture

from lighten.compress import methods
from lighten.errors import RecipeError
from lighten.formats.artifact import RUN, Artifact, Work, write_artifact
from lighten.formats.safetensors_folder import expanded_weights
from lighten.model import read_spec
from lighten.model.spec import Linear, block_name
from lighten.recipe import apply_recipe, parse_recipe

STEPS = {
    "shrink": "shrink(layers, keep=1, tokens=64)",
    "prune": "prune(admm, sparsity=0.5, tokens=64)",
    "distill": "distill(logits, steps=2, tokens=64, batch_tokens=32)",
    "narrow": "shrink(ffn, ratio=0.5, tokens=64)",
}
LAST = "quantize(gptq, bits=4, group_size=16, symmetric=true, tokens=64)"
TUNED = "distill(scales, steps=2, tokens=64)"


def compress(folder: Path, text: str, out: Path, **work: Any) -> Artifact:
    return write_artifact(folder, parse_recipe(text), out, calibration=list, work=Work(windows=calibration("llama"), text="same", **work))


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_architecture("llama", tmp_path_factory.mktemp("pipelines") / "llama")


@pytest.mark.parametrize("order", list(itertools.permutations(STEPS, 4))[::5], ids=" | ".join)
def test_any_order_of_steps_gives_what_it_predicts(order: tuple[str, ...], llama: Path, tmp_path: Path) -> None:
    text = " | ".join([*(STEPS[name] for name in order), LAST, TUNED])
    artifact = compress(llama, text, tmp_path / "out")
    spec, predicted = read_spec(tmp_path / "out"), apply_recipe(parse_recipe(text), read_spec(llama))
    assert spec.total_parameters == predicted.total_parameters < 0.7 * read_spec(llama).total_parameters
    assert artifact.size_bytes == pytest.approx(artifact.predicted_size_bytes, rel=0.03)
    assert {block_name(part) for part in spec.parts if block_name(part)} == {"model.layers.0"}
    weights = dict(expanded_weights(tmp_path / "out", spec))
    linears = [part for part in spec.parts if isinstance(part, Linear) and part.component != "head"]
    assert all(part.weight.bits == 4 for part in linears)
    zeros = [float((weights[f"{part.name}.weight"] == 0).float().mean()) for part in linears]
    assert min(zeros) >= (0.5 if order.index("prune") > order.index("narrow") else 0.3), "of those that are left where neurons went afterwards"


def files_of(folder: Path) -> dict[str, bytes]:
    """All but how the run went."""
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file() and path.name != RUN}


class _Ended(BaseException):
    """In the place of a kill."""


@pytest.mark.parametrize("ended_at", range(5))
def test_a_pipeline_that_ends_at_any_step_goes_on_to_the_same_bytes(ended_at: int, llama: Path, tmp_path: Path, monkeypatch: Any) -> None:
    text = " | ".join([STEPS["shrink"], STEPS["prune"], STEPS["distill"], LAST, TUNED])
    compress(llama, text, tmp_path / "whole")
    steps = parse_recipe(text).steps
    key = (steps[ended_at].verb, steps[ended_at].method)
    done = methods.METHODS[key]

    def ends(job: Any) -> Any:
        done(job)
        raise _Ended

    with monkeypatch.context() as patched:
        patched.setitem(methods.METHODS, key, ends)
        with pytest.raises(_Ended):
            compress(llama, text, tmp_path / "out")
    said: list[str] = []
    compress(llama, text, tmp_path / "out", resume=True, log=said.append)
    assert files_of(tmp_path / "out") == files_of(tmp_path / "whole")
    if ended_at >= 2:
        assert not any(line.startswith("step ") and "loss" in line for line in said), "training was done already"


MIXES = [
    ("llama", "prune(magnitude, sparsity=0.5) | factorize(svd, ratio=0.5, tokens=64)"),
    ("llama", "factorize(svd, ratio=0.5, tokens=64) | prune(admm, sparsity=0.5, tokens=64)"),
    ("llama", "shrink(ffn, ratio=0.5, tokens=64) | factorize(svd, rank=8, tokens=64) | quantize(gptq, bits=4, group_size=8, tokens=64)"),
    ("llama", "prune(admm, sparsity=0.5, tokens=64) | quantize(gptq, group_size=16, tokens=64) | factorize(correction, rank=4, tokens=64)"),
    ("llama", "prune(admm, sparsity=0.5, allocation=sensitivity, tokens=64) | shrink(layers, keep=1, tokens=64)"),
    ("llama", "prune(magnitude, sparsity=0.7) | prune(wanda, sparsity=0.5, tokens=64) | cast(bfloat16)"),
    ("mixtral", "prune(admm, sparsity=0.5, tokens=64)"),
    ("mixtral", "prune(magnitude, sparsity=0.5, scope=global) | shrink(experts, ratio=0.5, tokens=64)"),
]


@pytest.mark.parametrize(("name", "text"), MIXES)
def test_a_mix_of_steps_is_written_and_comes_back(name: str, text: str, tmp_path: Path) -> None:
    """Each artifact is read back and run before it has its name (`verify_folder`)."""
    folder, recipe = save_architecture(name, tmp_path / "model"), parse_recipe(text)
    write_artifact(folder, recipe, tmp_path / "out", calibration=list, work=Work(windows=calibration(name)))
    assert read_spec(tmp_path / "out").total_parameters == apply_recipe(recipe, read_spec(folder)).total_parameters


def test_experts_that_no_token_meets_lose_their_share_too(tmp_path: Path) -> None:
    folder, recipe = save_architecture("mixtral", tmp_path / "model", num_local_experts=16), parse_recipe("prune(admm, sparsity=0.5, tokens=16)")
    row = {key: value[:1, :2] for key, value in calibration("mixtral")(16)[0].items()}
    said: list[str] = []
    write_artifact(folder, recipe, tmp_path / "out", calibration=list, work=Work(windows=lambda tokens: [row], log=said.append))
    assert any("no calibration row reaches" in line for line in said)
    spec = read_spec(tmp_path / "out")
    weights = dict(expanded_weights(tmp_path / "out", spec))
    for part in spec.parts:
        for key in part.tensors() if isinstance(part, Linear) and part.experts > 1 else ():
            assert float((weights[key] == 0).float().mean()) == 0.5


def test_shapes_are_cut_before_linears_are_factorized(llama: Path) -> None:
    with pytest.raises(
        RecipeError, match=r"^shrink\(ffn\) changes what follows from the config, which knows no linears of two factors; put it before"
    ):
        apply_recipe(parse_recipe("factorize(svd, rank=8) | shrink(ffn, ratio=0.5)"), read_spec(llama))
