"""Advice: each lever is what the other commands take, gains what they say, and is ranked by what was asked for."""

from __future__ import annotations

import argparse
import itertools
import json
import random
import shlex
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import quality_ranges
from choose_setup import made_up_profile

from lighten import verbs
from lighten.cli import estimate as estimate_command
from lighten.cli.main import main
from lighten.cli.options import plan_of, workload_of
from lighten.cost.workload import PHASES
from lighten.device.catalog import read_device, with_price
from lighten.device.device import Device
from lighten.errors import LightenError, RecipeError, WorkloadError
from lighten.model import ModelSpec
from lighten.model.spec import Attention, Linear, WeightFormat
from lighten.parallel.plan import Plan
from lighten.recipe import Recipe, apply_recipe, parse_recipe, read_recipe
from lighten.recipe.advise import GOALS, Advice, Line, advise, gains, join, loss
from lighten.recipe.case import Case, cost_of, has_sparse_products
from lighten.recipe.draft import ACCEPTED, expected_tokens, speculate
from lighten.recipe.levers import LEVERS, Lever, compatible, propose
from lighten.recipe.predicted import PREDICTED
from lighten.recipe.quality import BASELINE, SAME, Quality, quality_of_cache, quality_of_step, together
from lighten.recipe.shrink import kept_features
from lighten.recipe.steps import STEPS
from lighten.verbs import open_spec

CONFIGS: dict[str, dict[str, Any]] = {
    "bert": {
        "model_type": "bert", "architectures": ["BertModel"], "vocab_size": 3000, "hidden_size": 128, "num_hidden_layers": 4,
        "num_attention_heads": 4, "intermediate_size": 512, "max_position_embeddings": 512, "type_vocab_size": 2,
    },
    "llama": {
        "model_type": "llama", "architectures": ["LlamaForCausalLM"], "vocab_size": 3000, "hidden_size": 256, "num_hidden_layers": 4,
        "num_attention_heads": 8, "num_key_value_heads": 4, "intermediate_size": 768, "max_position_embeddings": 4096,
        "tie_word_embeddings": False, "torch_dtype": "bfloat16",
    },
    "gpt2": {
        "model_type": "gpt2", "architectures": ["GPT2LMHeadModel"], "vocab_size": 3000, "n_embd": 128, "n_layer": 4, "n_head": 4, "n_positions": 1024,
    },
    "t5": {
        "model_type": "t5", "architectures": ["T5ForConditionalGeneration"], "vocab_size": 3000, "d_model": 128, "num_layers": 4,
        "num_decoder_layers": 4, "num_heads": 4, "d_ff": 512, "d_kv": 32,
    },
    "mixtral": {
        "model_type": "mixtral", "architectures": ["MixtralForCausalLM"], "vocab_size": 3000, "hidden_size": 128, "num_hidden_layers": 4,
        "num_attention_heads": 4, "num_key_value_heads": 2, "intermediate_size": 384, "num_local_experts": 4, "num_experts_per_tok": 2,
        "torch_dtype": "bfloat16",
    },
}  # fmt: skip
WIDE = CONFIGS["llama"] | {
    "vocab_size": 32000, "hidden_size": 4096, "num_hidden_layers": 7, "num_attention_heads": 32, "num_key_value_heads": 32,
    "intermediate_size": 44032,
}  # fmt: skip
"""4.5 billion parameters, so that published ranges are told of it, in few layers, so that it is fast."""
SIZES = {"train": {"batch_size": 4, "seq_len": 128}, "decode": {"seq_len": 128, "new_tokens": 8}, "generate": {"seq_len": 128, "new_tokens": 8}}
COMMON = ("vocab_size", "hidden_size", "num_hidden_layers", "intermediate_size")


pytestmark = pytest.mark.usefixtures("made_up_rates")


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """Configs without weights: nothing here reads any."""
    found = tmp_path_factory.mktemp("models")
    for name, config in {**CONFIGS, "wide": WIDE, "draft": CONFIGS["llama"] | {"num_hidden_layers": 1, "hidden_size": 64}}.items():
        (found / name).mkdir()
        (found / name / "config.json").write_text(json.dumps(config))
    return found


def spec_of(folder: Path, name: str) -> ModelSpec:
    return open_spec(str(folder / name))


def case_of(spec: ModelSpec, phase: str, **changes: Any) -> Case:
    return Case(spec=spec, workload=verbs.make_workload(spec, phase=phase, **{**SIZES.get(phase, {}), **changes}))  # type: ignore[arg-type]


def phases_of(spec: ModelSpec) -> list[str]:
    found = []
    for phase in PHASES:
        try:
            case_of(spec, phase)
        except WorkloadError:
            continue
        found.append(phase)
    return found


