"""A child process that builds, loads and runs: one JSON command a line on stdin, one JSON answer a line on stdout.

`{"error": text, "kind": name}` answers a command that failed. Whatever a library prints to stdout goes to stderr.
"""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np

from lighten.device.environment import die_with_parent
from lighten.errors import LightenError
from lighten.formats.graph_inputs import encoder_inputs
from lighten.model import ModelSpec, read_spec
from lighten.model.pooling import pools_first_token
from lighten.model.read import read_config
from lighten.recipe import parse_recipe
from lighten.recipe.options import Batching, Speculation
from lighten.runtimes import MODULES, Runtime, Session, Setup, open_session
from lighten.runtimes.batching import encode_texts
from lighten.runtimes.profiling import RUNS, WARM_UP_RUNS, open_recorder, profile_runs
from lighten.runtimes.session import Ids

CALIBRATION_TEXTS = 512
"""Calibration passages of `quantize(static)` at most; benchmarks/static_int8.py compares numbers of them. Choice."""


class Worker:
    """The state of a child: at most one loaded session."""

    def __init__(self) -> None:
        self.session: Session | None = None
        self.spec: ModelSpec | None = None
        self.runtime: Runtime | None = None
        self.batching: Batching = "padded"
        self.device = "cpu"

    def build(self, source: str, recipe: str, folder: str, text: str | None, exports: str) -> dict[str, Any]:
        """Write an artifact."""
        from lighten.formats.artifact import Work, write_artifact
        from lighten.judge.calibration import text_windows
        from lighten.judge.text import load_text

        said, chosen = parse_recipe(recipe), Path(text) if text else None
        read = load_text(chosen) if any(step.calibrated for step in said.steps) else None
        windows = text_windows(Path(source), read_spec(Path(source)), read, labels=said.labels) if read else None
        artifact = write_artifact(
            Path(source), said, Path(folder), exports=Path(exports), calibration=lambda: calibration_batches(Path(source), chosen),
            work=Work(windows=windows, text=read.fingerprint if read else ""),
        )  # fmt: skip
        return {"size_bytes": artifact.size_bytes}

    def load(self, folder: str, original: str, runtime: str, setup: dict[str, Any]) -> dict[str, Any]:
        """Import the runtime and load a folder with it."""
        start = time.perf_counter()
        self.spec = _spec_of(Path(folder), Path(original))
        self.runtime = MODULES[runtime]
        asked = _setup(setup)
        self.device, self.batching = asked.device, asked.batching
        self.session = open_session(runtime, Path(folder), self.spec, asked)
        return {"seconds": time.perf_counter() - start}

    def describe(self) -> dict[str, Any]:
        """The peak memory so far, of the device where there is one, and then what the session runs in, which may take memory to find out."""
        session, _ = self._loaded()
        assert self.runtime is not None, "the parent loads before it asks"
        peak = peak_memory_bytes() if self.device == "cpu" else device_peak_bytes()
        return {"peak_memory_bytes": peak, "precision": session.precision, "version": self.runtime.version()}

    def time(  # noqa: PLR0913 - a workload
        self, phase: str, batch_size: int, seq_len: int, new_tokens: int, seeds: Sequence[int], lengths: Sequence[int] = (),
        prompts: str | None = None,
    ) -> dict[str, Any]:  # fmt: skip
        """Run the workload once for each seed, on other tokens each time; seconds of each, of a generation until its first token, and how proposals
        went.

        Args:
            lengths: of texts that are encoded in batches, where they have their own.
            prompts: an .npy of tokens of real text; None: random ones.
        """
        session, spec = self._loaded()
        vocabulary, found, first, accepted = int(spec.config["vocab_size"]), [], [], []
        windows = None if prompts is None else np.load(prompts, mmap_mode="r")
        for seed in seeds:
            random = np.random.default_rng(seed)
            if lengths:
                texts = [random.integers(10, vocabulary, length) for length in lengths]
                start = time.perf_counter()
                encode_texts(session, texts, batch_size=batch_size, batching=self.batching, most=spec.max_positions)
                found.append(time.perf_counter() - start)
                continue
            if windows is None:
                ids = _tokens(seed, spec, batch_size, seq_len)
            else:
                ids = np.array(windows[np.arange(seed * batch_size, (seed + 1) * batch_size) % len(windows)])
            if phase in ("encode", "prefill"):
                mask = np.ones_like(ids)
                start = time.perf_counter()
                session.encode(ids, mask) if phase == "encode" else session.logits(ids)
                found.append(time.perf_counter() - start)
            else:
                made = session.generate(ids, new_tokens + (phase == "decode"))
                found.append(made.rest_s + (made.first_s if phase == "generate" else 0.0))
                first.append(made.first_s)
                accepted += [] if made.accepted is None else [asdict(made.accepted)]
        return {"seconds": found, "first_seconds": first if phase == "generate" else [], "accepted": accepted}

    def profile(self, folder: str, original: str, runtime: str, setup: dict[str, Any], workload: dict[str, Any]) -> dict[str, Any]:
        """Load a folder with its runtime's profiler on, run the workload, and tell what its operators take."""
        spec = _spec_of(Path(folder), Path(original))
        recorder = open_recorder(runtime, Path(folder), spec, _setup(setup))
        tokens = [_tokens(seed, spec, workload["batch_size"], workload["seq_len"]) for seed in range(WARM_UP_RUNS + RUNS)]
        return asdict(profile_runs(recorder, workload["phase"], workload["new_tokens"], tokens))

    def embed(self, texts: Sequence[str], tokenizer: str, batch_size: int, seq_len: int, out: str, own_lengths: bool = False) -> dict[str, Any]:
        """Sentence embeddings of the texts, pooled as the model's `1_Pooling/config.json` says (mean where there is none), to an .npy file.

        Args:
            own_lengths: in the batches of the recipe, each no wider than it says; else all of `seq_len` positions.
        """
        from lighten.judge.tokens import Tokenizer

        session, spec = self._loaded()
        first_token, read = pools_first_token(Path(tokenizer)), Tokenizer(Path(tokenizer))
        if own_lengths:
            tokens = [np.array(read.encode(text, length=seq_len).ids, np.int64) for text in texts]
            states = encode_texts(session, tokens, batch_size=batch_size, batching=self.batching, most=spec.max_positions)
            np.save(out, np.stack([hidden[0] if first_token else hidden.mean(0) for hidden in states]).astype(np.float32))
            return {}
        rows = []
        for ids, mask in read.batches(texts, batch_size=batch_size, length=seq_len):
            hidden = session.encode(ids, mask)
            weights = mask[..., None].astype(np.float32)
            rows.append(hidden[:, 0] if first_token else (hidden * weights).sum(1) / weights.sum(1))
        np.save(out, np.concatenate(rows)[: len(texts)].astype(np.float32))
        return {}

    def answer(self, rows: str, start: int, stop: int, tokenizer: str, batch_size: int) -> dict[str, Any]:
        """What the model says to some of a task's rows, which lie in a JSON file (`task.written_rows`)."""
        from lighten.judge.answers import by_continuations, by_head, by_prompts, by_words, by_writing
        from lighten.judge.tokens import Tokenizer

        session, spec = self._loaded()
        asked = json.loads(Path(rows).read_text())
        asked["rows"] = asked["rows"][start:stop]
        reader = Tokenizer(Path(tokenizer))
        if asked["way"] == "head":
            one_shape = self.runtime is MODULES["torch-compile"]
            return {"answers": by_head(session, spec, reader, asked, batch_size=batch_size, one_shape=one_shape)}
        if asked["way"] == "continuations":
            return {"answers": by_continuations(session, asked["rows"])}
        if asked["way"] == "prompts":
            return {"answers": by_prompts(session, reader, asked["rows"], asked["ends"])}
        if asked["way"] == "words":
            return {"answers": by_words(session, spec, reader, asked)}
        return {"answers": by_writing(session, spec, reader, asked, asked["ends"])}

    def score(self, windows: str, reference: str, write: bool) -> dict[str, Any]:
        """Score [W, T] token windows: log-likelihoods, and against `reference` (an .npy of logits [W, T-1, V]) KL and top-1; or write it."""
        from lighten.judge.quality import score_window

        session, spec = self._loaded()
        ids = np.load(windows)
        shape = (len(ids), ids.shape[1] - 1, int(spec.config["vocab_size"]))
        held = np.lib.format.open_memmap(reference, "w+" if write else "r", np.float32, shape if write else None)
        found: list[dict[str, Any]] = []
        for row, window in enumerate(ids):
            logits = session.logits(window[None])[0, :-1]
            if write:
                held[row] = logits
            scores = score_window(logits, window[1:], None if write else held[row])
            found.append({
                "log_likelihood": scores.log_likelihood.tolist(),
                "kl": None if scores.kl is None else scores.kl.tolist(),
                "top1": None if scores.top1 is None else scores.top1.tolist(),
            })  # fmt: skip
        if write:
            held.flush()
        return {"windows": found}

    def _loaded(self) -> tuple[Session, ModelSpec]:
        assert self.session is not None, "the parent loads before it runs"
        assert self.spec is not None, "the parent loads before it runs"
        return self.session, self.spec


