"""Models that were followed before and travel with the package as polynomials: without a formula, and without torch.

`known/*.json` holds, for one config and class, what `lighten.trace.fit` found for some workloads; scripts/known_fits.py writes it. A config
is the same where every field that changes shapes or costs is: it is completed by its class's defaults first.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from lighten.cost.operators import Op
from lighten.cost.workload import Workload
from lighten.errors import WorkloadError
from lighten.model.families._config import complete
from lighten.trace.fit import Fitted, Piece
from lighten.trace.program import Program

FOLDER = Path(__file__).parent / "known"
WITHOUT_EFFECT = frozenset({
    "_name_or_path", "architectures", "auto_map", "bos_token_id", "cls_token_id", "decoder_start_token_id", "dtype", "eos_token_id", "id2label",
    "initializer_range", "label2id", "pad_token_id", "sep_token_id", "torch_dtype", "transformers_version", "use_cache", "model_type",
    "tokenizer_class", "task_specific_params", "finetuning_task", "forced_bos_token_id", "forced_eos_token_id", "is_decoder",
})  # fmt: skip
"""Fields of a config that change neither shapes nor costs of a followed run."""


def digest(config: Mapping[str, Any], architecture: str) -> str:
    """Of what a config says about shapes and costs, and of its class."""
    filled = {name: value for name, value in complete(config).items() if name not in WITHOUT_EFFECT and value is not None}
    text = json.dumps([config.get("model_type"), architecture, filled], sort_keys=True, default=str)
    return hashlib.sha256(text.encode()).hexdigest()[:24]


def find_known(config: Mapping[str, Any], source: str, name: str) -> KnownModel | None:
    """The model of a config, where it travels with the package."""
    architectures = config.get("architectures")
    named = architectures[0] if isinstance(architectures, list) and architectures else ""
    path = FOLDER / f"{digest(config, str(named))}.json"
    return KnownModel(json.loads(path.read_text()), source=source, name=name) if path.is_file() else None


class KnownModel:
    """A model of the package's own, as `lighten.trace.program.Followed`: its figures come from polynomials, labelled extrapolated."""

    breaks: tuple[int, ...] = ()
    fingerprint: str | None = None  # nothing would be gained by keeping what is read from a file

    def __init__(self, content: Mapping[str, Any], *, source: str, name: str) -> None:
        self.name, self.source = name, source
        self.family, self.architecture = str(content["family"]), str(content["architecture"])
        self.dtype, self.fixed_len = str(content["dtype"]), content["fixed_len"]
        self._fits = [(Workload(**each["workload"]), each["fit"]) for each in content["fits"]]
        self.phases: tuple[str, ...] = tuple(dict.fromkeys(workload.phase for workload, _ in self._fits))

    def follow(self, workload: Workload) -> Program:
        """Its program, with one operator for each component; see `Followed.follow`.

        Raises:
            WorkloadError: a workload that was not fitted; those that were are named.
        """
        plain = replace(workload, batch_size=1, seq_len=1)
        fits = [fit for known, fit in self._fits if replace(known, batch_size=1, seq_len=1) == plain]
        if not fits:
            kinds = "; ".join(_words(known) for known, _ in self._fits)
            raise WorkloadError(f"{self.name} travels with lighten for these workloads alone: {kinds}. With torch installed it is followed for any.")
        fitted = read_fit(fits[0])
        found = {name: int(values[0]) for name, values in fitted.at([workload.batch_size], [workload.seq_len]).items()}
        matmul = {name.partition("/")[2]: value for name, value in found.items() if name.startswith("matmul/")}
        ops = [Op(name=f"model.{part}", kind="linear", component=part, matmul_flops=value, causal_flops=value) for part, value in matmul.items()]
        ops.append(Op(name="model.other", kind="elementwise", component="other", other_flops=found["total_flops"] - sum(matmul.values())))
        return Program(
            **fitted.facts, ops=[(op, 1) for op in ops], memory=fitted.memory(workload.batch_size, workload.seq_len), label="extrapolated",
            causal_is_known=False, unknown_ops=dict.fromkeys(fitted.unknown_ops, 1),
            assumptions=("from polynomials that travel with lighten, fitted to this config when it was followed",),
        )  # fmt: skip


def _words(workload: Workload) -> str:
    more = [workload.attention, workload.dtype, *([workload.optimizer] if workload.optimizer else [])]
    return f"{workload.phase} ({', '.join(more)})"


def written_fit(fitted: Fitted) -> dict[str, Any]:
    """A fit as plain values."""
    pieces = [
        {
            "single": piece.single, "first": piece.first, "last": piece.last,
            "flops": {name: values.tolist() for name, values in piece.flops.items()}, "moments": piece.moments.tolist(),
        }
        for piece in fitted.pieces
    ]  # fmt: skip
    return {"facts": fitted.facts, "unknown_ops": list(fitted.unknown_ops), "pieces": pieces}


def read_fit(found: Mapping[str, Any]) -> Fitted:
    """A fit from plain values."""
    pieces = tuple(
        Piece(
            single=each["single"], first=each["first"], last=each["last"],
            flops={name: np.array(values, dtype=np.int64) for name, values in each["flops"].items()},
            moments=np.array(each["moments"], dtype=np.int64),
        )
        for each in found["pieces"]
    )  # fmt: skip
    return Fitted(facts=dict(found["facts"]), unknown_ops=tuple(found["unknown_ops"]), pieces=pieces)
