"""Side by side: each entry is what estimate says, one that cannot be says why, and the page holds all of them."""

from __future__ import annotations

import json
import re
import xml.etree.ElementTree as ET
from pathlib import Path
from typing import Any

import pytest

from lighten import verbs
from lighten.cli.main import main
from lighten.report.compare_page import say_rate

LLAMA: dict[str, Any] = {
    "model_type": "llama", "architectures": ["LlamaForCausalLM"], "vocab_size": 3000, "hidden_size": 256, "num_hidden_layers": 4,
    "num_attention_heads": 8, "num_key_value_heads": 4, "intermediate_size": 768, "max_position_embeddings": 4096, "torch_dtype": "bfloat16",
}  # fmt: skip
BERT = {
    "model_type": "bert", "architectures": ["BertModel"], "vocab_size": 3000, "hidden_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4,
    "intermediate_size": 512, "max_position_embeddings": 512, "type_vocab_size": 2,
}  # fmt: skip
HUGE = LLAMA | {"hidden_size": 4096, "intermediate_size": 44032, "num_hidden_layers": 8}
"""9.5 GB, more than an RTX 3070 has."""
FOUR = "quantize(rtn, bits=4, group_size=32)"
DECODE = ("--phase", "decode", "--seq-len", "128", "--new-tokens", "8")


pytestmark = pytest.mark.usefixtures("made_up_rates")


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    found = tmp_path_factory.mktemp("models")
    for name, config in {
        "large": LLAMA,
        "small": LLAMA | {"num_hidden_layers": 2},
        "bert": BERT,
        "huge": HUGE,
    }.items():
        (found / name).mkdir()
        (found / name / "config.json").write_text(json.dumps(config))
    return found


@pytest.fixture
def compared(folder, capsys):
    """What `lighten compare` prints of models by name."""

    def run(models: str, *options: object) -> str:
        assert main(["compare", *(str(folder / name) for name in models.split()), *map(str, options)]) == 0
        return capsys.readouterr().out

    return run


@pytest.fixture
def refused(folder, capsys):
    """The one line that `lighten compare` says of a mistake."""

    def run(models: str, *options: object) -> str:
        assert main(["compare", *(str(folder / name) for name in models.split()), *map(str, options)]) == 2
        said = capsys.readouterr()
        assert said.out == ""
        (line,) = said.err.strip().splitlines()
        return line.removeprefix("lighten: ")

    return run


def test_every_combination_is_what_estimate_says(folder, compared):
    devices = ("l4", "a100-sxm-80gb:2")
    said = json.loads(compared("large small", *DECODE, "--recipe", "", "--recipe", FOUR, *(f"--device={name}" for name in devices), "--json"))
    entries = said["entries"]
    names = [(entry["model"], entry["recipe"], entry["device"]) for entry in entries]
    assert names == [(model, recipe, device) for model in ("large", "small") for recipe in (None, FOUR) for device in devices]
    for entry in entries:
        found = verbs.estimate(
            folder / entry["model"], recipe=entry["recipe"], device=entry["device"], phase="decode", seq_len=128, new_tokens=8
        )  # fmt: skip
        assert found.placed is not None
        assert found.time is not None
        assert found.placed.bill is not None
        assert entry["failure"] is None
        assert entry["parameters"] == found.spec.total_parameters
        assert entry["memory"]["needed"] == found.placed.needed_bytes
        assert (entry["flops"], entry["size_bytes"]) == (found.total_flops, found.size_bytes)
        assert (entry["time"]["seconds"], entry["time"]["bound_by"]) == (found.time.seconds, found.time.bound_by)
        assert (entry["usd"], entry["joules"]) == (found.placed.bill.usd, found.placed.bill.joules)


def test_few_stand_side_by_side_and_many_below_each_other(compared):
    few = compared("large small", *DECODE, "--device", "l4")
    assert re.search(r"^ +large +small$", few, re.MULTILINE)
    assert re.search(r"^parameters +\S+ M +\S+ M$", few, re.MULTILINE)
    many = compared("large small", *DECODE, *(f"--device={name}" for name in ("l4", "t4", "h100-sxm")))
    assert re.search(r"^model +device +memory +fits", many, re.MULTILINE)
    assert len(re.findall(r"^(?:large|small) ", many, re.MULTILINE)) == 6


def test_without_a_device_there_is_no_time(compared):
    said = json.loads(compared("large", "--recipe", "", "--recipe", FOUR, "--json"))["entries"]
    assert {entry["device"] for entry in said} == {None}
    assert {(entry["time"], entry["usd"], entry["fits"]) for entry in said} == {(None, None, None)}
    assert said[1]["memory"]["needed"] < said[0]["memory"]["needed"]


def test_one_that_cannot_be_says_why_beside_the_others(compared):
    said = json.loads(compared("large bert", "--recipe", "", "--recipe", "shrink(window, size=16)", "--json"))["entries"]
    failures = {(entry["model"], entry["recipe"]): entry["failure"] for entry in said}
    assert failures["bert", "shrink(window)" if ("bert", "shrink(window)") in failures else "shrink(window, size=16)"] == (
        "shrink(window): bert has no causal attention over more than 16 keys."
    )
    assert sum(failure is not None for failure in failures.values()) == 1
    assert "shrink(window): bert has no causal" in compared("large bert", "--recipe", "", "--recipe", "shrink(window, size=16)")


