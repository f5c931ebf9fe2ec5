"""Structured removal on sixteen architectures: a smaller folder that transformers loads, and that is the masked original where only zeros went.

Oracles: transformers' own classes, which load what was written; brute-force least squares; a search of all choices on small cases.

Faults put in by hand, each caught: columns of a group taken as if they lay side by side; the weight of an RMSNorm left as it was over fewer channels,
and its eps; heads removed without the others that share their key; a refit of the wrong sign; of equal groups the higher one kept; blocks numbered in
the order of their influence; the router's rows left in their old order; the first block's table of positions lost with it; a number that follows from
the width not made up for; lists with an entry a block left as they were; heads of each block chosen by themselves where a table binds them.
"""

from __future__ import annotations

import inspect
import json
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from any_architecture import ARCHITECTURES, calibration, save_architecture
from hypothesis import given
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
from lighten.errors import RecipeError
from lighten.formats.artifact import Work, write_artifact
from lighten.formats.safetensors_folder import expanded_weights, write_folder
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
        **dict.fromkeys(DERIVED, "takes the size of a head from its width and the number of heads, so heads cannot go alone; shrink.width. takes"),
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


@pytest.mark.parametrize("name", ["granitemoe", "gpt_oss"])
def test_experts_in_one_tensor_lose_channels_of_the_stream_alike(tmp_path: Path, name: str) -> None:
    zeros = with_zeros(save_architecture(name, tmp_path / "model"), METHODS["width"], tmp_path / "zeros")
    write(zeros, name, METHODS["width"], tmp_path / "out")
    assert relative(output(tmp_path / "out", name), output(zeros, name)) < 1e-5


@pytest.mark.parametrize("name", sorted(ARCHITECTURES.keys() - POSTNORM - {"mamba"}))
def test_blocks_that_add_nothing_go_and_nothing_changes(folders: Folders, tmp_path: Path, name: str) -> None:
    for number in (0, 1):
        idle = with_idle_block(folders[name], tmp_path / f"idle{number}", number)
        write(idle, name, METHODS["layers"], tmp_path / f"out{number}")
        assert relative(output(tmp_path / f"out{number}", name), output(idle, name)) < 1e-5


def test_experts_that_no_token_meets_go_and_nothing_changes(folders: Folders, tmp_path: Path) -> None:
    """The router sees one token alone, which meets two of four experts in each layer."""
    one = lambda tokens: [{"input_ids": calibration("mixtral")(0)[0]["input_ids"][:1, :1]}]  # noqa: E731
    write(folders["mixtral"], "mixtral", METHODS["experts"], tmp_path / "out", calibration=one)
    token = {key: torch.from_numpy(value) for key, value in one(0)[0].items()}
    with torch.no_grad():
        found, expected = (load(folder)(**token).logits for folder in (tmp_path / "out", folders["mixtral"]))
    assert relative(found, expected) < 1e-5


def test_several_query_heads_over_one_key_go_alone(tmp_path: Path) -> None:
    folder = save_architecture("llama", tmp_path / "model", num_key_value_heads=1)
    zeros = with_zeros(folder, METHODS["heads"], tmp_path / "zeros")
    write(zeros, "llama", METHODS["heads"], tmp_path / "out")
    config = read_config(tmp_path / "out")
    assert (config["num_attention_heads"], config["num_key_value_heads"], config["head_dim"]) == (2, 1, 16)
    assert relative(output(tmp_path / "out", "llama"), output(zeros, "llama")) < 1e-5


def test_a_head_whose_size_followed_from_others_has_it_in_the_config(tmp_path: Path) -> None:
    folder = save_architecture("mixtral", tmp_path / "model", head_dim=None)
    assert "head_dim" not in {key for key, value in read_config(folder).items() if value is not None}
    write(folder, "mixtral", METHODS["heads"], tmp_path / "out")
    assert read_config(tmp_path / "out")["head_dim"] == 16
    load(tmp_path / "out")


