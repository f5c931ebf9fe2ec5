"""Bytes of the caches that generation keeps between tokens, as transformers, llama.cpp and vLLM keep them, which differ.

Of each layer: keys and values of the tokens so far (`Attention`), those of the source (cross attention), or a state of fixed size (`Scan`).
A layer that reads another's cache (`Attention.cached` is False) has none.

Legend: B sequences, C tokens of each, W window, G key/value heads, D and V width of a key and of a value head, L latent width,
e bytes of an element.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from lighten.cost.workload import CACHE_KEEPERS, KeptBy
from lighten.errors import WorkloadError
from lighten.model.ggml_types import GGML_TYPES, PLAIN
from lighten.model.spec import Attention, Conv, ModelSpec, Scan
from lighten.units import DTYPE_BITS, dtype_bytes

FLOAT32 = 4
LLAMA_CPP_PADDING = 256
"""Tokens to which llama.cpp rounds a context up. Source: `GGML_PAD(…, 256)` of src/llama-context.cpp and src/llama-kv-cache-iswa.cpp."""
LLAMA_CPP_WINDOWED = frozenset({
    "gemma2", "gemma3", "gemma3_text", "gemma3n", "gemma3n_text", "cohere2", "olmo3", "exaone4", "gpt_oss", "llama4", "llama4_text", "smallthinker",
})  # fmt: skip
"""Families for which llama.cpp keeps a smaller cache in windowed layers; in others (Mistral, Phi-3, Qwen2, StarCoder2) it keeps all tokens.
Source: `hparams.swa_type` in the loading of each architecture (src/llama-model.cpp, src/models)."""
GGML_CACHE_TYPES = ("F32", "F16", "BF16", "Q8_0", "Q4_0", "Q4_1", "IQ4_NL", "Q5_0", "Q5_1")
"""Source: `kv_cache_types` of llama.cpp's common/arg.cpp."""
MOST_LAYERS_OVER_FEWEST = 1.5
"""Below this ratio vLLM pads the smaller kind of layers to the size of the larger. Source: `_get_kv_cache_groups_uniform_page_size` of
vllm/v1/core/kv_cache_utils.py."""


@dataclass(frozen=True, kw_only=True)
class CacheOptions:
    """Settings of the keepers, with their defaults.

    Attributes:
        source_len: tokens of the source of an encoder-decoder.
        new_tokens: transformers: tokens of the latest forward pass, which a windowed layer holds beside its window (a prefill's are all of C).
        prompt_len: transformers-quantized: tokens that were quantized at once by the prefill; None: all of C.
        bits, group_size, residual_length: transformers-quantized: width of a code, values that share a scale and a zero point, and how many
            tokens gather in full width before they are quantized.
        ubatch: llama.cpp: tokens of a physical batch (`--ubatch-size`), which a windowed layer holds beside its window.
        swa_full: llama.cpp: windowed layers keep all tokens (`--swa-full`).
        block_size: vLLM: tokens of a page (`--block-size`).
    """

    source_len: int = 0
    new_tokens: int = 1
    prompt_len: int | None = None
    bits: int = 4
    group_size: int = 64
    residual_length: int = 128
    ubatch: int = 512
    swa_full: bool = False
    block_size: int = 16


DEFAULTS = CacheOptions()


def cache_bytes(
    spec: ModelSpec, *, batch_size: int, context_len: int, dtype: str, kept_by: KeptBy = "transformers",
    options: CacheOptions = DEFAULTS,
) -> int:  # fmt: skip
    """Bytes of all caches once each of `batch_size` sequences has `context_len` tokens. See `cache_layers`."""
    layers = cache_layers(spec, batch_size=batch_size, context_len=context_len, dtype=dtype, kept_by=kept_by, options=options)
    return sum(layers.values())


