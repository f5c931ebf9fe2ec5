"""Kill `lighten choose` with SIGKILL at five moments, run it to the end, and count what was repeated, lost or doubled.

    python benchmarks/kill_choose.py --model .models/minilm --out killed -- --batch-size 32 --minimize latency

What follows `--` goes to `lighten choose`. No moment is found by sleeping: each is told by what the run has printed, what lies in its folder
and which processes it has. The last line is one JSON object; exit 1 where anything was repeated, lost, doubled or left behind.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil

POLL_S = 0.002
ORPHAN_S = 20.0
"""How long a process of a killed run may take to be gone."""
STALL_S = 1800.0
"""A run that does not reach its moment in this time is taken for hung."""
RESULTS = {".lock", "artifact", "choice.json", "report.html", "trials.jsonl"}
ORIGINAL = "the original, by torch in float32"
STARTED = re.compile(r"^\[\d+/\d+, about .* left\] (?P<recipe>.*?)(?P<done>: done before)?$")


class Run:
    """One `lighten choose` in a process group of its own."""

    def __init__(self, command: Sequence[str], out: Path) -> None:
        self.out = out
        self.finished_before = journal(out)
        self.lines: list[str] = []
        self._process = subprocess.Popen(
            command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True, start_new_session=True,
            preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # a shell that starts jobs in the background has them ignore it
        )  # fmt: skip
        self._reader = threading.Thread(target=self._read)
        self._reader.start()

    def _read(self) -> None:
        assert self._process.stderr is not None, "opened as a pipe"
        for line in self._process.stderr:
            self.lines.append(line.rstrip("\n"))

    @property
    def workers(self) -> list[psutil.Process]:
        """The processes that it started, and those that they started."""
        try:
            return psutil.Process(self._process.pid).children(recursive=True)
        except psutil.NoSuchProcess:
            return []

    @property
    def new_trials(self) -> int:
        return len(journal(self.out)) - len(self.finished_before)

    def end_at(self, moment: Callable[[Run], bool], signal_number: int, *, group: bool = False) -> list[psutil.Process] | None:
        """Send the signal when the moment has come; its processes of that moment, or None where the run ended before.

        Args:
            group: whether its processes get the signal too, as they do from a terminal.

        Raises:
            TimeoutError: the moment did not come.
        """
        deadline = time.monotonic() + STALL_S
        try:
            while self._process.poll() is None:
                if moment(self):
                    workers = self.workers
                    os.killpg(self._process.pid, signal_number) if group else self._process.send_signal(signal_number)
                    self.wait()
                    return workers
                if time.monotonic() > deadline:
                    raise TimeoutError(f"the moment did not come within {STALL_S:.0f} s; the last line was {self.lines[-1:]}")
                time.sleep(POLL_S)
        finally:
            self._process.kill()
            self.wait()
        return None

    def wait(self) -> int:
        code = self._process.wait()
        self._reader.join()
        if self._process.stderr is not None:
            self._process.stderr.close()
        return code

    def repeated(self) -> list[str]:
        """The recipes that it tried though they were in the journal when it started."""
        had = {f"{trial['recipe']} @ {trial['runtime']}".strip() for trial in self.finished_before}
        started = [found["recipe"] for line in self.lines if (found := STARTED.match(line)) and not found["done"]]
        started += ["@ torch"] * self.lines.count(ORIGINAL)
        return [recipe for recipe in started if recipe in had]


def journal(out: Path) -> list[dict[str, Any]]:
    """The whole lines of a folder's journal."""
    path = out / "trials.jsonl"
    return [json.loads(line) for line in path.read_bytes().split(b"\n")[:-1]] if path.exists() else []


