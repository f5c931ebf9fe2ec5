"""The caching allocator's rules on lists worked out by hand, its invariants on any list, and its speed's order."""

from __future__ import annotations

import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lighten.trace.allocator import Reserved, rounded, segment_bytes, simulate, simulate_events
from lighten.trace.program import Storage, Timeline

KIB, MIB = 1 << 10, 1 << 20


def peaks(sizes: list[int], events: list[int], **options: int) -> tuple[int, int, tuple[int, ...]]:
    found = simulate_events(sizes, events, **options)
    return found.allocated, found.reserved, found.segments


def test_requests_are_rounded_to_512_bytes_and_small_ones_share_2_mib():
    assert peaks([1, 513], [0, 1]) == (512 + 1024, 2 * MIB, (2 * MIB,))


def test_the_second_small_segment_comes_when_the_first_is_full():
    assert peaks([MIB, MIB, 512], [0, 1, 2]) == (2 * MIB + 512, 4 * MIB, (2 * MIB, 2 * MIB))


def test_one_mib_is_small_and_a_byte_more_is_large():
    assert peaks([MIB], [0])[1] == 2 * MIB
    assert peaks([MIB + 1], [0]) == (MIB + 512, 20 * MIB, (20 * MIB,))


def test_large_requests_share_20_mib_under_10_mib_and_have_their_own_from_there():
    assert peaks([9 * MIB, 9 * MIB], [0, 1])[2] == (20 * MIB,)
    assert peaks([10 * MIB], [0]) == (10 * MIB, 10 * MIB, (10 * MIB,))
    assert peaks([10 * MIB + 1], [0]) == (10 * MIB + 512, 12 * MIB, (12 * MIB,))
    assert peaks([11 * MIB + 1], [0]) == (12 * MIB, 12 * MIB, (12 * MIB,))  # the rest is under 1 MiB, is not split off, and counts as used


def test_a_rest_of_exactly_one_mib_is_not_split_off_and_one_of_512_bytes_more_is():
    assert peaks([19 * MIB, 19 * MIB], [0, 1])[0] == 20 * MIB * 2  # each in a segment of 20 MiB, 1 MiB left: kept whole
    assert peaks([19 * MIB - 512], [0]) == (19 * MIB - 512, 20 * MIB, (20 * MIB,))
    # 9 MiB, then 10 MiB - 512: the 11 MiB that are left keep 1 MiB + 512 apart, which the next request of that size takes
    assert peaks([9 * MIB, 10 * MIB - 512, MIB + 512], [0, 1, 2]) == (20 * MIB, 20 * MIB, (20 * MIB,))
    # 9 MiB, then 10 MiB - 0: exactly 1 MiB is left and goes along
    assert peaks([9 * MIB, 10 * MIB], [0, 1]) == (20 * MIB, 20 * MIB, (20 * MIB,))


def test_a_freed_block_is_reused_and_the_smallest_that_fits_is_taken():
    # holes of 4 and 3 MiB, and 1.5 MiB at the end: the request of 3 MiB leaves the hole of 4 to that of 4
    sizes = [4 * MIB, 2 * MIB, 3 * MIB, 9 * MIB + 512 * KIB, 3 * MIB, 4 * MIB]
    assert peaks(sizes, [0, 1, 2, 3, -1, -3, 4, 5])[2] == (20 * MIB,)


def test_neighbours_that_are_free_become_one_block():
    sizes = [6 * MIB, 6 * MIB, 8 * MIB, 12 * MIB]
    assert peaks(sizes, [0, 1, 2, -1, -2, 3])[2] == (20 * MIB,)  # 6 + 6 joined hold 12
    assert peaks(sizes, [0, 1, 2, -1, -3, 3])[2] == (20 * MIB, 12 * MIB)  # 6 and 8 apart do not


def test_neighbours_join_on_both_sides():
    sizes = [5 * MIB, 5 * MIB, 5 * MIB, 5 * MIB, 15 * MIB]
    assert peaks(sizes, [0, 1, 2, 3, -1, -3, -2, 4])[2] == (20 * MIB,)  # the middle one joins what is before and after it


def test_segments_do_not_join():
    assert peaks([10 * MIB, 10 * MIB, 20 * MIB], [0, 1, -1, -2, 2]) == (20 * MIB, 40 * MIB, (10 * MIB, 10 * MIB, 20 * MIB))


def test_small_and_large_requests_do_not_share_segments():
    assert peaks([2 * MIB, 512], [0, -1, 1])[2] == (20 * MIB, 2 * MIB)


def test_a_large_free_block_is_used_up_to_the_last_mib():
    # a freed segment of 30 MiB serves 29 MiB whole, and 28 MiB with 2 MiB split off
    assert peaks([30 * MIB, 29 * MIB], [0, -1, 1]) == (30 * MIB, 30 * MIB, (30 * MIB,))
    assert peaks([30 * MIB, 28 * MIB, 2 * MIB], [0, -1, 1, 2])[2] == (30 * MIB,)


def test_peak_of_allocated_is_not_that_of_reserved():
    found = simulate_events([64 * MIB, 32 * MIB, 96 * MIB], [0, 1, -1, -2, 2])
    assert found == Reserved(allocated=96 * MIB, reserved=192 * MIB, segments=(64 * MIB, 32 * MIB, 96 * MIB))
    assert found.fragmentation == 0.5


def test_storages_without_bytes_take_nothing():
    assert simulate_events([0, 0], [0, 1, -1]) == Reserved(allocated=0, reserved=0, segments=())
    assert simulate_events([], []).fragmentation == 0.0


