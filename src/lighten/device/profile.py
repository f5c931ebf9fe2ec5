"""What is known of a machine: measured once by `lighten probe`, kept in the user's data folder, read by every prediction of time."""

from __future__ import annotations

import json
import math
import os
import tempfile
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import platformdirs

from lighten.errors import DeviceError, OutputError

VERSION = 2
"""Of the file's layout and of the models that are timed for it: another version is refused, as its figures mean something else."""

ENGINES = (
    "torch/float32", "torch/bfloat16", "torch-compile/float32", "torch-compile/bfloat16", "onnxruntime/float32", "onnxruntime/int8",
    "openvino/float32", "openvino/bfloat16", "openvino/int8", "ctranslate2/float32", "ctranslate2/int8",
)  # fmt: skip
"""Runtime and the type that it computes linears in. int8: dynamic, per channel, in ONNX Runtime; static by NNCF in OpenVINO; dynamic, by token, in
CTranslate2."""


@dataclass(frozen=True, kw_only=True)
class Machine:
    """The machine that was measured. `memory_bytes` is None where the system does not say."""

    cpu: str
    cores: int
    memory_bytes: int | None
    os: str


@dataclass(frozen=True, kw_only=True)
class Bandwidth:
    """Bytes per second that all threads together read, or copy (read and written bytes count), cycling through `working_set_bytes`."""

    working_set_bytes: int
    read_bytes_per_s: float
    copy_bytes_per_s: float


@dataclass(frozen=True, kw_only=True)
class Sample:
    """One operator, measured alone, without the costs of a call and of an operator.

    Attributes:
        kind: linear, attention, layernorm, rmsnorm, gelu, add, rotary; cold: a linear whose weight comes from memory; fresh: what it costs to write
            a tensor's memory for the first time.
        rows: rows of a linear's input; batch × heads of attention; bytes of a fresh tensor; elements of everything else.
        shape: (in_features, out_features) of a linear, (queries, keys, head_dim) of attention, () of everything else.
    """

    kind: str
    rows: int
    shape: tuple[int, ...]
    seconds: float


@dataclass(frozen=True, kw_only=True)
class BlockSample:
    """A stack of synthetic layers with random weights, measured as a whole: of an encoder, or of a decoder where it has key-value heads.

    Attributes:
        calm: no other process disturbed it.
    """

    hidden_size: int
    num_attention_heads: int
    intermediate_size: int
    layers: int
    batch_size: int
    seq_len: int
    seconds: float
    calm: bool = True
    num_key_value_heads: int | None = None


@dataclass(frozen=True, kw_only=True)
class Calibration:
    """What turns the sum of single operators into the time of a whole model.

    Attributes:
        factors: class of time (`CLASSES` of roofline.py) → what its sum is multiplied by: below 1 where the runtime
            fuses or overlaps, above 1 where it moves data between operators. Fitted to `blocks` synthetic blocks.
        spread: half width of the 90 % interval of log(measured / predicted), from blocks that the fit did not see (leave one out).
        blocks: how many were measured; with 0 the factors are 1 and the range is not known.
    """

    factors: Mapping[str, float] = field(default_factory=dict)
    spread: float | None = None
    blocks: int = 0


@dataclass(frozen=True, kw_only=True)
class EngineProfile:
    """One runtime in one precision on this machine. None: not known.

    Attributes:
        name: of `ENGINES`.
        version: the runtime's own.
        precision: the type that it says it computes floats in.
        call_overhead_s: of one forward pass of an almost empty model.
        operator_overhead_s: what each further tiny operator adds.
        disturbed_ratio: the share of measured points during which other processes took cores away: high, and the machine was busy.
        base_memory_bytes: peak resident memory of a fresh process that imported the runtime and ran a tiny model.
        weight_copies: how many times the bytes of a stored model are resident at the peak of loading and running it.
        import_s, load_s: of the runtime, and of a model of `loaded_bytes`.
    """

    name: str
    version: str
    precision: str
    samples: tuple[Sample, ...]
    call_overhead_s: float
    operator_overhead_s: float
    blocks: tuple[BlockSample, ...] = ()
    calibration: Calibration = field(default_factory=Calibration)
    disturbed_ratio: float | None = None
    base_memory_bytes: int | None = None
    weight_copies: float | None = None
    import_s: float | None = None
    load_s: float | None = None
    loaded_bytes: int | None = None

    @property
    def runtime(self) -> str:
        return self.name.split("/")[0]

    @property
    def dtype(self) -> str:
        return self.name.split("/")[1]

    @property
    def activation_dtype(self) -> str:
        """What flows between operators: an int8 engine quantizes inside its linears."""
        return "bfloat16" if self.dtype == "bfloat16" else "float32"


@dataclass(frozen=True, kw_only=True)
class Profile:
    """One machine: bandwidth, and each runtime that could be measured. An engine in neither `engines` nor `failures` is not known."""

    machine: Machine
    threads: int
    bandwidth: tuple[Bandwidth, ...]
    engines: Mapping[str, EngineProfile]
    failures: Mapping[str, str] = field(default_factory=dict)
    versions: Mapping[str, str] = field(default_factory=dict)
    measured_at: str = ""

    def engine(self, name: str) -> EngineProfile:
        """The profile of one engine.

        Raises:
            DeviceError: it was not measured here; says why, and which were.
        """
        if name in self.engines:
            return self.engines[name]
        why = f"failed in the probe ({self.failures[name]})" if name in self.failures else "was not measured"
        known = ", ".join(self.engines) or "none"
        raise DeviceError(f"engine {name} {why} on this machine; measured: {known}. `lighten probe` measures what is installed.")


