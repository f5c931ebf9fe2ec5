"""Tensors that wait in a file come back bit by bit, in place, and what waits in memory stays under its limit.

Faults that were put in by hand, each caught: a place in the file is given out twice; a restored storage is not counted as held; a storage
that two groups share is dropped by the first that comes back.
"""

from __future__ import annotations

import gc
import os
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lighten.compress.activations import SpillBuffer
from lighten.errors import OutputError


def resident(tensor: torch.Tensor) -> int:
    return tensor.untyped_storage().nbytes()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.int64, torch.bool, torch.float8_e4m3fn])
def test_a_spilled_tensor_takes_no_memory_and_comes_back(dtype, tmp_path):
    tensor = (torch.arange(6000).reshape(60, 100) % 7).to(dtype)
    expected, other = tensor.clone(), tensor[3:5].T
    with SpillBuffer(tmp_path, limit_bytes=None) as buffer:
        parked = buffer.spill(tensor)
        assert (resident(tensor), buffer.held_bytes, buffer.spilled_bytes) == (0, 0, expected.nbytes)
        buffer.restore(parked)
        assert (resident(tensor), buffer.held_bytes, buffer.spilled_bytes) == (expected.nbytes, 0, 0)
    assert tensor.view(torch.uint8).equal(expected.view(torch.uint8))
    assert other.contiguous().view(torch.uint8).equal(expected[3:5].T.contiguous().view(torch.uint8))


def test_the_file_has_no_name(tmp_path):
    with SpillBuffer(tmp_path, limit_bytes=0) as buffer:
        buffer.park([torch.ones(1000)])
        assert buffer.spilled_bytes == 4000
        assert list(tmp_path.iterdir()) == []


@settings(max_examples=25)
@given(
    sizes=st.lists(st.integers(0, 3000), min_size=1, max_size=8), limit=st.none() | st.integers(0, 40_000),
    order=st.lists(st.integers(0, 7), max_size=40),
)  # fmt: skip
def test_groups_that_come_and_go_keep_their_values_and_the_limit(sizes, limit, order, tmp_path_factory):
    """Two storages a group, one of them seen through a view; the running group is changed in place, as a block does."""
    groups = [[torch.full((size,), float(n)), torch.arange(2 * size).reshape(2, size)[1:]] for n, size in enumerate(sizes)]
    expected = [[tensor.clone() for tensor in group] for group in groups]
    with SpillBuffer(tmp_path_factory.mktemp("spill"), limit_bytes=limit) as buffer:
        parked = [buffer.park(group) for group in groups]
        for number in order:
            n = number % len(groups)
            if limit is not None:
                assert buffer.held_bytes <= limit
            buffer.restore(parked[n])
            assert all(map(torch.equal, groups[n], expected[n]))
            for tensor, value in zip(groups[n], expected[n], strict=True):
                tensor += 1
                value += 1
            parked[n] = buffer.park(groups[n])
        for handle in parked:
            buffer.restore(handle)
        assert (buffer.held_bytes, buffer.spilled_bytes) == (0, 0)
    for group, values in zip(groups, expected, strict=True):
        assert all(map(torch.equal, group, values))


def test_a_storage_of_two_groups_is_kept_once_and_lives_as_long_as_either(tmp_path):
    mask, first, second = torch.ones(500), torch.zeros(500), torch.full((500,), 2.0)
    view = mask[10:]
    with SpillBuffer(tmp_path, limit_bytes=0) as buffer:
        one, two = buffer.park([mask, first]), buffer.park([view, second])
        assert buffer.spilled_bytes == 3 * 2000
        buffer.restore(one)
        assert (mask == 1).all()
        mask += 1
        buffer.restore(two)
    assert (mask == 2).all()
    assert (second == 2).all()


def test_room_in_the_file_is_used_again(tmp_path):
    tensor = torch.ones(10_000)
    with SpillBuffer(tmp_path, limit_bytes=0) as buffer:
        for _ in range(5):
            buffer.restore(buffer.park([tensor]))
        assert os.fstat(buffer._file).st_size <= 2 * tensor.nbytes


def test_what_torch_cannot_resize_stays(tmp_path):
    array = np.ones(1000, np.float32)
    tensor = torch.from_numpy(array)
    with SpillBuffer(tmp_path, limit_bytes=0) as buffer:
        buffer.restore(buffer.park([tensor, torch.zeros(0)]))
    assert (tensor == 1).all()


def test_values_live_while_they_wait_though_nothing_else_refers_to_them(tmp_path):
    tensor = torch.full((2000,), 3.0)
    view = tensor[5:]
    with SpillBuffer(tmp_path, limit_bytes=0) as buffer:
        parked = buffer.park([tensor])
        del tensor
        gc.collect()
        torch.zeros(2000)
        buffer.restore(parked)
    assert (view == 3).all()


def test_a_full_disk_and_a_missing_folder_are_said(tmp_path, monkeypatch):
    def full(*_: object) -> int:
        raise OSError(28, "No space left on device")

    tensor = torch.ones(3000)
    with SpillBuffer(tmp_path / "none", limit_bytes=0) as buffer, pytest.raises(OutputError, match=r"none: activations .* No such file"):
        buffer.park([tensor])
    monkeypatch.setattr(os, "pwritev", full)
    with SpillBuffer(tmp_path, limit_bytes=0) as buffer, pytest.raises(OutputError, match=r"cannot be kept there: No space left on device\.$"):
        buffer.park([tensor])
    assert (tensor == 1).all()


def test_writes_that_the_system_cuts_short_go_on(tmp_path, monkeypatch):
    whole: dict[str, object] = {"pwritev": os.pwritev, "preadv": os.preadv}
    for name, call in whole.items():
        monkeypatch.setattr(os, name, lambda handle, views, place, call=call: call(handle, [views[0][:1000]], place))
    tensor = torch.arange(3001)
    with SpillBuffer(Path(tmp_path), limit_bytes=0) as buffer:
        buffer.restore(buffer.park([tensor]))
    assert tensor.equal(torch.arange(3001))