def gpu() -> Device:
    return with_price(read_device("a100-sxm-80gb"), "2/h")


# ---- steps that are read before they are done ----


@pytest.mark.parametrize(
    ("name", "recipe", "changes"),
    [
        ("llama", "shrink(ffn, ratio=0.25)", {"intermediate_size": 576}),
        ("bert", "shrink(ffn, ratio=0.5)", {"intermediate_size": 256}),
        ("gpt2", "shrink(ffn, ratio=0.5)", {"n_inner": 256}),
        ("t5", "shrink(ffn, ratio=0.5)", {"d_ff": 256}),
        ("mixtral", "shrink(ffn, ratio=0.5)", {"intermediate_size": 192}),
        ("llama", "shrink(layers, ratio=0.5)", {"num_hidden_layers": 2}),
        ("bert", "shrink(layers, ratio=0.4)", {"num_hidden_layers": 3}),
        ("gpt2", "shrink(layers, ratio=0.75)", {"n_layer": 1}),
        ("t5", "shrink(layers, ratio=0.5)", {"num_layers": 2, "num_decoder_layers": 2}),
        ("mixtral", "shrink(layers, ratio=0.5)", {"num_hidden_layers": 2}),
    ],
)
def test_a_smaller_model_is_that_of_a_smaller_config(folder, tmp_path, name, recipe, changes):
    """The oracle is the family's own description of the smaller config."""
    (tmp_path / "smaller").mkdir()
    (tmp_path / "smaller" / "config.json").write_text(json.dumps(CONFIGS[name] | changes))
    smaller = spec_of(tmp_path, "smaller")
    assert apply_recipe(parse_recipe(recipe), spec_of(folder, name)).parts == smaller.parts


def test_a_window_is_that_of_a_config_with_one(folder, tmp_path):
    mistral = {**CONFIGS["llama"], "model_type": "mistral", "architectures": ["MistralForCausalLM"]}
    for name, window in (("full", None), ("windowed", 64)):
        (tmp_path / name).mkdir()
        (tmp_path / name / "config.json").write_text(json.dumps(mistral | {"sliding_window": window}))
    windowed = [part for part in spec_of(tmp_path, "windowed").parts if isinstance(part, Attention)]
    made = [part for part in apply_recipe(parse_recipe("shrink(window, size=64)"), spec_of(tmp_path, "full")).parts if isinstance(part, Attention)]
    assert made == windowed


