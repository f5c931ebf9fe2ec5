"""What algorithms give that compute the same with the same weights: batches of texts by length, and greedy decoding with proposals.

    python benchmarks/algorithms.py --model .models/minilm .models/smollm2-135m

Of an encoder: texts of --text, each of its own length, --batch-size at once: padded in order against sorted and bucketed. Of a decoder: prompts of
--seq-len tokens of --text, --new-tokens after each: plain against prompt lookup, and against --draft where one is given. Each recipe runs in a
process of its own, the two ways in turn on the same tokens; ratios are plain seconds over own, the median and the quartiles of the turns. Predicted
ratios are by `lighten probe`'s profile, where there is one. Where what was written with proposals differs from the plain text, the gap is how much
less likely, in logits, the model finds the first other token than its likeliest. The last line is one JSON object.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from lighten.cost import Workload
from lighten.device.environment import pinned_environment
from lighten.device.find import find_device
from lighten.errors import DeviceError
from lighten.judge.measure import TIMED_TEXTS, own_lengths
from lighten.judge.text import load_text
from lighten.judge.tokens import Tokenizer
from lighten.model import ModelSpec, read_spec
from lighten.recipe import Recipe, apply_recipe, parse_recipe
from lighten.recipe.estimate import estimate
from lighten.recipe.predict import compute_dtype
from lighten.runtimes import Session, Setup, open_session
from lighten.runtimes.batching import encode_texts
from lighten.verbs import compress, usable_cores

ENCODER = (
    "torch(batching=sorted)", "torch(batching=bucketed)", "torch(dtype=bfloat16, batching=sorted)", "onnxruntime(batching=sorted)",
    "openvino(batching=sorted)", "openvino(batching=bucketed)",
)  # fmt: skip
DECODER = (
    "torch(speculate=prompt-lookup)", "torch(dtype=bfloat16, speculate=prompt-lookup)", "onnxruntime(speculate=prompt-lookup)",
    "openvino(speculate=prompt-lookup)", "openvino(dtype=bfloat16, speculate=prompt-lookup)",
)  # fmt: skip
WARM_UP = 1


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, nargs="+", required=True, help="folders in Hugging Face format")
    parser.add_argument("--text", type=Path, help="texts and prompts (default: the embedded text)")
    parser.add_argument("--recipe", nargs="+", help="runtimes with options (default: several)")
    parser.add_argument("--draft", type=Path, help="a smaller decoder of the same vocabulary, for torch")
    parser.add_argument("--texts", type=int, default=TIMED_TEXTS, help=f"of an encoder (default {TIMED_TEXTS}, which is the most)")
    parser.add_argument("--batch-size", type=int, default=32, help="texts at once (default 32)")
    parser.add_argument("--seq-len", type=int, help="tokens of a text at most (default 128), or of a prompt (default 64)")
    parser.add_argument("--new-tokens", type=int, default=64, help="after each prompt (default 64)")
    parser.add_argument("--turns", type=int, default=7, help="runs of all texts, or prompts (default 7)")
    parser.add_argument("--threads", type=int, default=usable_cores())
    parser.add_argument("--one", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.one:
        print(json.dumps(one_recipe(args, parse_recipe(f"@ {args.one}"))))
        return
    rows = []
    for model in args.model:
        decodes = read_spec(model).is_decoder
        recipes = args.recipe or [*(DECODER if decodes else ENCODER), *([f'torch(speculate="{args.draft}")'] if args.draft and decodes else [])]
        for recipe in recipes:
            row = {"model": model.name, **in_child(args, model, recipe)}
            rows.append(row)
            print(said(row), flush=True)
    print(json.dumps({"cores": os.cpu_count(), "threads": args.threads, "rows": rows}))


def in_child(args: argparse.Namespace, model: Path, recipe: str) -> dict[str, Any]:
    """A recipe's row, by a process of its own."""
    more = [part for name in ("text", "seq_len") if getattr(args, name) for part in (f"--{name.replace('_', '-')}", str(getattr(args, name)))]
    same = [
        part
        for name in ("texts", "batch_size", "new_tokens", "turns", "threads")
        for part in (f"--{name.replace('_', '-')}", str(getattr(args, name)))
    ]
    environment = os.environ | pinned_environment(args.threads, runtime=parse_recipe(f"@ {recipe}").runtime)
    ran = subprocess.run(
        [sys.executable, __file__, "--model", str(model), "--one", recipe, *same, *more],
        stdout=subprocess.PIPE,
        text=True,
        env=environment,
        check=True,
    )
    found: dict[str, Any] = json.loads(ran.stdout.splitlines()[-1])
    return found


def one_recipe(args: argparse.Namespace, recipe: Recipe) -> dict[str, Any]:
    """Both ways in turn."""
    [model] = args.model
    spec, plain = read_spec(model), replace(recipe, options=())
    with tempfile.TemporaryDirectory() as work:
        folder = model
        if recipe.runtime != "torch":
            folder = compress(model, str(plain), Path(work) / "artifact").folder
        dtype = compute_dtype(plain, apply_recipe(plain, spec))
        fast, slow = (
            open_session(one.runtime, folder, spec, Setup(dtype=dtype, threads=args.threads, speculation=one.speculation))
            for one in (recipe, plain)
        )  # fmt: skip
        found = (decoded if spec.is_decoder else encoded)(args, spec, recipe, fast, slow)
    ratios = found.pop("ratios")
    first, median, third = np.percentile(ratios, (25, 50, 75))
    return {"recipe": recipe.runtime_text, "ratio": median, "ratio_q1": first, "ratio_q3": third, "turns": len(ratios), **found}


