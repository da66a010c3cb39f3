"""FLOPs that a training step needs at least, and peak FLOP/s of devices: MFU is the first over the second.

Axes: docs/contributing.md#axes.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from middo_jax.models.config import DecoderConfig
from middo_jax.models.parameters import adapters, parameters

# Published FLOP/s of dense bfloat16 matmuls, per JAX device. Sources: cloud.google.com/tpu/docs/v4, /v5e,
# /v5p, /v6e, /tpu7x (v4 and v5p: one device is a chip, its two cores together; TPU7x: half a chip); NVIDIA's
# data sheets of A100, H100, H200, HGX B200, GB200, L4, L40S (half of the figures "with sparsity").
_PEAKS = {
    "TPU v4": 275e12,
    "TPU v5 lite": 197e12,
    "TPU v5e": 197e12,
    "TPU v5": 459e12,
    "TPU v5p": 459e12,
    "TPU v6 lite": 918e12,
    "TPU v6e": 918e12,
    "TPU7x": 1153.5e12,
    "NVIDIA A100": 312e12,
    "NVIDIA H100 PCIe": 756e12,
    "NVIDIA H100": 989.4e12,
    "NVIDIA H200": 989.4e12,
    "NVIDIA B200": 2250e12,
    "NVIDIA GB200": 2500e12,
    "NVIDIA L4": 121e12,
    "NVIDIA L40S": 362e12,
}


def peak_flops(device_kind: str) -> float | None:
    """Returns the published bfloat16 FLOP/s of a device; None for an unknown `device_kind` (JAX's name).

    "NVIDIA H100 80GB HBM3" -> 989.4e12: uses the longest table entry whose words the name starts with.
    """
    words = device_kind.replace("-", " ").split()
    fitting = [name for name in _PEAKS if words[: len(name.split())] == name.split()]
    if "PCIe" in words and "NVIDIA H100" in fitting:
        return _PEAKS["NVIDIA H100 PCIe"]
    return _PEAKS[max(fitting, key=len)] if fitting else None


def training_flops(config: DecoderConfig, lengths: Sequence[int], n_targets: int) -> float:
    """Returns the FLOPs of forward and backward pass over some examples: the least that any program needs.

        matrices      6 x parameters of the layers' matrices, per token
        head          6 x vocabulary x width, per target: no other position needs logits
        attention     12 x heads x head_dim, per layer and attended pair of positions

    A multiply-add is two FLOPs. The backward pass costs twice the forward pass; frozen matrices have no
    gradient of their own, so they count 4 instead of 6. Attended pairs are causal, within one example and the
    layer's window: without a window about half of length squared. Padding, recomputation (remat) and
    operations other than matmuls do not count.

        MFU = training_flops / (seconds x devices x peak_flops)

    Args:
      config: the model's config; if it has adapters, only these are trained.
      lengths: number of tokens of each example.
      n_targets: number of target tokens.
    """
    matrices = sum(s.size(config) for s in parameters(config) if s.path[-1].endswith("_proj"))
    of_adapters = sum(spec.size(config) for spec in adapters(config))
    head = config.vocab_size * config.hidden_size
    full = 6 if config.lora is None else 4
    dense = sum(lengths) * (full * matrices + 6 * of_adapters) + n_targets * full * head
    length_n = np.asarray(lengths, np.float64)
    kinds = config.kind_of_layer or (0,) * config.num_layers
    pairs = sum(
        _pairs(length_n, config.kinds[kind].window) * kinds.count(kind) for kind in sorted(set(kinds))
    )
    return float(dense + 12 * config.num_heads * config.head_dim * pairs)


def _pairs(length_n: np.ndarray, window: int | None) -> float:
    """Returns the number of pairs (query, attended key) in causal sequences; each position attends itself."""
    seen_n = length_n if window is None else np.minimum(length_n, window)
    return float((seen_n * (seen_n + 1) / 2 + (length_n - seen_n) * seen_n).sum())
