"""What a choice is shown as: the page is parsed, the boxes of its labels are computed, the terminal's lines are measured."""

from __future__ import annotations

import copy
import errno
import json
import math
import os
import re
from collections.abc import Callable, Iterator
from html.parser import HTMLParser
from itertools import combinations, pairwise
from pathlib import Path
from statistics import median
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lighten.errors import OutputError
from lighten.report import choice_table, format_table, prediction_table, svg, write_report
from lighten.report.figures import read_limit
from lighten.report.html import report_page
from lighten.report.svg import Box, Wanted, linear_ticks, log_ticks, place_labels

MB = 10**6


def trial(name: str, runtime: str, *, size: float, memory: float, ms: float, of_ms: float, quality: dict[str, Any], **more: Any) -> dict[str, Any]:
    """A measured trial whose predictions are off by various factors."""
    wave = (ms * 0.37 + size) % 7 / 7  # varied, and the same in every run
    off = more.pop("off", (0.99 + 0.02 * wave, 0.7 + 0.4 * wave, 1.35 - 0.5 * wave))
    measured = {
        "size_bytes": int(size * MB), "peak_memory_bytes": int(memory * MB), "latency_s": ms / 1e3,
        "latency_q1_s": ms * 0.985 / 1e3, "latency_q3_s": ms * 1.022 / 1e3, "throughput": 32e3 / ms, "speedup": of_ms / ms,
        "cold_start_s": 2.13, "precision": more.pop("precision", "float32"), "quality": quality,
    }  # fmt: skip
    predicted = {key: measured[key] * factor for key, factor in zip(("size_bytes", "peak_memory_bytes", "latency_s"), off, strict=True)}
    predicted |= {"latency_low_s": predicted["latency_s"] * 0.8, "latency_high_s": predicted["latency_s"] * 1.3}
    ratio = dict(zip(("size_bytes", "peak_memory_bytes", "latency_s"), off, strict=True))
    known = {"status": "measured", "failure": None, "pareto": False, "meets": True, "seconds": 31.2}
    return {"recipe": name, "runtime": runtime, "predicted": predicted, "measured": measured, "ratio": ratio} | known | more


def unmeasured(name: str, runtime: str, status: str, failure: str) -> dict[str, Any]:
    predicted = {"size_bytes": 45.4e6, "peak_memory_bytes": 410e6, "latency_s": 0.19, "latency_low_s": 0.15, "latency_high_s": 0.26}
    gone = {"measured": None, "ratio": None, "pareto": False, "meets": None, "seconds": 12.0}
    return {"recipe": name, "runtime": runtime, "status": status, "failure": failure, "predicted": predicted} | gone


def fidelity(neighbour: float, error: float, cosine: float) -> dict[str, Any]:
    return {
        "cosine": {"value": cosine, "standard_error": 0.0002},
        "rank_agreement": {"value": 1 - (1 - cosine) * 4, "standard_error": 0.001},
        "neighbour_agreement": {"value": neighbour, "standard_error": error},
    }


def with_ids(choice: dict[str, Any]) -> dict[str, Any]:
    for index, one in enumerate([choice["baseline"], *choice["candidates"]]):
        one["id"] = f"{(index + 1) * 0x9E3779B1 % 2**32:08x}"
    return choice


CIRCUMSTANCES = {
    "lighten": "0.1.0",
    "machine": {
        "cpu": "AMD EPYC 9554 64-Core Processor",
        "cores": 2,
        "memory_bytes": 16_700_000_000,
        "os": "Linux 6.8 x86_64",
        "threads": 2,
    },
    "versions": {"python": "3.11.7", "torch": "2.13.0", "openvino": "2026.2", "onnxruntime": "1.25.0", "nncf": "3.4"},
    "text": {"source": "pydoc_data.topics", "calibration_texts": 128, "test_texts": 512},
}


def with_accuracy(choice: dict[str, Any]) -> dict[str, Any]:
    accuracy = {}
    for key in ("size_bytes", "peak_memory_bytes", "latency_s"):
        ratios = [one["ratio"][key] for one in [choice["baseline"], *choice["candidates"]] if one["ratio"]]
        accuracy[key] = {"count": len(ratios), "median": median(ratios), "worst": max(ratios, key=lambda ratio: abs(math.log(ratio)))}
    return copy.deepcopy(CIRCUMSTANCES | choice | {"accuracy": accuracy})


def encoder_choice() -> dict[str, Any]:
    def one(name: str, runtime: str, size: float, ms: float, quality: dict[str, Any], **more: Any) -> dict[str, Any]:
        return trial(name, runtime, size=size, memory=size * 2.7 + 120, ms=ms, of_ms=334.0, quality=quality, **more)

    same, close = fidelity(1.0, 0.0, 1.0), fidelity(0.991, 0.0042, 0.9998)
    choice = {
        "command": 'lighten choose .models/minilm --require "neighbour_agreement>=0.97" --minimize latency --budget 12min -o demo',
        "model": {"name": "all-MiniLM-L6-v2", "family": "bert", "source": ".models/minilm", "dtype": "float32", "parameters": 22713216},
        "workload": {"phase": "encode", "batch_size": 32, "seq_len": 128, "new_tokens": 0, "dtype": "float32"},
        "require": ["neighbour_agreement>=0.97"],
        "objective": "latency",
        "goal": "minimize",
        "quality_metric": "neighbour_agreement",
        "seconds": 512.3,
        "baseline": one("", "torch", 90.9, 334, same),
        "candidates": [
            one("", "torch(dtype=bfloat16)", 90.9, 214, fidelity(0.990, 0.0044, 0.9998), precision="bfloat16"),
            one("", "torch-compile", 90.9, 271, same, off=(0.996, 0.42, 0.9)),
            one("", "torch-compile(dtype=bfloat16)", 90.9, 101, close, precision="bfloat16", pareto=True),
            one("", "onnxruntime", 91.4, 262, same, pareto=True),
            one("quantize(dynamic, bits=8)", "onnxruntime", 23.1, 148, fidelity(0.904, 0.013, 0.991), meets=False, precision="int8"),
            one("", "openvino", 91.2, 265, same),
            one("", "openvino(dtype=bfloat16)", 91.2, 139, fidelity(0.988, 0.0048, 0.9997), precision="bfloat16"),
            one("quantize(static, bits=8)", "openvino", 23.4, 93, fidelity(0.893, 0.0137, 0.990), meets=False, pareto=True, precision="int8"),
            one("quantize(rtn, bits=8)", "openvino(dtype=bfloat16)", 23.6, 141, fidelity(0.984, 0.0055, 0.9994), off=(0.91, 0.8, 1.3)),
            one(
                "prune(magnitude, sparsity=0.5) | quantize(rtn, bits=4, group_size=64)",
                "openvino",
                14.1,
                255,
                fidelity(0.31, 0.02, 0.71),
                meets=False,
            ),
            unmeasured("quantize(rtn, bits=2)", "torch-compile", "failed", "killed by the memory limit of 4 GB"),
            unmeasured("", "ctranslate2", "skipped", "ctranslate2 is not installed; pip install lighten[ctranslate2]"),
            unmeasured("prune(magnitude, n=2, m=4)", "torch", "skipped", "predicted latency 190 ms cannot beat 101 ms by the margin of 1.5"),
        ],
        "closest": None,
        "warnings": [],
    }
    with_ids(choice)
    chosen, int8 = choice["candidates"][2], choice["candidates"][7]
    offer = {"id": int8["id"], "gain": "latency 93 ms → 1.1x faster than the chosen", "cost": "neighbour_agreement 0.893 instead of 0.991"}
    return with_accuracy(choice | {"chosen": chosen["id"], "looser": [offer]})