def test_heads_that_share_a_table_of_positions_go_in_all_blocks_alike(folders: Folders, tmp_path: Path) -> None:
    """T5's blocks add the first one's table to their scores, one row a head: two stacks, each with one choice for its two blocks."""
    with done(folders["t5"], "t5", METHODS["heads"], tmp_path / "work") as result:
        assert list(result.weights)
    kept: dict[int, list[tuple[int, ...]]] = {}
    with Journal.open(tmp_path / "work", {}, resume=True) as journal:
        for block in journal.blocks(0):
            for report in journal.read(0, block).reports:
                if "cut" in report:
                    kept.setdefault(report["cut"], []).append(tuple(report["kept"]))
    assert sorted(map(len, kept.values())) == [1, 1, 3, 3]  # cross attention by itself; the choice, and the same again in two blocks
    assert all(len(set(each)) == 1 for each in kept.values())


@pytest.mark.parametrize(
    ("text", "kept"),
    [
        ("shrink(layers, keep=2)", [1, 3]),
        ("shrink(layers, ratio=0.25)", [0, 1, 3]),
        ("shrink(layers, keep=3, by=even)", [0, 1, 3]),
        ("shrink(layers, keep=2, by=last)", [0, 1]),
    ],
)
def test_the_blocks_that_turn_the_stream_least_go_and_the_others_keep_their_order(tmp_path: Path, text: str, kept: list[int]) -> None:
    folder = save_architecture("llama", tmp_path / "model", num_hidden_layers=4)
    tensors = tensors_of(folder)
    for key in tensors:
        for number, share in ((0, 0.01), (2, 0.0)):  # the third block does nothing, the first little
            if f".{number}." in key and key.endswith(("o_proj.weight", "down_proj.weight")):
                tensors[key] = tensors[key] * share
    write(with_tensors(folder, tmp_path / "planted", tensors), "llama", text, tmp_path / "out")
    after = tensors_of(tmp_path / "out")
    for new, old in enumerate(kept):
        assert after[f"model.layers.{new}.mlp.up_proj.weight"].equal(tensors[f"model.layers.{old}.mlp.up_proj.weight"])
    assert not any(f".{len(kept)}." in key for key in after)


def test_lists_with_an_entry_a_block_follow_the_blocks_that_stay(folders: Folders, tmp_path: Path) -> None:
    idle = with_idle_block(folders["gemma"], tmp_path / "idle", 0)
    write(idle, "gemma", METHODS["layers"], tmp_path / "out")
    assert read_config(idle)["layer_types"] == ["sliding_attention", "full_attention"]
    assert read_config(tmp_path / "out")["layer_types"] == ["full_attention"]


# ---- recipes ----


def test_steps_follow_each_other(folders: Folders, tmp_path: Path) -> None:
    text = "shrink(layers, keep=1) | shrink(ffn, ratio=0.5) | shrink(heads, ratio=0.5) | shrink(width, ratio=0.25)"
    write(folders["llama"], "llama", text, tmp_path / "out")
    config = read_config(tmp_path / "out")
    assert [config[key] for key in ("num_hidden_layers", "intermediate_size", "num_attention_heads", "num_key_value_heads", "hidden_size")] == [
        1, 64, 2, 1, 48,
    ]  # fmt: skip
    assert torch.isfinite(output(tmp_path / "out", "llama")).all()


@pytest.mark.parametrize("name", ["llama", "bert", "t5"])
def test_two_shrinks_in_turn_are_one_after_the_other_from_folder_to_folder(folders: Folders, tmp_path: Path, name: str) -> None:
    first, second = "shrink(ffn, ratio=0.5)", "shrink(layers, ratio=0.5)"
    write(folders[name], name, f"{first} | {second}", tmp_path / "both")
    write(folders[name], name, first, tmp_path / "one")
    write(tmp_path / "one", name, second, tmp_path / "two")
    both, two = tensors_of(tmp_path / "both"), tensors_of(tmp_path / "two")
    assert both.keys() == two.keys()
    assert all(both[key].equal(two[key]) for key in both)
    assert read_config(tmp_path / "both") == read_config(tmp_path / "two")


def test_a_smaller_model_is_quantized(folders: Folders, tmp_path: Path) -> None:
    text = "shrink(ffn, ratio=0.5) | quantize(gptq, bits=8, group_size=32)"
    with done(folders["llama"], "llama", text, tmp_path / "work") as result:
        reports = [report for _, _, report in result.weights if report is not None]
    down = next(report for report in reports if report.name == "model.layers.0.mlp.down_proj.weight")
    assert (down.bits, down.shape, down.relative_error) == (8, (64, 64), None)
    query = next(report for report in reports if report.name == "model.layers.0.self_attn.q_proj.weight")
    assert query.shape is None
    assert query.relative_error is not None


