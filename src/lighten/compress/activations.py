"""Tensors that wait: what fits stays in memory, the rest lies in a file until it is wanted, and every reference to it stays good."""

from __future__ import annotations

import ctypes
import os
import tempfile
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType

import torch
from torch import Tensor

from lighten.errors import OutputError

PAGE = 4096
"""Places in the file are whole pages (choice: any multiple of the element sizes would do)."""


@dataclass
class _Entry:
    """One storage that waits.

    Attributes:
        offset: its place in the file; None where it is in memory.
        holders: how many parked groups have it.
    """

    storage: torch.UntypedStorage
    size: int
    offset: int | None = None
    holders: int = 0


@dataclass(frozen=True)
class Parked:
    """A group of tensors that wait; `SpillBuffer.restore` uses it up."""

    keys: tuple[int, ...]


class SpillBuffer:
    """Keeps at most `limit_bytes` of parked tensors in memory, the others in one file of `folder` that has no name, so that nothing stays
    of it whatever ends the process.

    Groups are taken to come back in turn, again and again: what fits when it is parked stays, and what does not goes to the file. (The least
    recently used would be the wrong ones to let go: they come back first.)

    Args:
        limit_bytes: None: all stay in memory.
    """

    def __init__(self, folder: Path, *, limit_bytes: int | None) -> None:
        self._folder, self._limit = folder, limit_bytes
        self._entries: dict[int, _Entry] = {}
        self._free: dict[int, list[int]] = {}
        self._file: int | None = None
        self._end = 0
        self.held_bytes = 0
        self.spilled_bytes = 0

    def park(self, tensors: Iterable[Tensor]) -> Parked:
        """Let these wait. Until they are restored their values must not be read: each storage may be empty. A storage that several tensors or
        groups share is kept once.

        Raises:
            OutputError: the file cannot be written.
        """
        return self._park(tensors, self._limit)

    def spill(self, tensor: Tensor) -> Parked:
        """Let one tensor wait in the file, however much memory there is.

        Raises:
            OutputError: the file cannot be written.
        """
        return self._park([tensor], 0)

    def restore(self, parked: Parked) -> None:
        """Put the values of a group back where they were: every reference sees them.

        Raises:
            OutputError: the file cannot be read.
        """
        for key in parked.keys:
            entry = self._entries[key]
            if entry.offset is not None:
                entry.storage.resize_(entry.size)
                self._transfer(os.preadv, entry, entry.offset)
                self._release(entry)
                self.held_bytes += entry.size
            entry.holders -= 1
            if not entry.holders:
                self.held_bytes -= entry.size
                del self._entries[key]

    def close(self) -> None:
        """Give the file's room back; what is still in it is lost."""
        if self._file is not None:
            os.close(self._file)
            self._file = None
        self._entries.clear()
        self._free.clear()
        self._end = self.held_bytes = self.spilled_bytes = 0

    def __enter__(self) -> SpillBuffer:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close()

    def _park(self, tensors: Iterable[Tensor], limit: int | None) -> Parked:
        storages = {(storage := tensor.untyped_storage())._cdata: storage for tensor in tensors if tensor.device.type == "cpu"}
        for key, storage in storages.items():
            if key not in self._entries:
                self._entries[key] = _Entry(storage=storage, size=storage.nbytes())
                self.held_bytes += storage.nbytes()
            self._entries[key].holders += 1
        for key in storages:
            entry = self._entries[key]
            if limit is not None and self.held_bytes > limit and entry.offset is None and entry.size and entry.storage.resizable():
                self._write(entry)
        return Parked(keys=tuple(storages))

    def _write(self, entry: _Entry) -> None:
        """Move a storage to the file."""
        room = self._room(entry)
        free = self._free.get(room)
        place = free.pop() if free else self._end
        self._transfer(os.pwritev, entry, place)
        self._end = max(self._end, place + room)
        entry.storage.resize_(0)
        entry.offset = place
        self.held_bytes -= entry.size
        self.spilled_bytes += entry.size

    def _release(self, entry: _Entry) -> None:
        assert entry.offset is not None, "it is in the file"
        self._free.setdefault(self._room(entry), []).append(entry.offset)
        entry.offset = None
        self.spilled_bytes -= entry.size

    @staticmethod
    def _room(entry: _Entry) -> int:
        return -(-entry.size // PAGE) * PAGE

    def _transfer(self, call: Callable[[int, list[memoryview], int], int], entry: _Entry, place: int) -> None:
        """Read or write a whole storage; the system may do less than it is asked for at once."""
        view = memoryview((ctypes.c_char * entry.size).from_address(entry.storage.data_ptr())).cast("B")
        try:
            done = 0
            while done < entry.size:
                moved = call(self._opened(), [view[done:]], place + done)
                if not moved:
                    raise OutputError(f"{self._folder}: the file of waiting activations ended at byte {place + done}.")
                done += moved
        except OSError as error:
            raise OutputError(f"{self._folder}: activations that wait cannot be kept there: {error.strerror}.") from error

    def _opened(self) -> int:
        if self._file is None:
            handle, name = tempfile.mkstemp(prefix="activations-", dir=self._folder)
            os.unlink(name)
            self._file = handle
        return self._file
