"""A checkpoint's tensors, mapped one at a time: equal to what the format's own library reads, in bounded address space.

Faults that were put in by hand, each caught: rows counted from the file's start; the window's page offset forgotten; a shared (not private) mapping.
"""

from __future__ import annotations

import json
import resource
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from lighten.compress import checkpoint as module
from lighten.compress.checkpoint import Checkpoint, check_finite, map_tensor
from lighten.errors import ModelError

DTYPES = ("float64", "float32", "float16", "bfloat16", "float8_e4m3fn", "float8_e5m2", "int64", "int32", "int16", "int8", "uint8", "bool")


@pytest.fixture
def tensors() -> dict[str, torch.Tensor]:
    """One of each type, of odd sizes, so that pages and elements do not fall together."""
    torch.manual_seed(0)
    return {f"a.{name}": (torch.randn(37, 53) * 3).to(getattr(torch, name)) for name in DTYPES} | {
        "empty": torch.empty(0, 5), "scalar": torch.tensor(2.5), "row": torch.randn(4099), "cube": torch.randn(3, 5, 7),
    }  # fmt: skip


def folder_of(tensors: dict[str, torch.Tensor], folder: Path) -> Path:
    folder.mkdir(exist_ok=True)
    names = sorted(tensors)
    half = len(names) // 2
    files = {f"model-0000{n + 1}-of-00002.safetensors": part for n, part in enumerate((names[:half], names[half:]))}
    for file, part in files.items():
        save_file({name: tensors[name] for name in part}, folder / file)
    index = {"metadata": {}, "weight_map": {name: file for file, part in files.items() for name in part}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    return folder


def same(left: torch.Tensor, right: torch.Tensor) -> bool:
    if (left.dtype, left.shape) != (right.dtype, right.shape):
        return False
    return left.reshape(-1).view(torch.uint8).equal(right.reshape(-1).view(torch.uint8)) if left.numel() else True


def test_every_type_and_shape_is_what_the_library_reads(tensors, tmp_path):
    found = Checkpoint(folder_of(tensors, tmp_path))
    assert sorted(found.names) == sorted(tensors)
    for file in tmp_path.glob("*.safetensors"):
        for name, expected in load_file(file).items():
            assert same(found[name], expected)
            assert same(found.read(name, expected.dtype), expected)
            assert (found.spec(name).shape, found.spec(name).dtype) == (tuple(expected.shape), str(expected.dtype).removeprefix("torch."))


def test_rows_alone(tensors, tmp_path):
    found = Checkpoint(folder_of(tensors, tmp_path))
    for name, tensor in tensors.items():
        if tensor.ndim:
            for start, stop in ((0, len(tensor)), (1, min(3, len(tensor))), (len(tensor), len(tensor))):
                if start <= stop:
                    assert same(found.rows(name, start, stop), tensor[start:stop])
    with pytest.raises(ModelError, match=r"tensor row has 4099 rows, not 4000 to 4100\.$"):
        found.rows("row", 4000, 4100)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_read_in_another_type_goes_by_chunks(dtype, tensors, tmp_path, monkeypatch):
    monkeypatch.setattr(module, "CHUNK_ELEMENTS", 100)
    found = Checkpoint(folder_of(tensors, tmp_path))
    assert same(found.read("row", dtype), tensors["row"].to(dtype))
    assert same(found.read("a.float8_e4m3fn", dtype), tensors["a.float8_e4m3fn"].to(dtype))


def test_what_is_written_to_a_tensor_stays_in_memory(tensors, tmp_path):
    found = Checkpoint(folder_of(tensors, tmp_path))
    found["row"].zero_()
    assert same(found["row"], tensors["row"])


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float8_e4m3fn"])
@pytest.mark.parametrize("way", ["get", "read", "folder"])
def test_values_that_are_not_finite_are_counted_over_all_chunks(dtype, way, tmp_path, monkeypatch):
    monkeypatch.setattr(module, "CHUNK_ELEMENTS", 100)
    tensor = torch.ones(1000)
    tensor[[5, 650]] = torch.nan
    save_file({"w": tensor.to(getattr(torch, dtype))}, tmp_path / "model.safetensors")
    read = {"get": lambda c: c["w"], "read": lambda c: c.read("w", torch.float32), "folder": lambda _: check_finite(tmp_path)}[way]
    with pytest.raises(ModelError, match=r"model\.safetensors: tensor w holds 2 values that are not finite \(NaN or infinite\)\.$"):
        read(Checkpoint(tmp_path))


def test_a_file_that_was_cut_off_since_is_said(tmp_path):
    save_file({"w": torch.ones(10_000)}, tmp_path / "model.safetensors")
    found = Checkpoint(tmp_path)
    with (tmp_path / "model.safetensors").open("r+b") as file:
        file.truncate(1000)
    with pytest.raises(ModelError, match=r"model\.safetensors: truncated: bytes \d+ to \d+ are not there\.$"):
        found["w"]


def test_elements_that_lie_at_odd_bytes(tmp_path):
    (tmp_path / "raw").write_bytes(b"xyz" + torch.arange(5000, dtype=torch.float32).numpy().tobytes())
    assert map_tensor(tmp_path / "raw", 3, (5000,), torch.float32).equal(torch.arange(5000, dtype=torch.float32))


PROGRAM = """
import resource, sys, torch
from pathlib import Path
from lighten.compress.checkpoint import Checkpoint
torch.set_num_threads(1)  # each thread reserves address space of its own
used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
resource.setrlimit(resource.RLIMIT_AS, (used + int(sys.argv[2]), -1))
checkpoint = Checkpoint(Path(sys.argv[1]))
print(sum(float(checkpoint[name].sum(dtype=checkpoint[name].dtype)) for name in checkpoint.names), len(checkpoint.rows("w0", 5, 6)))
"""


@pytest.mark.skipif(not hasattr(resource, "RLIMIT_AS") or sys.platform != "linux", reason="address space is limited on Linux")
def test_address_space_is_that_of_one_tensor(tmp_path):
    """A shard of 192 MB, tensors of 32 MB, 160 MB of room above the imports. (Mapped whole, the shard does not fit.)"""
    save_file({f"w{n}": torch.zeros(1024, 8192) for n in range(6)}, tmp_path / "model.safetensors")
    command = [sys.executable, "-c", PROGRAM, str(tmp_path), str(160 * 2**20)]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=200)
    assert (done.returncode, done.stdout.split()) == (0, ["0.0", "1"]), done.stderr
