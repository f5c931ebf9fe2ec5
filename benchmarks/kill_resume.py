"""Kill `lighten compress` with SIGKILL at random moments, resume it each time, and compare the artifact with that of a run that nobody killed.

    python benchmarks/kill_resume.py --model .models/smollm2-135m-offgrid --recipe "quantize(gptq, bits=4, group_size=64)" --times 20

Moments are drawn evenly over the wall time of the first, uninterrupted run (by `--seed`); what is killed is resumed, and may be killed again
(`--kills`). Every file of the artifact is compared byte by byte, lighten.json too. The last line is one JSON object; exit 1 where one differs.
"""

from __future__ import annotations

import argparse
import hashlib
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


def command(arguments: argparse.Namespace, out: Path) -> list[str]:
    found = [sys.executable, "-m", "lighten.cli.main", "compress", arguments.model, "--recipe", arguments.recipe, "-o", str(out)]
    for option in ("text", "memory"):
        if getattr(arguments, option):
            found += [f"--{option}", getattr(arguments, option)]
    return found


def digests(folder: Path) -> dict[str, str]:
    """Each file's checksum, by its place in the folder, without the times of the run."""
    files = (path for path in sorted(folder.rglob("*")) if path.is_file() and path.name != "run.json")
    return {str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def killed_after(run: Sequence[str], seconds: float) -> tuple[bool, list[str]]:
    """Whether the run was still there to be killed, and what it had said."""
    process = subprocess.Popen(run, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True, start_new_session=True)
    try:
        _, said = process.communicate(timeout=seconds)
        return False, said.splitlines()
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        _, said = process.communicate()
        return True, said.splitlines()


def finished_blocks(out: Path) -> int:
    return len(list((out.parent / f".{out.name}.lighten-work").glob("pass-*/*.block")))


def trial(arguments: argparse.Namespace, folder: Path, moments: Sequence[float], expected: dict[str, str]) -> dict[str, Any]:
    """Run, kill, resume …, and at the end to the end."""
    out = folder / "out"
    start = command(arguments, out)
    kills, resumed = [], False
    for moment in moments:
        killed, said = killed_after([*start, "--resume"] if resumed else start, moment)
        kills.append({"after_s": round(moment, 2), "killed": killed, "finished_blocks": finished_blocks(out), "said": said[-1:]})
        resumed = True
    done = subprocess.run([*start, "--resume"], capture_output=True, text=True, check=False)
    found = digests(out) if out.is_dir() else {}
    different = sorted(name for name in found.keys() | expected.keys() if found.get(name) != expected.get(name))
    left = sorted(path.name for path in folder.iterdir() if path != out)
    shutil.rmtree(folder)
    return {"kills": kills, "exit": done.returncode, "different": different, "left_over": left, "said": done.stderr.splitlines()[-1:]}


def run(arguments: argparse.Namespace) -> dict[str, Any]:
    rng = random.Random(arguments.seed)
    with tempfile.TemporaryDirectory(prefix="kill-", dir=arguments.work) as work:
        whole = Path(work) / "whole" / "out"  # a folder of its own and one name, so that nothing but the kill differs
        begun = time.perf_counter()
        done = subprocess.run(command(arguments, whole), capture_output=True, text=True, check=False)
        seconds = time.perf_counter() - begun
        if done.returncode:
            sys.exit(f"the uninterrupted run failed: {done.stderr.strip().splitlines()[-1]}")
        expected = digests(whole)
        print(f"uninterrupted: {seconds:.1f} s, {len(expected)} files", flush=True)
        trials = []
        for number in range(arguments.times):
            folder = Path(work) / f"trial-{number}"
            found: dict[str, Any] = {"kills": []}
            while not any(kill["killed"] for kill in found["kills"]):  # a run that was over before its moment shows nothing: draw another
                folder.mkdir(exist_ok=True)
                found = trial(arguments, folder, [rng.uniform(0, seconds) for _ in range(arguments.kills)], expected)
                print(json.dumps(found), flush=True)
            trials.append(found)
        same = sum(not found["different"] and found["exit"] == 0 and not found["left_over"] for found in trials)
        return {
            "model": arguments.model, "recipe": arguments.recipe, "seconds": seconds, "times": arguments.times, "identical": same,
            "killed": sum(kill["killed"] for found in trials for kill in found["kills"]), "trials": trials,
        }  # fmt: skip


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--model", required=True)
    parser.add_argument("--recipe", default="quantize(gptq, bits=4, group_size=64)")
    parser.add_argument("--times", type=int, default=20)
    parser.add_argument("--kills", type=int, default=1, help="kills of one run before it may end (default 1)")
    parser.add_argument("--text")
    parser.add_argument("--memory")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--work", help="a folder for the artifacts (default: the system's temporary one)")
    found = run(parser.parse_args(argv))
    print(json.dumps(found))
    return 0 if found["identical"] == found["times"] else 1


if __name__ == "__main__":
    sys.exit(main())