def test_cached_segments_are_given_back_before_a_request_fails():
    sizes, events = [64 * MIB, 32 * MIB, 96 * MIB], [0, 1, -1, -2, 2]
    assert simulate_events(sizes, events, capacity_bytes=96 * MIB) == Reserved(
        allocated=96 * MIB, reserved=96 * MIB, segments=(64 * MIB, 32 * MIB, 96 * MIB)
    )
    assert simulate_events(sizes, events, capacity_bytes=95 * MIB).failed_at == 1
    assert simulate_events([18 * MIB, MIB * 2, 96 * MIB], [0, 1, -1, 2], capacity_bytes=110 * MIB).failed_at == 3  # a split segment stays


def test_a_timeline_is_a_list_of_births_and_deaths():
    storages = [Storage(bytes=size, kind="activations", module="", operator="") for size in (600, 3 * MIB)]
    assert simulate(Timeline(storages=storages, events=[0, 1, -1, -2])) == Reserved(
        allocated=1024 + 3 * MIB, reserved=22 * MIB, segments=(2 * MIB, 20 * MIB)
    )


@st.composite
def lives(draw: st.DrawFn) -> tuple[list[int], list[int]]:
    sizes = draw(st.lists(st.integers(0, 40 * MIB) | st.integers(0, 4 * KIB) | st.just(10 * MIB), min_size=1, max_size=30))
    living: list[int] = []
    events = []
    for index in range(len(sizes)):
        while living and draw(st.booleans()):
            events.append(-1 - living.pop(draw(st.integers(0, len(living) - 1))))
        events.append(index)
        living.append(index)
    return sizes, events


@settings(max_examples=150)
@given(lives())
def test_any_list_keeps_the_allocators_bounds(life):
    sizes, events = life
    found = simulate_events(sizes, events)
    now = peak = slack = 0
    for event in events:
        size = sizes[event] if event >= 0 else sizes[-1 - event]
        now += rounded(size) * (size > 0) * (1 if event >= 0 else -1)
        peak = max(peak, now)
        slack += event >= 0
    assert peak <= found.allocated <= peak + slack * MIB  # a block is at most 1 MiB larger than was asked for
    assert found.allocated <= found.reserved == sum(found.segments)  # no segment was given back
    assert all(size % (2 * MIB) == 0 for size in found.segments)
    assert simulate_events(sizes, events, capacity_bytes=found.reserved) == found
    assert len(found.segments) <= len(sizes)
    assert found.reserved <= sum(segment_bytes(rounded(size)) for size in sizes if size)


def brute_force(sizes: list[int], events: list[int]) -> Reserved:
    """Each segment as a row of pieces, all of them searched for each request."""
    segments: list[tuple[bool, list[list[int]]]] = []  # small?, pieces of [bytes, storage or -1 where free]
    allocated = most = 0
    for event in events:
        index = event if event >= 0 else -1 - event
        size = rounded(sizes[index])
        if sizes[index] == 0:
            continue
        if event < 0:
            row, at = next((row, at) for _, row in segments for at, piece in enumerate(row) if piece[1] == index)
            allocated -= row[at][0]
            row[at][1] = -1
            for left in (at, at - 1):
                if 0 <= left < len(row) - 1 and row[left][1] == row[left + 1][1] == -1:
                    row[left : left + 2] = [[row[left][0] + row[left + 1][0], -1]]
            continue
        small = size <= MIB
        free = [(piece[0], which, at) for which, (kind, row) in enumerate(segments) for at, piece in enumerate(row)
                if kind == small and piece[1] == -1 and piece[0] >= size]  # fmt: skip
        if not free:
            segments.append((small, [[segment_bytes(size), -1]]))
            free = [(0, len(segments) - 1, 0)]
        _, which, at = min(free)
        row = segments[which][1]
        rest = row[at][0] - size
        if rest >= 512 if small else rest > MIB:
            row[at : at + 1] = [[size, index], [rest, -1]]
        else:
            row[at][1] = index
        allocated += row[at][0]
        most = max(most, allocated)
    taken = tuple(sum(size for size, _ in row) for _, row in segments)
    return Reserved(allocated=most, reserved=sum(taken), segments=taken)


@settings(max_examples=150)
@given(lives())
def test_any_list_gives_what_a_search_of_all_pieces_gives(life):
    assert simulate_events(*life) == brute_force(*life)


@settings(max_examples=50)
@given(lives())
def test_the_same_step_again_takes_no_new_segment_when_all_died(life):
    sizes, events = life
    alive = [event for event in events if event >= 0 and -1 - event not in events]
    whole = [*events, *(-1 - event for event in alive)]
    once = simulate_events(sizes, whole)
    again = [event + len(sizes) if event >= 0 else event - len(sizes) for event in whole]
    assert simulate_events(sizes * 2, [*whole, *again]).reserved >= once.reserved


def test_a_hundred_thousand_events_are_replayed_in_full():
    chance = random.Random(0)
    sizes, events, living = [], [], []
    while len(events) < 100_000:
        if living and chance.random() < 0.48:
            events.append(-1 - living.pop(chance.randrange(len(living))))
        else:
            living.append(len(sizes))
            events.append(len(sizes))
            sizes.append(int(2 ** chance.uniform(5, 26)))
    found = simulate_events(sizes, events)
    assert found.reserved == sum(found.segments) >= found.allocated


@pytest.mark.parametrize(("size", "expected"), [(1, 512), (512, 512), (513, 1024), (MIB, MIB)])
def test_rounding(size, expected):
    assert rounded(size) == expected