@pytest.mark.parametrize(
    "text",
    [
        "shrink(ffn, ratio=0.5) | quantize(rtn, group_size=32)",
        "prune(magnitude, sparsity=0.5) | shrink(width, ratio=0.25)",
        "shrink(layers, keep=1)",
    ],
)
def test_an_artifact_is_as_large_as_predicted_and_says_its_layers(folders: Folders, tmp_path: Path, text: str) -> None:
    recipe, folder = parse_recipe(text), folders["llama"]
    artifact = write_artifact(folder, recipe, tmp_path / "out", calibration=list, work=Work(windows=calibration("llama"), text="random"))
    assert artifact.predicted_size_bytes == artifact_bytes(recipe, apply_recipe(recipe, read_spec(folder)))
    assert read_spec(tmp_path / "out").weight_bytes() == apply_recipe(recipe, read_spec(folder)).weight_bytes()
    layers = json.loads((tmp_path / "out" / "lighten.json").read_text())["layers"]
    assert any("shape" in layer for layer in layers) == ("layers" not in text)


def test_codes_stay_codes_where_blocks_go(folders: Folders, tmp_path: Path) -> None:
    with done(folders["llama"], "llama", "quantize(rtn, bits=8) | shrink(layers, keep=1)", tmp_path / "work") as result:
        reports = {report.name: report for _, _, report in result.weights if report is not None}
    assert reports["model.layers.0.mlp.up_proj.weight"].bits == 8
    assert all(report.relative_error is not None and report.relative_error < 0.02 for report in reports.values())


KILLED = [("llama", "shrink(ffn, ratio=0.5) | shrink(layers, keep=1)", (1, 2, 3)), ("bert", "shrink(width, ratio=0.5)", (1, 2))]


@pytest.mark.parametrize(("name", "text", "stop"), [(name, text, stop) for name, text, stops in KILLED for stop in stops])
def test_a_run_that_is_killed_goes_on_to_the_same_bytes(
    folders: Folders, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, text: str, stop: int
) -> None:
    write(folders[name], name, text, tmp_path / "whole")
    written = []
    original = Journal.write

    def killed(self: Journal, *args: Any, **options: Any) -> None:
        if len(written) == stop:
            raise KeyboardInterrupt
        written.append(args[:2])
        original(self, *args, **options)

    monkeypatch.setattr(Journal, "write", killed)
    with pytest.raises(KeyboardInterrupt), done(folders[name], name, text, tmp_path / "out.work") as result:
        list(result.weights)
    monkeypatch.undo()
    assert len(list((tmp_path / "out.work").glob("pass-*/*.block"))) == stop
    write(folders[name], name, text, tmp_path / "out", resume=True)
    assert (tmp_path / "out" / "model.safetensors").read_bytes() == (tmp_path / "whole" / "model.safetensors").read_bytes()
    assert (tmp_path / "out" / "config.json").read_bytes() == (tmp_path / "whole" / "config.json").read_bytes()


def test_zeros_stay_through_a_cut_and_are_counted_in_what_is_left(folders: Folders, tmp_path: Path) -> None:
    """Predicted: as large a share as there was; in the file: those that there are, in rows that go and in columns that are solved for anew too."""
    recipe = parse_recipe("prune(magnitude, sparsity=0.5) | shrink(ffn, ratio=0.5)")
    predicted = apply_recipe(recipe, read_spec(folders["llama"]))
    artifact = write_artifact(folders["llama"], recipe, tmp_path / "out", calibration=list, work=Work(windows=calibration("llama")))
    written = read_spec(tmp_path / "out")
    for before, after in zip(predicted.parts, written.parts, strict=True):
        if isinstance(before, Linear) and isinstance(after, Linear) and before.component in ("mlp", "attention"):
            assert before.weight.sparsity == 0.5
            assert before.weight.kept == before.in_features * before.out_features // 2
            assert after.weight.kept == pytest.approx(before.weight.kept, rel=0.2)
    dense = dict(expanded_weights(tmp_path / "out", written))
    masks = {name: load_file(tmp_path / "out" / "sparse.safetensors")[f"{name}_values"] for name in dense if name.endswith("down_proj.weight")}
    assert all(len(values) == int((dense[name] != 0).sum()) for name, values in masks.items())
    assert artifact.size_bytes == pytest.approx(artifact.predicted_size_bytes, rel=0.05)


