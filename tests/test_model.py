"""Reading a model and counting it: held against transformers' own modules, PyTorch's FLOP counter, and a hub on this machine."""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
import threading
from collections import Counter
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from tiny_models import bert_config, build, config_of, llama_config, save
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoConfig, DynamicCache, PretrainedConfig

from lighten.cost.operators import Forward, forward_operators
from lighten.cost.workload import Workload
from lighten.errors import ModelError, UnsupportedFamily
from lighten.model import ModelSpec, read_spec
from lighten.model.families import FAMILIES, bert, describe, llama
from lighten.model.spec import Embedding, Linear
from lighten.recipe.estimate import Estimate, estimate

ARCHITECTURES = {"bert": bert.ARCHITECTURES, "llama": llama.ARCHITECTURES}
NAMES = [name for names in ARCHITECTURES.values() for name in names]
VARIANTS: dict[str, list[dict[str, Any]]] = {
    "bert": [{}, {"tie_word_embeddings": False}, {"num_labels": 5}, {"hidden_act": "relu", "type_vocab_size": 1}, {"num_hidden_layers": 1}],
    "llama": [
        {}, {"tie_word_embeddings": False}, {"attention_bias": True}, {"mlp_bias": True}, {"head_dim": 16}, {"num_key_value_heads": 1},
        {"num_key_value_heads": None}, {"attention_bias": True, "mlp_bias": True, "head_dim": 2, "tie_word_embeddings": False},
    ],
}  # fmt: skip
CASES = [
    pytest.param(name, changes, id=f"{name}-{'-'.join(f'{k}={v}' for k, v in changes.items()) or 'plain'}")
    for family, names in ARCHITECTURES.items() for name in names for changes in VARIANTS[family]
    if not (name == "BertForQuestionAnswering" and "num_labels" in changes)  # its two labels are the start and the end
]  # fmt: skip


def spec_of(config: PretrainedConfig) -> ModelSpec:
    raw, architecture = config.to_dict(), config.architectures[0]
    return ModelSpec(
        name=architecture, family=config.model_type, architecture=architecture, source="", dtype="float32",
        config=raw, parts=describe(raw, architecture),
    )  # fmt: skip


def matmul_flops(found: Estimate) -> int:
    return sum(found.matmul.values())


def token_ids(batch: int, length: int, device: str = "cpu") -> torch.Tensor:
    return torch.arange(batch * length, device=device).reshape(batch, length) % 300


# ---- parameters ----


@pytest.mark.parametrize(("architecture", "changes"), CASES)
def test_parameters_are_those_of_transformers_module(architecture, changes):
    config = config_of(architecture, **changes)
    module = build(config, device="meta")
    expected = {name: tuple(parameter.shape) for name, parameter in module.named_parameters()}  # a tied one once
    spec = spec_of(config)
    assert {name: shape for part in spec.parts for name, shape in part.tensors().items()} == expected
    assert spec.total_parameters == module.num_parameters()
    assert sum(spec.parameters().values()) == spec.total_parameters


@pytest.mark.parametrize(("architecture", "changes"), CASES)
def test_a_saved_model_is_read_as_it_was_made(architecture, changes, tmp_path):
    config = config_of(architecture, **changes)
    spec = read_spec(save(config, tmp_path / "model"))
    assert spec.parts == spec_of(config).parts
    assert (spec.name, spec.family, spec.architecture, spec.dtype) == ("model", config.model_type, architecture, "float32")
    assert spec.tensors is not None
    assert sum(tensor.elements for tensor in spec.tensors) == spec.total_parameters
    assert spec.weight_bytes() == 4 * spec.total_parameters


def test_real_models_have_their_published_parameters(minilm, smollm2):
    """22,713,216: the safetensors of sentence-transformers/all-MiniLM-L6-v2 hold 90.9 MB of float32; 134,515,008: SmolLM2-135M's model card."""
    assert read_spec(minilm).total_parameters == 22_713_216
    assert read_spec(smollm2).total_parameters == 134_515_008


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_the_type_is_that_of_most_elements(dtype, tmp_path):
    spec = read_spec(save(llama_config(dtype=dtype), tmp_path / "model"))
    assert spec.dtype == dtype
    assert {part.weight.dtype for part in spec.parts if isinstance(part, Linear | Embedding)} == {dtype}
    assert spec.weight_bytes() == 2 * spec.total_parameters


