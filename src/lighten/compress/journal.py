"""The working folder of a run: what is finished stays there, whatever ends the process, until the artifact is in its place.

    .NAME.lighten-work/          beside the artifact NAME
        journal.json             what the run was begun with, and how far it is
        clock.json               what each step took so far, as of the last block that was finished
        lock                     held by the one process that works here
        pass-00/BLOCK.block      what a pass made of a block, written whole or not at all, with its checksum
        scratch/                 of the running process; emptied when the next begins
        artifact/                the artifact while it is assembled; renamed to NAME at the end

A block file: 8 bytes, the header's length as a little-endian integer; the header, JSON; the tensors' bytes; the sha256 of all that. Codes of up to
4 bits lie in it two a byte.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import importlib
import json
import math
import os
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from types import TracebackType
from typing import Any, BinaryIO, Literal
from urllib.parse import quote

import torch
from torch import Tensor

from lighten.compress.checkpoint import map_tensor
from lighten.compress.clock import Clock
from lighten.compress.grid import QuantizedTensor, Weight
from lighten.errors import OutputError

FILE, LOCK, SCRATCH, ARTIFACT, CLOCK = "journal.json", "lock", "scratch", "artifact", "clock.json"
VERSION = 1
ALIGNMENT = 64
"""Tensors begin at multiples of it (choice: a cache line; any element size divides it)."""
CHUNK_BYTES = 2**24
"""Bytes that are written, or read to check them, at once (choice)."""
NIBBLE_BITS = 4
LONGEST_NAME = 150
"""Of a file for a block: file systems take 255 bytes (POSIX NAME_MAX on Linux); longer names end in a digest."""

_KINDS = {"QuantizedTensor": "lighten.compress.grid", "GgmlTensor": "lighten.compress.ggml", "Factors": "lighten.compress.lowrank"}
"""Weights that are no plain tensor → the module of their class: dataclasses whose fields are tensors, or what JSON holds."""


@dataclass(frozen=True, kw_only=True)
class Finished:
    """What a pass made of a block.

    Attributes:
        weights: each read when it is asked for; tensors are mapped from the file, privately.
        reports: what was said of it, as JSON holds it.
    """

    weights: Mapping[str, Weight]
    reports: list[dict[str, Any]]


def work_folder(out: Path) -> Path:
    """Where a run that writes `out` works."""
    return out.parent / f".{out.name}.lighten-work"


class Journal:
    """A run's finished blocks. `Journal.open` makes one; leaving its `with` block gives the folder free for another process.

    Attributes:
        resumed: an earlier run's blocks are there.
        assembled: the artifact was whole before the earlier run ended: all that can be missing is its new name.
        clock: what each step took, in all processes of the run; of one that was killed, up to its last finished block.
    """

    def __init__(self, folder: Path, lock: int, identity: Mapping[str, str], *, out: Path, before: Mapping[str, Any] | None) -> None:
        self.folder, self._out = folder, out
        self.resumed = before is not None
        self.assembled = before is not None and before["state"] == "assembled"
        self._lock: int | None = lock
        self._identity = dict(identity)
        self._whole: set[Path] = set()
        self.clock = Clock(_clock_of(folder) if self.resumed else None)

    @classmethod
    def open(
        cls, folder: Path, identity: Mapping[str, str], *, resume: bool, out: Path | None = None, log: Callable[[str], None] = lambda line: None
    ) -> Journal:
        """Begin a run, or go on with one.

        Args:
            identity: all that its bytes depend on, each under a name that a user knows.
            out: what is named where the folder cannot be written; None: the folder itself.
            resume: go on where there is a run to go on with; else begin, and say so.

        Raises:
            OutputError: another process works there; an unfinished run without `resume`; one that was begun with something else; or the folder
                cannot be written.
        """
        out = out or folder
        lock = _lock(folder, out)
        try:
            before = _read(folder)
            if before is not None and not resume:
                raise OutputError(f"{folder} holds an unfinished run; go on with it by --resume, or remove that folder to start anew.")
            if before is not None:
                _refuse_changes(folder, before["identity"], identity)
            elif resume:
                log(f"nothing to resume at {folder}: starting anew")
        except BaseException:
            os.close(lock)
            raise
        journal = cls(folder, lock, identity, out=out, before=before)
        try:
            with writing(out):
                shutil.rmtree(journal.scratch, ignore_errors=True)
                journal.scratch.mkdir()
            if before is None:
                journal.mark("working")
        except BaseException:
            if before is None:
                journal.discard()
            journal.close()
            raise
        return journal

    @staticmethod
    def identity_in(folder: Path) -> dict[str, str]:
        """What the run in a folder was begun with; nothing where there is none, or none that can be read."""
        try:
            return dict((_read(folder) or {}).get("identity", {}))
        except (OutputError, OSError):
            return {}

    @property
    def scratch(self) -> Path:
        """A folder for what this process alone needs."""
        return self.folder / SCRATCH

    @property
    def artifact(self) -> Path:
        """Where the artifact is assembled."""
        return self.folder / ARTIFACT

    def has(self, pass_index: int, block: str) -> bool:
        return self._path(pass_index, block).is_file()

    def blocks(self, pass_index: int) -> list[str]:
        """Names of a pass's finished blocks, sorted.

        Raises:
            OutputError: a file is damaged.
        """
        return sorted(str(_header(path)[0]["block"]) for path in self._pass(pass_index).glob("*.block"))

    def write(self, pass_index: int, block: str, weights: Mapping[str, Weight], reports: Sequence[Mapping[str, Any]] = ()) -> None:
        """Keep what a pass made of a block; when this returns, it outlives a kill and a loss of power.

        Raises:
            OutputError: it cannot be written; what was finished before stays.
        """
        path = self._path(pass_index, block)
        header, tensors = _describe(block, weights, reports)
        with writing(self._out):
            if not path.parent.is_dir():
                path.parent.mkdir()
                sync(self.folder)
            with _replacing(path) as file:
                _write_block(file, header, tensors)
            with _replacing(self.folder / CLOCK) as file:
                file.write(json.dumps(self.clock.spent()).encode())
        self._whole.discard(path)

    def read(self, pass_index: int, block: str) -> Finished:
        """What a pass made of a block; its checksum is checked once a run.

        Raises:
            OutputError: the file is damaged, or cannot be read.
        """
        path = self._path(pass_index, block)
        header, start = _header(path)
        if path not in self._whole:
            _check(path)
            self._whole.add(path)
        return Finished(weights=_Weights(path, start, header["weights"]), reports=header["reports"])

    def reports(self, pass_index: int) -> list[dict[str, Any]]:
        """What was said of all of a pass's finished blocks, in the order of the blocks' files; their tensors are not read.

        Raises:
            OutputError: a file is damaged.
        """
        return [report for path in sorted(self._pass(pass_index).glob("*.block")) for report in _header(path)[0]["reports"]]

    def file(self, pass_index: int, name: str) -> Path:
        """Where a pass may keep a file of its own making, beside its blocks.

        Raises:
            OutputError: the folder cannot be written.
        """
        folder = self._pass(pass_index)
        with writing(self._out):
            folder.mkdir(exist_ok=True)
        return folder / name

    def forget(self, pass_index: int, block: str) -> None:
        """Remove a block that nothing reads any more; there may be none."""
        self._path(pass_index, block).unlink(missing_ok=True)

    def drop(self, pass_index: int) -> None:
        """Remove a pass's blocks, where no later pass reads them."""
        shutil.rmtree(self._pass(pass_index), ignore_errors=True)

    def worth_keeping(self) -> bool:
        """Whether there is something to go on from: a block, or a whole artifact."""
        return self.assembled or any(self.folder.glob("pass-*/*.block"))

    def kept_bytes(self) -> int:
        """Of all finished blocks."""
        return sum(path.stat().st_size for path in self.folder.glob("pass-*/*.block"))

    def mark(self, state: Literal["working", "assembled"]) -> None:
        """Write down how far the run is.

        Raises:
            OutputError: it cannot be written.
        """
        text = json.dumps({"version": VERSION, "state": state, "identity": self._identity}, indent=1) + "\n"
        with writing(self._out), _replacing(self.folder / FILE) as file:
            file.write(text.encode())
        self.assembled = state == "assembled"

    def discard(self) -> None:
        """Remove the folder: the artifact is in its place, or there is nothing worth going on from. `journal.json` goes last but for the lock."""
        for path in self.folder.iterdir():
            if path.is_dir():
                shutil.rmtree(path, ignore_errors=True)
            elif path.name not in (FILE, LOCK):
                path.unlink(missing_ok=True)
        (self.folder / FILE).unlink(missing_ok=True)
        (self.folder / LOCK).unlink(missing_ok=True)
        with contextlib.suppress(OSError):
            self.folder.rmdir()

    def close(self) -> None:
        """Let another process work here."""
        if self._lock is not None:
            os.close(self._lock)
            self._lock = None

    def __enter__(self) -> Journal:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close()

    def _pass(self, pass_index: int) -> Path:
        return self.folder / f"pass-{pass_index:02}"

    def _path(self, pass_index: int, block: str) -> Path:
        name = quote(block, safe=" ()[],=+@") or "%"
        if len(name) > LONGEST_NAME:
            name = f"{name[: LONGEST_NAME - 17]}-{hashlib.sha256(block.encode()).hexdigest()[:16]}"
        return self._pass(pass_index) / f"{name}.block"