# ---- edges ----


@pytest.mark.parametrize(
    ("name", "text", "says"),
    [
        ("llama", "shrink(ffn, ratio=1.0)", "shrink(ffn): ratio=1.0 is not possible; ratio is the share that goes, between 0 and 1."),
        ("llama", "shrink(heads, ratio=0)", "shrink(heads): ratio=0 is not possible; ratio is the share that goes, between 0 and 1."),
        ("llama", "shrink(heads, ratio=0.4)", "shrink(heads): ratio=0.4 of llama's 4 heads in 2 groups leaves all of them."),
        ("llama", "shrink(ffn, ratio=0.05)", "shrink(ffn): ratio=0.05 of llama's 128 inner features, in whole tiles of 8, leaves all of them."),
        ("llama", "shrink(width, ratio=0.1)", "shrink(width): ratio=0.1 of llama's 64 channels leaves all of them."),
        ("llama", "shrink(layers, keep=2)", "shrink(layers): all of llama's 2 blocks would stay."),
        ("llama", "shrink(layers, keep=3)", "shrink(layers): keep=3 is more than the 2 blocks of llama: no step makes a model larger."),
        ("llama", "shrink(vocab, keep=1000)", "shrink(vocab): llama has 64 tokens, and 1000 are to stay; keep fewer."),
        ("t5", "shrink(layers, ratio=0.4)", "shrink(layers): all of t5's 2 and 2 blocks would stay."),
        ("llama", "shrink(layers)", "shrink(layers): give exactly one of ratio and keep; given: none."),
        ("llama", "shrink(layers, keep=1, ratio=0.5)", "shrink(layers, ratio=0.5, keep=1): give exactly one of ratio and keep; given: ratio, keep."),
        (
            "llama", "shrink(layers, keep=1, by=even, tokens=5)",
            "shrink(layers, keep=1, by=even, tokens=5): tokens=5 has no effect with by=even, which looks at none.",
        ),
        ("mixtral", "shrink(experts, ratio=0.1)", "shrink(experts): ratio=0.1 of mixtral's 4 experts leaves all of them."),
        (
            "mixtral", "shrink(experts, ratio=0.75)",
            "shrink(experts): ratio=0.75 leaves 1 of 4 experts; at least 2 have to stay, for a token meets 2 and a router chooses.",
        ),
        ("llama", "quantize(rtn) | shrink(ffn)", "shrink(ffn): model.layers.0.mlp.gate_proj is already quantized to 8 bits; put this step before"),
        ("mamba", "shrink(width)", "shrink(width): no fields of mamba's config say its width of 64 channels alone, or its width and heads."),
    ],
)  # fmt: skip
def test_what_cannot_be_done_is_one_line(folders: Folders, name: str, text: str, says: str) -> None:
    with pytest.raises(RecipeError) as caught:
        apply_recipe(parse_recipe(text), read_spec(folders[name]))
    assert str(caught.value).startswith(says)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("changes", "text", "field", "size"),
    [
        ({"intermediate_size": 100}, "shrink(ffn, ratio=0.5)", "intermediate_size", 56),
        ({"intermediate_size": 13}, "shrink(ffn, ratio=0.9)", "intermediate_size", 8),
        ({"hidden_size": 72, "num_attention_heads": 9, "num_key_value_heads": 3}, "shrink(heads, ratio=0.34)", "num_attention_heads", 6),
        ({"hidden_size": 64, "num_attention_heads": 8, "num_key_value_heads": 8}, "shrink(heads, ratio=0.9)", "num_attention_heads", 1),
        ({"hidden_size": 64, "num_attention_heads": 8, "num_key_value_heads": 8}, "shrink(heads, ratio=0.25)", "num_attention_heads", 8),
        ({"hidden_size": 72, "num_attention_heads": 9, "num_key_value_heads": 3, "head_dim": 8}, "shrink(width, ratio=0.01)", "hidden_size", 72),
    ],
)
def test_counts_are_exact_for_odd_sizes(tmp_path: Path, changes: dict[str, int], text: str, field: str, size: int) -> None:
    """Llama's class takes a width alone that its heads divide: of 8 heads over 64 channels 6 cannot stay."""
    folder = save_architecture("llama", tmp_path / "model", **({"head_dim": 8} | changes))
    if read_config(folder)[field] == size:
        with pytest.raises(RecipeError, match=r"leaves all of them"):
            apply_recipe(parse_recipe(text), read_spec(folder))
        return
    write(folder, "llama", text, tmp_path / "out")
    assert read_config(tmp_path / "out")[field] == size
    load(tmp_path / "out")