def cache_layers(
    spec: ModelSpec, *, batch_size: int, context_len: int, dtype: str, kept_by: KeptBy = "transformers",
    options: CacheOptions = DEFAULTS,
) -> dict[str, int]:  # fmt: skip
    """Bytes of the cache of each layer, by the name of its attention or recurrence.

    Of a full layer, B · C' · G · (D + V) · e; of latent attention B · C' · L · e. C' is

        transformers            C; in a windowed layer min(C - new_tokens, W - 1) + new_tokens, for the tensor that holds a window's last
                                tokens is a view of one that holds the newest too
        transformers-static     C, the `max_cache_len` that was asked for; min(C, W) in a windowed layer
        transformers-quantized  C, in codes of `bits` with a scale and a zero point of e bytes for each group (quanto, HQQ), but for up to
                                residual_length - 1 tokens in full width; refused by transformers where a layer is windowed
        llama.cpp               C rounded up to 256; in windowed layers of the families in `LLAMA_CPP_WINDOWED` min(that, W + ubatch)
                                rounded up to 256
        vllm                    C in whole pages of `block_size` tokens; windowed layers free the pages that lie before the window. Full and
                                windowed layers share one pool of pages: they are put into groups of one number of layers, and a group
                                that is not full wastes the rest ("padding")

    Cross attention keeps G · (D + V) · e for each token of the source (of a model's fixed number where it has one); recurrences keep
    `state_elements` values for each sequence: in llama.cpp float32, in vLLM of e bytes, in transformers of e bytes the latest inputs of a
    convolution and float32 the rest. transformers of before version 5 expanded the latent to keys and values of all heads.

    Args:
        dtype: of the cache: a type of `DTYPE_BITS`, or for llama.cpp one of its own, as q8_0.
        options: of the keeper, and the source's length of an encoder-decoder.

    Not counted: tables of pages, counters and positions; vLLM's padding of a hybrid's states to the size of attention pages.

    Source: transformers 5.23, cache_utils.py; llama.cpp, src/llama-kv-cache.cpp, src/llama-kv-cache-iswa.cpp, src/llama-memory-recurrent.cpp;
    vLLM, vllm/v1/core/single_type_kv_cache_manager.py, vllm/v1/core/kv_cache_utils.py, vllm/v1/kv_cache_interface.py; the latent cache:
    DeepSeek-V2 (arXiv:2405.04434), eq. 9. transformers' are held against real caches in tests/test_kv_cache.py.

    Raises:
        WorkloadError: an unknown keeper or type, or a cache that the keeper refuses.
    """
    if kept_by not in CACHE_KEEPERS:
        raise WorkloadError(f"kept_by={kept_by!r} is not known; known: {', '.join(CACHE_KEEPERS)}.")
    if batch_size < 1 or context_len < 0:
        raise WorkloadError(f"a cache of batch_size={batch_size} and context_len={context_len} cannot be; at least 1 and 0 are needed.")
    own = [part for part in spec.parts if isinstance(part, Attention) and part.causal and part.cached and not part.is_cross]
    cross = [part for part in spec.parts if isinstance(part, Attention) and part.is_cross and part.cached and part.rows in ("token", "logits")]
    element = _element(dtype, kept_by)
    asked = _Asked(spec=spec, context=context_len, element=element, dtype=dtype, options=options)
    layers = _SELF[kept_by](asked, own)
    for part in cross:
        layers[part.name] = _cross_tokens(part, kept_by, options) * _token_bytes(part, element)
    for state, window in _states(spec):
        layers[state.name] = _state_bytes(state, window, dtype, kept_by)
    return {name: batch_size * size for name, size in layers.items()}


@dataclass(frozen=True, kw_only=True)
class _Element:
    """Bytes of a block of so many values; 1 value where the type is plain."""

    block: int
    bytes: float


@dataclass(frozen=True, kw_only=True)
class _Asked:
    spec: ModelSpec
    context: int
    element: _Element
    dtype: str
    options: CacheOptions


def _element(dtype: str, kept_by: str) -> _Element:
    kind = dtype.upper()
    if kept_by == "llama.cpp" and kind in GGML_CACHE_TYPES:
        return _Element(block=GGML_TYPES[kind].block, bytes=GGML_TYPES[kind].bytes)
    allowed = [PLAIN[name] for name in GGML_CACHE_TYPES if name in PLAIN] if kept_by == "llama.cpp" else [*DTYPE_BITS]
    if dtype not in allowed:
        more = [name.lower() for name in GGML_CACHE_TYPES if name not in PLAIN] if kept_by == "llama.cpp" else []
        raise WorkloadError(f"a cache of type {dtype!r} is not known to {kept_by}; known: {', '.join([*allowed, *more])}.")
    return _Element(block=1, bytes=dtype_bytes(dtype))