# the folder


def _lock(folder: Path, out: Path) -> int:
    """The lock of a folder, which is made where it is not there.

    Raises:
        OutputError: another process has it, or it cannot be made.
    """
    while True:
        with writing(out):
            folder.mkdir(parents=True, exist_ok=True)
            try:
                handle = os.open(folder / LOCK, os.O_RDWR | os.O_CREAT, 0o644)
            except FileNotFoundError:
                continue  # the process that had it has just finished and removed the folder
            except OSError:
                with contextlib.suppress(OSError):
                    folder.rmdir()
                raise
            try:
                fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError as error:
                os.close(handle)
                raise OutputError(f"{folder}: another process works there; wait for it, or write to another folder.") from error
            except BaseException:
                os.close(handle)
                raise
        try:
            if os.path.samestat(os.fstat(handle), os.stat(folder / LOCK)):
                return handle
        except FileNotFoundError:
            pass
        os.close(handle)


def _read(folder: Path) -> dict[str, Any] | None:
    """What `journal.json` says; None where no run was begun.

    Raises:
        OutputError: not a journal's folder, or one of another version.
    """
    try:
        said: dict[str, Any] = json.loads((folder / FILE).read_bytes())
        if said["version"] != VERSION or said["state"] not in ("working", "assembled") or not isinstance(said["identity"], dict):
            raise ValueError(f"version {said['version']}")
        return said
    except FileNotFoundError:
        if foreign := sorted(path.name for path in folder.iterdir() if path.name not in (LOCK, SCRATCH, f"{FILE}.tmp")):
            raise OutputError(f"{folder} holds {foreign[0]} and no {FILE}: it is not the folder of a run; move it away.") from None
        return None
    except OSError as error:
        raise OutputError(f"{folder / FILE} cannot be read: {error.strerror}.") from error
    except (ValueError, KeyError, TypeError) as error:
        raise OutputError(f"{folder / FILE} is not a journal of this version ({error}); remove {folder} to start anew.") from error


