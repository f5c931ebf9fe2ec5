"""Follow a model once: programs are kept in lighten's folder under the model's fingerprint and the workload.

A file that cannot be read is followed anew and replaced; a folder that cannot be written means that nothing is kept.
"""

from __future__ import annotations

import contextlib
import gzip
import hashlib
import json
import os
from dataclasses import asdict
from functools import cache
from pathlib import Path
from typing import Any

import platformdirs

from lighten.cost.memory import MemoryBreakdown
from lighten.cost.operators import Op
from lighten.cost.workload import Workload
from lighten.model.spec import WeightFormat
from lighten.trace.program import Followed, Program, Storage, Timeline


def follow_once(followed: Followed, workload: Workload) -> Program:
    """`followed.follow(workload)`, or what it gave before.

    Raises:
        WorkloadError, TraceError: see `Followed.follow`.
    """
    if followed.fingerprint is None:
        return followed.follow(workload)
    key = hashlib.sha256(repr((followed.fingerprint, workload, _code())).encode()).hexdigest()
    path = _folder() / f"{key[:32]}.json.gz"
    with contextlib.suppress(OSError, ValueError, KeyError, TypeError, EOFError):
        return _read(json.loads(gzip.decompress(path.read_bytes())))
    program = followed.follow(workload)
    with contextlib.suppress(OSError):
        path.parent.mkdir(parents=True, exist_ok=True)
        unfinished = path.with_suffix(f".{os.getpid()}")
        unfinished.write_bytes(gzip.compress(json.dumps(_written(program)).encode(), compresslevel=1))
        unfinished.replace(path)
    return program


def _folder() -> Path:
    return Path(os.environ.get("LIGHTEN_HOME") or platformdirs.user_cache_dir("lighten")) / "traces"


@cache
def _code() -> str:
    """Of the code that follows: another version follows anew."""
    digest = hashlib.sha256()
    for path in sorted([*Path(__file__).parent.glob("*.py"), Path(__file__).parent.parent / "cost" / "operators.py"]):
        digest.update(path.read_bytes())
    return digest.hexdigest()


PLAIN = WeightFormat()


def _written(program: Program) -> dict[str, Any]:
    names = [name for name in Op.__dataclass_fields__ if name != "weight"]
    return {
        "facts": {
            name: getattr(program, name)
            for name in (
                "parameters", "trainable_parameters", "active_parameters", "weight_bytes", "causal_is_known", "unknown_ops", "label", "layers",
                "assumptions",
            )
        },
        "memory": asdict(program.memory),
        "op_names": names, "ops": [[*(getattr(op, name) for name in names), count] for op, count in program.ops],
        "timelines": [
            {
                "storages": [[s.bytes, s.kind, s.module, s.operator, s.shape] for s in timeline.storages],
                "events": list(timeline.events), "phases": list(timeline.phases),
            }
            for timeline in program.timelines
        ],
    }  # fmt: skip


def _read(found: dict[str, Any]) -> Program:
    names = found["op_names"]
    ops = [(Op(**dict(zip(names, values, strict=True)), weight=PLAIN), count) for *values, count in found["ops"]]
    timelines = tuple(
        Timeline(
            storages=[Storage(bytes=b, kind=k, module=m, operator=o, shape=tuple(shape)) for b, k, m, o, shape in each["storages"]],
            events=tuple(each["events"]), phases=tuple((event, name) for event, name in each["phases"]),
        )
        for each in found["timelines"]
    )  # fmt: skip
    facts = found["facts"] | {"assumptions": tuple(found["facts"]["assumptions"])}
    return Program(ops=ops, memory=MemoryBreakdown(**found["memory"]), timelines=timelines, **facts)