def _row_bytes(width: int, element: _Element) -> int:
    """Bytes of one token's values.

    Raises:
        WorkloadError: they are no whole number of blocks.
    """
    if width % element.block:
        raise WorkloadError(f"a cache in blocks of {element.block} values cannot hold rows of {width}; use float16.")
    return round(width // element.block * element.bytes)


def _widths(part: Attention) -> tuple[int, ...]:
    """Values that each token keeps: of keys and of values, or of the latent that stands for both."""
    return (part.latent_dim,) if part.latent_dim else (part.num_key_value_heads * part.head_dim, part.num_key_value_heads * part.value_dim)


def _token_bytes(part: Attention, element: _Element) -> int:
    return sum(_row_bytes(width, element) for width in _widths(part))


def _cross_tokens(part: Attention, kept_by: str, options: CacheOptions) -> int:
    tokens = part.keys if isinstance(part.keys, int) else options.source_len
    return _padded(tokens, options.block_size) if kept_by == "vllm" else tokens


def _states(spec: ModelSpec) -> Iterator[tuple[Scan, int]]:
    """Each recurrence, and how many of its state's values are the latest inputs of the depthwise convolution before it."""
    inputs = 0
    for part in spec.parts:
        if isinstance(part, Conv) and part.groups == part.in_channels:
            inputs = part.out_channels * math.prod(part.kernel)
        elif isinstance(part, Scan):
            yield part, min(inputs, part.state_elements)
            inputs = 0


def _state_bytes(state: Scan, inputs: int, dtype: str, kept_by: str) -> int:
    if kept_by == "llama.cpp":
        return FLOAT32 * state.state_elements
    element = dtype_bytes(dtype)
    rest = element if kept_by == "vllm" else max(FLOAT32, element)
    return round(inputs * element + (state.state_elements - inputs) * rest)


def _padded(tokens: int, multiple: int) -> int:
    return -(-tokens // multiple) * multiple


def _fields(config: Mapping[str, Any]) -> Iterable[Any]:
    """Window sizes that transformers makes a windowed cache of."""
    for table in (config, config.get("text_config") or {}):
        yield from (table.get(name) for name in ("sliding_window", "attention_chunk_size"))


def _window(asked: _Asked, part: Attention) -> int | None:
    """The window of a layer's cache in transformers: that of its attention, where the config names it as such."""
    return part.window if part.window in set(_fields(asked.spec.config)) else None


def _dynamic(asked: _Asked, parts: list[Attention]) -> dict[str, int]:
    found = {}
    for part in parts:
        window, tokens = _window(asked, part), asked.context
        if window is not None:
            new = min(asked.options.new_tokens, tokens)
            tokens = min(tokens - new, window - 1) + new
        found[part.name] = tokens * _token_bytes(part, asked.element)
    return found


def _static(asked: _Asked, parts: list[Attention]) -> dict[str, int]:
    found = {}
    for part in parts:
        window = _window(asked, part)
        tokens = asked.context if window is None else min(asked.context, window)
        found[part.name] = tokens * _token_bytes(part, asked.element)
    return found


def _quantized(asked: _Asked, parts: list[Attention]) -> dict[str, int]:
    options = asked.options
    if windowed := [part.name for part in parts if _window(asked, part) is not None]:
        raise WorkloadError(
            f"kept_by=transformers-quantized: {windowed[0]} and {len(windowed) - 1} more layers have a sliding window, which transformers' "
            f"QuantizedCache refuses; use transformers or transformers-static."
        )
    prompt = asked.context if options.prompt_len is None else min(options.prompt_len, asked.context)
    full = (asked.context - prompt) % options.residual_length
    found = {}
    for part in parts:
        size = full * _token_bytes(part, asked.element)
        for width in _widths(part):
            values = (asked.context - full) * width
            groups = math.ceil(values / options.group_size)
            size += math.ceil(values * options.bits / 8) + round(2 * groups * asked.element.bytes)
        found[part.name] = size
    return found


def _llama_cpp(asked: _Asked, parts: list[Attention]) -> dict[str, int]:
    whole = _padded(asked.context, LLAMA_CPP_PADDING)
    windowed = asked.spec.family in LLAMA_CPP_WINDOWED and not asked.options.swa_full
    found = {}
    for part in parts:
        tokens = whole
        if windowed and part.window is not None:
            tokens = _padded(min(whole, part.window + asked.options.ubatch), LLAMA_CPP_PADDING)
        found[part.name] = tokens * _token_bytes(part, asked.element)
    return found


def _vllm(asked: _Asked, parts: list[Attention]) -> dict[str, int]:
    size = asked.options.block_size
    pages = {part.name: size * _token_bytes(part, asked.element) for part in parts}
    if len({part.window for part in parts}) < 2:
        return {part.name: _pages(asked.context, part.window, size) * pages[part.name] for part in parts}
    largest = max(pages.values())
    if odd := [name for name, page in pages.items() if largest % page]:
        raise WorkloadError(f"kept_by=vllm: a page of {odd[0]} is no whole part of the largest page, {largest} bytes; vLLM refuses that.")
    kinds: defaultdict[tuple[int | None, int], list[str]] = defaultdict(list)
    for part in parts:
        kinds[part.window, size * (largest // pages[part.name])].append(part.name)
    group = _group_size([len(names) for names in kinds.values()])
    found: dict[str, int] = {}
    for (window, block), names in kinds.items():
        held = _pages(asked.context, window, block) * largest
        found |= dict.fromkeys(names, held)
        if padding := -len(names) % group:
            found["padding"] = found.get("padding", 0) + padding * held
    return found


def _pages(context: int, window: int | None, block_size: int) -> int:
    """Pages that hold the last of `context` tokens while it is computed: those before the window of the token before it are freed."""
    freed = max(0, context - window) // block_size if window is not None else 0
    return math.ceil(context / block_size) - freed


def _group_size(counts: list[int]) -> int:
    """Layers of a group: the fewest of a kind, or the most where there are hardly more."""
    fewest, most = min(counts), max(counts)
    return most if most < fewest * MOST_LAYERS_OVER_FEWEST else fewest


_SELF = {
    "transformers": _dynamic, "transformers-static": _static, "transformers-quantized": _quantized, "llama.cpp": _llama_cpp, "vllm": _vllm,
}  # fmt: skip
