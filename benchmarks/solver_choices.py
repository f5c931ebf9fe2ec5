"""What the solvers' constants were chosen by: each is varied on real layers, and judged on text that none of them saw.

    python benchmarks/solver_choices.py --model .models/smollm2-135m-offgrid

Inputs of some linears of a decoder in bfloat16: `--tokens` of the calibration text choose the codes, each fourth window among them is held out, and
windows of the test text judge. A figure is (w - ŵ)ᵀ H (w - ŵ) over wᵀ H w on the latter, relative to the way that is used. What is varied:

    damping   each share alone, on 3 and 15 windows     (gptq.DAMPINGS)
    rounds    of refitting scales and refining codes    (gptq._ROUNDS)
    search    shares of the range that are tried        (scale_search._STEPS)
    pruning   rounds and first steps of the penalty, conjugate gradients, dampings and units of ADMM, beside SparseGPT   (compress/admm.py)
    moments   of bfloat16 inputs in float32, by bfloat16 units or not: seconds and difference (statistics.Moments)

The last line is one JSON object.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
import transformers
from torch import Tensor

from lighten.compress import admm, gptq, scale_search, sparsegpt
from lighten.compress import statistics as moments
from lighten.compress.masks import Keep
from lighten.compress.statistics import InputStatistics, Moments
from lighten.judge.text import load_text
from lighten.judge.tokens import Tokenizer
from lighten.model.spec import WeightFormat

LENGTH = 1024
LINEARS = ("self_attn.q_proj", "self_attn.o_proj", "mlp.gate_proj", "mlp.down_proj")
SHARES = (0.01, 0.03, 0.1, 0.3, 1.0)


@dataclass(frozen=True, kw_only=True)
class Layer:
    """A linear, what its codes are chosen on, and what they are judged by."""

    name: str
    weight: Tensor
    few: InputStatistics
    many: InputStatistics
    judge: Tensor

    def error(self, format: WeightFormat, seen: InputStatistics) -> float:
        found = gptq.quantize_gptq({"w": self.weight}, seen, format)["w"].dequantize()
        return float(gptq.layer_error(self.weight, found, self.judge).sum() / gptq.layer_error(self.weight, torch.zeros(()), self.judge).sum())


def layers(model: Path, blocks: list[int], *, few: int, many: int, judges: int) -> list[Layer]:
    """Linears of some blocks with the original's inputs: `few` and `many` windows of the calibration text, `judges` of the test text."""
    module: Any = transformers.AutoModelForCausalLM.from_pretrained(model, dtype=torch.bfloat16)
    module.eval()
    text, tokenizer = load_text(None), Tokenizer(model)
    wanted = {f"model.layers.{block}.{name}": module.get_submodule(f"model.layers.{block}.{name}") for block in blocks for name in LINEARS}
    sums = {name: [Moments(linear.in_features) for _ in range(3)] for name, linear in wanted.items()}
    seen: list[tuple[int, bool]] = []

    def watch(name: str) -> Any:
        def hook(_: Any, inputs: tuple[Tensor, ...]) -> None:
            for place, held_out in seen:
                sums[name][place].add(inputs[0], held_out=held_out)

        return hook

    for name, linear in wanted.items():
        linear.register_forward_pre_hook(watch(name))
    with torch.no_grad():
        for number, window in enumerate(tokenizer.windows(text.calibration, count=many, length=LENGTH)):
            seen[:] = [(place, number % 4 == 3) for place, most in ((0, few), (1, many)) if number < most]
            module(torch.from_numpy(window[None]))
        for window in tokenizer.windows(text.test, count=judges, length=LENGTH):
            seen[:] = [(2, False)]
            module(torch.from_numpy(window[None]))
    return [
        Layer(name=name, weight=linear.weight.detach().float(), few=own[0].finish(), many=own[1].finish(), judge=own[2].finish().hessian)
        for (name, linear), own in zip(wanted.items(), sums.values(), strict=True)
    ]


def int_format(bits: int) -> WeightFormat:
    return WeightFormat(element="int", bits=bits, group_size=64, symmetric=True, scale_dtype="float16")


@contextmanager
def only(damping: float) -> Iterator[None]:
    """Every factor damped alike, and no choice."""
    with patch.object(gptq, "DAMPINGS", (damping,) * 3):
        yield


def compared(title: str, found: list[Layer], ways: dict[str, list[float]], used: str) -> dict[str, Any]:
    """A line a way: its error over that of the way which is used, the median of the layers, and how often it is the best."""
    best = [min(ways, key=lambda way: ways[way][place]) for place in range(len(found))]
    rows = {
        way: {"median": statistics.median(a / b for a, b in zip(errors, ways[used], strict=True)), "best": best.count(way)}
        for way, errors in ways.items()
    }
    print(title)
    for way, row in rows.items():
        print(f"    {way:26} {row['median']:.4f}   best on {row['best']} of {len(found)}", flush=True)
    return {title: rows}


def dampings(found: list[Layer], bits: int) -> Iterator[dict[str, Any]]:
    for name in ("few", "many"):
        ways = {}
        for way, context in {"chosen": nullcontext, **{str(share): (lambda share=share: only(share)) for share in SHARES}}.items():
            with context():  # type: ignore[operator]
                ways[way] = [layer.error(int_format(bits), getattr(layer, name)) for layer in found]
        windows = found[0].few if name == "few" else found[0].many
        yield compared(f"damping, {bits} bits, {windows.rows} + {windows.held_out_rows} rows", found, ways, "chosen")


