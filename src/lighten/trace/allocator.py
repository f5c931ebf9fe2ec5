"""What PyTorch's CUDA caching allocator makes of a list of births and deaths: bytes allocated and reserved, replayed block by block.

A request is rounded up to 512 bytes and served by the smallest cached free block that holds it; the rest of that block is split off where
it is worth it. Where none holds it, a new segment is taken from the device: 2 MiB for requests of at most 1 MiB, 20 MiB for those under
10 MiB, else the request rounded up to 2 MiB. A freed block joins its free neighbours in the same segment; segments stay reserved.

Deviations: one stream; addresses of segments grow in the order in which they are taken (which decides between free blocks of one size);
the default settings (no `expandable_segments`, no `max_split_size_mb`, no `roundup_power2_divisions`). What a kernel's library takes for
itself (the workspace of cuBLAS) is in the list only where the caller puts it there; the device's context never is.

Source: `DeviceCachingAllocator` of c10/cuda/CUDACachingAllocator.cpp (PyTorch 2.x): `malloc`, `round_size`, `get_allocation_size`,
`get_free_block`, `should_split`, `alloc_found_block`, `free_block`, `try_merge_blocks`, `release_cached_blocks`.
"""

from __future__ import annotations

from bisect import bisect_left, insort
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from lighten.trace.program import Timeline

MIN_BLOCK = 512
SMALL_SIZE = 1 << 20
SMALL_SEGMENT = 2 << 20
MIN_LARGE = 10 << 20
LARGE_SEGMENT = 20 << 20
ROUND_LARGE = 2 << 20
"""Bytes. Source: kMinBlockSize, kSmallSize, kSmallBuffer, kMinLargeAlloc, kLargeBuffer, kRoundLarge of the same file."""


@dataclass(frozen=True, kw_only=True)
class Reserved:
    """What a list of births and deaths took at most.

    Attributes:
        allocated: `torch.cuda.max_memory_allocated`: blocks in use, with what rounding left unsplit in them.
        reserved: `torch.cuda.max_memory_reserved`: segments.
        segments: bytes of each segment that was taken, in order.
        failed_at: number of the event for which the capacity did not suffice, even after all cached segments were given back; None: it did.
    """

    allocated: int
    reserved: int
    segments: tuple[int, ...]
    failed_at: int | None = None

    @property
    def fragmentation(self) -> float:
        """The share of the reserved bytes that was never in use at once."""
        return 1 - self.allocated / self.reserved if self.reserved else 0.0


def simulate(timeline: Timeline, *, capacity_bytes: int | None = None) -> Reserved:
    """The allocator's peaks over a timeline.

    Args:
        capacity_bytes: what the device has for segments; None: enough.
    """
    return simulate_events((storage.bytes for storage in timeline.storages), timeline.events, capacity_bytes=capacity_bytes)


def simulate_events(sizes: Iterable[int], events: Iterable[int], *, capacity_bytes: int | None = None) -> Reserved:
    """The allocator's peaks.

    Args:
        sizes: bytes of each storage; storages of no bytes take nothing.
        events: index of the storage that is born, or -1 - index of the one that dies.
        capacity_bytes: what the device has for segments; None: enough.

    >>> simulate_events([600], [0])
    Reserved(allocated=1024, reserved=2097152, segments=(2097152,), failed_at=None)
    """
    allocator = _Allocator(capacity_bytes)
    bytes_of = list(sizes)
    blocks: dict[int, _Block] = {}
    for number, event in enumerate(events):
        if event < 0:
            if block := blocks.pop(-1 - event, None):
                allocator.free(block)
        elif bytes_of[event]:
            found = allocator.allocate(bytes_of[event])
            if found is None:
                return allocator.result(failed_at=number)
            blocks[event] = found
    return allocator.result(failed_at=None)