@given(width=st.integers(1, 5000), ratio=st.floats(0.001, 0.999))
def test_kept_features_are_whole_tiles_and_no_fewer_than_asked_for(width: int, ratio: float) -> None:
    kept = kept_features(width, ratio)
    assert 0 < kept <= width
    assert kept == width or kept % 8 == 0
    assert width * (1 - ratio) - 1e-5 <= kept < width * (1 - ratio) + 8 + 1e-5


@given(count=st.integers(1, 100), data=st.data())
def test_an_even_spread_has_so_many_different_blocks(count: int, data: st.DataObject) -> None:
    kept = data.draw(st.integers(1, count))
    places = spread_evenly(count, kept)
    assert len(set(places)) == kept
    assert list(places) == sorted(places)
    assert places[0] == 0
    assert kept == 1 or places[-1] == count - 1


def test_the_classes_that_take_divisible_widths_alone_are_those_of_transformers() -> None:
    found = set()
    for family in set(FAMILIES) & set(transformers.CONFIG_MAPPING):
        check = getattr(transformers.CONFIG_MAPPING[family], "validate_architecture", None)
        if check is not None and "self.hidden_size % self.num_attention_heads" in inspect.getsource(check):
            found.add(family)
    assert found == DIVISIBLE


@pytest.mark.parametrize(
    "text",
    ["shrink(ffn, ratio=0.5) @ onnxruntime", "shrink(layers, keep=1) @ openvino", "shrink(width, ratio=0.5) | quantize(rtn) @ openvino",
     "shrink(ffn, ratio=0.5) | quantize(dynamic) @ onnxruntime"],
)  # fmt: skip
def test_a_graph_has_the_smaller_shapes(text: str, folders: Folders, tmp_path: Path) -> None:
    """Its output is held to that of the smaller model before the artifact gets its name (`verify_graph`)."""
    recipe, spec = parse_recipe(text), read_spec(folders["bert"])
    artifact = write_artifact(folders["bert"], recipe, tmp_path / "out", calibration=list, work=Work(windows=calibration("bert")))
    smaller = apply_recipe(recipe, spec)
    assert json.loads((tmp_path / "out" / "config.json").read_text())["intermediate_size"] == smaller.config["intermediate_size"]
    assert artifact.size_bytes < 0.95 * artifact_bytes(replace(recipe, steps=()), apply_recipe(replace(recipe, steps=()), spec))


def test_the_description_of_pooling_has_the_new_width(folders: Folders, tmp_path: Path) -> None:
    shutil.copytree(folders["bert"], tmp_path / "model")
    (tmp_path / "model" / "1_Pooling").mkdir()
    (tmp_path / "model" / "1_Pooling" / "config.json").write_text(json.dumps({"word_embedding_dimension": 64, "pooling_mode_mean_tokens": True}))
    write(tmp_path / "model", "bert", METHODS["width"], tmp_path / "out")
    said = json.loads((tmp_path / "out" / "1_Pooling" / "config.json").read_text())
    assert said == {"word_embedding_dimension": 32, "pooling_mode_mean_tokens": True}


# ---- the algorithm ----


def layer(seed: int, outputs: int, columns: int, rows: int = 200) -> tuple[Tensor, Tensor, Tensor]:
    """[O, I] a weight, [T, I] inputs that hang together, and their second moments."""
    draw = torch.Generator().manual_seed(seed)
    x = torch.randn(rows, columns, generator=draw, dtype=torch.float64) @ torch.randn(columns, columns, generator=draw, dtype=torch.float64)
    return torch.randn(outputs, columns, generator=draw, dtype=torch.float64), x, x.T @ x / rows


