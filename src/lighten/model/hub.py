"""Read a `ModelSpec` from a hub: its config, and the headers of its safetensors by range requests. No weight is downloaded."""

from __future__ import annotations

import re
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

from lighten.errors import ModelError
from lighten.model.low_rank import config_as_stored
from lighten.model.read import PICKLES, SIDE_FILES, make_spec, parse_config, refuse_pickle
from lighten.model.safetensors_header import check_length, parse_header
from lighten.model.spec import ModelSpec, TensorSpec

FIRST_BYTES = 65_536
"""Asked for at once: the header of most files, in one request; a longer header takes a second."""
CONNECTIONS = 8
SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"


def read_hub(model_id: str) -> ModelSpec:
    """The spec of a model on the hub that `huggingface_hub` is set up for (HF_ENDPOINT, HF_TOKEN).

    Of each file of weights its header alone is asked for; where a server ignores that and sends the whole file, reading stops behind the header.

    Raises:
        ModelError: no such model, no access, no answer, a truncated one, or no safetensors.
    """
    from huggingface_hub import HfApi
    from huggingface_hub.errors import (  # type: ignore[attr-defined]  # HTTPError is of whichever client library it uses
        HTTPError,
        OfflineModeIsEnabled,
    )

    api = HfApi()
    try:
        info = api.model_info(model_id, files_metadata=True)
        sizes = {file.rfilename: file.size or 0 for file in info.siblings or ()}
        if not any(name.endswith(".safetensors") for name in sizes):
            _refuse_other_weights(model_id, sizes)
        config = Path(api.hf_hub_download(model_id, "config.json"))
        files = _weight_files(api, model_id, sizes)
        with ThreadPoolExecutor(CONNECTIONS) as pool:
            headers = list(pool.map(partial(_read_header, model_id), files))
    except (HTTPError, OfflineModeIsEnabled, OSError, ValueError) as error:
        raise _refusal(model_id, error) from error
    other = sum(size for name, size in sizes.items() if name in SIDE_FILES)
    tensors = tuple(tensor for header in headers for tensor in header)
    return make_spec(config_as_stored(parse_config(config.read_bytes(), model_id)), tensors, name=model_id, source=model_id, other_bytes=other)


def _refuse_other_weights(model_id: str, names: Iterable[str]) -> None:
    """Raises:
    ModelError: weights that are there in another format, pickled ones last: they could be read by no one safely.
    """
    found = list(names)
    if graphs := sorted(name for name in found if name.endswith((".gguf", ".onnx"))):
        raise ModelError(f"{model_id}: it has no safetensors but {graphs[0]}; download that file and give its path.")
    refuse_pickle(name for name in found if name.endswith(tuple(pattern[1:] for pattern in PICKLES)))


def _weight_files(api: Any, model_id: str, names: Iterable[str]) -> list[str]:
    """The files that hold a model's weights: the single one, else those that its index names."""
    known = set(names)
    if SINGLE in known:
        return [SINGLE]
    if INDEX not in known:
        raise ModelError(f"{model_id}: its safetensors cannot be read (it has neither {SINGLE} nor {INDEX}).")
    index = parse_config(Path(api.hf_hub_download(model_id, INDEX)).read_bytes(), f"{model_id}/{INDEX}").get("weight_map")
    if not isinstance(index, dict) or not all(isinstance(name, str) for name in index.values()):
        raise ModelError(f"{model_id}: its safetensors cannot be read ({INDEX} has no weight_map of tensor and file names).")
    files = sorted(set(index.values()))
    if missing := [name for name in files if name not in known]:
        raise ModelError(f"{model_id}: its safetensors cannot be read ({len(missing)} of its shards are missing: {', '.join(missing[:3])}).")
    return files


def _read_header(model_id: str, name: str) -> tuple[TensorSpec, ...]:
    """The tensors of one file.

    Raises:
        ModelError: a header that cannot be read, or an answer that is shorter than what was asked for.
    """
    path = Path(name)
    try:
        start, size = _first_bytes(model_id, name, FIRST_BYTES)
        if len(start) < 8:
            raise ModelError(f"{name}: {len(start)} bytes are no safetensors file")
        length = int.from_bytes(start[:8], "little")
        check_length(path, length, size)
        if len(start) < 8 + length:
            start, size = _first_bytes(model_id, name, 8 + length)
        if len(start) < 8 + length:
            raise ModelError(f"{name}: {8 + length} bytes were asked for and {len(start)} came: the answer is truncated")
        return parse_header(path, start[8 : 8 + length], size)
    except ModelError as error:
        raise ModelError(f"{model_id}: its safetensors cannot be read ({str(error).rstrip('.')}).") from error


def _first_bytes(model_id: str, name: str, count: int) -> tuple[bytes, int]:
    """The first `count` bytes of a file (all of a shorter one), and the file's size."""
    from huggingface_hub import get_session, hf_hub_url
    from huggingface_hub.utils import build_hf_headers, hf_raise_for_status  # type: ignore[attr-defined]  # documented, not re-exported

    headers = {**build_hf_headers(), "Range": f"bytes=0-{count - 1}", "Accept-Encoding": "identity"}
    with get_session().stream("GET", hf_hub_url(model_id, name), headers=headers) as response:
        if response.status_code >= 400:
            response.read()
        hf_raise_for_status(response)
        found = bytearray()
        for chunk in response.iter_bytes():
            found += chunk
            if len(found) >= count:
                break
        total = re.search(r"/(\d+)$", response.headers.get("Content-Range", "")) if response.status_code == 206 else None
        size = int(total[1]) if total else int(response.headers.get("Content-Length") or len(found))
    return bytes(found[:count]), size


def _refusal(model_id: str, error: Exception) -> ModelError:
    """What a failure of a hub means for the user."""
    from huggingface_hub.errors import GatedRepoError

    status = getattr(getattr(error, "response", None), "status_code", None)
    token = "set HF_TOKEN to a token of an account that has it, or run `hf auth login`"
    if isinstance(error, GatedRepoError):
        return ModelError(f"{model_id}: a gated model ({status}): its owner grants access on the model's page; then {token}.")
    if status in (401, 403):
        return ModelError(f"{model_id}: the hub gave no access ({status}): the model is private, or there is none of that name; {token}.")
    return ModelError(f"{model_id}: no such folder here, and the hub gave no model: {_first_line(error)}")


def _first_line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]