# ---- files ----


def test_the_header_tells_what_safetensors_own_reader_tells(tiny_bert):
    spec = read_spec(tiny_bert)
    with safe_open(tiny_bert / "model.safetensors", framework="pt") as opened:
        shapes = {name: tuple(opened.get_slice(name).get_shape()) for name in opened.keys()}  # noqa: SIM118 - no mapping
    assert spec.tensors is not None
    assert {tensor.name: tensor.shape for tensor in spec.tensors} == shapes
    assert {tensor.dtype for tensor in spec.tensors} == {"float32"}


def test_shards_are_one_model(tiny_llama_untied, tmp_path):
    sharded = save(llama_config(tie_word_embeddings=False), tmp_path / "sharded", max_shard_size="60KB")
    assert len(list(sharded.glob("*.safetensors"))) >= 3
    one, many = read_spec(tiny_llama_untied), read_spec(sharded)
    assert many.parts == one.parts
    assert sorted(many.tensors or (), key=str) == sorted(one.tensors or (), key=str)


def test_a_missing_shard_is_named(tmp_path):
    folder = save(llama_config(), tmp_path / "model", max_shard_size="60KB")
    gone = sorted(folder.glob("*.safetensors"))[1]
    gone.unlink()
    with pytest.raises(ModelError, match=rf"1 of its shards are missing: {gone.name}\.$"):
        read_spec(folder)


def test_a_head_saved_beside_the_table_that_it_is_tied_to_counts_once(tiny_llama):
    """Checkpoints written before weight tying was declared keep both."""
    spec = read_spec(tiny_llama)
    from lighten.model.read import make_spec
    from lighten.model.spec import TensorSpec

    assert spec.tensors is not None
    table = TensorSpec(name="lm_head.weight", shape=(320, 32), dtype="float32")
    doubled = make_spec(spec.config, (*spec.tensors, table), name="", source="", other_bytes=0)
    assert doubled.total_parameters == spec.total_parameters


@pytest.mark.parametrize(("field", "value"), [("model_type", "unheard_of"), ("model_type", None), ("architectures", ["BertForMultipleChoice"])])
def test_what_is_not_supported_names_what_is(tiny_bert, tmp_path, field, value):
    config = json.loads((tiny_bert / "config.json").read_text()) | {field: value}
    (tmp_path / "config.json").write_text(json.dumps(config))
    (tmp_path / "model.safetensors").symlink_to(tiny_bert / "model.safetensors")
    text = (
        f"{len(FAMILIES)} have one, by name the nearest: " if field == "model_type" else "has no formula; these have one: BertModel, BertForMaskedLM"
    )
    with pytest.raises(UnsupportedFamily, match=text):
        read_spec(tmp_path)


# ---- FLOPs, to the last one ----


def counted(architecture: str, changes: dict[str, Any]) -> PretrainedConfig:
    """A variant with one layer, for the counter is slow; the plain one with all."""
    return config_of(architecture, **({"num_hidden_layers": 1} | changes if changes else {}))


@pytest.mark.parametrize(("architecture", "changes"), CASES)
def test_forward_flops_are_the_counters(architecture, changes):
    config = counted(architecture, changes)
    module, ids = build(config, device="meta"), token_ids(3, 10, "meta")
    with FlopCounterMode(display=False) as counter:
        module(ids)
    workload = Workload(phase="encode" if config.model_type == "bert" else "prefill", batch_size=3, seq_len=10)
    assert matmul_flops(estimate(spec_of(config), workload)) == counter.get_total_flops()


