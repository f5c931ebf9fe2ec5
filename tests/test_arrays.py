"""Models of images and sound are calibrated by arrays, from the command to the artifact; what is wrong with a file of them is said in one line."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from any_architecture import calibration, save_architecture

import lighten
from lighten.cli.main import main
from lighten.errors import TextError
from lighten.judge.arrays import load_inputs
from lighten.model.source import read_spec

RECIPE = "quantize(gptq, bits=4, group_size=32)"


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("models")
    return {name: save_architecture(name, root / name) for name in ("vit", "whisper")}


def npz(path: Path, **arrays: Any) -> Path:
    np.savez(path, **arrays)
    return path


@pytest.mark.parametrize("name", ["vit", "whisper"])
def test_a_model_of_images_or_sound_is_compressed_by_its_arrays(folders: dict[str, Path], tmp_path: Path, name: str) -> None:
    text = npz(tmp_path / "inputs.npz", **calibration(name)(0)[0])
    made = lighten.compress(folders[name], RECIPE, tmp_path / "out", text=text)
    assert made.size_bytes < sum(path.stat().st_size for path in folders[name].iterdir())
    spec = read_spec(tmp_path / "out")
    assert {getattr(part, "weight", None) and part.weight.bits for part in spec.parts if part.component == "mlp" and hasattr(part, "weight")} == {4}


@pytest.mark.parametrize("name", ["vit", "whisper"])
def test_without_arrays_it_is_refused_before_any_work(
    folders: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str], name: str
) -> None:
    assert main(["compress", str(folders[name]), "--recipe", RECIPE, "-o", str(tmp_path / "out")]) == 2
    assert capsys.readouterr().err.strip().splitlines()[-1].startswith("lighten: ")
    assert list(tmp_path.iterdir()) == []


IMAGES = np.zeros((4, 3, 16, 16), np.float32)


@pytest.mark.parametrize(
    ("arrays", "said"),
    [
        ({"pixels": IMAGES}, "holds pixels, which ViTModel does not take; it takes pixel_values"),
        ({"bool_masked_pos": np.zeros((4, 16), np.int64)}, "lacks pixel_values, the input of ViTModel; it holds bool_masked_pos"),
        ({"pixel_values": IMAGES, "bool_masked_pos": np.zeros((3, 16), np.int64)}, "the same number of samples .* pixel_values 4, bool_masked_pos 3"),
        ({"pixel_values": IMAGES[:0]}, "at least 1"),
        ({"pixel_values": IMAGES * np.nan}, "pixel_values holds values that are not finite numbers"),
        ({}, "lacks pixel_values, the input of ViTModel; it holds nothing"),
    ],
)
def test_arrays_that_do_not_fit_are_refused_in_words(folders: dict[str, Path], tmp_path: Path, arrays: dict[str, Any], said: str) -> None:
    with pytest.raises(TextError, match=said):
        load_inputs(npz(tmp_path / "inputs.npz", **arrays), read_spec(folders["vit"]))


@pytest.mark.parametrize("content", [b"", b"PK\x03\x04 cut", b"no archive at all"])
def test_a_broken_file_is_refused_in_one_line(folders: dict[str, Path], tmp_path: Path, content: bytes) -> None:
    (tmp_path / "inputs.npz").write_bytes(content)
    with pytest.raises(TextError, match=r"inputs\.npz cannot be read as arrays") as caught:
        load_inputs(tmp_path / "inputs.npz", read_spec(folders["vit"]))
    assert "\n" not in str(caught.value)


def test_the_fingerprint_tells_files_apart(folders: dict[str, Path], tmp_path: Path) -> None:
    spec = read_spec(folders["vit"])
    found = [load_inputs(npz(tmp_path / f"{k}.npz", pixel_values=IMAGES + value), spec).fingerprint for k, value in enumerate((0, 0, 1))]
    assert found[0] == found[1] != found[2]