def _setup(said: Mapping[str, Any]) -> Setup:
    """As a judge says it, through JSON."""
    speculation = said.get("speculation")
    return Setup(**{**said, "speculation": Speculation(**speculation) if speculation else None})


def _tokens(seed: int, spec: ModelSpec, batch_size: int, seq_len: int) -> Ids:
    return np.random.default_rng(seed).integers(10, int(spec.config["vocab_size"]), (batch_size, seq_len))


def _spec_of(folder: Path, original: Path) -> ModelSpec:
    """What a folder runs; of a graph the original, unless the config beside it says other shapes."""
    if any(folder.glob("*.safetensors")):
        return read_spec(folder)
    spec, config = read_spec(original), folder / "config.json"
    return spec if not config.is_file() or read_config(folder) == spec.config else read_spec(config)


def calibration_batches(source: Path, text: Path | None) -> list[dict[str, Any]]:
    """Inputs of one calibration passage each, from the text's calibration part, cut to 128 tokens, without padding."""
    from lighten.judge.text import load_text
    from lighten.judge.tokens import Tokenizer

    texts = load_text(text).calibration[:CALIBRATION_TEXTS]
    spec = read_spec(source)
    longest = min(128, spec.max_positions or 128)
    batches = Tokenizer(source).batches(texts, batch_size=1, length=longest)
    return [encoder_inputs(spec, ids[:, : mask.sum()], mask[:, : mask.sum()]) for ids, mask in batches]