def _clock_of(folder: Path) -> dict[str, Any]:
    """What the processes before took; nothing where none finished a block.

    Raises:
        OutputError: it cannot be read.
    """
    try:
        said: dict[str, Any] = json.loads((folder / CLOCK).read_bytes())
        return {what: {"seconds": float(each["seconds"]), "peak_bytes": each["peak_bytes"]} for what, each in said.items()}
    except FileNotFoundError:
        return {}
    except OSError as error:
        raise OutputError(f"{folder / CLOCK} cannot be read: {error.strerror}.") from error
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise OutputError(f"{folder / CLOCK} is damaged; delete this file and run again with --resume, which counts time anew.") from error


def _refuse_changes(folder: Path, before: Mapping[str, str], now: Mapping[str, str]) -> None:
    """Raises:
    OutputError: the run was begun with something else.
    """
    changed = [name for name in sorted({*before, *now}) if before.get(name) != now.get(name)]
    if changed:
        said = "; ".join(f"{name} ({_short(before.get(name))}, now {_short(now.get(name))})" for name in changed)
        raise OutputError(f"{folder} was begun with another {said}; resume it as it was begun, or remove that folder to start anew.")


def _short(value: str | None) -> str:
    if value is None:
        return "none"
    return value if len(value) <= 100 else f"{value[:97]}…"


