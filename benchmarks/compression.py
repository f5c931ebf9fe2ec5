"""Quantization, ours beside the peers': what is lost at the same bits, and what is lost at the same file size?

    python benchmarks/compression.py --model .models/smollm2-135m-offgrid --tokens 4096 --only ours
    python benchmarks/compression.py --model .models/smollm2-135m-offgrid --peers llm-compressor,hqq --environments ENVS --tokens 4096 32768

Everybody gets the same calibration tokens (windows of 1,024 of the text's calibration part, as many as it has up to `--tokens`), and everybody's
weights are dequantized and scored by one evaluator in the original's architecture: 20 windows of 1,024 tokens of the test part, perplexity and
divergence from the original in the same type, bfloat16 for weight-only codes of fewer than 8 bits and float32 else. 8-bit activations are simulated
alike for all: each token rounded by its own scale. Of an encoder (`--model .models/minilm`) each runtime embeds the test passages itself, and what is
compared is how many keep their nearest neighbour.

Each peer runs in an environment of its own below `--environments`, made from the peer's `REQUIREMENTS` where it is missing (1.5 to 6 GB each).
Rows that `--out` has already are not measured again, unless `--rerun NAME` names their peer; a peer that fails leaves a row that says why.

A row's figures
    bits            of a weight of the quantized linears: the code's, and its share of scales and of zero points that are not constant
    stored_bits     every byte that the artifact keeps for those linears
    size_bytes      all files of the artifact's weights, embedding and head included
    quantize_s      quantization alone;  process_s  from the process's start to the artifact on disk
    peak_rss_bytes  of the process until then;  peak_above_imports_bytes  over what it held once everything was imported
    quiet           whether the machine had nothing else to do: `--quiet` says so, and only then are the seconds worth comparing

The last line on stdout is one JSON object: `rows`, and `classes`, where ours is beside the best peer of the same bits and tokens, and of at most
80 and 60 MB; `speeds` has our GPTQ beside llm-compressor's. `--picture FILE` draws perplexity over file size as an SVG.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import platform
import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

from environments import interpreter as environment_of

HERE = Path(__file__).parent
LENGTH, TEST_WINDOWS = 1024, 20
FAMILIES: dict[str, str] = {"llm-compressor": "llm_compressor", "torch-pruning": "torch_pruning"}
"""A peer's name → its file's; the others are named alike."""


@dataclass(frozen=True, kw_only=True)
class Case:
    """One thing to measure.

    Attributes:
        peer: `ours`, or a peer's name.
        settings: of `ours` a recipe; of a peer method, bits, group_size, symmetric and what else its method takes.
        calibrated: it reads calibration tokens, so that their number matters.
    """

    peer: str
    settings: dict[str, Any]
    calibrated: bool = True

    @property
    def name(self) -> str:
        if self.peer == "ours":
            return str(self.settings["recipe"])
        shown = {key: value for key, value in self.settings.items() if key != "method"}
        return f"{self.settings['method']}({', '.join(f'{key}={value}' for key, value in shown.items())})"


@dataclass(frozen=True, kw_only=True)
class Row:
    """What was measured of a case; None: not known, or it failed. The module's docstring says what each figure counts."""

    key: str
    peer: str
    name: str
    settings: dict[str, Any]
    version: str | None = None
    model: str
    text: str
    tokens_asked: int | None
    tokens: int | None
    test_windows: int
    bits: float | None = None
    stored_bits: float | None = None
    size_bytes: int | None = None
    perplexity: float | None = None
    ratio: float | None = None
    ratio_error: float | None = None
    kl: float | None = None
    int8_activations: bool = False
    neighbours: float | None = None
    neighbours_error: float | None = None
    cosine: float | None = None
    rank: float | None = None
    top1: float | None = None
    evaluated_in: str | None = None
    quantize_s: float | None = None
    process_s: float | None = None
    peak_rss_bytes: int | None = None
    peak_above_imports_bytes: int | None = None
    threads: int | None = None
    quiet: bool = False
    machine: str = ""
    failure: str | None = None
    notes: list[str] = field(default_factory=list)


# ---- what is measured ----


def _int(method: str, bits: int, group_size: int | None = 64, **more: Any) -> dict[str, Any]:
    return {"method": method, "bits": bits, "group_size": group_size, "symmetric": True} | more


WIDTHS = ((4, 64), (3, 64), (3, 32), (2, 64))
"""(bits, group): 4.25, 3.25, 3.5 and 2.25 bits a weight with 16-bit scales."""

ITERATIONS = (10, 50, 200)
"""Of AutoRound; 200 is its default. On 2 cores of 2026 and 4,096 tokens one costs half a minute of the whole model."""