def rounds(found: list[Layer], bits: int) -> dict[str, Any]:
    ways = {}
    for count in range(5):
        with patch.dict(gptq._ROUNDS, {bits: count}):
            ways[str(count)] = [layer.error(int_format(bits), layer.few) for layer in found]
    return compared(f"rounds, {bits} bits", found, ways, str(gptq._ROUNDS[bits]))


def search(found: list[Layer], bits: int) -> dict[str, Any]:
    """The search alone, under the weights of its columns: 12 shares and two refits, or more of either."""
    ways = {}
    for steps, refits in ((6, 2), (12, 0), (12, 2), (80, 0), (80, 4)):
        with ExitStack() as stack:
            stack.enter_context(patch.object(scale_search, "_STEPS", steps))
            stack.enter_context(patch.object(scale_search, "_REFITS", refits))
            errors = []
            for layer in found:
                weights = gptq.first_factor(layer.few).residual
                value = scale_search.search_scales(layer.weight, format=int_format(bits), importance=weights).dequantize()
                errors.append(float(((layer.weight - value).square() * weights).sum()))
            ways[f"{steps} shares, {refits} refits"] = errors
    return compared(f"search, {bits} bits", found, ways, f"{scale_search._STEPS} shares, {scale_search._REFITS} refits")


def pruning(found: list[Layer], keep: Keep) -> dict[str, Any]:
    """All of ADMM's constants varied one by one, and the paper's SparseGPT."""

    def error(layer: Layer, pruned: Tensor) -> float:
        return float(gptq.layer_error(layer.weight, pruned, layer.judge).sum() / gptq.layer_error(layer.weight, torch.zeros(()), layer.judge).sum())

    def by_admm(damping: float | None = None) -> list[float]:
        return [error(layer, admm.prune_admm({"w": layer.weight}, layer.few, {"w": keep}, damping)["w"]) for layer in found]

    ways = {"as it is": by_admm()}
    changes: dict[str, dict[str, Any]] = {
        "48 rounds": {"ROUNDS": 48, "GROWTH": 1.1}, "12 rounds": {"ROUNDS": 12, "GROWTH": 1.45}, "8 rounds": {"ROUNDS": 8, "GROWTH": 1.7},
        "first penalty 0.01": {"FIRST_PENALTY": 0.01}, "first penalty 0.1": {"FIRST_PENALTY": 0.1},
        "5 gradient steps": {"GRADIENT_STEPS": 5}, "20 gradient steps": {"GRADIENT_STEPS": 20},
        "float32 units": {"bfloat16_units": nullcontext},
    }  # fmt: skip
    for name, values in changes.items():
        with ExitStack() as stack:
            for constant, value in values.items():
                stack.enter_context(patch.object(admm, constant, value))
            ways[name] = by_admm()
    for share in SHARES:
        ways[f"damping {share}"] = by_admm(share)
    ways["sparsegpt"] = [error(layer, sparsegpt.prune_sparsegpt({"w": layer.weight}, layer.few, {"w": keep})["w"]) for layer in found]
    ways["sparsegpt, damping 0.01"] = [
        error(layer, sparsegpt.prune_sparsegpt({"w": layer.weight}, layer.few, {"w": keep}, 0.01)["w"]) for layer in found
    ]
    name = f"pruning, {keep.pattern[0]}:{keep.pattern[1]}" if keep.pattern else f"pruning, {keep.sparsity}"
    return compared(name, found, ways, "as it is")


def moment_units(columns: int, rows: int = 4096, runs: int = 7) -> dict[str, Any]:
    """Seconds of one sum of moments, in turn by float32's units and bfloat16's, and how far apart the sums are."""
    x = torch.randn(rows, columns, generator=torch.Generator().manual_seed(0)).bfloat16()
    seconds: dict[str, list[float]] = {"float32 units": [], "bfloat16 units": []}
    made = {}
    for _ in range(runs):
        for name, units in (("float32 units", lambda wanted: nullcontext()), ("bfloat16 units", moments.bfloat16_units)):
            with patch.object(moments, "bfloat16_units", units):
                own = Moments(columns)
                start = time.perf_counter()
                own.add(x)
                seconds[name].append(time.perf_counter() - start)
                made[name] = own.finish().hessian
    plain, units = (statistics.median(seconds[name]) for name in seconds)
    difference = float((made["float32 units"] - made["bfloat16 units"]).norm() / made["float32 units"].norm())
    print(f"moments of {rows} x {columns}: bfloat16 units {plain / units:.2f} times as fast, relative difference {difference:.1e}", flush=True)
    return {f"moments {rows} x {columns}": {"times_as_fast": plain / units, "difference": difference}}


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--blocks", type=int, nargs="+", default=[1, 15, 28])
    parser.add_argument("--few", type=int, default=4, help="windows of 1,024 tokens that choose (default 4)")
    parser.add_argument("--many", type=int, default=20, help="the same where there are many (default 20)")
    parser.add_argument("--judges", type=int, default=8, help="windows of the test text that judge (default 8)")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--only", choices=("pruning",))
    asked = parser.parse_args()
    torch.set_num_threads(asked.threads)
    said: dict[str, Any] = {}
    for columns in (576, 1536):
        said |= moment_units(columns)
    found = layers(asked.model, asked.blocks, few=asked.few, many=asked.many, judges=asked.judges)
    for keep in (Keep(sparsity=0.5), Keep(pattern=(2, 4))):
        said |= pruning(found, keep)
    for bits in (4, 2) if asked.only != "pruning" else ():
        said |= search(found, bits)
    for bits in (4, 3, 2) if asked.only != "pruning" else ():
        said |= rounds(found, bits)
    for bits in (4, 2) if asked.only != "pruning" else ():
        for each in dampings(found, bits):
            said |= each
    print(json.dumps(said))


if __name__ == "__main__":
    main()