def device_peak_bytes() -> int:
    """Most bytes that tensors took on the CUDA device so far."""
    import torch

    return int(torch.cuda.max_memory_allocated())


def peak_memory_bytes() -> int | None:
    """The largest resident size of this process so far; None where the system does not tell."""
    try:
        lines = Path("/proc/self/status").read_text().splitlines()
    except OSError:
        return None
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM:")), None)


def serve(worker: Worker) -> None:
    """Answer commands until stdin ends."""
    out = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    for line in sys.stdin:
        request: dict[str, Any] = json.loads(line)
        command: Callable[..., dict[str, Any]] = getattr(worker, request.pop("command"))
        try:
            answer = command(**request)
        except LightenError as error:
            answer = {"error": str(error), "kind": type(error).__name__}
        except MemoryError:
            answer = {"error": "out of memory", "kind": "MemoryError"}
        except Exception as error:  # noqa: BLE001 - whatever a runtime raises is this trial's failure, reported by the parent
            answer = {"error": f"{type(error).__name__}: {_first_line(error)}", "kind": "failure"}
        out.write(json.dumps(answer) + "\n")
        out.flush()


def _first_line(error: Exception) -> str:
    return next((line.strip() for line in str(error).splitlines() if line.strip()), "no message")[:300]


if __name__ == "__main__":
    die_with_parent(int(sys.argv[1]))
    serve(Worker())