CASES: tuple[Case, ...] = (
    *(Case(peer="llm-compressor", settings=_int("gptq", *width)) for width in WIDTHS),
    Case(peer="llm-compressor", settings=_int("rtn", 4), calibrated=False),
    Case(peer="llm-compressor", settings=_int("awq", 4)),
    Case(peer="llm-compressor", settings=_int("smoothquant+gptq", 8, None, activations="dynamic")),
    *(Case(peer="autoround", settings=_int("autoround", *width, iterations=count)) for count in ITERATIONS for width in WIDTHS),
    *(Case(peer="gptqmodel", settings=_int("gptq", *width)) for width in ((4, 64), (3, 64), (2, 64))),
    *(Case(peer="hqq", settings=_int("hqq", bits, 64) | {"symmetric": False}, calibrated=False) for bits in (4, 3, 2)),
    Case(peer="nncf", settings=_int("rtn", 4), calibrated=False),
    Case(peer="nncf", settings=_int("awq+scale_estimation", 4)),
    Case(peer="nncf", settings=_int("gptq", 4)),
    Case(peer="nncf", settings=_int("awq+scale_estimation", 4, all_layers=True)),
    Case(peer="torchao", settings=_int("int4", 4), calibrated=False),
    *(Case(peer="torchao", settings=_int("intx", *width), calibrated=False) for width in WIDTHS),
    Case(peer="torchao", settings=_int("int8", 8, None), calibrated=False),
    Case(peer="torchao", settings=_int("int8", 8, None, activations="dynamic"), calibrated=False),
)

ENCODER_CASES: tuple[Case, ...] = (
    Case(peer="onnxruntime", settings={"method": "dynamic", "bits": 8, "per_channel": True}, calibrated=False),
    Case(peer="onnxruntime", settings={"method": "dynamic", "bits": 8, "per_channel": False}, calibrated=False),
    Case(peer="nncf", settings={"method": "ptq", "bits": 8}),
    Case(peer="torchao", settings=_int("int8", 8, None, activations="dynamic"), calibrated=False),
    Case(peer="torchao", settings=_int("intx", 4, 64), calibrated=False),
)
ENCODER_RECIPES = (
    "quantize(rtn, bits=8)", "quantize(smoothquant, activations=dynamic, tokens={tokens})",
    "quantize(smoothquant, activations=static, tokens={tokens})",
    "quantize(dynamic) @ onnxruntime", "quantize(static) @ openvino", "quantize(rtn, bits=4, group_size=64)",
    "quantize(gptq, bits=4, group_size=64, tokens={tokens})", "quantize(gptq, bits=4, group_size=64, symmetric=true, tokens={tokens})",
)  # fmt: skip
TEXTS, TEXT_LENGTH, CALIBRATION_TEXTS = 1000, 128, 300
"""Of an encoder: most test texts, tokens of one, and most calibration texts; 300 is NNCF's own number."""

TUNED = "distill(scales, steps=24, tokens={tokens})"
TUNED_FAST = "distill(scales, steps=24, learning_rate=0.002, tokens={tokens})"
TABLE = "cast(bfloat16)"
HALVED_TABLE = "quantize(rtn, bits=8, symmetric=true, embeddings=true, targets='embed|head')"
"""A rotated model has a head of its own: both tables in 8 bits take what the tied one took in 16."""
GPTQ = {width: f"quantize(gptq, bits={width[0]}, group_size={width[1]}, symmetric=true, tokens={{tokens}})" for width in WIDTHS}
RECIPES = (
    f"{TABLE} | quantize(rtn, bits=4, group_size=64, symmetric=true)",
    f"{TABLE} | quantize(hqq, bits=4, group_size=64)",
    f"{TABLE} | quantize(gptq, bits=4, group_size=64, symmetric=true, damping=0.01, refine=0, search=false, tokens={{tokens}})",
    *(f"{TABLE} | {step}" for step in GPTQ.values()),
    *(f"{TABLE} | {step} | {TUNED if bits > 2 else TUNED_FAST}" for (bits, _), step in GPTQ.items()),
    *(f"{TABLE} | rotate(hadamard) | {step} | {HALVED_TABLE} | {TUNED if bits > 2 else TUNED_FAST}" for (bits, _), step in GPTQ.items()),
    f"{TABLE} | rotate(hadamard) | {GPTQ[4, 64]}",
    f"{TABLE} | quantize(awq, bits=4, group_size=64, symmetric=true, tokens={{tokens}})",
    "quantize(smoothquant, activations=dynamic, tokens={tokens})",
    "quantize(smoothquant, alpha=auto, activations=dynamic, tokens={tokens})",
    f"{TABLE} | quantize(auto, size<=80MB, tokens={{tokens}}) | {TUNED}",
    f"{TABLE} | quantize(auto, size<=60MB, tokens={{tokens}}) | {TUNED_FAST}",
)
"""Our recipes; `{tokens}` becomes the number of calibration tokens. The peers load the model in bfloat16, embedding included; so the cast."""
PIPELINES = (
    "shrink(ffn, ratio=0.43, tokens={tokens})"
    " | distill(logits, minutes<=20, dtype=bfloat16, batch_tokens=1024, tokens={tokens}, self_tokens=32768) | cast(bfloat16)"
    f" | quantize(auto, size<=60MB, tokens={{tokens}}) | {TUNED_FAST}",
    f"{TABLE} | quantize(auto, size<=60MB, tokens={{tokens}}) | {TUNED_FAST}",
)
ENCODER_PIPELINES = tuple(
    f"{before}quantize(auto, size<={size}MB, tokens={{tokens}})"
    for size in (15, 10, 8, 7)
    for before in ("shrink(ffn, ratio=0.5, tokens={tokens}) | distill(embeddings, minutes<=10, hidden=1.0, dtype=bfloat16, tokens={tokens}) | ", "")
)
"""Quantization of a smaller model, recovered, beside that of the whole one, at the same size. `--pipelines` measures these instead."""