def data_folder() -> Path:
    """Where lighten keeps what it learned of this machine: $LIGHTEN_HOME, or the user's data folder of the system."""
    return Path(os.environ.get("LIGHTEN_HOME") or platformdirs.user_data_dir("lighten"))


def profile_path() -> Path:
    """The file of this machine's profile."""
    return data_folder() / "profile.json"


def profile_to_json(profile: Profile) -> dict[str, Any]:
    """The profile as JSON-ready data; `profile_from_json` is its inverse."""
    return {"version": VERSION, **asdict(profile)}


def profile_from_json(data: Any) -> Profile:
    """The profile that `profile_to_json` wrote.

    Raises:
        DeviceError: another version, or not a profile.
    """
    if not isinstance(data, dict) or "version" not in data:
        raise DeviceError("it is not a machine profile")
    if data["version"] != VERSION:
        raise DeviceError(f"it has version {data['version']}, this lighten reads version {VERSION}")
    try:
        return Profile(
            machine=Machine(**data["machine"]),
            threads=data["threads"],
            bandwidth=tuple(Bandwidth(**each) for each in data["bandwidth"]),
            engines={name: _engine_from_json(each) for name, each in data["engines"].items()},
            failures=dict(data["failures"]),
            versions=dict(data["versions"]),
            measured_at=data["measured_at"],
        )
    except (KeyError, TypeError, AttributeError, ValueError) as error:
        raise DeviceError(f"it is damaged ({type(error).__name__}: {error})") from error


def engine_from_json(data: Mapping[str, Any]) -> EngineProfile:
    """One engine's part of a profile.

    Raises:
        KeyError, TypeError, ValueError: a missing, unknown or impossible field.
    """
    return _engine_from_json(data)


def require_profile_folder() -> None:
    """Raises:
    OutputError: the folder of this machine's profile cannot be written; said before minutes are spent on measuring.
    """
    path = profile_path()
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=path.parent):
            pass
    except OSError as error:
        raise OutputError(f"{path}: cannot be written ({error.strerror or error}); LIGHTEN_HOME names another folder.") from error


def save_profile(profile: Profile, path: Path | None = None) -> Path:
    """Write the profile beside its place, then rename: a reader sees the old one or the new one, never half of one.

    Raises:
        OutputError: the folder cannot be written.
    """
    path = path or profile_path()
    text = json.dumps(profile_to_json(profile), separators=(",", ":"))
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, beside = tempfile.mkstemp(dir=path.parent, prefix=path.name, suffix=".part")
        try:
            with os.fdopen(handle, "w", encoding="utf-8") as file:
                file.write(text)
            os.replace(beside, path)
        except BaseException:
            Path(beside).unlink(missing_ok=True)
            raise
    except OSError as error:
        raise OutputError(f"{path}: cannot be written ({error.strerror or error}); LIGHTEN_HOME names another folder.") from error
    return path


def merge_profiles(known: Profile, found: Profile) -> Profile:
    """What was found now, and of the engines that were not asked for what was known."""
    failures = {name: reason for name, reason in known.failures.items() if name not in found.engines}
    engines = {name: engine for name, engine in known.engines.items() if name not in found.failures}
    return replace(found, engines={**engines, **found.engines}, failures={**failures, **found.failures})


def load_profile(path: Path | None = None) -> Profile:
    """This machine's profile.

    Raises:
        DeviceError: there is none, it cannot be read, or it is of another version.
    """
    path = path or profile_path()
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError as error:
        raise DeviceError(f"this machine was not measured yet (no {path}); run `lighten probe` once.") from error
    except (OSError, UnicodeDecodeError) as error:
        raise DeviceError(f"{path}: cannot be read ({error}); run `lighten probe` again.") from error
    try:
        return profile_from_json(json.loads(text))
    except json.JSONDecodeError as error:
        raise DeviceError(f"{path}: not JSON ({error.msg} at character {error.pos}); run `lighten probe` again.") from error
    except DeviceError as error:
        raise DeviceError(f"{path}: {error}; run `lighten probe` again.") from error


def _engine_from_json(data: Mapping[str, Any]) -> EngineProfile:
    samples = tuple(Sample(**{**each, "shape": tuple(each["shape"])}) for each in data["samples"])
    blocks = tuple(BlockSample(**each) for each in data["blocks"])
    for seconds in [*(each.seconds for each in samples), *(each.seconds for each in blocks)]:
        _require_positive(seconds, "seconds")
    _require_positive(data["operator_overhead_s"], "operator_overhead_s")
    return EngineProfile(**{**data, "samples": samples, "blocks": blocks, "calibration": Calibration(**data["calibration"])})


def _require_positive(value: Any, what: str) -> None:
    if not isinstance(value, int | float) or not math.isfinite(value) or value <= 0:
        raise ValueError(f"{what}={value!r}")