@pytest.mark.parametrize(
    ("model", "seq_len", "golden"),
    [("minilm", 128, 2_869_198_848), ("smollm2", 128, 35_559_309_312), ("smollm2", 512, 155_826_782_208), ("smollm2", 1024, 347_892_350_976)],
)
def test_forward_flops_of_real_models_are_the_counters(model, seq_len, golden, request):
    """The golden figures are FlopCounterMode's, of torch 2.13 on transformers 5.23; it counts again here, with the versions of today."""
    folder = request.getfixturevalue(model)
    module = build(AutoConfig.from_pretrained(folder), device="meta")
    with FlopCounterMode(display=False) as counter:
        module(token_ids(1, seq_len, "meta"))
    spec = read_spec(folder)
    found = estimate(spec, Workload(phase="prefill" if spec.is_decoder else "encode", seq_len=seq_len))
    assert matmul_flops(found) == counter.get_total_flops() == golden


@pytest.mark.parametrize(("changes", "steps"), [({}, 1), ({}, 2), *((changes, 5) for changes in VARIANTS["llama"])], ids=str)
def test_generation_flops_are_those_of_a_greedy_loop(changes, steps):
    config = counted("LlamaForCausalLM", changes)
    module, cache, ids = build(config), DynamicCache(config=config), token_ids(2, 7)
    spec = spec_of(config)
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        for _ in range(steps):
            logits = module(ids, past_key_values=cache, use_cache=True, logits_to_keep=1).logits
            ids = logits[:, -1].argmax(-1, keepdim=True)
        generated = counter.get_total_flops()
    assert matmul_flops(estimate(spec, Workload(phase="generate", batch_size=2, seq_len=7, new_tokens=steps))) == generated
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        module(token_ids(2, 7), past_key_values=DynamicCache(config=config), use_cache=True, logits_to_keep=1)
    decoded = generated - counter.get_total_flops()
    if steps > 1:
        assert matmul_flops(estimate(spec, Workload(phase="decode", batch_size=2, seq_len=7, new_tokens=steps - 1))) == decoded


def loss_of(module: Any, config: PretrainedConfig, ids: torch.Tensor) -> torch.Tensor:
    """The head's own loss, or the mean of the last hidden state: what `estimate` states."""
    architecture, options = config.architectures[0], {}
    if config.model_type == "llama":
        options["use_cache"] = False
    if architecture in ("BertModel", "LlamaModel"):
        return module(ids, **options).last_hidden_state.mean()
    if architecture == "BertForQuestionAnswering":
        return module(ids, start_positions=ids[:, 0] % 5, end_positions=ids[:, 1] % 5).loss
    labels = ids if architecture.endswith("LM") else ids % config.num_labels
    return module(ids, labels=labels[:, 0] if "Sequence" in architecture else labels, **options).loss


@pytest.mark.parametrize(
    ("architecture", "changes", "recompute"),
    [*(pytest.param(*case.values, "none", id=case.id) for case in CASES), *(pytest.param(name, {}, "full", id=f"{name}-full") for name in NAMES)],
)
def test_training_flops_are_the_counters(architecture, changes, recompute):
    """Forward and backward, with each block's forward again where it is recomputed. A BertModel's pooler, which no loss uses, has no backward."""
    config = counted(architecture, changes)
    module = build(config).train()
    if recompute == "full":
        module.activation_checkpointing_enable()
    with FlopCounterMode(display=False) as counter:
        loss_of(module, config, token_ids(2, 9)).backward()
    found = estimate(spec_of(config), Workload(phase="train", batch_size=2, seq_len=9, optimizer="adamw", recompute=recompute))
    assert matmul_flops(found) == counter.get_total_flops()


@pytest.mark.parametrize("architecture", NAMES)
def test_flops_by_component_and_in_total(architecture):
    spec = spec_of(config_of(architecture))
    workload = Workload(phase="prefill" if spec.is_decoder else "encode", batch_size=2, seq_len=9)
    found = estimate(spec, workload)
    operators = forward_operators(spec, Forward(batch_size=2, query_len=9, key_len=9), "float32")
    assert found.total_flops == sum(op.flops for op in operators) > matmul_flops(found)
    assert found.matmul_causal == sum(op.causal_flops for op in operators)
    assert (found.matmul_causal < matmul_flops(found)) == spec.is_decoder
    assert found.matmul.keys() == {op.component for op in operators if op.matmul_flops}


