"""Published parameter counts, file sizes, cache sizes and peaks of memory against the formulas.

    python benchmarks/published_counts.py --rows FOLDER

FOLDER holds counts.csv, kv_cache.csv and training.csv: one figure a row, with the sizes of its model and its source. `KINDS` says which
architecture a model's name means and which of its fields the columns do not have; a config is made of both. A row is

    ok        equal to the last digit, or, where the row is rounded, to its own number of digits
    rounded   off by no more than its rounding (rows marked as rounded by their source, or sizes in GB)
    wrong     neither: by how much, and what else is published that it contradicts, is beside it
    left out  no figure of parameters, files or caches, or sizes that the row does not give

Peaks of training.csv are predicted by `predicted_peak`, whose assumptions are in its docstring, and shown by source. The last line is one
JSON object.
"""

from __future__ import annotations

import argparse
import ast
import csv
import json
import math
import operator
import re
import statistics
import sys
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

from published_rows import LeftOut, Row, kind_of, spec_of

from lighten.cost.adapters import adapter_parameters, frozen_bytes
from lighten.cost.kv_cache import cache_bytes
from lighten.cost.memory import workload_memory
from lighten.cost.optimizer_state import state_bytes, trained_shapes
from lighten.cost.precision import parameter_bytes
from lighten.cost.tuning import memory_of
from lighten.cost.workload import Workload
from lighten.errors import LightenError
from lighten.model.ggml_types import GGML_TYPES
from lighten.model.spec import Attention, ModelSpec, Part
from lighten.units import dtype_bytes

TENTATIVE = {"hidden_size": 64, "intermediate_size": 64, "vocab_size": 64}
"""For a cache, whose bytes do not depend on them."""
LORA = {"litgpt": (8, "q_proj,v_proj"), "PEFT": (16, "q_proj,v_proj")}
"""Tool → rank and targets of its adapters. Source: litgpt's tutorials/finetune_lora.md of 2023; the README of PEFT and its default targets."""


Answer = tuple[float, str]
"""A figure, and what it holds that the plain one does not."""


# ---- counts.csv ----


def predicted_count(row: Row) -> list[Answer]:
    """What the formulas say of a row of counts.csv, in the row's own unit; with what else the publisher may have counted, after that."""
    quantity = row["quantity"]
    if quantity == "params_total":
        spec = spec_of(row)
        beside = kind_of(row["model"]).beside
        more = [(spec.total_parameters + count, what) for what, count in ([beside(spec)] if beside else [])]
        return [(spec.total_parameters, ""), *more]
    if quantity == "params_active":
        spec = spec_of(row)
        table = next(part for part in spec.parts if part.component == "embedding")
        return [(spec.active_parameters, ""), (spec.active_parameters - table.parameters, "without the table of tokens, of which one reads a row")]
    if quantity == "trainable_params":
        return [(_adapters(row), "")]
    if quantity == "file_size":
        spec = spec_of(row)
        return [(gguf_bytes(spec, row["model"].split()[-1]) / SIZES[row["unit"]], "")]
    raise LeftOut(f"{quantity}: no count of parameters and no file")


def _adapters(row: Row) -> int:
    """Trained parameters of a row's adapters: LoRA, or LLaMA-Adapter's prompts for each layer with a gate for each head."""
    spec = spec_of(row)
    if found := re.search(r"LoRA.*?(" + "|".join(LORA) + ")", row["model"]):
        rank, targets = LORA[found[1]]
        return adapter_parameters(spec, rank, targets)
    if re.search(r"Adapter.*litgpt", row["model"]):
        layers, hidden, heads = (spec.config[name] for name in ("num_hidden_layers", "hidden_size", "num_attention_heads"))
        return int((layers - PROMPTED_FROM) * (PROMPT_TOKENS * hidden + heads))
    raise LeftOut("adapters of another kind")


PROMPT_TOKENS, PROMPTED_FROM = 10, 2
"""Tokens of a layer's prompt, and the first layer that has one. Source: arXiv:2303.16199; the defaults of litgpt/adapter.py."""
SIZES = {"GiB": 2**30, "GB": 1e9}


