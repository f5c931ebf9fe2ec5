"""Recipes of several verbs: any order, one journal, zeros and shapes that survive to the end, and the same bytes after an end at any step.

Faults put in by hand, each caught: tuning after a quantization that compares with the original's blocks by their old numbers, whether they went
before it or after; zeros that training or a refit fills; formats of experts that are looked for under the name of all.
"""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import pytest
import torch
from any_architecture import calibration, save_architecture
from safetensors.torch import load_file, save_file

from lighten.compress import methods, training
from lighten.errors import RecipeError
from lighten.formats.artifact import RUN, Artifact, Work, write_artifact
from lighten.formats.export import export
from lighten.formats.safetensors_folder import expanded_weights
from lighten.model import read_spec
from lighten.model.quantized import stored_tensors
from lighten.model.spec import Linear, ModelSpec, block_name
from lighten.recipe import apply_recipe, parse_recipe

Models = dict[str, Path]

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
    ("mixtral", "shrink(experts, ratio=0.5, tokens=64) | shrink(ffn, ratio=0.5, tokens=64) | distill(logits, steps=2, tokens=64, batch_tokens=64)"),
    (
        "mixtral",
        "factorize(svd, rank=8, targets=self_attn, tokens=64) | shrink(experts, ratio=0.5, tokens=64) | quantize(gptq, bits=4, group_size=8)",
    ),
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


# ---- all orders ----

ORDERED = {
    "prune": "prune(magnitude, sparsity=0.5)",
    "shrink": "shrink(ffn, ratio=0.5, tokens=64)",
    "factorize": "factorize(svd, rank=8, tokens=64)",
    "distill": "distill({what}, steps=2, tokens=64, batch_tokens=64)",
    "quantize": "quantize(rtn, bits=4, group_size=8)",
}
ORDERS = list(itertools.permutations(ORDERED))
TRAINED = {"llama": "logits", "bert": "embeddings"}


def ordered(order: tuple[str, ...], name: str) -> str:
    return " | ".join(ORDERED[step] for step in order).format(what=TRAINED[name])


def shapes_of(spec: ModelSpec) -> dict[str, tuple[int, ...]]:
    return {key: shape for part in spec.parts for key, shape in stored_tensors(part).items()}


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("ordered")
    return {name: save_architecture(name, root / name, num_hidden_layers=1) for name in TRAINED}


@pytest.mark.parametrize("name", TRAINED)
@pytest.mark.parametrize("order", [order for order in ORDERS if order[-1] == "quantize"], ids=" | ".join)
def test_each_order_of_the_steps_gives_the_shapes_and_bytes_that_it_predicts(
    order: tuple[str, ...], name: str, models: Models, tmp_path: Path
) -> None:
    recipe = parse_recipe(ordered(order, name))
    artifact = write_artifact(models[name], recipe, tmp_path / "out", calibration=list, work=Work(windows=calibration(name), text="same"))
    spec, predicted = read_spec(tmp_path / "out"), apply_recipe(recipe, read_spec(models[name]))
    assert shapes_of(spec) == shapes_of(predicted)
    assert spec.weight_bytes() == predicted.weight_bytes()
    assert artifact.size_bytes == pytest.approx(artifact.predicted_size_bytes, rel=0.05)
    pairs = [part for part in spec.parts if isinstance(part, Linear) and part.name.endswith((".up", ".down"))]
    assert {min(part.in_features, part.out_features) for part in pairs} == {8}
    assert all(part.weight.bits == 4 for part in pairs)
    if order.index("prune") > order.index("factorize"):  # of factors; zeros of a weight that is exchanged for factors go with it
        weights = dict(expanded_weights(tmp_path / "out", spec))
        assert all(float((weights[f"{part.name}.weight"] == 0).float().mean()) >= 0.3 for part in pairs), "fewer where columns went afterwards"


@pytest.mark.parametrize("name", TRAINED)
def test_dense_weights_are_changed_before_they_are_quantized_or_not_at_all(name: str, models: Models) -> None:
    """Each other order is refused, and says what would work."""
    spec = read_spec(models[name])
    for order in ORDERS:
        if order[-1] != "quantize":
            with pytest.raises(RecipeError, match=r"quantized to 4 bits; put (it|this step) before quantize") as caught:
                apply_recipe(parse_recipe(ordered(order, name)), spec)
            assert "\n" not in str(caught.value)


@pytest.mark.parametrize("name", TRAINED)
def test_steps_that_stand_alone_follow_each_other_in_pairs(name: str, models: Models) -> None:
    spec = read_spec(models[name])
    pairs = [pair for pair in itertools.permutations(ORDERED, 2) if pair[0] != "quantize"]
    for pair in pairs:
        assert apply_recipe(parse_recipe(ordered(pair, name)), spec).total_parameters <= spec.total_parameters


def test_an_order_that_ends_within_a_step_goes_on_to_the_same_bytes(models: Models, tmp_path: Path, monkeypatch: Any) -> None:
    """At the fourth step, the pairs of the second cut by the third."""
    text = ordered(("prune", "factorize", "shrink", "distill", "quantize"), "llama")
    work: dict[str, Any] = {"windows": calibration("llama"), "text": "same"}
    write_artifact(models["llama"], parse_recipe(text), tmp_path / "whole", calibration=list, work=Work(**work))
    with monkeypatch.context() as patched:
        patched.setattr(training.Trainer, "step", _end)
        with pytest.raises(_Ended):
            write_artifact(models["llama"], parse_recipe(text), tmp_path / "out", calibration=list, work=Work(**work))
    write_artifact(models["llama"], parse_recipe(text), tmp_path / "out", calibration=list, work=Work(resume=True, **work))
    assert files_of(tmp_path / "out") == files_of(tmp_path / "whole")


