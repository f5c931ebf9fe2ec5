"""Training of dense weights under kills and in several processes: the same weights after a SIGKILL at random moments, the same loss by 2 processes.

    python benchmarks/distill_processes.py --model MODEL --text TEXT.txt --kills 10

Prints one JSON line: of each kill the line of progress that it came after and whether the resumed run ended in the bytes of an uninterrupted one; of
DDP and FSDP2 the largest difference of a logged loss from one process's; of two epochs over the same rows the seconds of a step in each, how often
and how long the original ran, all before the first step; with `--speed` positions a second of a plain loop of torch on as many rows.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import random
import re
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

OFTEN = """
import sys
from lighten.cli.main import main
from lighten.compress import distill_dense
distill_dense.SAVE_SECONDS, distill_dense.SAVE_SHARE = 0.0, 0
sys.exit(main(sys.argv[1:]))
"""
"""The command with a state written down after each step."""
RECIPE = "prune(magnitude, sparsity=0.5) | distill(logits, steps={steps}, batch_tokens={batch}, seq_len={length}, tokens={tokens}{more})"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--text", type=Path)
    parser.add_argument("--kills", type=int, default=10)
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--batch-tokens", type=int, default=256)
    parser.add_argument("--seq-len", type=int, default=32)
    parser.add_argument("--tokens", type=int, default=2048)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--speed", action="store_true", help="time a plain loop of torch beside the trainer")
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as work:
        print(json.dumps(run(given, Path(work))))


def run(given: argparse.Namespace, work: Path) -> dict[str, Any]:
    whole = work / "whole"
    lines = finish(command(given, whole))
    draw = random.Random(given.seed)
    kills = [kill(given, work / f"killed-{number}", draw.randrange(len(lines) - 3), draw.random(), whole) for number in range(given.kills)]
    found: dict[str, Any] = {
        "model": given.model.name, "steps": given.steps, "kills": kills, "same_bytes": sum(each["same_bytes"] for each in kills),
    }  # fmt: skip
    for parallel in ("ddp", "fsdp"):
        out = work / parallel
        finish(command(given, out, parallel=parallel))
        found[f"{parallel}_loss_difference"] = max(abs(one - other) for one, other in zip(losses(whole), losses(out), strict=True))
    return found | epochs(given, work / "epochs") | (speed(given) if given.speed else {})


def command(given: argparse.Namespace, out: Path, *more: str, parallel: str = "none") -> list[str]:
    said = "" if parallel == "none" else f", parallel={parallel}"
    recipe = RECIPE.format(steps=given.steps, batch=given.batch_tokens, length=given.seq_len, tokens=given.tokens, more=said)
    text = ["--text", str(given.text)] if given.text else []
    begin = [sys.executable, "-c", OFTEN]
    if parallel != "none":
        begin = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "-m", "lighten"]
    return [*begin, "compress", str(given.model), "--recipe", recipe, "-o", str(out), *text, *more]


def finish(words: list[str]) -> list[str]:
    """Run it to its end; its lines of progress."""
    ran = subprocess.run(words, capture_output=True, text=True, check=True, env=os.environ | {"OMP_NUM_THREADS": "1"})
    return ran.stderr.splitlines()


def kill(given: argparse.Namespace, out: Path, line: int, wait: float, whole: Path) -> dict[str, Any]:
    """End a run after a line of its progress and a moment, and resume it."""
    run = subprocess.Popen(
        command(given, out), stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, text=True, env=os.environ | {"OMP_NUM_THREADS": "1"}
    )
    assert run.stderr is not None, "it is a pipe"
    said = [run.stderr.readline() for _ in range(line + 1)]
    time.sleep(0.05 * wait)
    run.send_signal(signal.SIGKILL)
    run.communicate()
    finish(command(given, out, "--resume"))
    return {"after": said[-1].strip()[:60], "killed": run.returncode == -signal.SIGKILL, "same_bytes": digest(out) == digest(whole)}


def epochs(given: argparse.Namespace, out: Path) -> dict[str, Any]:
    """Twice over the same rows: how often the original ran and how long, and the seconds of a step in the first epoch and in the second."""
    training = given.tokens // given.seq_len * 7 // 8  # each eighth row is held out
    half = training // (given.batch_tokens // given.seq_len)
    words = command(argparse.Namespace(**vars(given) | {"steps": 2 * half}), out)
    process = subprocess.Popen(words, stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, text=True, env=os.environ | {"OMP_NUM_THREADS": "1"})
    assert process.stderr is not None, "it is a pipe"
    at: dict[int, float] = {}
    teacher_s = before = time.perf_counter()
    for line in process.stderr:
        if "the original answered" in line:
            teacher_s = time.perf_counter() - before
        before = time.perf_counter()
        if found := re.match(r".*step (\d+) of", line):
            at[int(found[1])] = time.perf_counter()
    process.wait()
    first, last = min(at), max(at)
    middle = min(at, key=lambda step: abs(step - half))
    curve = json.loads((out / "lighten.json").read_text())["curves"][0]
    return {
        "epoch_steps": half, "teacher_passes": curve["teacher_passes"], "teacher_s": teacher_s,
        "epoch_1_step_s": (at[middle] - at[first]) / (middle - first), "epoch_2_step_s": (at[last] - at[middle]) / (last - middle),
    }  # fmt: skip


def digest(out: Path) -> str:
    return hashlib.sha256(b"".join(path.read_bytes() for path in sorted(out.glob("*.safetensors")))).hexdigest()


def losses(out: Path) -> list[float]:
    return [point[2] for point in json.loads((out / "lighten.json").read_text())["curves"][0]["curve"]]


def speed(given: argparse.Namespace) -> dict[str, float]:
    """Positions a second of a plain loop: `transformers`' model, autocast, whole logits of teacher and student, AdamW."""
    import torch
    from transformers import AutoModelForCausalLM

    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "1")))
    student, teacher = (AutoModelForCausalLM.from_pretrained(given.model, dtype=torch.float32) for _ in range(2))
    optimizer = torch.optim.AdamW(student.parameters(), lr=1e-6)
    ids = torch.randint(10, student.config.vocab_size, (max(1, given.batch_tokens // given.seq_len), given.seq_len))
    taken = []
    for _ in range(3):
        start = time.perf_counter()
        with torch.autocast("cpu", dtype=torch.bfloat16):
            with torch.no_grad():
                target = teacher(ids).logits.float().log_softmax(-1)
            ours = student(ids).logits.float().log_softmax(-1)
        torch.nn.functional.kl_div(ours, target, log_target=True, reduction="sum").div(ids.numel()).backward()
        torch.nn.utils.clip_grad_norm_(student.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        taken.append(time.perf_counter() - start)
    return {"plain_positions_per_s": ids.numel() / min(taken)}


if __name__ == "__main__":
    main()