def contradiction(row: Row) -> str:
    """What else is published that a size of a file contradicts; else its bits for each parameter."""
    bits = float(row["value"]) * SIZES[row["unit"]] * 8 / spec_of(row).total_parameters
    name = row["model"].split()[0]
    same = [each for each in rows_of_counts if each["model"] == name and each["quantity"] == "params_total" and each["exact"] == "yes"]
    if row["model"].endswith(" F32") and same:
        return f"{bits:.3f} bits for each of the {same[0]['value']} parameters that counts.csv has for it, not 32"
    mix = row["model"].split()[-1]
    others = [
        gguf_bytes(spec_of(each), mix) * 8 / spec_of(each).total_parameters
        for each in rows_of_counts
        if each["quantity"] == "file_size" and each["model"].endswith(f" {mix}") and each is not row
    ]
    around = f", where the other rows of {mix} have {min(others):.3f} to {max(others):.3f}" if others else ""
    return f"{bits:.3f} bits a parameter{around}"


def gguf_bytes(spec: ModelSpec, mix: str) -> int:
    """Bytes of the tensors of a Llama in a GGUF file of one of llama.cpp's mixtures, vectors in float32."""
    output = next(part.name for part in spec.parts if part.component == "head")
    layers = spec.layers
    total = 0
    for part in spec.parts:
        for shape in part.tensors().values():
            if len(shape) == 1:
                total += 4 * shape[0]
            else:
                total += GGML_TYPES[ggml_type(spec, part, mix, layers, output)].stored_bytes(*shape)
    return total


def ggml_type(spec: ModelSpec, part: Part, mix: str, layers: int, output: str) -> str:
    """The type of one matrix. Source: `llama_tensor_get_type` of llama.cpp's src/llama-quant.cpp, for the mixtures that the rows name."""
    base = mix.removesuffix("_S").removesuffix("_M") if re.match(r"Q\d_K_", mix) else mix
    if base in ("F32", "F16", "BF16", "Q8_0"):
        return base
    narrow = base.startswith(("IQ1", "IQ3_XXS"))
    if part.name == output:
        return "Q5_K" if narrow else "Q6_K"
    if part.component == "embedding":
        return {"IQ1_S": "Q2_K", "IQ3_XXS": "IQ3_S"}.get(base, base)
    layer = int(found[1]) if (found := re.search(r"layers\.(\d+)\.", part.name)) else 0
    attention = next(each for each in spec.parts if isinstance(each, Attention))
    shared = attention.num_attention_heads // attention.num_key_value_heads >= 4
    more = layer < layers // 8 or layer >= 7 * layers // 8 or (layer - layers // 8) % 3 == 2
    leaf = part.name.rpartition(".")[2]
    rule = MIXTURES.get(mix, {}).get(leaf)
    if rule is None:
        return base
    found_type = rule(layer, layers, more, shared) or base
    if leaf == "v_proj" and layers == 80 and found_type in ("Q3_K", "Q4_K"):  # models of 70 B parameters share values among eight heads
        return "Q5_K"
    return found_type