def encoded(args: argparse.Namespace, spec: ModelSpec, recipe: Recipe, fast: Session, slow: Session) -> dict[str, Any]:
    """Texts, in the recipe's batches and in order."""
    model, text = args.model[0], load_text(args.text)
    shape = Workload(phase="encode", batch_size=args.batch_size, seq_len=args.seq_len or 128)
    workload = own_lengths(shape, model, text)
    workload = replace(workload, lengths=workload.lengths[: args.texts])
    reader = Tokenizer(model)
    texts = [np.array(reader.encode(one, length=shape.seq_len).ids, np.int64) for one in text.test[: len(workload.lengths)]]
    ways = {"own": (fast, recipe.batching), "plain": (slow, "padded")}
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    states: dict[str, Any] = {}
    for turn in range(args.turns + WARM_UP):
        for name, (session, batching) in ways.items():
            start = time.perf_counter()
            states[name] = encode_texts(session, texts, batch_size=args.batch_size, batching=batching, most=spec.max_positions)
            if turn >= WARM_UP:
                seconds[name].append(time.perf_counter() - start)
    apart = max(float(np.linalg.norm(one - other) / np.linalg.norm(other)) for one, other in zip(states["own"], states["plain"], strict=True))
    return {
        "ratios": np.divide(seconds["plain"], seconds["own"]).tolist(), "texts": len(texts), "tokens": workload.tokens,
        "mean_tokens": workload.tokens / len(texts), "texts_per_s": len(texts) / float(np.median(seconds["own"])), "largest_error": apart,
        **predicted(spec, workload, recipe),
    }  # fmt: skip


def decoded(args: argparse.Namespace, spec: ModelSpec, recipe: Recipe, fast: Session, slow: Session) -> dict[str, Any]:
    """Prompts gone on with, with proposals and without."""
    length = args.seq_len or 64
    prompts = Tokenizer(args.model[0]).windows(load_text(args.text).test, count=args.turns + WARM_UP, length=length)
    ratios, same, gaps, accepted = [], 0, [], []
    for turn, prompt in enumerate(prompts):
        own = fast.generate(prompt[None], args.new_tokens + 1)
        plain = slow.generate(prompt[None], args.new_tokens + 1)
        if turn < WARM_UP:
            continue
        ratios.append(plain.rest_s / own.rest_s)
        accepted.append(own.accepted)
        other = np.flatnonzero(own.ids[0] != plain.ids[0])
        same += not len(other)
        if len(other):
            logits = slow.logits(np.concatenate([prompt, plain.ids[0, : other[0]]])[None])[0, -1]
            gaps.append(float(logits.max() - logits[own.ids[0, other[0]]]))
    tokens, passes, proposed, taken = (sum(getattr(each, name) for each in accepted) for name in ("tokens", "passes", "proposed", "accepted"))
    workload = Workload(phase="decode", seq_len=length, new_tokens=args.new_tokens)
    return {
        "ratios": ratios, "tokens_per_pass": tokens / passes, "accepted": taken / max(proposed, 1), "same_texts": same,
        "largest_gap": max(gaps, default=0.0),
        **predicted(spec, workload, recipe),
    }  # fmt: skip


def predicted(spec: ModelSpec, workload: Workload, recipe: Recipe) -> dict[str, float | None]:
    """Plain seconds over the recipe's, before anything is measured, and the ends of the range."""
    found = []
    for one in (replace(recipe, options=()), recipe):
        asked = replace(workload, dtype=compute_dtype(one, apply_recipe(one, spec)))
        try:
            found.append(estimate(spec, asked, recipe=one, device=find_device("this")).time)
        except DeviceError:
            return dict.fromkeys(("predicted", "predicted_low", "predicted_high"))
    plain, own = found
    assert plain is not None
    assert own is not None
    most, least = (plain.seconds / end if end else None for end in (own.low, own.high))
    return {"predicted": plain.seconds / own.seconds, "predicted_low": least, "predicted_high": most}


def said(row: dict[str, Any]) -> str:
    ratio = f"{row['ratio']:.2f} ({row['ratio_q1']:.2f} to {row['ratio_q3']:.2f})"
    told = "not predicted" if row["predicted"] is None else f"predicted {row['predicted']:.2f}"
    if "tokens_per_pass" in row:
        more = f"{row['accepted']:.0%} accepted, {row['tokens_per_pass']:.2f} tokens a pass, {row['same_texts']} of {row['turns']} texts the same"
        more += f", largest gap {row['largest_gap']:.3f}"
    else:
        more = f"{row['texts']} texts of {row['mean_tokens']:.0f} tokens, {row['texts_per_s']:.1f} texts/s, largest error {row['largest_error']:.1e}"
    return f"{row['model']} {row['recipe']}: {ratio}x, {told}; {more}"


if __name__ == "__main__":
    main()