def _end(*_: Any) -> None:
    raise _Ended


def test_codes_are_tuned_against_the_blocks_that_are_left(tmp_path: Path) -> None:
    """The first block does nothing and goes: 8 bits of the second are near to the original, whose second block they are."""
    folder = save_architecture("llama", tmp_path / "model")
    tensors = load_file(folder / "model.safetensors")
    for name in ("self_attn.o_proj", "mlp.down_proj"):
        tensors[f"model.layers.0.{name}.weight"].zero_()
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    said: list[str] = []
    compress(
        folder, "quantize(rtn, bits=8) | shrink(layers, keep=1, tokens=64) | distill(scales, steps=1, tokens=64)", tmp_path / "out", log=said.append
    )
    assert float(next(line for line in said if line.startswith("distance")).split()[-1]) < 0.01
    dropped = [line for line in said if "turns its input" in line]
    assert float(dropped[0].split()[-4]) < 1e-6 < float(dropped[1].split()[-4])


@pytest.mark.parametrize("text", [
    "quantize(rtn, bits=4, group_size=16, targets=self_attn) | shrink(ffn, ratio=0.5, tokens=64) | distill(scales, steps=2, tokens=64)",
    "quantize(rtn, bits=4, group_size=16, targets=self_attn) | factorize(svd, rank=8, targets=mlp, tokens=64) | distill(scales, steps=2, tokens=64)",
    "factorize(svd, rank=8, tokens=64) | quantize(awq, bits=4, group_size=8, tokens=64) | distill(qat, steps=2, tokens=64)",
    "factorize(svd, rank=8, tokens=64) | rotate(hadamard) | quantize(gptq, bits=4, group_size=8, tokens=64)",
    "quantize(rtn, bits=4, group_size=16) | factorize(correction, rank=4, tokens=64) | shrink(layers, keep=1, tokens=64)",
])  # fmt: skip
def test_what_stands_between_steps_is_written_and_comes_back(llama: Path, tmp_path: Path, text: str) -> None:
    compress(llama, text, tmp_path / "out")
    assert shapes_of(read_spec(tmp_path / "out")) == shapes_of(apply_recipe(parse_recipe(text), read_spec(llama)))


@pytest.mark.parametrize("first", [
    "shrink(ffn, ratio=0.5, tokens=64)", "shrink(layers, keep=1, tokens=64)", "distill(logits, steps=2, tokens=64, batch_tokens=64)",
    "rotate(hadamard)", "factorize(svd, rank=8, targets=self_attn, tokens=64)", "prune(admm, sparsity=0.3, tokens=64)",
])  # fmt: skip
def test_a_correction_makes_up_for_what_quantizing_lost_after_any_step(llama: Path, tmp_path: Path, first: str) -> None:
    """And for what pruning lost before it, which left each weight in its place."""
    quantized = f"{first} | quantize(rtn, bits=3, group_size=16, targets=mlp)"
    found = []
    for number, text in enumerate(
        ("cast(float32)" if "prune" in first else first, quantized, f"{quantized} | factorize(correction, rank=16, targets=mlp, tokens=64)")
    ):
        compress(llama, text, tmp_path / str(number))
        export(tmp_path / str(number), "safetensors", tmp_path / f"dense{number}") if number else None
        folder = tmp_path / (f"dense{number}" if number else "0")
        found.append(dict(expanded_weights(folder, read_spec(folder))))
    whole, without, with_it = found
    for name in [name for name in whole if ".mlp." in name]:
        assert (with_it[name].float() - whole[name].float()).norm() < 0.97 * (without[name].float() - whole[name].float()).norm()


@pytest.mark.parametrize("text", [
    "factorize(svd, rank=16, tokens=64) | prune(magnitude, sparsity=0.5)",
    "prune(magnitude, sparsity=0.5) | quantize(rtn, bits=8, targets=mlp)",
])  # fmt: skip
def test_what_is_part_zeros_is_exported_whole(llama: Path, tmp_path: Path, text: str) -> None:
    compress(llama, text, tmp_path / "out")
    export(tmp_path / "out", "safetensors", tmp_path / "dense")
    spec, before = read_spec(tmp_path / "dense"), read_spec(llama)
    assert shapes_of(spec) == shapes_of(before)
    assert not {"sparsity_config", "low_rank", "quantization_config"} & spec.config.keys()
    found = dict(expanded_weights(tmp_path / "dense", spec))
    stored = dict(expanded_weights(tmp_path / "out", read_spec(tmp_path / "out")))
    pairs = {name.removesuffix(".up.weight"): stored[name] @ stored[name.replace(".up.", ".down.")] for name in stored if name.endswith(".up.weight")}
    for name, value in found.items():
        expected = stored[name] if name in stored else pairs[name.removesuffix(".weight")]
        assert torch.allclose(value, expected, atol=1e-5)


def test_a_correction_is_not_tuned(llama: Path, tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match=r"^distill\(scales\) compares with the original, which has nothing in the place of what factorize"):
        compress(llama, "quantize(rtn) | factorize(correction, rank=4) | distill(scales)", tmp_path / "out")
