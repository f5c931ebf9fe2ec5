"""What one operator of PyTorch computes and moves, from the shapes of its tensors.

`matmul_flops` are those of `torch.utils.flop_counter` where that counts the operator, with eager attention: a fused attention kernel counts
what its two products would (its backward pass four products, though the kernel computes the scores again). Beside them, in `other_flops`:
one an element for pointwise operators, the operations of norms and softmax, the inputs of sums. Operators that move data alone count 0.
What is in none of these lists is not known: the caller names it.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry

from lighten.cost.operators import NORM_FLOPS, SOFTMAX_FLOPS, OpKind

aten = torch.ops.aten


@dataclass(frozen=True, kw_only=True)
class Counted:
    """One operator: see `lighten.cost.operators.Op`. `causal_flops` None: whether its scores are masked cannot be told."""

    name: str
    kind: OpKind
    matmul_flops: int = 0
    causal_flops: int | None = None
    other_flops: int = 0
    weight_bytes: int = 0
    activation_bytes: int = 0
    rows: int = 0
    columns: int = 0
    outputs: int = 0
    products: int = 0


def count_operator(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], result: Any) -> Counted | None:
    """FLOPs and bytes of one operator; None where they are not known."""
    packet, name = func._overloadpacket, func._overloadpacket.__name__
    read, weights = _bytes_read(args, kwargs)
    moved = {"weight_bytes": weights, "activation_bytes": read + _bytes(result)}
    if name in ATTENTION:
        return _attention(name, args, moved)
    if name in GROUPED:
        rows, columns, outputs, flops = GROUPED[name](args)
        return Counted(name=name, kind="linear", matmul_flops=flops, causal_flops=flops, rows=rows, columns=columns, outputs=outputs, **moved)
    if packet in flop_registry:
        flops = flop_registry[packet](*args, **kwargs, out_val=result)
        rows, columns, outputs = _product_shape(name, args, result)
        causal = None if name in ("bmm", "baddbmm") else flops
        return Counted(name=name, kind="linear", matmul_flops=flops, causal_flops=causal, rows=rows, columns=columns, outputs=outputs, **moved)
    other = _other_flops(func, packet, name, args, result)
    if other is None:
        return None
    kind: OpKind = "gather" if name in GATHERS else "norm" if "norm" in name else "elementwise"
    shape = next((tuple(x.shape) for x in tree_leaves(result) if isinstance(x, torch.Tensor)), ())
    columns = shape[-1] if shape else 1
    return Counted(name=name, kind=kind, causal_flops=0, other_flops=other, rows=math.prod(shape[:-1]), columns=columns, **moved)


def _attention(name: str, args: tuple[Any, ...], moved: dict[str, int]) -> Counted:
    backward = name.endswith("_backward")
    q, k, v = args[1:4] if backward else args[:3]
    *batch, heads, queries, dim = q.shape
    keys, value_dim = k.shape[-2], v.shape[-1]
    flops = 2 * math.prod(batch) * heads * queries * keys * (dim + value_dim) * (2 if backward else 1)
    causal = any(argument is True for argument in args[3:])
    seen = keys * queries - queries * (queries - 1) // 2
    part = flops * seen // (queries * keys) if causal and queries * keys else flops
    return Counted(
        name=name, kind="attention", matmul_flops=flops, causal_flops=part, other_flops=math.prod(batch) * heads * queries * keys * SOFTMAX_FLOPS,
        rows=queries, columns=keys, outputs=dim, products=math.prod(batch) * heads, **moved,
    )  # fmt: skip


ATTENTION = frozenset({
    f"_scaled_dot_product_{kind}{direction}"
    for kind in ("flash_attention", "flash_attention_for_cpu", "efficient_attention", "cudnn_attention", "fused_attention_overrideable")
    for direction in ("", "_backward")
})  # fmt: skip
"""Fused attention; the backward ones take the gradient of the output first."""


def _grouped(args: tuple[Any, ...]) -> tuple[int, int, int, int]:
    """rows × inner by [experts, inner, outputs], or where the groups lie along the inner axis (a weight's gradient) their products."""
    left, right = args[0], args[1]
    if left.dim() == 2 and right.dim() == 3:
        rows, inner, outputs = left.shape[0], left.shape[1], right.shape[2]
    elif left.dim() == 3:
        rows, inner, outputs = right.shape[-1] if right.dim() == 2 else left.shape[0] * left.shape[1], left.shape[2], left.shape[1]
    else:
        rows, inner, outputs = left.shape[1], left.shape[0], right.shape[1]  # the inner axis is cut into groups
    return rows, inner, outputs, 2 * rows * inner * outputs


def _grouped_backward(args: tuple[Any, ...]) -> tuple[int, int, int, int]:
    """Two products: the gradients of the input and of the weight."""
    left, right = args[0], args[1]
    rows, inner, outputs = left.shape[0], left.shape[1], right.shape[2]
    return rows, inner, outputs, 4 * rows * inner * outputs


GROUPED: dict[str, Callable[[tuple[Any, ...]], tuple[int, int, int, int]]] = {
    "_grouped_mm": _grouped, "grouped_mm_fallback": _grouped, "grouped_mm_fallback_backward": _grouped_backward,
}  # fmt: skip
"""Products of experts, which PyTorch's own counter counts as 0."""

GATHERS = frozenset({"embedding", "index_select", "index", "gather", "embedding_dense_backward"})
MOVES = GATHERS | frozenset({
    "clone", "_to_copy", "copy_", "cat", "stack", "contiguous", "empty", "empty_like", "empty_strided", "new_empty", "new_empty_strided", "zeros",
    "zeros_like", "ones", "ones_like", "full", "full_like", "new_zeros", "new_ones", "new_full", "arange", "fill", "fill_", "zero_",
    "scalar_tensor", "lift_fresh", "lift_fresh_copy", "constant_pad_nd", "roll", "flip", "index_put", "index_put_", "_index_put_impl_", "scatter",
    "scatter_", "slice_backward", "select_backward", "slice_scatter", "select_scatter", "repeat", "repeat_interleave", "expand_copy", "view_copy",
    "tril", "triu", "masked_fill", "masked_fill_", "where", "reflection_pad1d", "replication_pad2d", "pixel_shuffle", "pixel_unshuffle", "im2col",
    "col2im", "_unsafe_index", "_unsafe_index_put", "eye", "linspace", "detach", "detach_", "set_", "resize_", "_reshape_copy", "permute_copy",
    "unfold", "unfold_backward", "_local_scalar_dense", "nonzero", "masked_select", "tril_indices", "triu_indices", "one_hot", "take",
    "unsqueeze_copy", "upsample_nearest2d", "diag_embed", "diagonal_backward", "as_strided", "as_strided_scatter", "alias", "index_copy",
    "index_copy_", "index_fill", "_pin_memory", "block_diag", "channel_shuffle", "reflection_pad2d", "replication_pad1d", "rot90",
    "split_with_sizes_copy", "narrow_copy", "squeeze_copy", "randperm", "masked_scatter", "masked_scatter_", "masked_scatter_backward",
    "_foreach_copy_", "range", "pad_sequence", "_nested_tensor_from_mask", "transpose_copy", "scatter_reduce", "unbind_copy", "new_empty_like",
    "_efficientzerotensor", "select_copy", "slice_copy", "t_copy", "is_same_size",
})  # fmt: skip
"""Operators that move or make data and compute nothing."""
REDUCTIONS = frozenset({
    "_is_all_true", "_is_any_true", "sum", "mean", "amax", "amin", "max", "min", "argmax", "argmin", "any", "all", "prod", "var", "std",
    "var_mean", "std_mean", "norm", "linalg_vector_norm", "logsumexp", "cumsum", "cumprod", "cummax", "cummin", "logcumsumexp", "aminmax",
    "count_nonzero", "scatter_add", "scatter_add_", "index_add", "index_add_", "histc", "bincount", "topk", "sort", "_unique2",
    "unique_consecutive", "unique_dim", "nll_loss_forward", "nll_loss_backward", "nll_loss2d_forward", "nll_loss2d_backward", "searchsorted",
    "bucketize", "kthvalue", "median", "dot", "mse_loss", "mse_loss_backward", "huber_loss", "avg_pool1d", "avg_pool2d", "avg_pool3d",
    "avg_pool2d_backward", "max_pool2d_with_indices", "max_pool2d_with_indices_backward", "max_pool3d_with_indices", "_adaptive_avg_pool2d",
    "_adaptive_avg_pool2d_backward", "_adaptive_avg_pool3d", "adaptive_max_pool2d", "multinomial", "trace", "nansum", "renorm",
    "binary_cross_entropy", "binary_cross_entropy_backward", "equal", "smooth_l1_loss", "scatter_reduce_two", "_foreach_norm", "diff", "mode",
    "upsample_bilinear2d", "upsample_bilinear2d_backward", "upsample_bicubic2d", "upsample_bicubic2d_backward", "_upsample_bilinear2d_aa",
    "grid_sampler_2d", "_upsample_bicubic2d_aa", "upsample_linear1d", "upsample_trilinear3d", "grid_sampler_2d_backward", "_ctc_loss",
    "_embedding_bag", "_cdist_forward", "_pdist_forward",
})  # fmt: skip
"""Operators that read each element of their inputs about once: one operation each."""
SOFTMAXES = frozenset({"_softmax", "_log_softmax", "_softmax_backward_data", "_log_softmax_backward_data", "_safe_softmax", "_masked_softmax"})
NORMS = {
    "native_layer_norm": "layernorm", "native_group_norm": "groupnorm", "native_batch_norm": "batchnorm", "_fused_rms_norm": "rmsnorm",
    "native_layer_norm_backward": "layernorm", "native_group_norm_backward": "groupnorm", "native_batch_norm_backward": "batchnorm",
    "_fused_rms_norm_backward": "rmsnorm", "_native_batch_norm_legit": "batchnorm", "_native_batch_norm_legit_no_training": "batchnorm",
    "_batch_norm_with_update": "batchnorm", "_batch_norm_no_update": "batchnorm", "cudnn_batch_norm": "batchnorm", "batch_norm_backward": "batchnorm",
}  # fmt: skip
POINTWISE = frozenset({
    "gelu", "gelu_backward", "floor_divide", "log_sigmoid_forward", "log_sigmoid_backward", "silu_backward", "sigmoid_backward", "tanh_backward",
    "threshold_backward", "native_dropout", "native_dropout_backward", "bernoulli", "bernoulli_", "rand", "rand_like", "randn", "randn_like",
    "randint", "randint_like", "normal_", "uniform_", "addcmul_", "addcdiv_", "lerp_", "elu_backward", "hardtanh_backward", "leaky_relu_backward",
    "hardswish_backward", "hardsigmoid_backward", "softplus_backward", "mish_backward", "logit_backward", "complex", "polar", "view_as_real_copy",
    "_conj_physical", "glu", "glu_backward", "angle", "cross", "linalg_cross", "isin", "isnan", "normal", "exponential_", "random_",
    "softshrink_backward", "cauchy_", "_fused_dropout", "native_dropout_forward", "addr", "outer", "_prelu_kernel", "_prelu_kernel_backward",
    "rrelu_with_noise", "_weight_norm_interface", "_weight_norm_interface_backward", "trunc_normal_", "erfinv_",
})  # fmt: skip
MATRIX_VECTORS = frozenset({"mv", "addmv", "addmv_", "vdot"})
"""Products that PyTorch's counter does not take for matrix products."""


def _other_flops(func: Any, packet: Any, name: str, args: tuple[Any, ...], result: Any) -> int | None:
    if name in MOVES or name.rstrip("_") in MOVES:
        return 0
    if name in NORMS:
        return _elements(args[0]) * NORM_FLOPS[NORMS[name]] * (2 if name.endswith("backward") else 1)
    if name in SOFTMAXES:
        return _elements(result) * SOFTMAX_FLOPS
    if name in REDUCTIONS:
        return max(_elements(args[0]) if args else 0, _elements(result))
    if name in MATRIX_VECTORS:
        return 2 * sum(x.numel() for x in tree_leaves(args) if isinstance(x, torch.Tensor) and x.dim() == 2)
    if name == "linalg_solve_triangular":  # n² multiply-adds a column, of which half are zero
        return int(args[0].shape[-1]) * _elements(args[1])
    if name in POINTWISE or torch.Tag.pointwise in func.tags:
        return _elements(result)
    if name.startswith(("_foreach_", "_fused_adam")):
        return sum(x.numel() for x in tree_leaves(args[0]) if isinstance(x, torch.Tensor))
    base = getattr(torch.ops.aten, name.rstrip("_"), None) if name.endswith("_") else None
    if base is not None and any(torch.Tag.pointwise in getattr(base, each).tags for each in base.overloads()):
        return _elements(args[0])
    return None


def _product_shape(name: str, args: tuple[Any, ...], result: Any) -> tuple[int, int, int]:
    """rows, columns and outputs as one product; a batch of products counts its rows together."""
    if name in ("mm", "bmm", "addmm", "baddbmm", "_scaled_mm"):
        left, right = args[1:3] if name.startswith(("add", "badd")) else args[:2]
        return math.prod(left.shape[:-1]), left.shape[-1], right.shape[-1]
    weight = args[2] if name.endswith("backward") else args[1]
    out = next(x for x in tree_leaves(result) if isinstance(x, torch.Tensor))
    return out.numel() // max(1, out.shape[1] if out.dim() > 1 else 1), weight.numel() // max(1, weight.shape[0]), weight.shape[0]


def _elements(value: Any) -> int:
    return max((x.numel() for x in tree_leaves(value) if isinstance(x, torch.Tensor)), default=0)


def _bytes(value: Any) -> int:
    return sum(x.numel() * x.element_size() for x in tree_leaves(value) if isinstance(x, torch.Tensor))


def _bytes_read(args: Any, kwargs: Any) -> tuple[int, int]:
    """Bytes of the tensors read: activations, and parameters."""
    read = weights = 0
    for x in tree_leaves((args, kwargs)):
        if isinstance(x, torch.Tensor):
            size = x.numel() * x.element_size()
            base = x._base if x._is_view() else x
            if isinstance(x, torch.nn.Parameter) or isinstance(base, torch.nn.Parameter):
                weights += size
            else:
                read += size
    return read, weights
