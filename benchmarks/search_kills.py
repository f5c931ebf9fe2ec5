"""Does a search that is killed again and again end with the front of one that was left alone?

    python benchmarks/search_kills.py --model .models/minilm --kills 10

A small encoder with random weights and the model's tokenizer is searched twice, over the same named recipes: once in one go, once killed (SIGKILL) at
random moments and started again. Both are asked for the smallest, whose front does not hang on times. The last line on stdout is one JSON object:
`trials`, `kills`, `same_front`, `same_choice`, `repeated` (trials that were carried out twice), and how long each run took.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from lighten.choose.space import spell_out

RECIPES = (
    "quantize(rtn, bits={8|6|4|3|2}, group_size={16|32|64}, embeddings={true|false}) @ torch",
    "prune(magnitude, sparsity={0.1|0.2|0.3|0.4|0.5|0.6|0.7|0.8|0.9}) @ torch",
    "prune(magnitude, sparsity={0.1|0.3|0.5|0.7|0.9}) | cast({float16|bfloat16}) @ torch",
    "quantize(hqq, bits={8|4}, group_size={16|32|64}) @ torch",
    "cast({float16|bfloat16}) @ torch",
    "quantize(rtn, bits={8|4|2}) @ torch",
)


def make_model(source: Path, folder: Path) -> None:
    """Two layers of BERT, 64 wide."""
    from transformers import BertConfig, BertModel

    vocabulary = len(json.loads((source / "tokenizer.json").read_text())["model"]["vocab"])
    config = BertConfig(
        vocab_size=vocabulary, hidden_size=64, num_hidden_layers=2, num_attention_heads=4, intermediate_size=128, max_position_embeddings=128
    )  # fmt: skip
    BertModel(config).save_pretrained(folder)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copyfile(source / name, folder / name)


def start(model: Path, out: Path, recipes: Sequence[str], home: Path) -> subprocess.Popen[bytes]:
    said = [part for recipe in recipes for part in ("--recipe", recipe)]
    command = [sys.executable, "-m", "lighten", "choose", str(model), *said, "--minimize", "size", "--seq-len", "16", "--fresh", "-o", str(out)]
    environment = os.environ | {"LIGHTEN_HOME": str(home)}
    return subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, env=environment, start_new_session=True)


def finished(process: subprocess.Popen[bytes], seconds: float | None) -> bool:
    """Whether it ended by itself in time; else it is killed."""
    try:
        process.wait(seconds)
    except subprocess.TimeoutExpired:
        os.kill(process.pid, signal.SIGKILL)
        process.wait()
        return False
    if process.returncode != 0:
        raise SystemExit(f"lighten choose ended with {process.returncode}")
    return True


def answer(out: Path) -> tuple[set[str], str]:
    """The front and the choice, by recipe."""
    choice: dict[str, Any] = json.loads((out / "choice.json").read_text())
    trials = [choice["baseline"], *choice["candidates"]]
    name = {trial["id"]: f"{trial['recipe']} @ {trial['runtime']}" for trial in trials}
    return {name[trial["id"]] for trial in trials if trial["pareto"]}, name[choice["chosen"]]


def main(given: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, required=True, help="whose tokenizer is used")
    parser.add_argument("--kills", type=int, default=10)
    parser.add_argument("--trials", type=int, default=60)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args(given)
    recipes = [recipe for text in RECIPES for recipe in spell_out(text)][: arguments.trials]
    draw = random.Random(arguments.seed)
    with tempfile.TemporaryDirectory(prefix="kills-") as scratch:
        folder = Path(scratch)
        make_model(arguments.model, folder / "model")
        begun = time.monotonic()
        if not finished(start(folder / "model", folder / "whole", recipes, folder / "home"), None):
            raise SystemExit("the first run did not end")
        whole_s, kills, begun = time.monotonic() - begun, 0, time.monotonic()
        while kills < arguments.kills:
            seconds = draw.uniform(0.2, 2 * 0.8 * whole_s / arguments.kills)
            kills += not finished(start(folder / "model", folder / "killed", recipes, folder / "home"), seconds)
            print(f"killed {kills} times", file=sys.stderr, flush=True)
            if (folder / "killed" / "choice.json").exists():
                break
        finished(start(folder / "model", folder / "killed", recipes, folder / "home"), None)
        killed_s = time.monotonic() - begun
        (front, chosen), (other, same) = answer(folder / "whole"), answer(folder / "killed")
        ids = [json.loads(line)["id"] for line in (folder / "killed" / "trials.jsonl").read_text().splitlines()]
    print(json.dumps({
        "trials": len(recipes), "kills": kills, "same_front": front == other, "same_choice": chosen == same, "repeated": len(ids) - len(set(ids)),
        "front": sorted(front), "seconds": {"whole": whole_s, "killed": killed_s},
    }))  # fmt: skip


if __name__ == "__main__":
    main()
