"""(no program) What every running peer shares: the answers to the questions that `lighten measure` asks its own workers, asked by `runtimes.py`.

A peer is one file `runtime_NAME.py` that runs in an environment of its own: it builds the model in its own format by its own exporter, at the best
settings that its documentation names, and answers one JSON command a line. numpy, tokenizers and the standard library alone.

Shape legend: B sequences, S tokens of each, D hidden size, V vocabulary, W windows of T tokens.
"""

from __future__ import annotations

import json
import os
import sys
import time
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np


class Engine:
    """A peer's model.

    Args:
        model: a Hugging Face folder in dense float32.
        work: an empty folder, or one that was filled before for the same settings.
        settings: what the peer is asked for.
    """

    PACKAGE = ""
    threads = int(os.environ.get("OMP_NUM_THREADS", "1"))

    def __init__(self, model: Path, work: Path, settings: dict[str, Any]) -> None:
        raise NotImplementedError

    def encode(self, ids: Any, mask: Any) -> Any:
        """[B, S, D] of an encoder."""
        raise NotImplementedError

    def logits(self, ids: Any) -> Any:
        """[B, S, V] of a decoder."""
        raise NotImplementedError

    def generate(self, ids: Any, new_tokens: int) -> tuple[float, float]:
        """Seconds until the first of the new tokens, and of the others; greedily, whatever ends a text."""
        raise NotImplementedError

    def files(self) -> int:
        """Bytes of the files that it runs from."""
        raise NotImplementedError


def folder_bytes(folder: Path, *patterns: str) -> int:
    """Bytes of the files that match, or of all."""
    return sum(path.stat().st_size for pattern in patterns or ("*",) for path in folder.rglob(pattern) if path.is_file())


def embed(engine: Engine, texts: list[str], tokenizer: str, batch_size: int, seq_len: int) -> Any:
    """The mean over a text's tokens of the last hidden states [B, S, D]."""
    from tokenizers import Tokenizer

    cut = Tokenizer.from_file(f"{tokenizer}/tokenizer.json")
    cut.enable_truncation(seq_len)
    cut.enable_padding()
    rows = []
    for start in range(0, len(texts), batch_size):
        coded = cut.encode_batch(texts[start : start + batch_size])
        ids, mask = (np.array([getattr(each, name) for each in coded], np.int64) for name in ("ids", "attention_mask"))
        weights = mask[..., None].astype(np.float32)
        rows.append((np.asarray(engine.encode(ids, mask), np.float32) * weights).sum(1) / weights.sum(1))
    return np.concatenate(rows)


def score(engine: Engine, windows: str, reference: str) -> list[dict[str, Any]]:
    """Of each window: log-likelihoods of the tokens that follow, divergence from the reference's logits, and whether the likeliest agree."""
    held, found = np.load(reference, mmap_mode="r"), []
    for row, window in enumerate(np.load(windows)):
        own, other = log_softmax(engine.logits(window[None])[0, :-1]), log_softmax(held[row])
        places = np.arange(len(own))
        found.append({
            "log_likelihood": own[places, window[1:]].tolist(), "kl": (np.exp(other) * (other - own)).sum(-1).tolist(),
            "top1": (other[places, own.argmax(-1)] == other.max(-1)).tolist(),
        })  # fmt: skip
    return found


def log_softmax(logits: Any) -> Any:
    wide = np.asarray(logits, np.float64)
    wide = wide - wide.max(-1, keepdims=True)
    return wide - np.log(np.exp(wide).sum(-1, keepdims=True))


def seconds(engine: Engine, vocabulary: int, asked: dict[str, Any]) -> list[float]:
    """Of the workload, once for each seed, on other tokens each time."""
    found = []
    for seed in asked["seeds"]:
        ids = np.random.default_rng(seed).integers(10, vocabulary, (asked["batch_size"], asked["seq_len"]))
        start = time.perf_counter()
        if asked["phase"] == "encode":
            engine.encode(ids, np.ones_like(ids))
        elif asked["phase"] == "prefill":
            engine.logits(ids)
        else:
            first, rest = engine.generate(ids, asked["new_tokens"] + (asked["phase"] == "decode"))
            found.append(rest + (first if asked["phase"] == "generate" else 0.0))
            continue
        found.append(time.perf_counter() - start)
    return found


def peak_bytes() -> int:
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM:"))
    return int(line.split()[1]) * 1024


def serve(kind: type[Engine]) -> None:
    """Answer commands until stdin ends; what libraries print goes to stderr."""
    out = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    engine: Engine | None = None
    vocabulary = 0
    for line in sys.stdin:
        asked = json.loads(line)
        command = asked.pop("command")
        try:
            if command == "load":
                start = time.perf_counter()
                model, work = Path(asked["model"]), Path(asked["work"])
                vocabulary = json.loads((model / "config.json").read_text())["vocab_size"]
                work.mkdir(parents=True, exist_ok=True)
                engine = kind(model, work, asked["settings"])
                answer: dict[str, Any] = {"seconds": time.perf_counter() - start}
            else:
                assert engine is not None, "loaded before it is asked"
                answer = answered(engine, vocabulary, command, asked)
        except Exception as error:  # noqa: BLE001  whatever a peer raises is its row's failure
            said = next((line.strip() for line in str(error).splitlines() if line.strip()), "no message")
            answer = {"error": f"{type(error).__name__}: {said[:300]}", "kind": "failure"}
        out.write(json.dumps(answer) + "\n")
        out.flush()


def answered(engine: Engine, vocabulary: int, command: str, asked: dict[str, Any]) -> dict[str, Any]:
    if command == "time":
        return {"seconds": seconds(engine, vocabulary, asked)}
    if command == "describe":
        return {"peak_memory_bytes": peak_bytes(), "version": version(engine.PACKAGE), "size_bytes": engine.files(), "precision": ""}
    if command == "embed":
        np.save(asked["out"], embed(engine, asked["texts"], asked["tokenizer"], asked["batch_size"], asked["seq_len"]).astype(np.float32))
        return {}
    if command == "score":
        return {"windows": score(engine, asked["windows"], asked["reference"])}
    raise ValueError(f"no command {command!r}.")