def tried(lines: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """The trials of a journal, without its proxies, finals and profiles."""
    return [line for line in lines if line["status"] in ("measured", "failed")]


def starting(run: Run) -> bool:
    return (run.out / ".lock").exists()


def in_the_baseline(run: Run) -> bool:
    return ORIGINAL in run.lines and not run.new_trials and len(run.workers) >= 2


def in_a_build(run: Run) -> bool:
    return any((run.out / "work" / "artifacts").glob(".*"))


def in_a_measurement(run: Run) -> bool:
    """An artifact is there whose trial is not in the journal, and two workers are: it, and the original beside it."""
    artifacts = run.out / "work" / "artifacts"
    built = {path.name for path in artifacts.glob("[!.]*")} - {trial["id"] for trial in journal(run.out)}
    return bool(built) and len(run.workers) >= 2


def after_an_append(run: Run) -> bool:
    return run.new_trials > 0


MOMENTS: dict[str, Callable[[Run], bool]] = {
    "start": starting, "baseline": in_the_baseline, "build": in_a_build, "measurement": in_a_measurement, "append": after_an_append,
}  # fmt: skip


@dataclass
class Tally:
    """What five kills and a last run did."""

    kills: list[dict[str, Any]] = field(default_factory=list)
    repeated: list[str] = field(default_factory=list)
    lost: int = 0
    orphans: int = 0

    def count(self, moment: str, run: Run, workers: list[psutil.Process] | None, start: float) -> None:
        """Take down a run that was ended; `workers` is None where it came to its end before."""
        self.repeated += run.repeated()
        self.lost += sum(trial not in journal(run.out) for trial in run.finished_before)
        orphans = still_there(workers or [])
        self.orphans += len(orphans)
        self.kills.append({
            "moment": moment, "reached": workers is not None, "after_s": round(time.monotonic() - start, 2), "workers": len(workers or []),
            "finished_before": len(journal(run.out)), "orphans": [" ".join(process.cmdline()[:4]) for process in orphans],
        })  # fmt: skip


def still_there(processes: list[psutil.Process]) -> list[psutil.Process]:
    """Those that have not ended after `ORPHAN_S`."""
    _, alive = psutil.wait_procs(processes, timeout=ORPHAN_S)
    return [process for process in alive if process.is_running() and process.status() != psutil.STATUS_ZOMBIE]


def kill_and_finish(command: Sequence[str], out: Path, *, log: Callable[[str], None]) -> dict[str, Any]:
    """Kill the command at each moment, then let it end: what was repeated, lost, doubled or left behind."""
    tally = Tally()
    for name, moment in MOMENTS.items():
        start = time.monotonic()
        run = Run(command, out)
        workers = run.end_at(moment, signal.SIGKILL)
        tally.count(name, run, workers, start)
        log(f"{name}: {tally.kills[-1]}")
    last = Run(command, out)
    code = last.wait()
    tally.repeated += last.repeated()
    trials = journal(out)
    tally.lost += sum(trial not in trials for trial in last.finished_before)
    left_over = sorted({path.name for path in out.iterdir()} - RESULTS)
    problem = incomplete(out, trials)
    if code not in (0, 1):
        problem = f"the last run ended with {code}: {last.lines[-1:]}"
    doubled = sorted(name for name, times in Counter(trial["id"] for trial in trials).items() if times > 1)
    return {
        "kills": tally.kills, "trials": len(tried(trials)), "measured": sum(trial["status"] == "measured" for trial in trials),
        "repeated": tally.repeated, "lost": tally.lost, "doubled": doubled, "orphans": tally.orphans, "left_over": left_over,
        "exit_code": code, "complete": problem is None, "problem": problem,
    }  # fmt: skip


def incomplete(out: Path, trials: Sequence[dict[str, Any]]) -> str | None:
    """What is missing from the results of a run that ended; None where nothing is."""
    try:
        choice = json.loads((out / "choice.json").read_text())
        page = (out / "report.html").read_text()
    except (OSError, ValueError) as error:
        return str(error)
    shown = [trial for trial in [choice["baseline"], *choice["candidates"]] if trial["status"] != "skipped"]
    ids = {trial["id"] for trial in [*shown, *choice["ablation"]] if trial["status"] != "skipped"}
    if ids != {trial["id"] for trial in tried(trials)}:
        return "choice.json and trials.jsonl have different trials"
    if not page.rstrip().endswith("</html>"):
        return "report.html is cut off"
    if choice["chosen"] is None:
        return None
    chosen = next(trial for trial in shown if trial["id"] == choice["chosen"])
    manifest = out / "artifact" / "lighten.json"
    if not manifest.is_file() or json.loads(manifest.read_text())["recipe"] != f"{chosen['recipe']} @ {chosen['runtime']}".strip():
        return "artifact/ is not the chosen"
    return None


def choose_command(model: Path, out: Path, options: Sequence[str]) -> list[str]:
    return [sys.executable, "-m", "lighten.cli.main", "choose", str(model), "-o", str(out), *options]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, required=True, help="a folder in Hugging Face format")
    parser.add_argument("--out", type=Path, required=True, help="a new folder")
    parser.add_argument("options", nargs="*", metavar="-- OPTION", help="of lighten choose")
    args = parser.parse_args()
    if args.out.exists() and any(args.out.iterdir()):
        parser.error(f"{args.out} is not empty; name a new folder")
    start = time.monotonic()
    found = kill_and_finish(choose_command(args.model, args.out, args.options), args.out, log=lambda line: print(line, flush=True))
    good = found["complete"] and all(kill["reached"] for kill in found["kills"])
    good = good and not (found["repeated"] or found["lost"] or found["doubled"] or found["orphans"] or found["left_over"])
    print(json.dumps({"model": args.model.name, **found, "good": good, "seconds": round(time.monotonic() - start, 1)}))
    return 0 if good else 1


if __name__ == "__main__":
    sys.exit(main())
