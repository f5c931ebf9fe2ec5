"""Read a `ModelSpec` from a hub: its config, and the headers of its safetensors by range requests. No weight is downloaded."""

from __future__ import annotations

from pathlib import Path

from lighten.errors import ModelError
from lighten.model.read import SIDE_FILES, make_spec, parse_config, refuse_pickle
from lighten.model.safetensors_header import DTYPES
from lighten.model.spec import ModelSpec, TensorSpec


def read_hub(model_id: str) -> ModelSpec:
    """The spec of a model on the hub that `huggingface_hub` is set up for (HF_ENDPOINT, HF_TOKEN).

    Raises:
        ModelError: no such model, no access, no answer, or no safetensors.
    """
    from huggingface_hub import HfApi
    from huggingface_hub.errors import (  # type: ignore[attr-defined]  # HTTPError is of whichever client library it uses
        HTTPError,
        NotASafetensorsRepoError,
        OfflineModeIsEnabled,
        SafetensorsParsingError,
    )

    api = HfApi()
    try:
        info = api.model_info(model_id, files_metadata=True)
        sizes = {file.rfilename: file.size or 0 for file in info.siblings or ()}
        if not any(name.endswith(".safetensors") for name in sizes):
            refuse_pickle(name for name in sizes if name.endswith((".bin", ".pt", ".pth", ".ckpt", ".pkl")))
        config = Path(api.hf_hub_download(model_id, "config.json"))
        metadata = api.get_safetensors_metadata(model_id)
    except (NotASafetensorsRepoError, SafetensorsParsingError) as error:
        raise ModelError(f"{model_id}: its safetensors cannot be read ({_first_line(error)}).") from error
    except (HTTPError, OfflineModeIsEnabled, OSError, ValueError) as error:
        raise ModelError(f"{model_id}: no such folder here, and the hub gave no model: {_first_line(error)}") from error
    tensors = tuple(
        TensorSpec(name=name, shape=tuple(tensor.shape), dtype=DTYPES.get(tensor.dtype, tensor.dtype))
        for file in metadata.files_metadata.values()
        for name, tensor in file.tensors.items()
    )
    other = sum(size for name, size in sizes.items() if name in SIDE_FILES)
    return make_spec(parse_config(config.read_bytes(), model_id), tensors, name=model_id, source=model_id, other_bytes=other)


def _first_line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]