def decoder_choice() -> dict[str, Any]:
    def one(name: str, runtime: str, size: float, ms: float, ratio: float, **more: Any) -> dict[str, Any]:
        quality = {
            "perplexity": {"value": 21.4 * ratio, "standard_error": 0.6 * ratio},
            "perplexity_ratio": {"value": ratio, "standard_error": 0.0061 * ratio},
            "kl": {"value": max(ratio - 1, 0) * 0.9, "standard_error": 0.0004},
            "top1_agreement": {"value": max(1 - (ratio - 1) * 2, 0.01), "standard_error": 0.004},
        }
        return trial(name, runtime, size=size, memory=size * 1.6 + 300, ms=ms, of_ms=6200.0, quality=quality, **more)

    choice = {
        "command": 'lighten choose .models/smollm2-135m-offgrid --require "perplexity<=1.05x" --minimize size -o out',
        "model": {
            "name": "SmolLM2-135M-Instruct",
            "family": "llama",
            "source": ".models/smollm2",
            "dtype": "float32",
            "parameters": 134515008,
        },
        "workload": {"phase": "generate", "batch_size": 1, "seq_len": 512, "new_tokens": 64, "dtype": "float32"},
        "require": ["perplexity<=1.05x"],
        "objective": "size",
        "goal": "minimize",
        "quality_metric": "perplexity_ratio",
        "seconds": 1843.0,
        "baseline": one("", "torch", 538.1, 6200, 1.0),
        "candidates": [
            one("", "torch(dtype=bfloat16)", 269.1, 3900, 1.0004),
            one("", "openvino", 539.0, 4300, 1.0),
            one("", "openvino(dtype=bfloat16)", 270.2, 2300, 1.0005),
            one("quantize(rtn, bits=8)", "torch", 136.4, 9100, 1.002, pareto=True),
            one("quantize(rtn, bits=8)", "openvino", 136.6, 2100, 1.0021),
            one("quantize(rtn, bits=4, group_size=32)", "torch", 84.2, 9300, 1.041, pareto=True),
            one("quantize(rtn, bits=4, group_size=64)", "openvino", 80.0, 1900, 1.083, meets=False, pareto=True),
            one("quantize(rtn, bits=4)", "torch", 76.2, 9200, 1.31, meets=False, pareto=True),
            one("quantize(rtn, bits=3, group_size=32)", "torch", 67.4, 9500, 2.9, meets=False, pareto=True),
            one("quantize(rtn, bits=2, group_size=32)", "torch", 50.6, 9500, 41234.5, meets=False, pareto=True),
            unmeasured("prune(magnitude, sparsity=0.9)", "torch", "failed", "no answer within 300 s"),
        ],
        "closest": None,
        "warnings": ["the chosen is slower than the original"],
    }
    with_ids(choice)
    offers = [
        {
            "id": choice["candidates"][index]["id"],
            "gain": f"size {size} MB → {gain}x smaller than the chosen",
            "cost": f"perplexity_ratio {cost} instead of 1.041",
        }
        for index, size, gain, cost in ((6, 80.0, 1.05, 1.083), (7, 76.2, 1.11, 1.31))
    ]
    return with_accuracy(choice | {"chosen": choice["candidates"][5]["id"], "looser": offers})


def unmet_choice() -> dict[str, Any]:
    """The encoder's trials, under requirements that no trial meets."""
    choice = encoder_choice()
    for one in choice["candidates"]:
        one["meets"] = False if one["status"] == "measured" else None
    choice["baseline"]["meets"] = False
    closest = {"id": choice["candidates"][8]["id"], "misses": ["neighbour_agreement 0.984, required >=0.995"]}
    return choice | {"require": ["neighbour_agreement>=0.995", "size<=30MB"], "chosen": None, "closest": closest, "looser": []}


KINDS = ("linear", "attention", "norm", "activation", "embedding", "other", "between")


def explained_choice() -> dict[str, Any]:
    """The encoder's choice with what explains it: the chosen has a step, and one of its variants was not measured."""
    choice = encoder_choice()
    chosen = choice["candidates"][8]  # quantize(rtn, bits=8) @ openvino(dtype=bfloat16)
    plain, bfloat16 = choice["candidates"][5], choice["candidates"][6]
    untried = unmeasured("quantize(rtn, bits=8)", "openvino", "skipped", "not tried: the budget of 12 min is used up") | {"id": "untried"}
    choice |= {"chosen": chosen["id"], "looser": []}
    rows = [
        (choice["baseline"], "original", ""), (plain, "with", "@ openvino"), (bfloat16, "with", "dtype=bfloat16"),
        (chosen, "with", "quantize(rtn, bits=8)"), (untried, "without", "dtype=bfloat16"),
    ]  # fmt: skip
    choice["ablation"] = [row | {"role": role, "step": step} for row, role, step in rows]

    def side(trial: dict[str, Any], seconds: float, sizes: tuple[int, ...], failure: str | None) -> tuple[dict[str, Any], dict[str, Any]]:
        shares = (0.6, 0.16, 0.05, 0.06, 0.002, 0.05, 0.078)
        named = {key: trial[key] for key in ("id", "recipe", "runtime")}
        predicted = {kind: trial["predicted"]["latency_s"] * share for kind, share in zip(KINDS, shares, strict=True)}
        measured = None if failure else {kind: seconds * share for kind, share in zip(KINDS, reversed(shares), strict=True)}
        parts = dict(zip(("embedding", "attention", "mlp", "head", "norm", "other", "files"), sizes, strict=True))
        profile = {"predicted": predicted, "measured": measured, "measured_s": None if failure else seconds, "runs": 5, "failure": failure}
        size = {"predicted": parts, "predicted_bytes": sum(parts.values()), "measured_bytes": trial["measured"]["size_bytes"]}
        return named | profile, named | size

    first = side(choice["baseline"], 0.35, (47_683_584, 14_195_712, 28_329_984, 0, 39_936, 590_000, 711_000), None)
    second = side(chosen, 0.15, (12_100_000, 3_600_000, 7_200_000, 0, 39_936, 150_000, 720_000), None)
    choice["profile"] = {"original": first[0], "chosen": second[0]}
    choice["components"] = {"original": first[1], "chosen": second[1]}
    for one in choice["candidates"][:5]:
        value = one["measured"]["quality"]["neighbour_agreement"]["value"]
        one["predicted"]["quality"] = {"neighbour_agreement": {"value": value - 0.004, "low": value - 0.016, "high": value + 0.008}}
    for key, within in (("size_bytes", 9), ("peak_memory_bytes", 0), ("latency_s", 10)):
        choice["accuracy"][key] |= {"median_error": 0.123, "ranged": 11 if within else 0, "within": within}
    choice["accuracy"]["quality"] = {
        "metric": "neighbour_agreement",
        "count": 5,
        "median_error": 0.004,
        "worst_error": 0.004,
        "ranged": 5,
        "within": 5,
    }
    return choice