@pytest.mark.parametrize(("kept", "of", "place_bits"), [(2, 4, 2), (4, 8, 3), (1, 2, 1)])
def test_what_is_left_of_n_in_m_is_stored_with_its_places(kept, of, place_bits):
    """Mishra et al. 2021 (arXiv:2104.08378), section 3.1: of 2:4, half the values and 2 bits for each."""
    weight = WeightFormat(dtype="bfloat16", pattern=(kept, of))
    assert weight.stored_bytes(3, 64) == 3 * (64 * kept // of * 2 + 64 * kept // of * place_bits // 8)


def test_what_is_kept_is_whole_tiles():
    assert [kept_features(width, share) for width, share in ((1000, 0.1), (768, 0.25), (7, 0.5))] == [904, 576, 7]


def test_a_step_is_done_or_predicted_alone():
    assert not STEPS.keys() & PREDICTED.keys()


@pytest.mark.parametrize("text", [f"{verb}({method})" for verb, method in PREDICTED])
def test_a_predicted_step_is_parsed_and_refused_where_it_would_be_done(text):
    recipe = parse_recipe(f"{text} | cast(bfloat16)")
    assert parse_recipe(str(recipe)) == recipe
    said = rf"^{text.partition('(')[0]}\(.*\) is predicted alone: lighten estimate, advise and compare read it; these steps can be carried out: cast"
    with pytest.raises(RecipeError, match=said):
        recipe.require_done()


def test_compress_refuses_a_predicted_step_in_one_line(tmp_path, capsys):
    from tiny_models import llama_config, save

    model = save(llama_config(), tmp_path / "model")
    assert main(["compress", str(model), "--recipe", "shrink(window)", "-o", str(tmp_path / "out")]) == 2
    line = capsys.readouterr().err.strip().splitlines()[-1]
    assert line.startswith("lighten: shrink(window) is predicted alone")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["model"]


@pytest.mark.parametrize(
    ("name", "recipe", "says"),
    [
        ("bert", "shrink(window, size=64)", "shrink(window): bert has no causal attention over more than 64 keys."),
        ("llama", "quantize(rtn, bits=4) | shrink(ffn)", "shrink(ffn): model.layers.0.mlp.gate_proj is already quantized to 4 bits;"),
        (
            "llama",
            "quantize(rtn, bits=4) | prune(sparsegpt, pattern=2:4)",
            "prune(sparsegpt): model.layers.0.self_attn.q_proj is already quantized to 4 bits;",
        ),
        ("llama", "prune(sparsegpt, pattern=2:5)", "pattern=2:5: 5 does not divide the 256 columns of model.layers.0.self_attn.q_proj."),
        ("llama", "shrink(layers, ratio=0.1)", "shrink(layers): all of llama's 4 blocks would stay."),
    ],
)
def test_what_a_predicted_step_cannot_take_is_said(folder, name, recipe, says):
    with pytest.raises(RecipeError) as caught:
        apply_recipe(parse_recipe(recipe), spec_of(folder, name))
    assert str(caught.value).startswith(says)


def test_a_recipe_names_what_is_predicted_alone():
    def named(verb: str | None = None) -> str:
        return f"Predicted alone: {', '.join(f'{known}({method})' for known, method in PREDICTED if verb in (None, known))}."

    for text, says in {
        "squeeze(rtn)": named(),
        "shrink(magic)": named("shrink"),
        "prune(magic)": "methods: magnitude, wanda, sparsegpt, admm.",
    }.items():
        with pytest.raises(RecipeError) as caught:
            parse_recipe(text)
        assert says in str(caught.value)


# ---- quality ----

ROW = dict.fromkeys(quality_ranges.COLUMNS, "") | {"dataset": "WikiText2", "metric": "perplexity", "source_repo_or_doc": "somewhere"}


def rows(*changes: dict[str, str]) -> list[dict[str, str]]:
    return [{**ROW, **change} for change in changes]


def test_ranges_are_of_published_figures(folder):
    """IST-DASLab/gptq, README, LLaMA 7B, 13B, 30B, 65B at 4 bits by channel: RTN 6.29, 5.53, 4.54, 3.92 over 5.68, 5.09, 4.10, 3.53."""
    found = quality_of_step(parse_recipe("quantize(rtn, bits=4, group_size=channel)").steps[0], spec_of(folder, "wide"))
    assert found is not None
    assert (found.low, found.high, found.rows) == (pytest.approx(5.53 / 5.09, abs=1e-4), pytest.approx(3.92 / 3.53, abs=1e-4), 4)
    assert found.sources == ("IST-DASLab/gptq README",)


@pytest.mark.parametrize(
    ("recipe", "low", "high"),
    [  # locuslab/wanda, README, Llama-2 7B, 13B, 70B over 5.12, 4.57, 3.12
        ("prune(sparsegpt, pattern=2:4)", 5.4 / 3.12, 10.17 / 5.12),
        ("prune(magnitude, pattern=2:4)", 8.33 / 4.57, 54.59 / 5.12),
        ("prune(magnitude, sparsity=0.5)", 6.37 / 4.57, 14.89 / 5.12),
    ],
)
def test_ranges_of_pruning(folder, recipe, low, high):
    found = quality_of_step(parse_recipe(recipe).steps[0], spec_of(folder, "wide"))
    assert found is not None
    assert (found.low, found.high) == (pytest.approx(low, abs=1e-4), pytest.approx(high, abs=1e-4))


@pytest.mark.parametrize(
    "recipe",
    ["quantize(rtn, bits=2, group_size=64)", "prune(magnitude, sparsity=0.3)", "shrink(layers, ratio=0.5)", "quantize(rtn, bits=4, targets=mlp)"],
)
def test_what_no_row_is_of_is_not_known(folder, recipe):
    assert quality_of_step(parse_recipe(recipe).steps[0], spec_of(folder, "wide")) is None


@pytest.mark.parametrize("name", ["bert", "llama", "t5"])
def test_ranges_are_told_of_like_models_alone(folder, name):
    """An encoder, or a decoder a thousand times smaller than any that was measured."""
    assert quality_of_step(parse_recipe("quantize(rtn, bits=4, group_size=64)").steps[0], spec_of(folder, name)) is None
    assert quality_of_cache("int8", spec_of(folder, name)) is None


def test_a_cache_of_8_bits_is_a_score(folder):
    """InternLM/lmdeploy, kv_quant.md: C-Eval of Llama-2-7B-chat 28.42, with int8 27.96."""
    found = quality_of_cache("int8", spec_of(folder, "wide"))
    assert found is not None
    assert (found.measure, found.low) == ("score_ratio", pytest.approx(27.96 / 28.42, abs=1e-4))
    assert quality_of_cache("float8_e4m3fn", spec_of(folder, "wide")) is None


def test_a_baseline_is_the_rows_own_or_the_16_bit_row_beside_it():
    own = {"model": "M-7B", "method": "GPTQ", "bits": "4", "group_size": "128", "value": "6", "baseline_value": "5"}
    beside = {"model": "N-8B", "method": "llama.cpp Q4_0", "value": "6.6"}
    found, left_out = quality_ranges.collect(rows(own, {**beside, "method": "llama.cpp F16", "value": "6"}, beside, {**beside, "dataset": "other"}))
    assert {key.method: [ratio for ratio, _ in each] for key, each in found.items()} == {"gptq": [1.2], "rtn": [pytest.approx(1.1)]}
    assert left_out == {"the baseline itself": 1, "no baseline": 1}


def test_rows_that_cannot_be_compared_or_understood_are_left_out_and_counted():
    fine = {"model": "M-7B", "method": "RTN", "bits": "4", "group_size": "per-channel", "value": "6", "baseline_value": "5"}
    found, left_out = quality_ranges.collect(rows({**fine, "metric": "perplexity (not comparable)"}, {**fine, "method": "sorcery"}, fine))
    assert sum(map(len, found.values())) == 1
    assert left_out == {"not comparable": 1, "method not understood": 1}


def test_a_table_without_its_columns_is_one_line(tmp_path, capsys, monkeypatch):
    (tmp_path / "rows.csv").write_text("model,method\na,b\n")
    monkeypatch.setattr("sys.argv", ["quality_ranges", "--rows", str(tmp_path / "rows.csv"), "-o", str(tmp_path / "out.json")])
    assert quality_ranges.main() == 2
    assert "no columns bits, group_size" in capsys.readouterr().err
    assert not (tmp_path / "out.json").exists()


def test_losses_are_multiplied_and_never_mixed():
    four, eight = (Quality(measure="perplexity_ratio", low=low, high=high, rows=2) for low, high in ((1.1, 1.2), (1.0, 1.01)))
    score = Quality(measure="score_ratio", low=0.98, high=0.99)
    both = together([four, SAME, eight, BASELINE])
    assert both is not None
    assert (both.measure, both.low, both.high) == ("perplexity_ratio", pytest.approx(1.1), pytest.approx(1.2 * 1.01))
    assert together([four, None]) is None
    assert together([four, score]) is None
    assert together([SAME, BASELINE]) == BASELINE


# ---- levers ----


def every_lever(spec: ModelSpec, target: Device | None) -> Iterator[tuple[Case, Lever]]:
    for phase in phases_of(spec):
        case = case_of(spec, phase, attention="eager")
        yield from ((case, lever) for lever in propose(case, target) if isinstance(lever, Lever))


def parsed(lever: Lever, device: str) -> argparse.Namespace:
    """The options of a lever as `lighten estimate` reads them."""
    parser = argparse.ArgumentParser(exit_on_error=False)
    estimate_command.add_arguments(parser)
    return parser.parse_args(["model", *lever.flags(device)])


def outcome(make: Callable[[], object]) -> object:
    """What it gives, or the text of its refusal."""
    try:
        return make()
    except LightenError as error:
        return str(error)


@pytest.mark.parametrize("name", CONFIGS)
def test_a_lever_is_proposed_in_its_phases_alone(folder, name):
    for case, lever in every_lever(spec_of(folder, name), gpu()):
        assert case.workload.phase in LEVERS[lever.name].phases
        assert lever.name in LEVERS


@pytest.mark.parametrize("name", CONFIGS)
def test_the_text_of_a_lever_is_what_the_commands_take(folder, name):
    for case, lever in every_lever(spec_of(folder, name), gpu()):
        words = shlex.split(lever.text("a100-sxm-80gb"))
        if lever.recipe:
            text = words[1] if words[0] == "--recipe" else lever.text("a100-sxm-80gb")
            assert read_recipe(text).steps == parse_recipe(lever.steps).steps
        options = parsed(lever, "a100-sxm-80gb")
        for field, value in lever.workload.items():
            assert workload_of(options)[field] == (value if field != "batch_size" else (value,))
        if lever.spreads:
            count = int(options.device.partition(":")[2])
            assert verbs.default_plan(case.workload, count, plan_of(options)) == lever.on(case).plan


def said_by_estimate(model: Path, case: Case, lever: Lever, device: str | None) -> object:
    """Memory, FLOPs and time that `lighten estimate` says of a case with the options of a lever."""
    asked = {field: getattr(case.workload, field) for field in ("phase", "batch_size", "seq_len", "new_tokens", "attention")}
    spread = {name: value for name, value in lever.plan.items() if value != Plan.__dataclass_fields__[name].default}
    where = f"{device}:{lever.on(case).plan.devices}" if device else None
    found = verbs.estimate(model, recipe=lever.recipe or None, device=where, **{**asked, **spread, **lever.workload})
    return found.memory, found.total_flops, found.time


def given(case: Case, lever: Lever, target: Device | None) -> object:
    cost = cost_of(lever.on(case), target)
    return cost.memory, cost.flops, cost.time


@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize("device", [None, "a100-sxm-80gb"])
def test_a_lever_gives_what_estimate_says_of_its_text(folder, name, device):
    """A refusal too, word for word."""
    spec, target = spec_of(folder, name), gpu() if device else None
    for case, lever in itertools.islice(every_lever(spec, target), 0, None, 3):
        if lever.name != "sparse":  # whose time data sheets do not give
            assert outcome(partial(given, case, lever, target)) == outcome(partial(said_by_estimate, folder / name, case, lever, device))


def test_levers_that_exclude_each_other_do_so_both_ways():
    found = [Lever(name=name) for name in LEVERS]
    for one, other in itertools.product(found, found):
        assert compatible(one, other) == compatible(other, one)
        assert not compatible(one, one)


def test_every_kind_that_is_excluded_exists():
    assert {name for kind in LEVERS.values() for name in kind.excludes} <= LEVERS.keys()


def test_a_kind_has_an_effect_in_each_of_its_phases(folder):
    """On some model, each kind of lever that proposes for itself gains something in each phase that it names."""
    missing = {(name, phase) for name, kind in LEVERS.items() for phase in kind.phases} - WITHOUT
    for model, changes in (("llama", {"seq_len": 3072}), ("gpt2", {}), ("bert", {}), ("llama", {"seq_len": 3072, "attention": "sdpa"})):
        spec = spec_of(folder, model)
        for phase in phases_of(spec):
            if any(left == phase for _, left in missing):
                case = case_of(spec, phase, **{"attention": "eager", **changes})
                missing -= {(line.levers[0].name, phase) for line in advise(case, read_device("h100-sxm")).lines}
    assert missing == set()


WITHOUT = {("draft", "decode"), ("draft", "generate")} | {("runtime", phase) for phase in ("encode", "prefill", "decode", "generate")}
"""A draft is given by hand, a runtime is of a probed machine: tested apart."""


def test_a_probed_machine_has_its_runtimes(folder):
    case = case_of(spec_of(folder, "bert"), "encode", batch_size=8)
    found = advise(case, made_up_profile())
    assert {lever.runtime for line in found.lines for lever in line.levers} & {"openvino", "openvino(dtype=bfloat16)", "onnxruntime"}
    assert all(line.cost.needed_bytes > 250_000_000 for line in found.lines), "the runtime itself counts"
    assert found.device == "this"


# ---- 2:4 ----


@pytest.mark.parametrize(
    ("device", "sparse"), [("a100-sxm-80gb", True), ("v100-sxm-32gb", False), ("mi300x", True), ("mi250", False), ("m2-ultra-76", False)]
)
def test_which_devices_skip_zeros(device, sparse):
    """NVIDIA from Ampere on (A100 whitepaper), AMD from CDNA 3 on (its whitepaper)."""
    assert has_sparse_products(read_device(device)) is sparse


def test_zeros_gain_time_only_where_they_are_skipped(folder):
    def both(device: str) -> tuple[float, float]:
        case = case_of(spec_of(folder, "gpt2"), "prefill", batch_size=64, seq_len=1024)
        before, after = (cost_of(each, read_device(device)) for each in (case, Lever(name="sparse", steps="prune(sparsegpt, pattern=2:4)").on(case)))
        assert before.time is not None
        assert after.time is not None
        return after.needed_bytes / before.needed_bytes, after.time.seconds / before.time.seconds

    assert both("v100-sxm-32gb") == (1, 1)
    memory, time = both("a100-sxm-80gb")
    assert memory < 1
    assert 0.5 <= time < 1


# ---- speculative decoding ----


@pytest.mark.parametrize("accepted", [0.0, 0.3, 0.7, 0.95, 1.0])
@pytest.mark.parametrize("proposed", [1, 3, 8])
def test_expected_tokens_is_the_mean_of_rounds(accepted, proposed):
    """The oracle draws rounds: the tokens before the first that is rejected, and the model's own."""
    draw, rounds = random.Random(0), 20_000
    found = sum(
        next((index for index in range(proposed) if draw.random() >= accepted), proposed) + 1 for _ in range(rounds)
    ) / rounds  # fmt: skip
    assert expected_tokens(accepted, proposed) == pytest.approx(found, rel=0.02)


def test_a_draft_speeds_up_by_the_best_number_of_proposals(folder):
    case = case_of(spec_of(folder, "wide"), "decode", seq_len=512, new_tokens=16)
    smaller = spec_of(folder, "wide")
    smaller = apply_recipe(parse_recipe("shrink(layers, ratio=0.9)"), smaller)
    found = speculate(case, gpu(), smaller)
    slow, middle, fast = found.speedup
    assert 1 < slow < middle < fast
    assert found.cost.needed_bytes > cost_of(case, gpu()).needed_bytes
    step, draft_step = (cost_of(case_of(spec, "decode", seq_len=520, new_tokens=1), gpu()).seconds for spec in (case.spec, smaller))
    assert step is not None
    assert draft_step is not None
    for count in range(1, 11):  # memory binds, so that checking takes a step: equation 1 of the paper and its theorem 3.8
        bound = expected_tokens(ACCEPTED[1], count) / (count * draft_step / step + 1)
        assert middle >= bound * 0.98 or count != found.proposed


@pytest.mark.parametrize(
    ("model", "other", "phase", "says"),
    [
        ("llama", "draft", "prefill", "a draft has no effect in phase prefill; it has one in: decode, generate."),
        ("draft", "llama", "decode", "draft llama is no smaller than draft:"),
        ("llama", "bert", "decode", "draft bert: bert is no decoder alone; a draft and its model both have to be."),
        ("wide", "llama", "decode", "draft llama has 3,000 tokens, wide has 32,000; a draft has to have the model's vocabulary."),
    ],
)
def test_a_draft_that_does_not_fit_is_said(folder, capsys, model, other, phase, says):
    new = ["--new-tokens", "4"] if phase == "decode" else []
    line = refused(capsys, folder / model, "--draft", folder / other, "--phase", phase, "--device", "a100-sxm-80gb", *new)
    assert line.startswith(says)


# ---- ranks ----


def lines_of(folder: Path, goal: str, device: str = "rtx-3070", **changes: Any) -> Advice:
    spec = spec_of(folder, "wide")
    return advise(case_of(spec, "decode", **{"seq_len": 512, "new_tokens": 8, **changes}), with_price(read_device(device), "1/h"), goal=goal)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("goal", "figure"),
    [
        ("latency", lambda line: line.cost.seconds),
        ("throughput", lambda line: line.cost.seconds_per_token),
        ("cost", lambda line: line.cost.usd_per_token),
    ],
)
def test_lines_are_in_the_order_of_the_goal(folder, goal, figure):
    found = lines_of(folder, goal, "a100-sxm-80gb").lines
    assert len(found) > 10
    figures = [figure(line) for line in found if line.cost.fits]
    assert figures == sorted(figures)