def test_a_price_is_of_the_device(compared):
    (entry,) = json.loads(compared("large", *DECODE, "--device", "l4", "--price", "3.60/h", "--json"))["entries"]
    assert entry["usd"] == pytest.approx(entry["time"]["seconds"] / 1000)
    assert entry["usd_per_million_tokens"] == pytest.approx(entry["usd"] / 8 * 1e6)


@pytest.mark.parametrize(
    ("models", "options", "says"),
    [
        ("large", ["--device", "no-such-gpu"], "no device is called 'no-such-gpu'"),
        (
            "large",
            ["--recipe", "quantize(magic)"],
            "quantize has no method 'magic'; methods: rtn, hqq, gptq, awq, smoothquant, auto, kv, dynamic, static.",
        ),
        ("large", ["--price", "2/h"], "--price=2/h goes with one --device; here are 0."),
        ("large", ["--device", "l4", "--device", "t4", "--price", "2/h"], "--price=2/h goes with one --device; here are 2."),
        ("large", ["--html", "page.pdf"], "--html page.pdf: write a file that ends in .html."),
        ("large", ["--plot", "plot.png"], "--plot plot.png: write a file that ends in .svg or .html."),
        ("bert", ["--phase", "decode", "--new-tokens", "2"], "bert is an encoder; phase decode needs a decoder."),
        ("bert", ["--recipe", "shrink(window)"], "shrink(window): bert has no causal attention over more than 4096 keys."),
        ("none", [], "none: "),
    ],
)
def test_mistakes_are_one_line(refused, models, options, says):
    assert says in refused(models, *options)


def test_a_plot_needs_two_that_have_both_figures(refused, tmp_path):
    line = refused("large", *DECODE, "--device", "l4", "--plot", tmp_path / "plot.svg")
    assert line.startswith("a plot of throughput against money needs two combinations with both figures; found 1;")
    assert "found 0" in refused("large small", "--plot", tmp_path / "plot.svg")
    assert list(tmp_path.iterdir()) == []


def test_a_folder_that_is_not_there_is_said(refused, tmp_path):
    assert "cannot be written" in refused("large", "--html", tmp_path / "none" / "page.html")


def test_the_page_holds_every_figure_and_fetches_nothing(compared, tmp_path):
    page = tmp_path / "page.html"
    options = (*DECODE, "--recipe", "", "--recipe", FOUR, "--device=l4", "--device=rtx-4090", "--device=h100-sxm:2", "--html", page)
    said = json.loads(compared("large small", *options, "--json"))["entries"]
    text = page.read_text("utf-8")
    assert "<script" not in text
    assert not re.findall(r'(?:src|href)="', text)
    assert text.count("<tr") == len(said) + 1
    for entry in said:
        assert say_rate(entry["time"]["tokens_per_second"]) in text
    svgs = re.findall(r"<svg.*?</svg>", text, re.DOTALL)
    assert len(svgs) == 2, "one for wide screens, one for narrow ones"
    for svg in svgs:
        assert len(ET.fromstring(svg).findall(".//{*}circle")) == len(said)


@pytest.mark.parametrize("against", ["money", "memory"])
def test_the_plot_has_the_fastest_on_top_and_the_least_left(compared, tmp_path, against):
    plot = tmp_path / "plot.svg"
    options = (*DECODE, "--device=l4", "--device=rtx-4090", "--device=h100-sxm", "--plot", plot, "--against", against, "--json")
    said = json.loads(compared("large small", *options))["entries"]
    root = ET.fromstring(plot.read_text("utf-8"))
    assert "var(" not in plot.read_text("utf-8"), "programs that know no variables draw it too"
    marks = [circle for circle in root.iter() if circle.tag.endswith("circle") and len(circle)]
    assert len(marks) == len(said)
    up = [-float(mark.attrib["cy"]) for mark in marks]
    across = [float(mark.attrib["cx"]) for mark in marks]
    value = {"money": lambda entry: entry["usd_per_million_tokens"], "memory": lambda entry: entry["memory"]["needed"]}[against]
    assert ranks(up) == ranks([entry["time"]["tokens_per_second"] for entry in said])
    assert ranks(across) == ranks([value(entry) for entry in said])


def ranks(values: list[float]) -> list[int]:
    """The place of each value among the different ones, coordinates to a tenth of a unit."""
    rounded = [float(f"{value:.6g}") for value in values]
    return [sorted(set(rounded)).index(value) for value in rounded]


def test_what_does_not_fit_is_hollow_and_red(compared, tmp_path):
    page = tmp_path / "page.html"
    compared("huge small", *DECODE, "--device=rtx-3070", "--device=l4", "--html", page)
    text = page.read_text("utf-8")
    hollow = text.count('fill="none" stroke-width="2"')
    over = text.count('<tr class="over">')
    assert (hollow, over) == (2, 1), "one in each of the two drawings"


def test_names_are_escaped(folder, compared, tmp_path):
    strange = folder / "<b>&"
    strange.mkdir(exist_ok=True)
    (strange / "config.json").write_text(json.dumps(LLAMA))
    compared("<b>& small", *DECODE, "--device", "l4", "--html", tmp_path / "page.html")
    text = (tmp_path / "page.html").read_text("utf-8")
    assert "<b>&<" not in text
    assert "&lt;b&gt;&amp;" in text


def test_the_fields_of_an_entry_are_described(compared):
    text = (Path(__file__).parent.parent / "docs" / "advice.md").read_text("utf-8")
    (entry,) = json.loads(compared("large", *DECODE, "--device", "l4", "--json"))["entries"]
    assert {name for name in (*entry, *entry["time"]) if f"`{name}`" not in text} == set()