def our_cases(recipes: Iterable[str], tokens: int) -> list[Case]:
    return [Case(peer="ours", settings={"recipe": recipe.replace("{tokens}", str(tokens))}, calibrated="{tokens}" in recipe) for recipe in recipes]


# ---- environments ----


def script_of(peer: str) -> Path:
    return HERE / "peers" / f"compress_{FAMILIES.get(peer, peer)}.py"


def interpreter(peer: str, environments: Path) -> Path:
    """The peer's Python, its environment made where it is missing or lacks a requirement of another version; ours is this one."""
    if peer == "ours":
        return Path(sys.executable)
    return environment_of(script_of(peer), environments / peer)


# ---- measuring ----


@dataclass(frozen=True, kw_only=True)
class Bench:
    """What all rows of a call share."""

    model: Path
    text: Path | None
    environments: Path
    work: Path
    test_windows: int
    threads: int
    timeout_s: float
    quiet: bool
    keep: bool

    def windows(self, part: str, count: int) -> Any:
        """[count, LENGTH] ids of the text's calibration or test part, fewer where it has no more."""
        from lighten.judge.text import load_text
        from lighten.judge.tokens import Tokenizer

        return Tokenizer(self.model).windows(getattr(load_text(self.text), part), count=count, length=LENGTH)

    def texts(self) -> dict[str, Any]:
        """Token ids and masks of an encoder's test texts, and of its calibration texts, padded."""
        import numpy as np

        from lighten.judge.text import load_text
        from lighten.judge.tokens import Tokenizer

        text, tokenizer = load_text(self.text), Tokenizer(self.model)
        arrays = {}
        for prefix, passages in (("", text.test[:TEXTS]), ("calibration_", text.calibration[:CALIBRATION_TEXTS])):
            ids, mask = zip(*tokenizer.batches(passages, batch_size=1, length=TEXT_LENGTH), strict=True)
            arrays |= {f"{prefix}ids": np.concatenate(ids), f"{prefix}mask": np.concatenate(mask)}
        return arrays

    @property
    def is_encoder(self) -> bool:
        return "CausalLM" not in json.loads((self.model / "config.json").read_text())["architectures"][0]

    def text_fingerprint(self) -> str:
        from lighten.judge.text import load_text

        return load_text(self.text).fingerprint[:16]

    def key(self, case: Case, tokens: int | None) -> str:
        """Names what decides a row's quality: the same key, the same weights."""
        config = hashlib.sha256((self.model / "config.json").read_bytes()).hexdigest()
        sizes = [file.stat().st_size for file in sorted(self.model.glob("*.safetensors"))]
        whole = [case.peer, case.settings, tokens, self.model.name, config, sizes, self.text_fingerprint(), self.test_windows]
        return hashlib.sha256(json.dumps(whole, sort_keys=True).encode()).hexdigest()[:16]

    def measure(self, case: Case, tokens_asked: int | None) -> Row:
        """Run the case and score what it made; a failure is a row too."""
        import numpy as np

        ids = self.windows("calibration", -(-(tokens_asked or LENGTH) // LENGTH)) if not self.is_encoder else np.zeros(0)
        known: dict[str, Any] = {
            "key": self.key(case, tokens_asked), "peer": case.peer, "name": case.name, "settings": case.settings, "model": self.model.name,
            "text": self.text_fingerprint(), "tokens_asked": tokens_asked, "tokens": (ids.size or None) if tokens_asked else None,
            "test_windows": self.test_windows, "threads": self.threads, "quiet": self.quiet, "machine": machine(),
        }  # fmt: skip
        self.work.mkdir(parents=True, exist_ok=True)
        folder = Path(tempfile.mkdtemp(prefix=f"{case.peer}-", dir=self.work))
        try:
            figures = self._run(case, ids, folder)
            quality = self._embedded(folder) if self.is_encoder else self._score(case, folder, figures)
        except (Failure, OSError, ValueError, subprocess.SubprocessError) as error:
            return Row(**known, failure=str(error))
        finally:
            if not self.keep:
                shutil.rmtree(folder, ignore_errors=True)
            shutil.rmtree(folder / "dense", ignore_errors=True)
        names = {field.name for field in fields(Row)}
        return Row(**known | {name: value for name, value in (figures | quality).items() if name in names})

    def _run(self, case: Case, ids: Any, folder: Path) -> dict[str, Any]:
        import numpy as np

        np.save(folder / "ids.npy", ids)
        settings = case.settings | ({"text": str(self.text) if self.text else None} if case.peer == "ours" else {})
        job = {name: str(folder / name) for name in ("artifact", "dense")}
        if self.is_encoder:
            np.savez(folder / "texts.npz", **self.texts())
            job["texts"] = str(folder / "texts.npz")
        job |= {"model": str(self.model), "ids": str(folder / "ids.npy"), "report": str(folder / "report.json")}
        (folder / "job.json").write_text(json.dumps(job | {"settings": settings}))
        log = folder / "log.txt"
        script = script_of("lighten" if case.peer == "ours" else case.peer)
        with log.open("w") as opened:
            ended = subprocess.run(
                [str(interpreter(case.peer, self.environments)), str(script), str(folder / "job.json")], stdout=opened, stderr=subprocess.STDOUT,
                timeout=self.timeout_s, env=quiet_environment(self.threads), check=False,
            )  # fmt: skip
        if ended.returncode:
            raise Failure(f"exit {ended.returncode}: {last_line(log.read_text(errors='replace'))}")
        figures: dict[str, Any] = json.loads((folder / "report.json").read_text())
        shared = {"size_bytes": weight_bytes(folder / "artifact"), "threads": self.threads, "int8_activations": bool(figures.get("int8_inputs"))}
        return figures | shared

    def _embedded(self, folder: Path) -> dict[str, Any]:
        """An encoder's embeddings beside the original's in float32."""
        import numpy as np

        from lighten.judge.quality import embedding_fidelity

        scores = embedding_fidelity(np.load(self._original_embeddings()), np.load(folder / "dense" / "embeddings.npy"))
        share = scores["neighbour_agreement"]
        return {
            "neighbours": share.value, "neighbours_error": share.standard_error, "cosine": scores["cosine"].value,
            "rank": scores["rank_agreement"].value, "evaluated_in": "its own runtime",
        }  # fmt: skip

    def _original_embeddings(self) -> Path:
        """The original's embeddings of the test texts, in a file that is kept: text by text, so that nothing is padded."""
        import numpy as np
        import torch
        from transformers import AutoModel

        file = self.work / "reference" / f"embeddings-{self.key(Case(peer='original', settings={}), None)}.npy"
        if file.exists():
            return file
        torch.set_num_threads(self.threads)
        texts = self.texts()
        model = AutoModel.from_pretrained(self.model, dtype=torch.float32).eval()
        rows = []
        for ids, mask in zip(texts["ids"], texts["mask"], strict=True):
            count = int(mask.sum())
            with torch.inference_mode():
                output = model(input_ids=torch.from_numpy(ids[None, :count]), attention_mask=torch.ones(1, count, dtype=torch.int64))
            rows.append(output.last_hidden_state[0].mean(0).numpy())
        file.parent.mkdir(parents=True, exist_ok=True)
        np.save(file, np.stack(rows))
        return file

    def _score(self, case: Case, folder: Path, figures: dict[str, Any]) -> dict[str, Any]:
        import torch
        from compression_quality import Evaluator, most_values
        from safetensors.torch import load_file

        torch.set_num_threads(self.threads)
        weights = load_file(folder / "dense" / "model.safetensors")
        bits, settings = figures["bits"], case.settings
        if case.peer != "ours":
            linear = next(name for name in weights if name.endswith(".weight") and weights[name].dim() == 2 and "embed" not in name)
            values = most_values(weights[linear], settings["group_size"])
            if values > 2 ** settings["bits"]:
                raise Failure(f"{linear} has {values} values in a group, and {settings['bits']} bits were asked for")
        dtype = torch.bfloat16 if bits < 8 else torch.float32
        evaluator = Evaluator(
            model=self.model, windows=self.windows("test", self.test_windows), dtype=dtype, cache=self.work / "reference",
            architecture=folder / "artifact" if "shrink(" in case.name else None,
        )  # fmt: skip
        inputs = frozenset(figures.get("int8_inputs", ()))
        scores = evaluator.scores(weights, int8_inputs=inputs)
        ratio = scores["perplexity_ratio"]
        return {
            "perplexity": scores["perplexity"].value, "ratio": ratio.value, "ratio_error": ratio.standard_error,
            "kl": scores["kl"].value, "top1": scores["top1_agreement"].value, "evaluated_in": str(dtype).removeprefix("torch."),
        }  # fmt: skip


class Failure(Exception):
    """Why a case has no figures."""


def quiet_environment(threads: int) -> dict[str, str]:
    """No network, one number of threads for all, no parallel tokenizers."""
    pinned = {name: str(threads) for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS")}
    return dict(os.environ) | pinned | {"HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false", "HF_DATASETS_OFFLINE": "1"}


def last_line(log: str) -> str:
    """The last line that says something: a traceback's error, not a progress bar."""
    lines = [line.split("\r")[-1].strip() for line in log.splitlines()]
    kept = [line for line in lines if line and "it/s" not in line and "s/it" not in line]
    errors = [line for line in kept if line.split(":")[0].rpartition(".")[2].endswith(("Error", "Exception"))]
    return (errors or kept or ["no output"])[-1][:300]


def weight_bytes(artifact: Path) -> int:
    """Bytes of an artifact's files that are no tokenizer, text, or record of ours."""
    side = {"tokenizer.json", "tokenizer_config.json", "vocab.txt", "chat_template.jinja", "lighten.json", "generation_config.json", "recipe.yaml"}
    return sum(file.stat().st_size for file in artifact.rglob("*") if file.is_file() and file.name not in side)


def machine() -> str:
    model = next((line.partition(":")[2].strip() for line in Path("/proc/cpuinfo").read_text().splitlines() if line.startswith("model name")), "")
    return f"{model or platform.processor()}, {os.cpu_count()} cores"


# ---- results ----


def read_rows(file: Path) -> dict[str, Row]:
    """Rows by key. Fields that a version of this script no longer has are dropped."""
    if not file.exists():
        return {}
    names = {field.name for field in fields(Row)}
    rows = [Row(**{name: value for name, value in row.items() if name in names}) for row in json.loads(file.read_text())["rows"]]
    return {row.key: row for row in rows}


def write_rows(file: Path, rows: Iterable[Row]) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    partial = file.with_suffix(".partial")
    partial.write_text(json.dumps({"rows": [asdict(row) for row in rows]}, indent=1) + "\n")
    partial.replace(file)


COLUMNS = (
    ("peer", 15), ("what", 76), ("tokens", 6), ("bits", 5), ("stored", 6), ("MB", 6), ("ppl", 9), ("ratio", 8), ("KL", 7), ("neighb.", 7),
    ("quant s", 8),     ("all s", 7), ("GB", 5), ("+GB", 5), ("quiet", 5),
)  # fmt: skip


def table(rows: Iterable[Row]) -> str:
    """The rows as text, the best first within each class of bits."""
    lines = [" ".join(f"{name:<{width}}" if number < 2 else f"{name:>{width}}" for number, (name, width) in enumerate(COLUMNS))]
    for row in sorted(rows, key=lambda row: (row.bits is None, round((row.bits or 0) * 4), row.ratio or 0)):
        if row.failure:
            lines.append(f"{row.peer:<15} {row.name[:76]:<76} {row.tokens or '':>6} failed: {row.failure[:110]}")
            continue
        figures = (
            _shown(row.tokens, "d"), _shown(row.bits, ".2f"), _shown(row.stored_bits, ".2f"), _shown(row.size_bytes, ".1f", 1e6),
            _shown(row.perplexity, ".2f"), _shown(row.ratio, ".4f"), _shown(row.kl, ".4f"),
            _shown(row.neighbours, ".3f"),
            _shown(row.quantize_s, ".0f"), _shown(row.process_s, ".0f"),
            _shown(row.peak_rss_bytes, ".2f", 1e9), _shown(row.peak_above_imports_bytes, ".2f", 1e9), "yes" if row.quiet else "no",
        )  # fmt: skip
        cells = [f"{text:>{width}}" for text, (_, width) in zip(figures, COLUMNS[2:], strict=True)]
        lines.append(f"{row.peer:<15} {row.name[:76]:<76} {' '.join(cells)}")
    return "\n".join(lines)


def _shown(value: float | None, form: str, unit: float = 1) -> str:
    return "" if value is None else format(value if unit == 1 else value / unit, form)


def classes(rows: Iterable[Row]) -> dict[str, Any]:
    """Ours beside the best peer, in each class of bits (to the quarter) and tokens, and at or under each limit of file size.

    `loss_share`: (our ratio - 1) / (the best peer's ratio - 1), and `log_share` the same of the logarithms. None where one side is missing. Rows of
    several texts stand in classes of their own, which name the text.
    """
    scored = [row for row in rows if row.ratio is not None and row.bits is not None]
    texts = sorted({row.text for row in scored})
    if len(texts) > 1:
        return {f"text {text}: {name}": found for text in texts for name, found in classes(row for row in scored if row.text == text).items()}
    groups: dict[str, list[Row]] = {}
    for row in scored:
        for tokens in {row.tokens_asked} if row.tokens_asked else {other.tokens_asked for other in scored if other.tokens_asked} or {None}:
            activations = ", int8 activations" if row.int8_activations else ""
            groups.setdefault(f"{round((row.bits or 0) * 4) / 4:.2f} bits{activations}, {tokens} tokens", []).append(row)
    for limit in SIZE_LIMITS:
        groups[f"at most {limit // 10**6} MB"] = [row for row in scored if (row.size_bytes or limit + 1) <= limit]
    return {name: _compared(members) for name, members in sorted(groups.items())}


SIZE_LIMITS = (80_000_000, 60_000_000)


def _compared(rows: Sequence[Row]) -> dict[str, Any]:
    from math import log

    ours, theirs = (
        min((row for row in rows if (row.peer == "ours") == mine), key=lambda row: row.ratio or 0, default=None) for mine in (True, False)
    )
    named = {side: row and {"peer": row.peer, "name": row.name, "ratio": row.ratio} for side, row in (("ours", ours), ("best_peer", theirs))}
    shares: dict[str, float | None] = {"loss_share": None, "log_share": None}
    if ours and theirs and (theirs.ratio or 0) > 1:
        shares = {"loss_share": _share(ours, theirs), "log_share": log(ours.ratio or 1) / log(theirs.ratio or 1)}
    return named | shares


def speeds(rows: Iterable[Row]) -> list[dict[str, Any]]:
    """Our GPTQ alone beside llm-compressor's at the same bits, tokens and threads: its time and ours, and the memory above the imports."""
    known = list(rows)
    ours = [row for row in known if row.peer == "ours" and re.fullmatch(r"(cast\(\w+\) \| )?quantize\(gptq, [^|]*\)", row.name) and row.bits]
    theirs = [row for row in known if row.peer == "llm-compressor" and row.settings["method"] == "gptq" and row.bits]
    figures = ("quantize_s", "process_s", "peak_above_imports_bytes", "quiet")
    return [
        {"recipe": mine.name, "bits": mine.bits, "tokens": mine.tokens, "threads": mine.threads, "loss_share": _share(mine, other)}
        | {name: [getattr(mine, name), getattr(other, name)] for name in figures}
        | {"quantize_share": (mine.quantize_s or 0) / (other.quantize_s or 1), "process_share": (mine.process_s or 0) / (other.process_s or 1)}
        for mine in ours
        for other in theirs
        if (round(mine.bits or 0, 1), mine.text, mine.tokens, mine.threads) == (round(other.bits or 0, 1), other.text, other.tokens, other.threads)
    ]


def _share(mine: Row, other: Row) -> float | None:
    return ((mine.ratio or 0) - 1) / ((other.ratio or 0) - 1) if mine.ratio and (other.ratio or 0) > 1 else None


def picture(rows: Iterable[Row], *, width: int = 860, height: int = 520) -> str:
    """What each artifact loses (perplexity over the original's, less 1) over its size, both axes logarithmic; bits a weight beside each point.

    Of the text and the number of calibration tokens that most rows have; of one peer, number of bits and about one size only the best is shown. What
    loses more than `MOST_LOSS` stands at the upper edge, with its loss.
    """
    from math import log10

    known = [row for row in rows if row.size_bytes and row.ratio]
    given = Counter((row.text, row.tokens_asked) for row in known if row.tokens_asked) or Counter((row.text, None) for row in known)
    text, tokens = max(given, key=given.__getitem__, default=("", None))
    best: dict[tuple[str, int, int], Row] = {}
    for row in sorted((row for row in known if row.text == text and row.tokens_asked in (None, tokens)), key=lambda row: row.ratio or 0):
        best.setdefault((row.peer, round((row.bits or 0) * 4), round((row.size_bytes or 0) / 25e6)), row)
    shown = sorted(best.values(), key=lambda row: row.ratio or 0)
    losses = [min(max((row.ratio or 1) - 1, 1e-4), MOST_LOSS) for row in shown]
    sizes = [(row.size_bytes or 0) / 1e6 for row in shown]
    left, right = min(sizes, default=1.0) * 0.93, max(sizes, default=2.0) * 1.1
    low, high = min(losses, default=0.01) * 0.7, max([*losses, 0.02], default=1.0) * 1.3
    box = (70, 40, width - 150, height - 60)  # left, top, right, bottom

    def across(size: float) -> float:
        return box[0] + log10(size / left) / log10(right / left) * (box[2] - box[0])

    def up(loss: float) -> float:
        return box[3] - log10(loss / low) / log10(high / low) * (box[3] - box[1])

    parts = [f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" font-family="sans-serif" font-size="12">']
    parts.append(f'<rect width="{width}" height="{height}" fill="#fff"/>')
    parts.append(f'<text x="{box[0]}" y="22" font-size="15">Loss over size of {shown[0].model if shown else "no"}\'s quantized artifacts</text>')
    for tick in (step * 10**power for power in (0, 1, 2, 3, 4) for step in (1, 1.2, 1.5, 2, 3, 4, 6, 8)):
        if left <= tick <= right:
            parts.append(f'<line x1="{across(tick):.0f}" x2="{across(tick):.0f}" y1="{box[1]}" y2="{box[3]}" stroke="#eee"/>')
            parts.append(f'<text x="{across(tick):.0f}" y="{box[3] + 18}" text-anchor="middle">{tick:.0f}</text>')
    for tick in (step * 10.0**power for power in (-3, -2, -1, 0, 1) for step in (1, 2, 5)):
        if low <= tick <= high:
            parts.append(f'<line x1="{box[0]}" x2="{box[2]}" y1="{up(tick):.0f}" y2="{up(tick):.0f}" stroke="#eee"/>')
            parts.append(f'<text x="{box[0] - 8}" y="{up(tick) + 4:.0f}" text-anchor="end">+{100 * tick:g} %</text>')
    parts.append(f'<text x="{(box[0] + box[2]) / 2:.0f}" y="{height - 14}" text-anchor="middle">weights on disk, MB</text>')
    middle = (box[1] + box[3]) / 2
    parts.append(f'<text x="16" y="{middle:.0f}" transform="rotate(-90 16 {middle:.0f})" text-anchor="middle">perplexity over the original\'s</text>')
    labelled: list[tuple[float, float]] = []
    for row, size, loss in zip(shown, sizes, losses, strict=True):
        x, y, color = across(size), up(loss), COLORS.get(row.peer, "#555")
        title = f"{row.peer}: {row.name}, {size:.1f} MB, ratio {row.ratio:.4f}".replace("&", "&amp;").replace("<", "&lt;")
        filled = color if row.peer == "ours" else "#fff"
        parts.append(f'<circle cx="{x:.1f}" cy="{y:.1f}" r="5" stroke="{color}" stroke-width="2" fill="{filled}"><title>{title}</title></circle>')
        label = (f"{row.bits:.3g} bits" if row.bits else "") + (f" (×{row.ratio:.3g})" if (row.ratio or 1) - 1 > MOST_LOSS else "")
        left_of = any(abs(x - other) < 60 and abs(y - level) < 12 for other, level in labelled)  # where a label stands already
        labelled.append((x, y))
        place = f'x="{x - 8:.1f}" text-anchor="end"' if left_of else f'x="{x + 8:.1f}"'
        parts.append(f'<text {place} y="{y + 4:.1f}" font-size="11" fill="{color}">{label}</text>')
    for number, peer in enumerate(sorted({row.peer for row in shown}, key=lambda name: (name != "ours", name))):
        parts.append(f'<text x="{box[2] + 16}" y="{box[1] + 12 + 18 * number}" fill="{COLORS.get(peer, "#555")}">● {peer}</text>')
    return "\n".join([*parts, "</svg>"]) + "\n"


MOST_LOSS = 8.0
"""Of the picture's upper edge: nobody uses a model of nine times the perplexity."""
COLORS = {
    "ours": "#0b6e4f",
    "llm-compressor": "#c0392b",
    "autoround": "#8e44ad",
    "gptqmodel": "#d35400",
    "hqq": "#2980b9",
    "nncf": "#7f8c8d",
    "torchao": "#b7950b",
}


# ---- the command ----


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, default=Path(".models/smollm2-135m-offgrid"), help="a Hugging Face folder; of an encoder: embeddings")
    parser.add_argument("--text", type=Path, help="a .txt or .jsonl file (default: the embedded text)")
    parser.add_argument("--tokens", type=int, nargs="+", default=[4096], help="calibration tokens, in windows of 1,024")
    parser.add_argument("--peers", default="", help=f"any of {','.join(dict.fromkeys(case.peer for case in CASES))}")
    parser.add_argument("--only", choices=("ours", "peers"), help="measure only these")
    parser.add_argument("--recipe", action="append", help="one of ours instead of the list; {tokens} becomes the number of tokens")
    parser.add_argument("--pipelines", action="store_true", help="smaller models, recovered and quantized, in place of all else")
    parser.add_argument("--match", default="", help="measure only rows whose name holds this")
    parser.add_argument("--rerun", action="append", default=[], metavar="PEER", help="measure its rows again; `ours` too")
    parser.add_argument("--environments", type=Path, default=Path("/tmp/compression-peers"), help="where peers' environments are or are made")
    parser.add_argument("--work", type=Path, default=Path("/tmp/compression-work"), help="scratch: artifacts, and the original's logits (2 to 6 GB)")
    parser.add_argument("--out", type=Path, default=HERE / "results" / "compression.json")
    parser.add_argument("--picture", type=Path, help="write an SVG")
    parser.add_argument("--test-windows", type=int, default=TEST_WINDOWS)
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--timeout", type=float, default=3600, help="seconds of one quantization")
    parser.add_argument("--quiet", action="store_true", help="say that the machine runs nothing else: times may be compared")
    parser.add_argument("--keep", action="store_true", help="keep the artifacts below --work")
    return parser.parse_args(arguments)


def asked_cases(arguments: argparse.Namespace, *, encoder: bool = False) -> list[tuple[Case, int | None]]:
    """The cases of a call with their number of calibration tokens, None where a method reads none."""
    peers = [name for name in arguments.peers.split(",") if name]
    cases, recipes = (ENCODER_CASES, ENCODER_RECIPES) if encoder else (CASES, RECIPES)
    if arguments.pipelines:
        cases, recipes = (), ENCODER_PIPELINES if encoder else PIPELINES
    if unknown := set(peers) - {case.peer for case in cases}:
        raise SystemExit(f"unknown peers {', '.join(sorted(unknown))}; known: {', '.join(dict.fromkeys(case.peer for case in cases))}")
    asked: dict[tuple[str, str, int | None], tuple[Case, int | None]] = {}
    for tokens in arguments.tokens:
        theirs = [] if arguments.only == "ours" else [case for peer in peers for case in cases if case.peer == peer]
        ours = [] if arguments.only == "peers" else our_cases(arguments.recipe or recipes, tokens)
        for case in (*theirs, *ours):
            count = tokens if case.calibrated else None
            if arguments.match in case.name:
                asked[case.peer, case.name, count] = (case, count)
    return list(asked.values())


def main() -> None:
    arguments = parse()
    bench = Bench(
        model=arguments.model, text=arguments.text, environments=arguments.environments, work=arguments.work, test_windows=arguments.test_windows,
        threads=arguments.threads, timeout_s=arguments.timeout, quiet=arguments.quiet, keep=arguments.keep,
    )  # fmt: skip
    measured: set[str] = set()
    for case, tokens in asked_cases(arguments, encoder=bench.is_encoder):
        key = bench.key(case, tokens)
        if key not in read_rows(arguments.out) or case.peer in arguments.rerun:
            began = time.perf_counter()
            row = bench.measure(case, tokens)
            write_rows(arguments.out, (read_rows(arguments.out) | {key: row}).values())
            told = f"ratio {row.ratio:.4f}" if row.ratio else f"neighbours {row.neighbours}"
            print(f"{row.peer} {row.name} {tokens}: {row.failure or told} ({time.perf_counter() - began:.0f} s)", file=sys.stderr)
        measured.add(key)
    text = bench.text_fingerprint()
    rows = [row for row in read_rows(arguments.out).values() if row.model == arguments.model.name and row.text == text]
    print(table(rows))
    if arguments.picture:
        arguments.picture.write_text(picture(rows))
    print(json.dumps({"classes": classes(rows), "speeds": speeds(rows), "rows": [asdict(row) for row in rows]}))


if __name__ == "__main__":
    main()