@pytest.mark.parametrize("seed", range(5))
def test_a_refit_is_the_least_squares_answer(seed: int) -> None:
    """Brute force: least squares on the rows themselves, with the damping as rows of its own that hold the weight where it was."""
    weight, x, hessian = layer(seed, 5, 12)
    kept = torch.rand(12, generator=torch.Generator().manual_seed(seed)) < 0.6
    weights_rows = (DAMPING * hessian.diagonal().mean() * len(x)).sqrt() * torch.eye(12, dtype=torch.float64)
    rows = torch.cat([x, weights_rows])
    found = torch.linalg.lstsq(rows[:, kept], rows @ weight.T).solution
    made = refit(weight, hessian, kept)
    torch.testing.assert_close(made[:, kept], found.T)
    assert not made[:, ~kept].any()


def cost(weight: Tensor, hessian: Tensor, kept: Tensor) -> float:
    change = refit(weight, hessian, kept) - weight
    matrix = hessian + DAMPING * hessian.diagonal().mean() * torch.eye(len(hessian), dtype=torch.float64)
    return float((change @ matrix * change).sum())


@pytest.mark.parametrize("size", [1, 2, 3])
@pytest.mark.parametrize("seed", range(5))
def test_the_group_that_goes_first_is_the_best_of_all(seed: int, size: int) -> None:
    """Brute force: what each choice costs once the others are refitted is what `group_costs` says."""
    weight, _, hessian = layer(seed, 4, 12)
    groups = torch.arange(12) // size if seed % 2 else torch.arange(12) % (12 // size)
    costs = [cost(weight, hessian, groups != group) for group in range(12 // size)]
    kept = keep_groups(weight, hessian, groups, count=12 // size - 1)
    assert sorted(set(range(12 // size)) - set(kept.tolist())) == [int(np.argmin(costs))]
    matrix = hessian + DAMPING * hessian.diagonal().mean() * torch.eye(12, dtype=torch.float64)
    whole = float((weight @ matrix * weight).sum())
    torch.testing.assert_close(group_costs(weight, hessian, groups) * whole, torch.tensor(costs, dtype=torch.float64))


@pytest.mark.parametrize("seed", range(4))
def test_greedy_choices_are_near_the_best_of_all(seed: int) -> None:
    from itertools import combinations

    weight, _, hessian = layer(seed, 4, 10)
    best = min(cost(weight, hessian, torch.isin(torch.arange(10), torch.tensor(each))) for each in combinations(range(10), 6))
    kept = keep_groups(weight, hessian, torch.arange(10), count=6)
    by_size = (weight**2).sum(0).argsort(descending=True)[:6]
    found, plain = (cost(weight, hessian, torch.isin(torch.arange(10), each)) for each in (kept, by_size))
    assert found <= 1.5 * best
    assert found <= plain


@given(groups=st.integers(1, 12), size=st.integers(1, 3), seed=st.integers(0, 99), data=st.data())
def test_exactly_so_many_groups_stay(groups: int, size: int, seed: int, data: st.DataObject) -> None:
    count = data.draw(st.integers(1, groups))
    weight, _, hessian = layer(seed, 3, groups * size, rows=5)
    kept = keep_groups(weight, hessian, torch.arange(groups).repeat(size), count=count)
    assert len(set(kept.tolist())) == count
    assert kept.tolist() == sorted(kept.tolist())


def test_of_equal_groups_the_lower_stays() -> None:
    assert keep_groups(torch.ones(2, 6), torch.eye(6), torch.arange(6), count=4).tolist() == [0, 1, 2, 3]
    assert keep_groups(torch.ones(2, 6), torch.eye(6), torch.arange(6) // 2, count=1).tolist() == [0]
    assert keep_groups(torch.ones(2, 6), torch.zeros(6, 6), torch.arange(6), count=2).tolist() == [0, 1]


def test_of_two_columns_that_are_the_same_one_takes_the_others_part() -> None:
    weight, x, _ = layer(0, 4, 6)
    x[:, 5] = x[:, 2]
    hessian = x.T @ x / len(x)
    kept = keep_groups(weight, hessian, torch.arange(6), count=5)
    assert kept.tolist() in ([0, 1, 2, 3, 4], [0, 1, 3, 4, 5])
    made = refit(weight, hessian, torch.isin(torch.arange(6), kept))
    assert relative(x @ made.T, x @ weight.T) < 0.02