def rounded(size: int) -> int:
    """Bytes of the block that a request asks for.

    >>> rounded(1), rounded(512), rounded(513)
    (512, 512, 1024)
    """
    return max(MIN_BLOCK, -(-size // MIN_BLOCK) * MIN_BLOCK)


def segment_bytes(size: int) -> int:
    """Bytes of the segment that is taken for a rounded request.

    >>> [segment_bytes(mib << 20) >> 20 for mib in (1, 2, 9, 10, 11)]
    [2, 20, 20, 10, 12]
    """
    if size <= SMALL_SIZE:
        return SMALL_SEGMENT
    return LARGE_SEGMENT if size < MIN_LARGE else -(-size // ROUND_LARGE) * ROUND_LARGE


class _Block:
    """A piece of a segment, and its neighbours in it."""

    __slots__ = ("address", "after", "before", "free", "pool", "size")

    def __init__(self, pool: _Pool, address: int, size: int) -> None:
        self.pool, self.address, self.size = pool, address, size
        self.before: _Block | None = None
        self.after: _Block | None = None
        self.free = False

    @property
    def is_whole(self) -> bool:
        return self.before is None and self.after is None


class _Pool:
    """Free blocks in order of size, then address."""

    def __init__(self, *, small: bool) -> None:
        self.small = small
        self._keys: list[tuple[int, int]] = []
        self._blocks: dict[int, _Block] = {}

    def add(self, block: _Block) -> None:
        block.free = True
        insort(self._keys, (block.size, block.address))
        self._blocks[block.address] = block

    def remove(self, block: _Block) -> None:
        block.free = False
        del self._keys[bisect_left(self._keys, (block.size, block.address))]
        del self._blocks[block.address]

    def take(self, size: int) -> _Block | None:
        """The smallest free block of at least `size`."""
        at = bisect_left(self._keys, (size, -1))
        if at == len(self._keys):
            return None
        block = self._blocks[self._keys[at][1]]
        self.remove(block)
        return block

    def whole(self) -> Iterator[_Block]:
        """Free blocks that are a segment each."""
        yield from [block for block in self._blocks.values() if block.is_whole]

    def keeps_apart(self, rest: int) -> bool:
        """Whether a rest of so many bytes is split off."""
        return rest >= MIN_BLOCK if self.small else rest > SMALL_SIZE


class _Allocator:
    def __init__(self, capacity: int | None) -> None:
        self.small, self.large = _Pool(small=True), _Pool(small=False)
        self.capacity = capacity
        self.allocated = self.most_allocated = 0
        self.reserved = self.most_reserved = 0
        self.address = 0
        self.segments: list[int] = []

    def allocate(self, request: int) -> _Block | None:
        size = rounded(request)
        pool = self.small if size <= SMALL_SIZE else self.large
        block = pool.take(size) or self._segment(pool, segment_bytes(size))
        if block is None:
            return None
        if pool.keeps_apart(block.size - size):
            self._split(block, size)
        self.allocated += block.size
        self.most_allocated = max(self.most_allocated, self.allocated)
        return block

    def free(self, block: _Block) -> None:
        self.allocated -= block.size
        before, after = block.before, block.after
        if before and before.free:
            block.pool.remove(before)
            block.address, block.size, block.before = before.address, before.size + block.size, before.before
            if block.before:
                block.before.after = block
        if after and after.free:
            block.pool.remove(after)
            block.size, block.after = block.size + after.size, after.after
            if block.after:
                block.after.before = block
        block.pool.add(block)

    def result(self, *, failed_at: int | None) -> Reserved:
        return Reserved(allocated=self.most_allocated, reserved=self.most_reserved, segments=tuple(self.segments), failed_at=failed_at)

    def _segment(self, pool: _Pool, size: int) -> _Block | None:
        if not self._fits(size):
            self._give_back()
            if not self._fits(size):
                return None
        block = _Block(pool, self.address, size)
        self.address += size
        self.segments.append(size)
        self.reserved += size
        self.most_reserved = max(self.most_reserved, self.reserved)
        return block

    def _fits(self, size: int) -> bool:
        return self.capacity is None or self.reserved + size <= self.capacity

    def _give_back(self) -> None:
        """Return all segments that nothing is in to the device."""
        for pool in (self.small, self.large):
            for block in pool.whole():
                pool.remove(block)
                self.reserved -= block.size

    @staticmethod
    def _split(block: _Block, size: int) -> None:
        rest = _Block(block.pool, block.address + size, block.size - size)
        rest.before, rest.after = block, block.after
        if rest.after:
            rest.after.before = rest
        block.after, block.size = rest, size
        block.pool.add(rest)