def test_what_makes_it_fit_comes_first_with_the_least_loss(folder):
    found = lines_of(folder, "fits")
    assert found.baseline.fits is False
    here = [line for line in found.lines if line.cost.devices == 1 and line.cost.fits]
    assert here == list(found.lines[: len(here)]), "what fits on the device that there is comes before more devices"
    losses = [loss(line.quality) for line in here]
    assert losses == sorted(losses)
    assert all(line.cost.fits for line in found.lines[: sum(bool(line.cost.fits) for line in found.lines)])
    assert found.together is None or found.together.cost.fits


def test_the_goal_follows_from_what_binds(folder):
    spec = spec_of(folder, "wide")
    case = case_of(spec, "decode", seq_len=512, new_tokens=8)
    assert advise(case, read_device("rtx-3070")).goal == "fits"
    assert advise(case, read_device("a100-sxm-80gb")).goal == "latency"
    assert advise(case).goal == "fits"


def test_without_a_device_memory_and_flops_are_known(folder):
    found = advise(case_of(spec_of(folder, "gpt2"), "prefill"))
    assert found.lines
    for line in found.lines:
        assert (line.time, line.latency, line.money, line.cost.time) == (None, None, None, None)
    needs = [line.cost.needed_bytes for line in found.lines]
    assert needs == sorted(needs)