CHOICES = {"encoder": encoder_choice, "decoder": decoder_choice, "unmet": unmet_choice, "explained": explained_choice}


class Node:
    """An element of the page: its tag, attributes and, in order, the texts and elements in it."""

    def __init__(self, tag: str, attributes: dict[str, str | None]) -> None:
        self.tag, self.attributes, self.children = tag, attributes, list[Any]()

    def every(self, tag: str | None = None, style: str | None = None) -> Iterator[Node]:
        for child in self.children:
            if isinstance(child, Node):
                if tag in (None, child.tag) and (style is None or style in (child.attributes.get("class") or "").split()):
                    yield child
                yield from child.every(tag, style)

    def one(self, tag: str | None = None, style: str | None = None) -> Node:
        return next(self.every(tag, style))

    @property
    def text(self) -> str:
        return "".join(child if isinstance(child, str) else child.text for child in self.children)


class PageParser(HTMLParser):
    """Builds the tree; an element that is not closed, or closed out of order, is an error."""

    def __init__(self) -> None:
        super().__init__(convert_charrefs=True)
        self.root = Node("", {})
        self.open = [self.root]

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        assert len(dict(attrs)) == len(attrs), f"an attribute of <{tag}> is given twice"
        self.open[-1].children.append(Node(tag, dict(attrs)))
        if tag not in ("meta", "br"):
            self.open.append(self.open[-1].children[-1])

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.open[-1].children.append(Node(tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop().tag == tag

    def handle_data(self, data: str) -> None:
        self.open[-1].children.append(data)


def parse(page: str) -> Node:
    parser = PageParser()
    parser.feed(page)
    parser.close()
    assert parser.open == [parser.root]
    return parser.root


def trials_of(choice: dict[str, Any]) -> list[dict[str, Any]]:
    return [choice["baseline"], *choice["candidates"]]


def row_of(page: Node, trial_id: str) -> Node:
    rows = [row for row in page.one("table", "trials").every("tr") if trial_id in row.text]
    assert len(rows) == 1, f"{trial_id} has {len(rows)} rows"
    return rows[0]


def cells_of(row: Node) -> list[str]:
    return [child.text for child in row.children if isinstance(child, Node)]


def number_in(text: str) -> float:
    found = re.match(r"-?[0-9.]+(?:e[+-]?[0-9]+)?", text)
    assert found, text
    return float(found[0])


every_choice = pytest.mark.parametrize("make", CHOICES.values(), ids=CHOICES)
Make = Callable[[], dict[str, Any]]


@every_choice
def test_every_trial_has_its_row_with_recipe_runtime_and_figures(make: Make) -> None:
    choice = make()
    page = parse(report_page(choice))
    assert len(list(page.one("table", "trials").every("tr"))) == len(trials_of(choice)) + 2  # two lines of head
    for one in trials_of(choice):
        row = row_of(page, one["id"])
        assert one["recipe"] in row.text
        assert f"@ {one['runtime']}" in row.text
        if one["status"] == "measured":
            value = one["measured"]["quality"][choice["quality_metric"]]["value"]
            assert number_in(cells_of(row)[2]) == pytest.approx(value, rel=0.01, abs=5e-4)
            assert [cells_of(row)[column] for column in (6, 9, 12)] == [f"{ratio:.2f}" for ratio in one["ratio"].values()]
            assert "–" not in cells_of(row)[4:6] + cells_of(row)[7:9]
        else:
            assert f"{one['status']}: {one['failure']}" in row.text
            assert one["status"] in (row.attributes["class"] or "")


@every_choice
def test_the_page_fetches_nothing_runs_nothing_and_its_links_lead_somewhere(make: Make) -> None:
    choice = make()
    source = report_page(choice)
    page = parse(source)
    assert not [node.tag for node in page.every() if node.tag in ("script", "link", "img", "iframe", "object", "base", "form", "image", "use")]
    assert not [name for node in page.every() for name in node.attributes if name in ("src", "srcset", "style") or name.startswith("on")]
    assert not re.search(r"url\(|@import|https?:", source)
    ids = [node.attributes["id"] for node in page.every() if "id" in node.attributes]
    assert len(ids) == len(set(ids)) == len(trials_of(choice))
    links = [node.attributes["href"] for node in page.every("a")]
    points = list(page.every("a", "point"))
    assert len(links) == len(choice["looser"]) + len(points)
    assert len(points) == len([mark for mark in page.every(style="mark") if mark.text])
    assert {f"#{name}" for name in ids}.issuperset(links)
    style = page.one("style").text
    assert "prefers-color-scheme: dark" in style
    assert "@media print" in style
    used = {name for node in page.every() for name in (node.attributes.get("class") or "").split()}
    coloured = {name for name in used if re.search(rf"\.{re.escape(name)}\b", style)}
    assert used - coloured <= {"measured", "skipped", "other", "tick", "plot", "label", "front", "baseline", "off", "step"}


@every_choice
def test_no_page_or_table_shows_a_programs_word_for_nothing(make: Make) -> None:
    choice = make()
    for text in (parse(report_page(choice)).one("body").text, choice_table(choice), prediction_table(choice)):
        assert len(text) > 1000
        assert not re.search(r"\b(None|nan|inf|null|True|False|undefined)\b", text, re.IGNORECASE)


HOSTILE = "<script>alert(1)</script>\"'&amp;</style><img src=x onerror=alert(2)>"


def spoiled(part: Any, key: str = "") -> Any:
    """`part` with a hostile word behind every text that is not one of the schema's own words."""
    if isinstance(part, dict):
        return {name + HOSTILE if key in ("versions", "quality") else name: spoiled(value, name) for name, value in part.items()}
    if isinstance(part, list):
        return [spoiled(value, key) for value in part]
    return part + HOSTILE if isinstance(part, str) and key not in ("status", "objective", "goal") else part


@every_choice
def test_every_text_of_a_users_is_shown_as_text(make: Make) -> None:
    choice = spoiled(make())
    page = parse(report_page(choice))
    assert not list(page.every("script"))
    assert not list(page.every("img"))
    assert len(list(page.every("style"))) == 1
    assert not [name for node in page.every() for name in node.attributes if name.startswith("on")]
    texts = [
        choice["command"],
        choice["model"]["name"],
        choice["machine"]["cpu"],
        choice["text"]["source"],
        *choice["require"],
        *choice["warnings"],
    ]
    texts += [text for one in trials_of(choice) for text in (one["id"], one["recipe"], one["runtime"], one["failure"]) if text]
    texts += [text for offer in choice["looser"] for text in (offer["gain"], offer["cost"])] + list(choice["versions"])
    assert len(texts) > 40
    assert [text for text in texts if text not in page.text] == []


def test_a_name_cannot_steer_the_terminal() -> None:
    choice = encoder_choice()
    choice["candidates"][0]["recipe"] = "quantize(\x1b[2J\x07rtn)\n\nforged line"
    choice["candidates"][10]["failure"] = "first\r\n\x1b]0;title\x07 second"
    text = choice_table(choice) + prediction_table(choice)
    assert "forged line" in text
    assert all(letter == "\n" or letter.isprintable() for letter in text)
    assert not re.search(r"^forged", text, re.MULTILINE)


# the answer


def answer_of(choice: dict[str, Any]) -> tuple[str, str]:
    page = parse(report_page(choice))
    return page.one("h1").text, page.one("header").text


def test_the_answer_says_what_was_chosen_the_gain_the_loss_and_that_requirements_hold() -> None:
    choice = encoder_choice()
    headline, answer = answer_of(choice)
    assert headline == "3.31× faster than the original, same size on disk; 99.1% of the texts keep their nearest neighbour"
    for said in (
        "torch-compile(dtype=bfloat16)",
        "ran in bfloat16",
        "334 ms → 101 ms",
        "0.991 ± 0.004",
        "neighbour_agreement>=0.97: measured",
    ):
        assert said in answer
    assert "✓ All requirements hold" in answer
    terminal = " ".join(choice_table(choice).split())
    assert "Chosen: no change @ torch-compile(dtype=bfloat16): 3.31× faster (334 ms → 101 ms), same size on disk" in terminal
    assert "neighbour_agreement 0.991 ± 0.004 (original: 1)" in terminal
    assert "All requirements hold: neighbour_agreement>=0.97." in terminal


def test_a_chosen_that_is_slower_or_bigger_is_said_so_in_the_headline_and_in_the_terminal() -> None:
    choice = decoder_choice()
    headline, answer = answer_of(choice)
    assert headline == "6.39× smaller than the original, 1.50× slower; perplexity 1.041× the original's"
    assert "Warning: the chosen is slower than the original" in answer
    assert "only 1.4 standard errors from the limit" in answer  # (1.05 - 1.041) / (0.0061 · 1.041)
    terminal = choice_table(choice)
    assert "1.50× slower (6.2 s → 9.3 s)" in terminal
    assert "Warning: the chosen is slower than the original." in terminal

    bigger = encoder_choice()
    bigger["candidates"][2]["measured"]["size_bytes"] = 2 * bigger["baseline"]["measured"]["size_bytes"]
    assert "2.00× bigger" in answer_of(bigger)[0]
    assert "2.00× bigger" in choice_table(bigger)


def test_where_nothing_meets_the_requirements_the_closest_and_its_misses_come_first() -> None:
    choice = unmet_choice()
    headline, answer = answer_of(choice)
    assert headline == "Nothing met the requirements"
    assert "Closest: neighbour_agreement 0.984, required >=0.995" in answer
    assert "✗ The requirements do not all hold" in answer
    assert "quantize(rtn, bits=8) on openvino(dtype=bfloat16)" in answer
    assert "size<=30MB: measured 23.6 MB" in answer
    terminal = choice_table(choice)
    assert "Nothing met the requirements. Closest: quantize(rtn, bits=8) @ openvino(dtype=bfloat16)" in terminal
    assert "★" not in "\n".join(terminal.split("\n")[:-4])
    assert "Looser quality" not in terminal


def test_the_original_itself_can_be_the_choice() -> None:
    choice = encoder_choice()
    choice |= {"chosen": choice["baseline"]["id"], "looser": []}
    headline, _ = answer_of(choice)
    assert headline.startswith("Keep the original")
    assert "Chosen: the original itself (original @ torch)" in choice_table(choice)


def test_without_any_measurement_nothing_is_claimed() -> None:
    choice = encoder_choice()
    for one in trials_of(choice):
        one |= {"status": "failed", "failure": "killed", "measured": None, "ratio": None, "pareto": False, "meets": None}
    choice |= {"chosen": None, "closest": None, "looser": [], "accuracy": {}}
    headline, _ = answer_of(choice)
    page = parse(report_page(choice))
    assert headline.startswith("Nothing was chosen")
    assert not list(page.every("svg", "plot"))
    assert page.text.count("median ratio not known, worst not known") == 3
    assert "Nothing was chosen" in choice_table(choice)
    assert prediction_table(choice).count("not known") == 6


def test_what_looser_quality_would_buy_is_listed_in_page_and_terminal() -> None:
    choice = decoder_choice()
    page, terminal = parse(report_page(choice)).one("table", "looser").text, " ".join(choice_table(choice).split())
    for offer in choice["looser"]:
        for said in (offer["gain"], offer["cost"]):
            assert said in page
            assert said in terminal


# missing figures


def test_a_missing_figure_is_not_known_and_never_a_number() -> None:
    choice = encoder_choice()
    one = choice["candidates"][3]
    one["measured"] |= {"peak_memory_bytes": None, "latency_s": math.nan, "latency_q1_s": None, "speedup": None, "precision": None}
    one["measured"]["quality"] = {"neighbour_agreement": {"value": math.inf, "standard_error": None}}
    one["predicted"] |= dict.fromkeys(one["predicted"])
    one["ratio"] = dict.fromkeys(one["ratio"])
    page = parse(report_page(choice))
    cells = cells_of(row_of(page, one["id"]))
    size = cells[5]
    assert size == "91.4 MB"
    assert [cell for cell in cells[2:] if cell != size] == ["not known"] * 10
    assert not re.search(r"\b(None|nan|inf|null)\b", page.one("body").text + choice_table(choice) + prediction_table(choice), re.IGNORECASE)
    line = next(line for line in choice_table(choice).split("\n") if "onnxruntime" in line and "no change" in line)
    assert line.count("not known") == 4
    assert next(line for line in prediction_table(choice).split("\n") if line.startswith("no change @ onnxruntime")).count("not known") == 8


def test_what_the_run_does_not_say_about_itself_is_not_known() -> None:
    choice = encoder_choice()
    full = parse(report_page(choice)).one("dl")
    assert "AMD EPYC 9554 64-Core Processor, 2 cores, 2 threads used" in full.text
    assert "torch 2.13.0" in full.text
    assert "not known" not in full.text
    choice |= dict.fromkeys(("model", "workload", "machine", "versions", "text", "seconds", "command", "accuracy", "lighten"))
    page = parse(report_page(choice))
    facts = [node.text for node in page.one("dl").every("dd")]
    assert all("not known" in fact for fact in facts)
    assert page.one("pre").text == "not known"


def test_the_command_to_rerun_is_exact() -> None:
    assert parse(report_page(encoder_choice())).one("pre").text == encoder_choice()["command"]


# the plots


def plots_of(choice: dict[str, Any]) -> list[Node]:
    """Wide and narrow trade-off, then size, memory and latency predicted against measured, and quality where it was predicted; no bars."""
    return [plot for plot in parse(report_page(choice)).every("svg", "plot") if list(plot.every("a", "point"))]


def boxes_of(plot: Node) -> dict[str, Box]:
    """Where a browser draws the labels: 0.602 em a letter (DejaVu Sans Mono's advance), 11 pixels high, from the baseline up by 0.76 em."""
    labels = [(node.text, float(node.attributes["x"] or ""), float(node.attributes["y"] or "")) for node in plot.every("text", "label")]
    boxes = {text: Box(x=x, y=y - 0.76 * 11, width=0.602 * 11 * len(text), height=11) for text, x, y in labels}
    assert len(boxes) == len(labels), "two labels say the same"
    return boxes


def overlapping(boxes: dict[str, Box]) -> list[tuple[str, str]]:
    return [(one, other) for one, other in combinations(boxes, 2) if boxes[one].overlaps(boxes[other])]


@every_choice
def test_no_two_labels_of_a_plot_overlap_and_none_leaves_it(make: Make) -> None:
    plots = plots_of(make())
    assert len(plots) == 5 + (make is explained_choice)
    for plot in plots:
        width, height = (float(side) for side in (plot.attributes["viewbox"] or "").split()[2:])
        boxes = boxes_of(plot)
        assert len(boxes) >= 3
        assert overlapping(boxes) == []
        assert [text for text, box in boxes.items() if not Box(x=0, y=0, width=width, height=height).holds(box)] == []


def test_labels_that_would_overlap_are_seen_by_the_test_above() -> None:
    assert overlapping({"one": svg.label_box("one", 10, 10), "other": svg.label_box("other", 25, 15)}) == [("one", "other")]
    assert overlapping({"one": svg.label_box("one", 10, 10), "other": svg.label_box("other", 10, 25)}) == []


@every_choice
def test_each_measured_trial_is_drawn_once_and_its_number_stands_beside_it(make: Make) -> None:
    choice = make()
    measured = [one for one in trials_of(choice) if one["status"] == "measured"]
    page = parse(report_page(choice))
    numbers = {int(cells_of(row_of(page, one["id"]))[0].lstrip("★· ")) for one in measured}
    for plot in plots_of(choice)[:2]:
        marks = list(plot.every(style="mark"))
        assert len(marks) == len(measured)
        shown = [int(number) for text in boxes_of(plot) if text[0].isdigit() for number in re.match(r"[\d,]+", text)[0].split(",")]
        assert sorted(shown) == sorted(numbers)
        assert sum("baseline" in (mark.attributes["class"] or "") for mark in marks) == 1
        assert sum((mark.attributes["class"] or "").split()[1] in ("chosen", "closest") for mark in marks) == 1


def test_what_a_failed_trial_left_behind_is_not_drawn() -> None:
    choice = encoder_choice()
    failed = next(one for one in choice["candidates"] if one["status"] == "failed")
    failed |= {"measured": copy.deepcopy(choice["baseline"]["measured"]), "ratio": choice["baseline"]["ratio"], "pareto": True}
    assert [len(list(plot.every(style="mark"))) for plot in plots_of(choice)] == [11] * 5


def test_the_chosen_is_never_below_the_plots_edge_however_bad_its_quality() -> None:
    choice = encoder_choice() | {"require": []}
    choice["chosen"] = choice["candidates"][7]["id"]  # 0.893, where half of the trials have 0.988 and more
    texts = list(boxes_of(plots_of(choice)[0]))
    assert [text for text in texts if "↓" in text] == ["7↓0.310"]


def place_of(mark: Node) -> tuple[float, float]:
    if mark.tag == "circle":
        return float(mark.attributes["cx"] or ""), float(mark.attributes["cy"] or "")
    corners = [tuple(map(float, corner.split(","))) for corner in (mark.attributes["points"] or "").split()]
    xs, ys = zip(*corners, strict=True)
    if "closest" in (mark.attributes["class"] or ""):  # a triangle, drawn from 6 above to 5 below
        return sum(xs) / 3, min(ys) + 6
    return (sum(xs) / len(xs), sum(ys) / len(ys))


def marks_by_number(plot: Node) -> dict[int, tuple[float, float]]:
    return {int(mark.text.split(":")[0]): place_of(mark) for mark in plot.every(style="mark")}


@every_choice
def test_less_cost_is_further_left_and_better_quality_further_up(make: Make) -> None:
    choice = make()
    key = {"latency": "latency_s", "size": "size_bytes"}[choice["objective"]]
    sign = 1 if choice["quality_metric"] == "perplexity_ratio" else -1
    page = parse(report_page(choice))
    for plot in plots_of(choice)[:2]:
        places = marks_by_number(plot)
        floor = max(y for _, y in places.values())
        drawn = []
        for one in trials_of(choice):
            if one["status"] == "measured":
                x, y = places[int(cells_of(row_of(page, one["id"]))[0].lstrip("★· "))]
                drawn.append((one["measured"][key], sign * one["measured"]["quality"][choice["quality_metric"]]["value"], x, y))
        pairs = list(combinations(drawn, 2))
        assert len(pairs) == 55
        for (cost, loss, x, y), (other_cost, other_loss, other_x, other_y) in pairs:
            assert (x - other_x) * (cost - other_cost) >= 0
            assert abs(x - other_x) > 1 or cost == pytest.approx(other_cost, rel=0.02)
            if max(y, other_y) < floor:
                assert (y - other_y) * (loss - other_loss) >= 0


@every_choice
def test_the_front_passes_through_every_pareto_trial_and_leaves_none_above_it(make: Make) -> None:
    choice = make()
    page = parse(report_page(choice))
    plot = plots_of(choice)[0]
    corners = [tuple(map(float, corner.split())) for corner in (plot.one("path", "front-line").attributes["d"] or "")[1:].split(" L")]
    assert all(after[0] >= before[0] and after[1] <= before[1] for before, after in pairwise(corners)), "stairs go right and up"
    assert all(after[0] == before[0] or after[1] == before[1] for before, after in pairwise(corners)), "nobody measured what lies between"
    places = marks_by_number(plot)
    front = [one for one in trials_of(choice) if one["pareto"]]
    assert len(front) >= 3
    for one in front:
        x, y = places[int(cells_of(row_of(page, one["id"]))[0].lstrip("★· "))]
        assert min(math.dist((x, y), corner) for corner in corners) < 0.2
    if choice["objective"] == "latency":  # the fixture's marks are a true front there
        for x, y in places.values():
            reached = min(corner_y for corner_x, corner_y in corners if corner_x <= x + 0.2)
            assert y >= reached - 0.2


def test_the_requirement_is_a_line_between_those_that_meet_it_and_those_that_do_not() -> None:
    for choice in (encoder_choice(), decoder_choice()):
        page, plot = parse(report_page(choice)), plots_of(choice)[0]
        y = float((plot.one("path", "limit").attributes["d"] or "").split()[1].removesuffix("L"))
        places = marks_by_number(plot)
        sides = {one["meets"]: [] for one in trials_of(choice) if one["meets"] is not None}
        for one in trials_of(choice):
            if one["status"] == "measured":
                sides[one["meets"]].append(places[int(cells_of(row_of(page, one["id"]))[0].lstrip("★· "))][1])
        assert max(sides[True]) < y < min(sides[False])
        shaded = plot.one("rect", "fails").attributes
        assert float(shaded["y"] or "") == pytest.approx(y, abs=0.1)
        assert any(text.startswith("required ") for text in boxes_of(plot))


def test_a_requirement_on_the_minimized_size_is_an_upright_line_and_others_are_named() -> None:
    choice = decoder_choice() | {"require": ["size<=100MB", "latency<=8s", "perplexity<=1.05x"]}
    plot = plots_of(choice)[0]
    ends = [[float(number) for number in re.findall(r"[\d.]+", path.attributes["d"] or "")] for path in plot.every("path", "limit")]
    upright = [(x, y) for x, y, end_x, end_y in ends if x == end_x]
    assert len(ends) == 2
    assert len(upright) == 1
    places = marks_by_number(plot)
    assert sum(x < upright[0][0] for x, _ in places.values()) == 5  # 84.2, 80.0, 76.2, 67.4 and 50.6 MB
    assert overlapping(boxes_of(plot)) == []
    assert "Required too, and not drawn: latency<=8s." in parse(report_page(choice)).text


@every_choice
def test_a_prediction_is_above_the_diagonal_where_it_is_too_high(make: Make) -> None:
    choice = make()
    page = parse(report_page(choice))
    seen = set()
    for plot, key in zip(plots_of(choice)[2:5], ("size_bytes", "peak_memory_bytes", "latency_s"), strict=True):
        x1, y1, x2, y2 = (float(number) for number in re.findall(r"[\d.]+", plot.one("path", "diagonal").attributes["d"] or ""))
        places = marks_by_number(plot)
        assert len(places) == 11
        for one in trials_of(choice):
            if one["status"] == "measured":
                x, y = places[int(cells_of(row_of(page, one["id"]))[0].lstrip("★· "))]
                above = y1 + (y2 - y1) * (x - x1) / (x2 - x1) - y
                ratio = one["ratio"][key]
                assert above * (ratio - 1) > 0 or abs(above) < 1.5, (key, ratio, above)
                seen.add(math.copysign(1, above))
    assert seen == {-1.0, 1.0}


@every_choice
def test_median_and_worst_ratio_stand_beside_each_plot_and_under_the_terminals_table(make: Make) -> None:
    choice = make()
    captions = [node.text for node in parse(report_page(choice)).every("figcaption") if "median ratio" in node.text]
    lines = prediction_table(choice).split("\n")
    assert len(captions) == 3
    for column, (caption, found) in enumerate(zip(captions, choice["accuracy"].values(), strict=False)):
        assert f"median ratio {found['median']:.2f}, worst {found['worst']:.2f} (11 trials)" in caption
        for line, which in ((lines[-2], "median"), (lines[-1], "worst")):
            assert line.startswith(f"{which} ratio")
            assert line.split()[2 + column] == f"{found[which]:.2f}"


def test_the_terminal_shows_prediction_measurement_and_ratio_in_this_order() -> None:
    line = next(line for line in prediction_table(encoder_choice()).split("\n") if line.startswith("no change @ torch-compile "))
    assert re.split(r"\s{2,}", line)[1:4] == ["90.5 MB", "90.9 MB", "1.00"]
    assert re.split(r"\s{2,}", line)[4:] == ["153.5 MB", "365.4 MB", "0.42", "243.9 ms", "271 ms", "0.90"]


def test_ratios_that_are_far_off_stand_out_in_the_table_of_trials() -> None:
    choice = encoder_choice()
    page = parse(report_page(choice))
    far = [f"{ratio:.2f}" for one in trials_of(choice) for ratio in (one["ratio"] or {}).values() if not 0.8 <= ratio <= 1.25]
    assert len(far) > 2
    assert sorted(node.text for node in page.every("td", "off")) == sorted(far)


def test_how_often_the_truth_lies_in_the_predicted_range_is_counted() -> None:
    choice = encoder_choice()
    for one, factor in zip(choice["candidates"], (0.5, 0.5, 0.5, 2.0), strict=False):
        measured = one["measured"]["latency_s"]
        one["predicted"] |= {"latency_low_s": measured * factor * 0.9, "latency_high_s": measured * factor * 1.1}
    rest = [choice["baseline"], *choice["candidates"][4:]]
    inside = sum(0.8 * one["ratio"]["latency_s"] <= 1 <= 1.3 * one["ratio"]["latency_s"] for one in rest if one["ratio"])
    assert 0 < inside < 7
    assert f"within the predicted range in {inside} of 11 trials" in parse(report_page(choice)).text


points = st.lists(st.tuples(st.floats(0, 300), st.floats(0, 200)), min_size=1, max_size=30)


@given(points=points)
def test_placed_labels_never_overlap_each_other_or_what_is_taken(points: list[tuple[float, float]]) -> None:
    frame, taken = Box(x=0, y=0, width=300, height=200), [Box(x=100, y=50, width=80, height=40)]
    wanted = [Wanted(x=x, y=y, texts=[f"{index} a rather long name", str(index)]) for index, (x, y) in enumerate(points)]
    placed = place_labels(wanted, frame, taken)
    assert placed
    assert all(frame.holds(label.box) and not label.box.overlaps(taken[0]) for label in placed)
    assert not [pair for pair in combinations(placed, 2) if pair[0].box.overlaps(pair[1].box)]


def test_a_lone_label_has_its_longest_text_beside_its_point() -> None:
    (label,) = place_labels([Wanted(x=50, y=50, texts=["the long text", "short"])], Box(x=0, y=0, width=300, height=100), [])
    assert label.text == "the long text"
    assert label.leader == []
    assert not label.box.overlaps(Box(x=49, y=49, width=2, height=2))


def test_trials_of_one_size_and_quality_share_a_label() -> None:
    texts = [text for text in boxes_of(plots_of(decoder_choice())[0]) if text[0].isdigit()]
    assert any(re.match(r"\d+,\d+ ", text) for text in texts)


def test_a_plot_of_equal_figures_is_drawn() -> None:
    choice = encoder_choice()
    for one in choice["candidates"]:
        if one["measured"]:
            one["measured"] = copy.deepcopy(choice["baseline"]["measured"])
    plots = plots_of(choice)
    assert len(plots) == 5
    assert all(overlapping(boxes_of(plot)) == [] for plot in plots)


@given(low=st.floats(1e-6, 1e9), span=st.floats(1.01, 1e6), at_most=st.integers(3, 10))
def test_ticks_are_within_the_bounds_and_few(low: float, span: float, at_most: int) -> None:
    for ticks in (log_ticks(low, low * span, at_most), linear_ticks(low, low * span, at_most)):
        assert len(ticks) >= 1
        assert len(ticks) <= at_most + 1
        assert all(low * (1 - 1e-9) <= tick <= low * span * (1 + 1e-9) for tick in ticks)
        assert ticks == sorted(set(ticks))


# requirements


@pytest.mark.parametrize(
    ("text", "figure", "at_least", "value"),
    [
        ("neighbour_agreement>=0.97", "neighbour_agreement", True, 0.97),
        ("quality >= 97%", "neighbour_agreement", True, 0.97),
        ("size<=50MB", "size_bytes", False, 50e6),
        ("memory<1GiB", "peak_memory_bytes", False, 2**30),
        ("latency<=20ms", "latency_s", False, 0.02),
        ("perplexity<=1.05x", "perplexity_ratio", False, 1.05),
        ("perplexity<=21.5", "perplexity", False, 21.5),
        ("speedup>=2x", "speedup", True, 2.0),
    ],
)
def test_a_requirement_is_read(text: str, figure: str, at_least: bool, value: float) -> None:
    limit = read_limit(text, "neighbour_agreement")
    assert limit is not None
    assert (limit.figure, limit.at_least, limit.value) == (figure, at_least, pytest.approx(value))


@pytest.mark.parametrize("text", ["size<=50", "latency<=2MB", "be good", "", "size<=many MB", "quality>=lots%"])
def test_a_requirement_of_another_form_is_shown_as_text_alone(text: str) -> None:
    assert read_limit(text, "cosine") is None
    choice = encoder_choice() | {"require": [text]}
    page = parse(report_page(choice))
    assert text in page.one("header").one(style="verdict").text
    assert not list(plots_of(choice)[0].every("path", "limit"))


# the terminal


def test_a_table_is_aligned() -> None:
    shown = format_table([["a", "1.5 MB", "x"], ["名前", "12 MB", "two\nlines"], ["b", "failed: it ran out of memory"]], ["name", "size", "note"])
    assert shown.split("\n") == [
        "name    size  note",
        "-------------------",
        "a     1.5 MB  x",
        "名前   12 MB  two",
        "              lines",
        "b     failed: it ran out of memory",
    ]


def test_an_empty_table_is_its_header() -> None:
    assert format_table([], ["a", "bc"]) == "a  bc\n-----"


@every_choice
def test_the_terminals_table_holds_every_trial_and_fits(make: Make) -> None:
    choice = make()
    text = choice_table(choice)
    assert max(map(len, text.split("\n"))) <= 110
    flat = " ".join(text.split())
    lines = text.split("\n")
    for one in trials_of(choice):
        assert one["runtime"] in text
        for word in one["recipe"].split():
            assert word in flat
        if one["failure"]:
            assert one["failure"].split(",")[0][:20] in flat
    marks = [line[0] for line in lines[3 : lines.index("★ chosen   · on the Pareto front")] if line[0] != " "]
    front = sum(one["pareto"] for one in trials_of(choice) if one["id"] != choice["chosen"])
    assert sorted(marks) == ["·"] * front + (["★"] if choice["chosen"] else [])


def test_the_terminals_table_says_latency_with_quartiles_and_how_good_its_prediction_was() -> None:
    choice = encoder_choice()
    line = next(line for line in choice_table(choice).split("\n") if line.startswith("★"))
    ratio = choice["candidates"][2]["ratio"]["latency_s"]
    assert [cell.strip() for cell in re.split(r"\s{2,}", line)] == [
        "★",
        "no change @ torch-compile(dtype=bfloat16)",
        "90.9 MB",
        "101 ms (99.5–103.2)",
        "3.31x",
        "0.991 ± 0.004",
        f"{ratio:.2f}",
    ]


# what explains the choice


def section(choice: dict[str, Any], title: str) -> Node:
    return next(node for node in parse(report_page(choice)).every("section") if title in [head.text for head in node.every("h2")])


def test_each_step_has_a_row_with_what_it_gave_and_what_was_predicted() -> None:
    choice = explained_choice()
    rows = list(section(choice, "What each step contributed").one("tbody").every("tr"))
    assert [row.one("code").text for row in rows] == [
        "the original @ torch", "@ openvino", "+ dtype=bfloat16", "+ quantize(rtn, bits=8) = chosen", "chosen without dtype=bfloat16",
    ]  # fmt: skip
    assert cells_of(rows[1])[1:] == ["265 ms353 ms", "91.2 MB90.4 MB", "366.2 MB261.6 MB", "1.000 ± 0.000"]
    assert "not tried: the budget of 12 min is used up" in rows[4].text
    assert [node.text for node in rows[4].every("i")] == ["190 ms", "45.4 MB", "410 MB", "not known"]
    assert not list(rows[1].every("i"))


def test_bars_are_as_long_as_their_figures_and_the_prediction_is_a_line() -> None:
    choice = explained_choice()
    plot = next(section(choice, "What each step contributed").every("svg", "plot"))
    widths = [float(node.attributes["width"] or "") for node in plot.every("rect", "part")]
    seconds = [row["measured"]["latency_s"] if row["measured"] else row["predicted"]["latency_s"] for row in choice["ablation"]]
    assert [width / widths[0] for width in widths] == pytest.approx([value / seconds[0] for value in seconds], rel=0.01)
    lines = [float(node.attributes["x1"] or "") - 2 for node in plot.every("line", "foreseen")]
    assert [x / lines[0] for x in lines] == pytest.approx(
        [row["predicted"]["latency_s"] / choice["baseline"]["predicted"]["latency_s"] for row in choice["ablation"]], rel=0.02
    )


def test_operators_and_components_are_told_in_bars_and_in_tables_that_add_up() -> None:
    choice = explained_choice()
    found = section(choice, "Where the time goes")
    times, sizes = found.every("table", "pieces")
    heads = [node.text for node in times.one("thead").every("th")]
    assert heads == ["", "original, predicted", "original, measured", "chosen, predicted", "chosen, measured"]
    for table, unit in ((times, "s"), (sizes, "B")):
        rows = {cells_of(row)[0]: cells_of(row)[1:] for row in table.one("tbody").every("tr")}
        assert len(rows) == 8 - (unit == "B")  # nothing is in a head
        factors = {"µs": 1e-6, "ms": 1e-3, "s": 1.0, "kB": 1e3, "MB": 1e6, "B": 1.0}
        for column in range(len(heads) - 1 if unit == "s" else 2):
            values = {name: number_in(cells[column]) * factors[cells[column].split()[1]] for name, cells in rows.items()}
            assert sum(values.values()) - values["all"] == pytest.approx(values["all"], rel=0.01)
    bars = [plot for plot in found.every("svg", "plot") if list(plot.every("rect", "part"))]
    titles = [node.text for node in bars[0].every("title")]
    assert "linear: 206.4 ms, 60%" in titles
    assert "The files of the chosen take 23.6 MB: predicted 23.8 MB, +0.89%." in found.text


def test_what_no_profiler_told_is_not_known_and_says_why() -> None:
    choice = explained_choice()
    choice["profile"]["chosen"] |= {"measured": None, "measured_s": None, "failure": "runtime llama.cpp does not tell: it has no profiler"}
    found = section(choice, "Where the time goes")
    assert "chosen, measured" not in found.text
    assert "Of the chosen: quantize(rtn, bits=8) @ openvino(dtype=bfloat16): runtime llama.cpp does not tell: it has no profiler" in found.text


def test_a_choice_of_an_older_version_has_a_page_without_what_it_does_not_say() -> None:
    page = report_page(encoder_choice())
    for title in ("What each step contributed", "Where the time goes", "Where the bytes lie", "within the range, aim"):
        assert title not in page
        assert title in report_page(explained_choice())


@pytest.mark.parametrize("broken", [None, [], {}, "words", {"original": None, "chosen": {"predicted": [1], "measured": {"linear": "fast"}}}])
def test_an_explanation_that_is_no_explanation_is_left_out(broken: Any) -> None:
    choice = explained_choice() | {"profile": broken, "components": broken, "ablation": broken if isinstance(broken, list) else None}
    page = report_page(choice)
    assert "What each step contributed" not in page
    assert "Where the bytes lie" not in page


def test_points_that_fail_a_requirement_are_grey_and_every_point_tells_all_its_figures() -> None:
    choice = explained_choice()
    page, plot = parse(report_page(choice)), plots_of(choice)[0]
    grey = {int(mark.text.split(":")[0]) for mark in plot.every(style="faint")}
    failing = {one["id"] for one in trials_of(choice) if one["meets"] is False}
    assert {int(cells_of(row_of(page, one))[0].lstrip("★· ")) for one in failing} == grey
    chosen = next(mark for mark in plot.every(style="mark") if "chosen" in (mark.attributes["class"] or "").split())
    assert chosen.text.split("\n") == [
        "4: quantize(rtn, bits=8) @ openvino(dtype=bfloat16)", "neighbour_agreement: measured 0.984 ± 0.005",
        "latency: measured 141 ms, predicted 183.3 ms", "size on disk: measured 23.6 MB, predicted 21.5 MB",
        "peak memory: measured 183.7 MB, predicted 147 MB",
    ]  # fmt: skip


def test_how_good_predictions_were_is_a_table_with_the_share_within_the_range() -> None:
    rows = [cells_of(row) for row in section(explained_choice(), "Predicted against measured").one("table", "accuracy").one("tbody").every("tr")]
    assert rows == [
        ["size on disk", "11", "12.3%", "0.82 (9 of 11)"], ["peak memory", "11", "12.3%", "no range"], ["latency", "11", "12.3%", "0.91 (10 of 11)"],
        ["neighbour_agreement", "5", "0.004", "1.00 (5 of 5)"],
    ]  # fmt: skip


# the file


def test_the_report_is_written_whole_and_replaces_the_old_one(tmp_path: Path) -> None:
    path = tmp_path / "report.html"
    path.write_text("old")
    choice = json.loads(json.dumps(encoder_choice()))
    write_report(choice, path)
    assert path.read_text(encoding="utf-8") == report_page(choice)
    assert os.listdir(tmp_path) == ["report.html"]
    assert path.stat().st_size < 200_000


def test_a_full_disk_leaves_the_old_report_and_nothing_else(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(self: Path, text: str, encoding: str) -> int:
        self.open("w").close()
        raise OSError(errno.ENOSPC, "No space left on device")

    path = tmp_path / "report.html"
    path.write_text("old")
    monkeypatch.setattr(Path, "write_text", fail)
    with pytest.raises(OutputError, match=r"report\.html: the report cannot be written: No space left on device\."):
        write_report(encoder_choice(), path)
    assert path.read_text() == "old"
    assert os.listdir(tmp_path) == ["report.html"]


def test_a_missing_folder_is_one_line(tmp_path: Path) -> None:
    with pytest.raises(OutputError, match="the report cannot be written: No such file or directory"):
        write_report(encoder_choice(), tmp_path / "nowhere" / "report.html")


# ---- a search of a large space ----


def searched_choice() -> dict[str, Any]:
    """An encoder's choice with thirty recipes more, none of which was tried."""
    choice = encoder_choice()
    reasons = ["predicted latency 190 ms, no better than what was measured", "neighbour_agreement 0.800 by proxy, required neighbour_agreement>=0.97"]
    for number in range(30):
        trial = unmeasured(f"quantize(rtn, bits=4, group_size={number + 1})", "torch", "skipped", reasons[number % 3 == 0])
        choice["candidates"].append(trial | {"id": f"untried-{number}"})
    return choice | {"stopped": "nothing that is left is predicted to be better than what was measured"}


def test_of_many_that_were_not_tried_the_terminal_counts_the_reasons() -> None:
    choice = searched_choice()
    table = choice_table(choice)
    assert "32 not tried: 10 of too low quality by proxy, 20 predicted to be no better, " in " ".join(table.split())
    assert "group_size=7" not in table
    assert "Stopped: nothing that is left is predicted to be better than what was measured." in " ".join(table.split())
    assert all(f"group_size={number}" in choice_table(choice | {"candidates": choice["candidates"][-8:]}) for number in (23, 30))


def test_of_many_that_were_not_tried_the_page_tells_each_behind_a_fold() -> None:
    choice = searched_choice()
    page = report_page(choice)
    before, _, after = page.partition("<details>")
    assert "group_size=7)" not in before
    assert after.count("group_size=") >= 30
    assert "nothing that is left is predicted to be better" in page


@pytest.mark.parametrize("objective", ["throughput", "energy", "cost", "time_to_first_token", "quality", "speedup"])
def test_every_objective_has_a_plot_with_the_better_to_the_left(objective: str) -> None:
    choice = encoder_choice() | {"objective": objective, "goal": "maximize" if objective in ("throughput", "quality", "speedup") else "minimize"}
    for one in trials_of(choice):
        if one["measured"]:
            seconds = one["measured"]["latency_s"]
            one["measured"] |= {
                "throughput": 4096 / seconds,
                "energy_j": 65 * seconds,
                "usd_per_million_tokens": seconds,
                "time_to_first_token_s": seconds,
            }
    plot = plots_of(choice)[0]
    places = marks_by_number(plot)
    page = parse(report_page(choice))
    drawn = [
        (one["measured"]["latency_s"], places[int(cells_of(row_of(page, one["id"]))[0].lstrip("★· "))][0])
        for one in trials_of(choice) if one["status"] == "measured"
    ]  # fmt: skip
    assert [x for _, x in sorted(drawn)] == sorted(x for _, x in drawn)
    assert "Chosen: " in choice_table(choice)