Rule = Callable[[int, int, bool, bool], str | None]
MIXTURES: dict[str, dict[str, Rule]] = {
    "Q4_K_M": {"v_proj": lambda i, n, more, gqa: "Q6_K" if more else None, "down_proj": lambda i, n, more, gqa: "Q6_K" if more else None},
    "Q5_K_M": {"v_proj": lambda i, n, more, gqa: "Q6_K" if more else None, "down_proj": lambda i, n, more, gqa: "Q6_K" if more else None},
    "Q4_K_S": {"v_proj": lambda i, n, more, gqa: "Q5_K" if i < 4 else None, "down_proj": lambda i, n, more, gqa: "Q5_K" if i < n // 8 else None},
    "Q2_K": {
        "v_proj": lambda i, n, more, gqa: "Q4_K" if gqa else "Q3_K", "down_proj": lambda i, n, more, gqa: "Q3_K",
        "o_proj": lambda i, n, more, gqa: "Q3_K",
    },
    "IQ1_S": {
        "v_proj": lambda i, n, more, gqa: "Q4_K" if gqa else "Q2_K", "down_proj": lambda i, n, more, gqa: "Q2_K" if i < n // 8 else None,
        "o_proj": lambda i, n, more, gqa: "IQ2_XXS",
    },
    "IQ3_XXS": {
        "v_proj": lambda i, n, more, gqa: "Q4_K" if gqa else None, "q_proj": lambda i, n, more, gqa: "IQ2_S",
        "k_proj": lambda i, n, more, gqa: "IQ2_S", "o_proj": lambda i, n, more, gqa: "IQ3_S",
    },
}  # fmt: skip
"""Mixture → matrix → (layer, layers, whether llama.cpp gives it more bits, at least four queries to a key) → type; None: the mixture's own."""


# ---- kv_cache.csv ----


def predicted_elements(row: Row) -> list[Answer]:
    """Values that a cache keeps for each token."""
    if row["model"].startswith("formula"):
        raise LeftOut("a formula, which is checked on its own")
    if not row["layers"].isdigit():
        raise LeftOut("the row does not give the layers")
    sizes = {name: int(row[column]) for column, name in (("kv_heads", "num_attention_heads"), ("head_dim", "head_dim")) if row[column]}
    if row["mla_kv_lora"]:
        found = spec_of({**row, "model": "DeepSeek-V3"}, TENTATIVE | {"hidden_size": 128, "num_attention_heads": 2, "moe_intermediate_size": 64})
    else:
        hidden = sizes["num_attention_heads"] * sizes["head_dim"]
        given = TENTATIVE | sizes | {"hidden_size": hidden, "num_local_experts": 2, "num_experts": 2, "num_experts_per_tok": 1}
        found = spec_of(row, given)
    return [(cache_bytes(found, batch_size=1, context_len=1, dtype="uint8"), "")]


def formula_holds(row: Row) -> bool:
    """Whether a published formula of the values a token gives what a cache of those sizes gives."""
    for layers, heads, size, latent, rope in ((3, 4, 8, 16, 4), (7, 6, 10, 32, 6)):
        groups = {"MHA": heads, "GQA": heads // 2, "MQA": 1, "MLA": heads}[row["attention"]]
        latent_dim = latent + rope if row["attention"] == "MLA" else None
        parts = [
            Attention(name=f"layers.{i}", component="attention", causal=True, num_attention_heads=heads, num_key_value_heads=groups,
                      head_dim=size, latent_dim=latent_dim)
            for i in range(layers)
        ]  # fmt: skip
        spec = ModelSpec(name="", family="llama", architecture="", source="", dtype="uint8", config={}, parts=tuple(parts))
        known = {"l": layers, "n_h": heads, "n_g": groups, "d_h": size, "d_c": latent, "d_h_R": rope}
        if _value(row["elements_per_token"].replace("^", "_"), known) != cache_bytes(spec, batch_size=1, context_len=1, dtype="uint8"):
            return False
    return True


def _value(text: str, known: Mapping[str, int]) -> int:
    """A formula of sums and products of known names."""
    does = {ast.Add: operator.add, ast.Mult: operator.mul}

    def walk(node: ast.expr) -> int:
        if isinstance(node, ast.BinOp):
            return int(does[type(node.op)](walk(node.left), walk(node.right)))
        return known[node.id] if isinstance(node, ast.Name) else int(ast.literal_eval(node))

    return walk(ast.parse(text, mode="eval").body)


# ---- training.csv ----

DTYPES = {"fp16": "float16", "bf16": "bfloat16", "bf16-true": "bfloat16", "amp_bf16": "bfloat16"}
SHARDED = {0: (), 1: ("optimizer",), 2: ("optimizer", "gradients"), 3: ("optimizer", "gradients", "weights")}
"""ZeRO stage → what is divided over the data-parallel devices. Source: arXiv:1910.02054, section 5."""


def predicted_peak(row: Row) -> int:
    """Bytes of the fullest device of a row of training.csv, by simple division.

        (weights + gradients + optimizer state, each divided by tp · pp, and by dp where the ZeRO stage shards it) + activations

    - Pre-training in 16 bits by Megatron keeps float32 masters and Adam's two moments; gradients are float32 with bf16, 16 bits with fp16.
      litgpt and torchtune train in pure 16 bits. LoRA trains adapters of rank 8 on queries and values (a fused projection: on all of it) in
      float32, on a frozen base. A paged optimizer's state is the host's, and its update is part of backward (torchtune's recipe), which
      frees each gradient.
    - Activations of tp = pp = 1, all kept but where the row says otherwise: those of the formula path's training step for each sequence, as
      its peak grows between two large batches (where no gradient of a weight is at the peak), in one type, at the row's length (512 where
      it gives none). Of adapters on one device: that of `lighten.cost.tuning`, as PEFT computes them; on several, adapters' own
      activations are not added, and what a frozen weight does not save is not taken off.
    - Activations otherwise, all recomputed: 2·s·b·h a layer for its input, of layers / pp layers and as many micro-batches as the pipeline
      has stages, and one layer at work, s·b·h·(10 + 24/tp + 5·a·s/(h·tp)). Source: Korthikanti et al. 2022 (arXiv:2205.05198), equation 2.
    - The device's context, its allocator's slack and gathered shards are not counted.
    """
    tp, pp, dp = (int(row[name] or 1) for name in ("tp", "pp", "dp"))
    dtype = DTYPES.get(row["precision"].split("+")[0])
    if dtype is None:
        raise LeftOut(f"precision {row['precision']!r} is not known")
    if row["cpu_offload"] == "True":
        raise LeftOut("weights and optimizer are offloaded to the host")
    if tp * pp > 1:
        return _spread(row, dtype, tp, pp, dp)
    spec = _trained(row)
    if not row["micro_batch"]:
        raise LeftOut("the row does not give the micro-batch")
    stage, recompute = int(row["zero_stage"] or 0), row["act_ckpt"] in ("full", "recipe default")
    if row["method"] in ("lora", "qlora") and stage == 0:
        return _adapted_peak(row, spec, dtype, recompute=recompute)
    states = sum(size // dp if name in SHARDED[stage] else size for name, size in _kept(row, spec, dtype).items())
    return states + _activations(row, spec, dtype, recompute=recompute)


def _adapted_peak(row: Row, spec: ModelSpec, dtype: str, *, recompute: bool) -> int:
    """What `lighten.cost.tuning` says of a step on one device, the base quantized as the row says."""
    bits = 4 if "nf4" in row["precision"] or row["method"] == "qlora" else None
    rank, targets = LORA["litgpt"]
    workload = Workload(
        phase="train", batch_size=int(row["micro_batch"]), seq_len=int(row["seq_len"] or 512), dtype=dtype, optimizer="adamw", lora_rank=rank,
        lora_targets=_fused(spec) or targets, base_bits=bits, recompute="full" if recompute else "none",
    )  # fmt: skip
    found = memory_of(spec, workload)
    once = frozen_bytes(spec, dtype, bits, double_quant="dq" in row["precision"]) - frozen_bytes(spec, dtype, bits)
    return found.peak + once


def _fused(spec: ModelSpec) -> str | None:
    """The projection that makes queries, keys and values at once, where there is one."""
    return next((part.name.rpartition(".")[2] for part in spec.parts if part.name.endswith(("query_key_value", "qkv_proj"))), None)


def _trained(row: Row) -> ModelSpec:
    """The row's model, its head tied to its embedding where that gives its number of parameters."""
    if not row["layers"]:
        raise LeftOut("the row does not give the layers")
    untied = spec_of(row)
    tied = spec_of({**row, "tied_embeddings": "True"})
    return tied if row["params_total"] == str(tied.total_parameters) else untied


def _kept(row: Row, spec: ModelSpec, dtype: str) -> dict[str, int]:
    """Weights, gradients and optimizer state on one device."""
    optimizer = "adam8bit" if "8bit" in row["optimizer"] else "adamw"
    if row["method"] in ("lora", "qlora"):
        bits = 4 if "nf4" in row["precision"] or row["method"] == "qlora" else None
        rank, targets = LORA["litgpt"]
        trained = adapter_parameters(spec, rank, _fused(spec) or targets)
        base = frozen_bytes(spec, dtype, bits, double_quant="dq" in row["precision"])
        return {"weights": base + 4 * trained, "gradients": 4 * trained, "optimizer": state_bytes(optimizer, [(trained,)], "float32")}
    hidden, others = trained_shapes(spec)
    found = parameter_bytes("pure", optimizer, hidden, dtype, others=others)
    if row["optimizer"].startswith("Paged"):
        return {"weights": found.weights}
    return {"weights": found.weights, "gradients": found.gradients, "optimizer": found.optimizer}


LARGE_BATCHES = (1024, 2048)


def _activations(row: Row, spec: ModelSpec, dtype: str, *, recompute: bool) -> int:
    sizes = []
    for batch in LARGE_BATCHES:
        length = int(row["seq_len"] or 512)
        workload = Workload(
            phase="train", batch_size=batch, seq_len=length, dtype=dtype, optimizer="sgd", recompute="full" if recompute else "none"
        )  # fmt: skip
        found = workload_memory(spec, workload)
        sizes.append(found.activations + found.temporary)
    return int(row["micro_batch"]) * (sizes[1] - sizes[0]) // (LARGE_BATCHES[1] - LARGE_BATCHES[0])


def _spread(row: Row, dtype: str, tp: int, pp: int, dp: int) -> int:
    hidden, length, batch = int(row["hidden"]), int(row["seq_len"]), int(row["micro_batch"])
    named = re.search(r"(\d+)B$", row["model"])
    if not row["params_total"] and not named:
        raise LeftOut("the row gives no number of parameters")
    count = int(row["params_total"]) if row["params_total"] else int(named[1]) * 10**9 if named else 0
    layers = int(row["layers"]) if row["layers"] else round(count / (12 * hidden**2))
    heads = int(row["heads"] or hidden // 128)
    gradients = "float32" if dtype == "bfloat16" else dtype
    found = parameter_bytes("master", "adam", [(count,)], dtype, gradient_dtype=gradients)
    parts = {"weights": found.weights, "gradients": found.gradients, "optimizer": found.optimizer + found.master}
    stage = int(row["zero_stage"] or 0)
    states = sum(size // (tp * pp * (dp if name in SHARDED[stage] else 1)) for name, size in parts.items())
    inputs = 2 * length * batch * hidden * math.ceil(layers / pp) * min(pp, int(row["grad_accum"] or pp))
    at_work = length * batch * hidden * (10 + 24 / tp + 5 * heads * length / (hidden * tp))
    return round(states + inputs + at_work)


# ---- the tables ----


@dataclass(frozen=True, kw_only=True)
class Verdict:
    row: Row
    verdict: str
    published: str = ""
    predicted: float | None = None
    reason: str = ""


def judged(row: Row, published: str, predict: Callable[[Row], list[Answer]], *, exact: bool) -> Verdict:
    """One row's verdict."""
    try:
        answers = predict(row)
    except (LeftOut, LightenError) as error:
        return Verdict(row=row, verdict="left out", published=published, reason=str(error).split("; these have one")[0])
    value = float(published)
    for predicted, what in answers:
        if predicted == value:
            return Verdict(row=row, verdict="ok", published=published, predicted=predicted, reason=what)
    for predicted, what in answers:
        if not exact and abs(predicted - value) <= _rounding(published):
            return Verdict(row=row, verdict="rounded", published=published, predicted=predicted, reason=what)
    predicted = answers[0][0]
    reason = f"{predicted / value - 1:+.3%}" + (f"; {contradiction(row)}" if row.get("quantity") == "file_size" else "")
    return Verdict(row=row, verdict="wrong", published=published, predicted=predicted, reason=reason)


def _rounding(published: str) -> float:
    """Half a unit of the last digit that is not a trailing zero of a whole number."""
    digits = published.split(".")[1] if "." in published else ""
    if digits:
        return 0.5 * math.pow(10, -len(digits)) * (1 + 1e-9)
    return 5.0 * math.pow(10, len(published) - len(published.rstrip("0")) - 1)


def judge_counts(rows: Iterable[Row]) -> list[Verdict]:
    return [judged(row, row["value"], predicted_count, exact=row["exact"] == "yes") for row in rows]


def judge_caches(rows: Iterable[Row]) -> list[Verdict]:
    """Each row's values a token, and, where it gives them, the bytes of its type."""
    verdicts = []
    for row in rows:
        if row["model"].startswith("formula"):
            verdicts.append(Verdict(row=row, verdict="ok" if formula_holds(row) else "wrong", published=row["elements_per_token"]))
            continue
        if not row["elements_per_token"]:
            verdicts.append(Verdict(row=row, verdict="left out", reason="a peak of memory, not a cache: see the table below"))
            continue
        verdict = judged(row, row["elements_per_token"], predicted_elements, exact=bool(row["bytes_per_token"]))
        stated = row["bytes_per_token"]
        width = {"bf16": "bfloat16", "fp16": "float16"}.get(row["dtype"], row["dtype"])
        if stated and verdict.predicted is not None and verdict.predicted * dtype_bytes(width) != float(stated):
            verdict = replace(verdict, verdict="wrong", published=stated, reason="bytes are not values times their width")
        verdicts.append(verdict)
    return verdicts


def measured_peaks(rows: Iterable[Row]) -> list[tuple[str, float]]:
    """(source, predicted over published) of the rows that give a peak."""
    found = []
    skipped: Counter[str] = Counter()
    for row in rows:
        if not row["peak_mem_gb"]:
            continue
        unit = 2**30 if row["mem_unit"] == "GiB" else 1e9
        try:
            ratio = predicted_peak(row) / (float(row["peak_mem_gb"]) * unit)
        except (LeftOut, LightenError) as error:
            skipped[str(error).split(";")[0][:110]] += 1
            continue
        found.append((f"{row['source_repo_or_doc']} {row['method']}", ratio))
    for reason, count in skipped.most_common():
        print(f"  left out {count:3d}: {reason}")
    return found


def generation_peaks(rows: Iterable[Row]) -> list[tuple[str, float]]:
    """(source, predicted over published) of the rows of kv_cache.csv that give a device's peak: 16-bit weights and the cache of all tokens."""
    found = []
    for row in rows:
        sizes = re.search(r"batch (\d+), (\d+) gen tokens", row["model"])
        stated = re.search(r"fp16 ([\d.]+)", row["published_or_derived"])
        if not sizes or not stated:
            continue
        name = row["model"].split("-Chat")[0]
        known = next((each for each in rows_of_counts if each["model"] == name and each["quantity"] == "params_total"), None)
        if known is None:
            continue
        spec = spec_of(known)
        cache = cache_bytes(spec, batch_size=int(sizes[1]), context_len=int(sizes[2]), dtype="float16")
        found.append((f"{row['source_repo_or_doc']} generate", (2 * spec.total_parameters + cache) / (float(stated[1]) * 1e9)))
    return found


rows_of_counts: list[Row] = []


def show(title: str, verdicts: list[Verdict], *, every: bool) -> Counter[str]:
    counts = Counter(each.verdict for each in verdicts)
    print(f"\n{title}: " + ", ".join(f"{counts[name]} {name}" for name in ("ok", "rounded", "wrong", "left out")))
    for each in verdicts:
        if every or each.verdict == "wrong":
            predicted = "" if each.predicted is None else f"{each.predicted:.12g}"
            quantity = each.row.get("quantity", each.row.get("attention", ""))
            print(f"  {each.verdict:8s} {each.row['model']:42s} {quantity:20s} {each.published:>16s} {predicted:>16s}  {each.reason}")
    return counts


def by_source(peaks: list[tuple[str, float]]) -> dict[str, dict[str, float]]:
    table: defaultdict[str, list[float]] = defaultdict(list)
    for source, ratio in peaks:
        table[source].append(ratio)
    found = {}
    for source, ratios in sorted(table.items()):
        errors = [abs(ratio - 1) for ratio in ratios]
        found[source] = {
            "rows": len(ratios), "median_ratio": round(statistics.median(ratios), 4), "median_error": round(statistics.median(errors), 4),
            "worst_error": round(max(errors), 4),
        }  # fmt: skip
        print(f"  {source:55s} {len(ratios):4d} rows, predicted / published {statistics.median(ratios):.3f} in the median, "
              f"off by {statistics.median(errors):.1%} (worst {max(errors):.1%})")  # fmt: skip
    return found


def read(path: Path) -> list[Row]:
    with path.open(newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=Path, required=True, help="the folder of counts.csv, kv_cache.csv and training.csv")
    parser.add_argument("--all", action="store_true", help="print every row, not the wrong ones alone")
    given = parser.parse_args()
    counted, cached = read(given.rows / "counts.csv"), read(given.rows / "kv_cache.csv")
    rows_of_counts.extend(counted)
    counts = show("counts.csv", judge_counts(counted), every=given.all)
    caches = show("kv_cache.csv", judge_caches(cached), every=given.all)
    print("\npeaks of memory, predicted without the device's context:")
    peaks = measured_peaks(read(given.rows / "training.csv")) + generation_peaks(cached)
    table = by_source(peaks)
    print(json.dumps({"counts": counts, "kv_cache": caches, "peaks": table}))
    return 0


if __name__ == "__main__":
    sys.exit(main())