@pytest.mark.parametrize("goal", GOALS)
def test_every_line_gains_something_and_says_why(folder, goal):
    found = lines_of(folder, goal, "l4")
    for line in (*found.lines, *([found.together] if found.together else [])):
        assert gains(line)
        assert line.why.endswith(".")
        assert line.why.count(". ") == 0
    assert dict(found.left_out).items() >= {("--attention flash", "gains nothing here")}


def test_ratios_are_after_over_before(folder):
    found = lines_of(folder, "latency", "a100-sxm-80gb")
    now = found.baseline
    assert now.time is not None
    for line in found.lines:
        assert line.cost.time is not None
        assert line.memory == line.cost.needed_bytes / now.needed_bytes
        assert line.latency == line.cost.time.seconds / now.time.seconds
        assert line.time == pytest.approx(line.latency * now.tokens / line.cost.tokens)
        assert line.money == pytest.approx(line.time * line.cost.devices)


@pytest.mark.parametrize(("device", "batch"), [("l4", 1), ("a100-sxm-80gb", 2)])
def test_the_largest_batch_fits_and_one_more_does_not(folder, device, batch):
    found = lines_of(folder, "throughput", device, batch_size=batch)
    sizes = [line.lever.workload["batch_size"] for line in found.lines if line.lever.name == "batch"]

    def fits(size: int) -> bool | None:
        return cost_of(replace(found.case, workload=replace(found.case.workload, batch_size=size)), read_device(device)).fits

    assert fits(max(sizes)) is True
    assert fits(max(sizes) + 1) is False