@pytest.mark.parametrize(("queries", "keys"), [(1, 1), (1, 9), (4, 4), (4, 9)])
def test_causal_flops_are_a_count_of_the_pairs_that_may_see_each_other(queries, keys):
    config = llama_config(num_hidden_layers=1)
    spec = spec_of(config)
    attention = next(
        op for op in forward_operators(spec, Forward(batch_size=2, query_len=queries, key_len=keys), "float32") if op.kind == "attention"
    )
    pairs = sum(key <= keys - queries + query for query in range(queries) for key in range(keys))
    assert attention.causal_flops == 2 * 2 * 2 * config.num_attention_heads * pairs * 8  # two products, 2 a multiply-add, 2 sequences, head_dim 8
    assert attention.matmul_flops == attention.causal_flops * queries * keys // pairs


# ---- a hub ----


class Hub(ThreadingHTTPServer):
    """The part of a hub's interface that reading a spec takes, over folders of this machine, with a count of the bytes sent."""

    daemon_threads = True

    def __init__(self, models: dict[str, Path]) -> None:
        super().__init__(("127.0.0.1", 0), _Answer)
        self.models = models
        self.sent: Counter[str] = Counter()


class _Answer(BaseHTTPRequestHandler):
    server: Hub

    def do_HEAD(self) -> None:
        self._answer(body=False)

    def do_GET(self) -> None:
        self._answer(body=True)

    def _answer(self, *, body: bool) -> None:
        path = self.path.split("?")[0].strip("/")
        if path.startswith("api/models/") and (folder := self.server.models.get(path.removeprefix("api/models/"))):
            siblings = [{"rfilename": file.name, "size": file.stat().st_size} for file in sorted(folder.iterdir())]
            info = {"_id": "1", "id": path.removeprefix("api/models/"), "sha": "0" * 40, "siblings": siblings}
            return self._send(200, json.dumps(info).encode(), body=body)
        model, _, name = path.partition("/resolve/main/")
        file = self.server.models.get(model, Path("nowhere")) / name
        if not name or not file.is_file():
            missing = {"X-Error-Code": "EntryNotFound" if model in self.server.models else "RepoNotFound"}
            return self._send(404, b"", body=body, headers=missing)
        content, status, headers = file.read_bytes(), 200, {"ETag": f'"{file.stat().st_size}"', "X-Repo-Commit": "0" * 40}
        if wanted := self.headers.get("Range"):
            first, last = wanted.removeprefix("bytes=").split("-")
            headers["Content-Range"] = f"bytes {first}-{last}/{len(content)}"
            content, status = content[int(first) : int(last) + 1], 206
        if body:
            self.server.sent[name] += len(content)
        return self._send(status, content, body=body, headers=headers)

    def _send(self, status: int, content: bytes, *, body: bool, headers: dict[str, str] | None = None) -> None:
        self.send_response(status)
        for name, value in {"Content-Type": "application/json", "Content-Length": str(len(content)), **(headers or {})}.items():
            self.send_header(name, value)
        self.end_headers()
        if body:
            self.wfile.write(content)

    def log_message(self, *_: object) -> None:
        pass


@contextlib.contextmanager
def hub_of(**models: Path) -> Iterator[Hub]:
    """A hub with the given folders as `test/NAME`."""
    with Hub({f"test/{name}": folder for name, folder in models.items()}) as hub:
        thread = threading.Thread(target=hub.serve_forever, daemon=True)
        thread.start()
        yield hub
        hub.shutdown()
        thread.join()


def estimate_from(endpoint: str, home: Path, model: str, **more: str) -> subprocess.CompletedProcess[str]:
    """`lighten estimate` in a process of its own: huggingface_hub reads its settings when it is imported."""
    settings = {"HF_ENDPOINT": endpoint, "HF_HUB_OFFLINE": "0", "HF_HOME": str(home), "NO_PROXY": "127.0.0.1", "HF_TOKEN": ""} | more
    command = [sys.executable, "-m", "lighten.cli.main", "estimate", model, "--json"]
    return subprocess.run(command, capture_output=True, text=True, timeout=120, check=False, env=os.environ | settings)


