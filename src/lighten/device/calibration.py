"""From whole blocks to factors: what fusion saves, and what a framework adds, over the sum of single operators.

Model:  log measured = log Σ_c factor[c] · seconds[c] + noise,  c in the classes of `roofline.py`.
The factors are the most probable ones under independent normal priors on their logarithms around 0 (factor 1): a linear or a call costs what it was
measured to cost, within a quarter; what surrounds it may vanish by fusion or double. So a class that the blocks say nothing about keeps 1.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from lighten.cost.operators import Forward, forward_operators
from lighten.device.cases import block_spec
from lighten.device.profile import Bandwidth, BlockSample, Calibration, EngineProfile
from lighten.device.roofline import CLASSES, sum_parts

PRIOR_SPREAD = {"linear": 0.25, "weights": 1.0, "attention": 0.5, "pointwise": 1.0, "fresh": 0.25, "overhead": 1.0, "overhead_rms": 1.0, "call": 0.25}
"""Standard deviation of log factor: wide for what compilers fuse, narrow for matrix products, which they do not."""
EAGER_PRIOR_SPREAD = {
    "linear": 0.08, "weights": 0.1, "attention": 0.1, "pointwise": 0.2, "fresh": 0.25, "overhead": 1.0, "overhead_rms": 1.0, "call": 0.5,
}  # fmt: skip
"""The same where models run the very operators that were measured, one by one, and cold weights were measured too: what is left is how warm the
caches are. With wider ones the classes take over each other's noise: a busy machine gave pointwise operators 3.9 and linears 0.8."""
BORROWED_PRIOR_SPREAD = PRIOR_SPREAD | {"linear": 1.0, "call": 1.0}
"""The same where single operators and calls are another runtime's: int8 products, say, beside torch's in float32."""
BORROWING = ("ctranslate2",)
"""Runtimes that run models and no operators."""
NOISE = 0.1
"""Standard deviation of log measured that is taken for granted: repeated blocks on a shared 2-core machine differ by about that."""
DISTURBED_NOISE = 0.3
"""The same of a block that other processes disturbed: seen beside two to four busy neighbours, mostly upwards."""
MIN_CALM = 10
"""Undisturbed blocks that are enough to fit the factors."""
STEPS = 30
LEVEL_Z = 1.6449
"""95 % quantile of the normal distribution: a two-sided 90 % interval."""

Array = np.ndarray[Any, np.dtype[np.float64]]


def calibrate(engine: EngineProfile, bandwidth: Sequence[Bandwidth]) -> EngineProfile:
    """The engine with the calibration that its own blocks give."""
    return replace(engine, calibration=fit_blocks(engine, bandwidth))


def fit_blocks(engine: EngineProfile, bandwidth: Sequence[Bandwidth]) -> Calibration:
    """Factors from all blocks; the spread from blocks left out one at a time."""
    if not engine.blocks:
        return Calibration()
    blocks = _trustworthy(engine.blocks)
    sums = np.array([_block_parts(block, engine, bandwidth) for block in blocks])
    measured = np.array([block.seconds for block in blocks])
    prior = _prior(engine)
    noise = np.array([NOISE if block.calm else DISTURBED_NOISE for block in blocks])
    factors = _fit(sums, measured, noise, prior)
    return Calibration(
        factors=dict(zip(CLASSES, (float(factor) for factor in factors), strict=True)),
        spread=_spread(_left_out_errors(sums, measured, noise, prior)),
        blocks=len(measured),
    )


def _prior(engine: EngineProfile) -> Mapping[str, float]:
    if engine.runtime in BORROWING:
        return BORROWED_PRIOR_SPREAD
    return EAGER_PRIOR_SPREAD if engine.runtime == "torch" and any(sample.kind == "cold" for sample in engine.samples) else PRIOR_SPREAD


def block_operators(block: BlockSample, dtype: str) -> list[Any]:
    """The operators of a synthetic block, as of any model."""
    forward = Forward(batch_size=block.batch_size, query_len=block.seq_len, key_len=block.seq_len)
    return forward_operators(block_spec(block), forward, dtype)


def _trustworthy(blocks: Sequence[BlockSample]) -> Sequence[BlockSample]:
    """The undisturbed blocks, if they are enough to fit; else all, whose scatter the range then shows."""
    calm = [block for block in blocks if block.calm]
    return calm if len(calm) >= MIN_CALM else blocks


def _block_parts(block: BlockSample, engine: EngineProfile, bandwidth: Sequence[Bandwidth]) -> list[float]:
    parts = sum_parts(block_operators(block, engine.activation_dtype), engine, bandwidth)
    return [parts.by_class[name] for name in CLASSES]


def _fit(sums: Array, measured: Array, noise: Array, prior: Mapping[str, float]) -> Array:
    """Gauss-Newton on the logarithms of the factors, damped by the prior."""
    precision = np.diag([1 / prior[name] ** 2 for name in CLASSES])
    logs = np.zeros(len(CLASSES))
    for _ in range(STEPS):
        terms = sums * np.exp(logs)
        total = terms.sum(axis=1)
        slope = terms / total[:, None] / noise[:, None]
        step = np.linalg.solve(slope.T @ slope + precision, slope.T @ (np.log(measured / total) / noise) - precision @ logs)
        logs += np.clip(step, -0.5, 0.5)
    return np.exp(logs)


def _left_out_errors(sums: Array, measured: Array, noise: Array, prior: Mapping[str, float]) -> Array:
    errors = []
    for left_out in range(len(measured)):
        kept = np.arange(len(measured)) != left_out
        predicted = sums[left_out] @ _fit(sums[kept], measured[kept], noise[kept], prior)
        errors.append(math.log(measured[left_out] / predicted))
    return np.array(errors)


def _spread(errors: Array) -> float:
    """Half width of the 90 % prediction interval of one more error: Student's t (Abramowitz & Stegun 26.7.5) times the root mean square."""
    count = len(errors)
    quantile = LEVEL_Z + (LEVEL_Z**3 + LEVEL_Z) / (4 * count)
    return float(quantile * math.sqrt((errors**2).mean()))