def test_a_batch_at_which_memory_binds_no_more_is_shown(folder):
    case = case_of(spec_of(folder, "gpt2"), "decode", dtype="float32", seq_len=8, new_tokens=8)
    sizes = sorted(line.lever.workload["batch_size"] for line in advise(case, gpu(), goal="throughput").lines if line.lever.name == "batch")
    costs = [cost_of(replace(case, workload=replace(case.workload, batch_size=size)), gpu()) for size in (1, sizes[0], sizes[0] // 2)]
    bounds = [cost.time.bound_by for cost in costs if cost.time]
    assert bounds[0] != "memory" or (bounds[1] != "memory" and bounds[2] == "memory")


def test_together_is_no_worse_than_the_best_of_its_parts_and_keeps_within_the_loss(folder):
    for goal, most in (("throughput", 1.0), ("cost", 1.05), ("latency", 1.5)):
        spec = spec_of(folder, "wide")
        found = advise(case_of(spec, "decode", seq_len=512, new_tokens=8), with_price(read_device("l4"), "1/h"), goal=goal, most_loss=most)  # type: ignore[arg-type]
        both = found.together
        if both is None:
            continue
        assert both.quality is not None
        assert both.quality.worst <= most
        assert len(both.levers) > 1
        parts = [line for line in found.lines if line.levers[0] in both.levers]
        assert both.cost.seconds_per_token is not None
        assert goal == "latency" or both.cost.seconds_per_token <= min(line.cost.seconds_per_token or 0.0 for line in parts)
        assert goal != "latency" or (both.cost.seconds or 0.0) <= min(line.cost.seconds or 0.0 for line in parts)
        assert cost_of(both.lever.on(found.case), with_price(read_device("l4"), "1/h")).needed_bytes == both.cost.needed_bytes


def test_a_type_that_was_asked_for_is_changed_by_name(folder):
    found = advise(case_of(spec_of(folder, "llama"), "prefill", dtype="float32"))
    texts = [line.lever.text() for line in found.lines]
    assert "--dtype bfloat16" in texts
    assert "cast(bfloat16)" in [line.lever.text() for line in advise(case_of(spec_of(folder, "gpt2"), "prefill")).lines]


def test_joined_levers_are_one_recipe_in_order():
    parts = [
        Lever(name="quantize", steps="quantize(rtn, bits=4)"),
        Lever(name="student", steps="shrink(layers, ratio=0.5)"),
        Lever(name="batch", workload={"batch_size": 4}),
    ]
    assert join(parts).text() == "--recipe 'shrink(layers, ratio=0.5) | quantize(rtn, bits=4)' --batch-size 4"


def test_advice_of_a_recipe_goes_on_from_it(folder):
    case = replace(case_of(spec_of(folder, "gpt2"), "prefill"), recipe=parse_recipe("quantize(rtn, bits=4, group_size=32)"))
    found = advise(case)
    assert not {line.lever.name for line in found.lines} & {"quantize", "sparse", "narrow"}, "what is quantized cannot be pruned or quantized again"
    assert any("already quantized" in why for _, why in found.left_out)


# ---- the command ----


def refused(capsys: pytest.CaptureFixture[str], *words: object) -> str:
    code: int | str | None
    try:
        code = main(["advise", *map(str, words)])
    except SystemExit as left:
        code = left.code
    assert code == 2
    said = capsys.readouterr()
    assert said.out == ""
    lines = said.err.strip().splitlines()
    assert len(lines) == 1, "a mistake is one line"
    return lines[0].removeprefix("lighten: ")


@pytest.mark.parametrize(
    ("model", "options", "says"),
    [
        ("bert", ["--phase", "decode", "--new-tokens", "4"], "bert is an encoder; phase decode needs a decoder."),
        ("llama", ["--goal", "speed", "--device", "l4"], "goal 'speed' is not known; goals: fits, latency, throughput, cost."),
        ("llama", ["--goal", "latency"], "goal latency needs a device: without --device memory and FLOPs alone are known"),
        ("llama", ["--device", "no-such-gpu"], "no device is called 'no-such-gpu'"),
        ("llama", ["--price", "2/h"], "--price=2/h has no effect without a --device of published figures"),
        ("llama", ["--tp", "2"], "--tp=2 has no effect without a --device of published figures"),
        ("llama", ["--device", "l4:3", "--tp", "2"], "tp=2 does not divide 3 devices."),
        ("llama", ["--device", "l4", "--recipe", "quantize(magic)"], "quantize has no method 'magic'"),
        ("llama", ["--device", "l4", "--stack", "fused"], "stack='fused' runs no inference"),
        ("none", [], "none: "),
    ],
)
def test_mistakes_are_one_line(folder, capsys, model, options, says):
    assert says in refused(capsys, folder / model, *options)


def test_an_image_has_its_own_length(tmp_path, capsys):
    vit = {
        "model_type": "vit", "architectures": ["ViTModel"], "hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4,
        "intermediate_size": 128, "image_size": 32, "patch_size": 16,
    }  # fmt: skip
    (tmp_path / "config.json").write_text(json.dumps(vit))
    assert main(["advise", str(tmp_path), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["workload"]["seq_len"] == 5


@pytest.mark.parametrize("text", ["0", "x", "0.9", "inf"])
def test_a_factor_of_loss_is_checked(folder, capsys, text):
    with pytest.raises(SystemExit):
        main(["advise", str(folder / "llama"), "--most-loss", text])
    assert "is no factor of loss" in capsys.readouterr().err


def test_the_document_and_the_table(folder, capsys):
    options = ["--device", "h100-sxm", "--price", "2/h", "--phase", "decode", "--new-tokens", "4", "--draft", str(folder / "draft")]
    assert main(["advise", str(folder / "llama"), *options, "--json"]) == 0
    said = json.loads(capsys.readouterr().out)
    assert [line["rank"] for line in said["lines"]] == list(range(1, len(said["lines"]) + 1))
    assert said["device"] == "h100-sxm"
    texts = [line["text"] for line in said["lines"]]
    assert len(set(texts)) == len(texts)
    assert main(["advise", str(folder / "llama"), *options, "--top", "2"]) == 0
    shown = capsys.readouterr().out
    assert texts[0].split()[0] in shown
    assert f"{len(texts) - 2} more; --top {len(texts)} shows them." in shown
    assert all(len(line) <= 130 for line in shown.splitlines()[1:])


def test_a_device_of_ones_own_is_named_as_it_was(folder, tmp_path, capsys):
    (tmp_path / "mine.toml").write_text(
        'name = "mine"\nfull_name = "Mine"\nvendor = "me"\nkind = "gpu"\nmemory_bytes = 1_000_000_000\nbandwidth_bytes_per_s = 1e11\n'
        '[peak_flops_per_s]\nbfloat16 = 1e13\nfloat32 = 1e12\n[sources]\nothers = "me"\n'
    )
    path = str(tmp_path / "mine.toml")
    assert main(["advise", str(folder / "llama"), "--device", f"{path}:1", "--json"]) == 0
    said = json.loads(capsys.readouterr().out)
    assert said["device"] == path
    assert all(path in line["text"] for line in said["lines"] if line["levers"] == ["plan"])


def columns(line: Line) -> set[str]:
    return set(line.as_json("l4"))


def test_the_fields_of_the_document_are_described(folder):
    """docs/advice.md names each field of the document and of its lines."""
    text = (Path(__file__).parent.parent / "docs" / "advice.md").read_text("utf-8")
    found = lines_of(folder, "latency", "l4")
    names = set(found.as_json()) | columns(found.lines[0]) | set(found.lines[0].as_json("l4")["gain"])
    assert {name for name in names if f"`{name}`" not in text} == set()


def test_weights_stay_linears_of_the_model(folder):
    """A lever never adds or renames a linear."""
    for case, lever in every_lever(spec_of(folder, "mixtral"), None):
        try:
            changed = lever.on(case).changed
        except LightenError:
            continue
        names = {part.name for part in changed.parts if isinstance(part, Linear)}
        assert names <= {part.name for part in case.spec.parts if isinstance(part, Linear)}
        assert Recipe().runtime == lever.on(case).recipe.runtime