def address(hub: Hub) -> str:
    return f"http://127.0.0.1:{hub.server_port}"


@pytest.fixture(scope="module")
def large(tmp_path_factory) -> dict[str, Path]:
    """16 MB of weights, in one file and in three."""
    config, folder = bert_config(vocab_size=60_000, hidden_size=64), tmp_path_factory.mktemp("large")
    module = build(config)
    for name, size in (("whole", "1GB"), ("shards", "6MB")):
        module.save_pretrained(folder / name, max_shard_size=size)
        (folder / name / "tokenizer.json").write_text("{}")
    return {name: folder / name for name in ("whole", "shards")}


@pytest.mark.parametrize("name", ["whole", "shards"])
def test_a_hub_model_is_read_by_its_headers_alone(name, large, tmp_path):
    with hub_of(**large) as hub:
        done = estimate_from(address(hub), tmp_path, f"test/{name}")
    assert done.returncode == 0, done.stderr
    weights = sum(file.stat().st_size for file in large[name].glob("*.safetensors"))
    assert 0 < sum(count for file, count in hub.sent.items() if file.endswith(".safetensors")) < 0.03 * weights
    found = json.loads(done.stdout)
    assert found["model"] == {"name": f"test/{name}", "family": "bert", "source": f"test/{name}", "dtype": "float32", "layers": 2}
    local = estimate(read_spec(large[name]), Workload(phase="encode")).as_json()
    assert {key: value for key, value in found.items() if key != "model"} == {key: value for key, value in local.items() if key != "model"}


def test_a_model_that_the_hub_does_not_have_is_one_line(large, tmp_path):
    with hub_of(**large) as hub:
        done = estimate_from(address(hub), tmp_path, "test/other")
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith("lighten: test/other: no such folder here, and the hub gave no model: ")
    assert done.stderr.count("\n") == 1
    assert "404" in done.stderr


def test_a_hub_that_does_not_answer_is_one_line(large, tmp_path):
    with hub_of(**large) as hub:
        gone = address(hub)
    done = estimate_from(gone, tmp_path, "test/whole")
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith("lighten: test/whole: no such folder here, and the hub gave no model: ")
    assert done.stderr.count("\n") == 1


def test_offline_a_hub_id_is_one_line(tmp_path):
    done = estimate_from("http://127.0.0.1:9", tmp_path, "test/whole", HF_HUB_OFFLINE="1")
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith("lighten: test/whole: no such folder here, and the hub gave no model: ")
    assert "offline" in done.stderr
    assert done.stderr.count("\n") == 1


def test_a_hub_model_without_safetensors_is_refused_in_one_line(tiny_bert, tmp_path):
    pickled, bare, broken = tmp_path / "pickled", tmp_path / "bare", tmp_path / "broken"
    for folder in (pickled, bare, broken):
        folder.mkdir()
        (folder / "config.json").write_bytes((tiny_bert / "config.json").read_bytes())
    (pickled / "pytorch_model.bin").write_bytes(b"\x80")
    (broken / "model.safetensors").write_bytes((2**40).to_bytes(8, "little") + b"{}")
    with hub_of(pickled=pickled, bare=bare, broken=broken) as hub:
        found = {name: estimate_from(address(hub), tmp_path / "home", f"test/{name}") for name in ("pickled", "bare", "broken")}
    assert {name: (done.returncode, done.stdout, done.stderr.count("\n")) for name, done in found.items()} == dict.fromkeys(found, (2, "", 1))
    assert "pytorch_model.bin is a pickle, which can run any code when read, and is refused; convert it" in found["pickled"].stderr
    assert "test/bare: its safetensors cannot be read" in found["bare"].stderr
    assert "test/broken: its safetensors cannot be read" in found["broken"].stderr