@contextlib.contextmanager
def writing(folder: Path) -> Iterator[None]:
    """Raises:
    OutputError: in place of the system's error.
    """
    try:
        yield
    except OSError as error:
        raise OutputError(f"{folder} cannot be written: {error.strerror}.") from error


@contextlib.contextmanager
def _replacing(path: Path) -> Iterator[BinaryIO]:
    """A new file in the place of `path`: there whole, or not at all."""
    beside = path.with_name(f"{path.name}.tmp")
    try:
        with beside.open("wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(beside, path)
        sync(path.parent)
    except BaseException:
        with contextlib.suppress(OSError):
            beside.unlink(missing_ok=True)
        raise


def sync(path: Path) -> None:
    """Make a file's content, or what a folder lists, outlive a loss of power."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


# a block file


def _describe(block: str, weights: Mapping[str, Weight], reports: Sequence[Mapping[str, Any]]) -> tuple[bytes, list[Tensor]]:
    """The header, and the tensors in the order of their bytes."""
    tensors: list[Tensor] = []
    end = 0

    def placed(tensor: Tensor) -> dict[str, Any]:
        nonlocal end
        start, end = end, end + -(-tensor.nbytes // ALIGNMENT) * ALIGNMENT
        tensors.append(tensor)
        return {"dtype": str(tensor.dtype).removeprefix("torch."), "shape": list(tensor.shape), "offset": start}

    def described(weight: Weight) -> dict[str, Any]:
        narrow = isinstance(weight, QuantizedTensor) and weight.bits <= NIBBLE_BITS
        values = {key: _field(value, placed, narrow=narrow and key == "codes") for key, value in _values(weight).items()}
        return {"kind": _kind(weight)} | values

    said = {name: described(weight) for name, weight in weights.items()}
    header = json.dumps({"version": VERSION, "block": block, "weights": said, "reports": [dict(report) for report in reports]}).encode()
    return header + b" " * (-(8 + len(header)) % ALIGNMENT), tensors


def _kind(weight: Weight) -> str:
    kind = type(weight).__name__
    assert isinstance(weight, Tensor) or kind in _KINDS, f"a journal keeps tensors and {', '.join(_KINDS)}, no {kind}"
    return "Tensor" if isinstance(weight, Tensor) else kind


def _values(weight: Any) -> dict[str, Any]:
    return {"tensor": weight} if isinstance(weight, Tensor) else {field.name: getattr(weight, field.name) for field in fields(weight)}


def _field(value: Any, placed: Callable[[Tensor], dict[str, Any]], *, narrow: bool) -> dict[str, Any]:
    if not isinstance(value, Tensor):
        return {"value": value}
    return {"tensor": placed(_in_pairs(value)), "codes": list(value.shape)} if narrow else {"tensor": placed(value)}


def _in_pairs(codes: Tensor) -> Tensor:
    """Codes of up to 4 bits, two a byte, the first in the low bits."""
    flat = codes.reshape(-1)
    pairs = flat[::2].clone()
    pairs[: len(flat) // 2] |= flat[1::2] << NIBBLE_BITS
    return pairs


def _one_by_one(pairs: Tensor, shape: tuple[int, ...]) -> Tensor:
    """The inverse of `_in_pairs`."""
    flat = torch.empty(2 * len(pairs), dtype=torch.uint8)
    flat[::2] = pairs & (2**NIBBLE_BITS - 1)
    flat[1::2] = pairs >> NIBBLE_BITS
    return flat[: math.prod(shape)].reshape(shape)


def _write_block(file: BinaryIO, header: bytes, tensors: Sequence[Tensor]) -> None:
    digest = hashlib.sha256()

    def put(data: Any) -> None:
        digest.update(data)
        file.write(data)

    put(len(header).to_bytes(8, "little"))
    put(header)
    for tensor in tensors:
        flat = tensor.detach().contiguous().reshape(-1).view(torch.uint8).numpy()
        for start in range(0, len(flat), CHUNK_BYTES):
            put(flat[start : start + CHUNK_BYTES].data)
        put(bytes(-len(flat) % ALIGNMENT))
    file.write(digest.digest())


def _header(path: Path) -> tuple[dict[str, Any], int]:
    """A block file's header, and where its tensors begin."""
    try:
        with path.open("rb") as file:
            length = int.from_bytes(file.read(8), "little")
            if length > path.stat().st_size:
                raise ValueError("length")
            header: dict[str, Any] = json.loads(file.read(length))
            if header["version"] != VERSION:
                raise ValueError("version")
            return header, 8 + length
    except OSError as error:
        raise OutputError(f"{path} cannot be read: {error.strerror}.") from error
    except (ValueError, KeyError, TypeError) as error:
        raise _damaged(path) from error


def _check(path: Path) -> None:
    """Raises:
    OutputError: the file's checksum is not that of its content.
    """
    digest, left = hashlib.sha256(), path.stat().st_size - hashlib.sha256().digest_size
    with path.open("rb") as file:
        while left > 0:
            chunk = file.read(min(CHUNK_BYTES, left))
            digest.update(chunk)
            left -= len(chunk)
        if left or file.read() != digest.digest():
            raise _damaged(path)


def _damaged(path: Path) -> OutputError:
    return OutputError(f"{path} is damaged: its checksum does not fit; delete this file and run again with --resume, which makes the block anew.")


class _Weights(Mapping[str, Weight]):
    """The weights of a block file."""

    def __init__(self, path: Path, start: int, said: Mapping[str, Mapping[str, Any]]) -> None:
        self._path, self._start, self._said = path, start, said

    def __getitem__(self, name: str) -> Weight:
        return _weight(self._path, self._start, self._said[name])

    def __iter__(self) -> Iterator[str]:
        return iter(self._said)

    def __len__(self) -> int:
        return len(self._said)


def _weight(path: Path, start: int, said: Mapping[str, Any]) -> Weight:
    """One weight, mapped from its block file."""
    values = {key: _value(path, start, value) for key, value in said.items() if key != "kind"}
    if said["kind"] == "Tensor":
        tensor: Tensor = values["tensor"]
        return tensor
    kind = said["kind"]
    made: Weight = getattr(importlib.import_module(_KINDS[kind]), kind)(**values)
    return made


def _value(path: Path, start: int, said: Mapping[str, Any]) -> Any:
    if "value" in said:
        return said["value"]
    place = said["tensor"]
    found = map_tensor(path, start + place["offset"], tuple(place["shape"]), getattr(torch, place["dtype"]))
    return _one_by_one(found, tuple(said["codes"])) if "codes" in said else found
