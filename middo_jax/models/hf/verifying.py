"""Verifies an export: transformers must compute the same logits from it as the decoder, for a few prompts.

Both compute in float32 from weights that are rounded to the export's dtype, so they differ only by the
rounding of sums. The prompts are rendered with training's tokenizer and with the exported one, so these are
compared too.
Axes: docs/contributing.md#axes.
"""

from __future__ import annotations

import dataclasses
import functools
import importlib.util
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
import transformers
from transformers import PreTrainedTokenizerBase

from middo_jax.data.example import Message
from middo_jax.data.tokenize import tokenize_prompt
from middo_jax.models.config import DecoderConfig
from middo_jax.models.hf.files import CheckpointError
from middo_jax.models.model import Model, Params, Structure, bound, structure
from middo_jax.models.parameters import num_params
from middo_jax.parallel.hosts import to_host, to_mesh
from middo_jax.parallel.mesh import batch_divisor

# Relative to the largest logit. After 30 layers, sums in float32 differ by 5e-6; a wrong tensor by far more.
TOLERANCE = 1e-4
_QUESTIONS = (
    "What is the capital of France?",
    "Add 12 and 345, then explain each step as you would to a child of seven.",
    "Rewrite this sentence: “Żółw, 亀 and a naïve café — all at 20 °C.”\n\n1. shorter\n2. as a question",
)
_TEXT = (
    "A sample that the model already knows teaches it nothing; one that it cannot understand, little. What "
    "lies between is worth the most, and where that is changes while the model learns:\n\n"
    "\tdef worth(before: float, after: float) -> float:\n\t\treturn before - after  # nats per token\n"
)


class Verification(NamedTuple):
    """How far transformers' logits are from the decoder's.

    Attributes:
      max_difference: largest absolute difference of two logits.
      largest_logit: largest absolute logit.
      n_prompts: number of prompts.
      n_tokens: number of tokens in all prompts.
    """

    max_difference: float
    largest_logit: float
    n_prompts: int
    n_tokens: int

    def __str__(self) -> str:
        return (
            f"verified: max |Δlogit| {self.max_difference:.1e} over {self.n_prompts} prompts, "
            f"{self.n_tokens} tokens (float32)"
        )


@dataclasses.dataclass(frozen=True)
class Expectation:
    """Per prompt, its tokens [t] and the decoder's float32 logits [t, v]."""

    tokens: tuple[np.ndarray, ...]
    logits: tuple[np.ndarray, ...]


def obstacle(config: DecoderConfig) -> str | None:
    """Why an export of such a model cannot be verified on this machine; None if it can."""
    if importlib.util.find_spec("torch") is None:
        return "torch is not installed"
    needed, available = 4 * num_params(config), _available_bytes()
    if available is not None and needed > available:
        return (
            f"torch would hold {needed / 1e9:.0f} GB in float32, {available / 1e9:.0f} GB of memory are free"
        )
    return None


def _available_bytes() -> int | None:
    """Available memory according to /proc/meminfo; None on systems without it."""
    try:
        lines = Path("/proc/meminfo").read_text(encoding="ascii").splitlines()
    except FileNotFoundError:
        return None
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable:")), None)


def expect(model: Model, tokenizer: PreTrainedTokenizerBase, dtype: str | None) -> Expectation:
    """What an export of this model must compute.

    In a program of several processes all must call it.

    Args:
      model: model without adapters.
      tokenizer: tokenizer with the chat template used in training.
      dtype: dtype of the export; None keeps each parameter's dtype.
    """
    params = model.params if dtype is None else _rounded(model.params, dtype)
    tokens = _probes(tokenizer)
    n, divisor = len(tokens), batch_divisor(model.mesh)
    # A multiple of 128, which some attention kernels require.
    length = -(-max(map(len, tokens)) // 128) * 128
    tokens_bt = np.zeros((-(-n // divisor) * divisor, length), np.int32)
    segment_ids_bt = np.full_like(tokens_bt, -1)
    for row, prompt in enumerate(tokens):
        tokens_bt[row, : len(prompt)], segment_ids_bt[row, : len(prompt)] = prompt, 0
    positions_bt = np.broadcast_to(np.arange(length, dtype=np.int32), tokens_bt.shape)
    graphdef = structure(dataclasses.replace(model.config, dtype="float32"))
    inputs = (to_mesh(model.mesh, x, "batch") for x in (tokens_bt, segment_ids_bt, positions_bt))
    # highest: accelerators would multiply float32 in bfloat16 or TF32.
    with jax.set_mesh(model.mesh), jax.default_matmul_precision("highest"):
        logits_ntv = to_host(_logits(graphdef, params, *inputs, n))
    logits = tuple(logits[: len(prompt)] for logits, prompt in zip(logits_ntv, tokens, strict=True))
    return Expectation(tuple(tokens), logits)


@functools.partial(jax.jit, static_argnums=1)
def _rounded(params: Params, dtype: str) -> Params:
    return jax.tree.map(lambda value: value.astype(dtype), params)


@functools.partial(jax.jit, static_argnums=(0, 5))
def _logits(
    graphdef: Structure,
    params: Params,
    tokens_bt: jax.Array,
    segment_ids_bt: jax.Array,
    positions_bt: jax.Array,
    n: int,
) -> jax.Array:
    """Float32 logits [n, t, v] of the first n rows."""
    model = bound(graphdef, params)
    hidden_btd = model.hidden(tokens_bt, segment_ids_bt, positions_bt)[:n]
    return model.unembed(hidden_btd.reshape(-1, hidden_btd.shape[-1])).reshape(*hidden_btd.shape[:2], -1)


def compare(directory: Path, expectation: Expectation) -> Verification:
    """Compares what transformers computes from an export with what is expected.

    Raises:
      CheckpointError: transformers reports a missing or unknown tensor, the tokenizer returns other tokens,
        or logits differ by more than TOLERANCE times the largest; the message names the place.
    """
    tokenizer, model = _open(directory)
    for prompt, (ours, theirs) in enumerate(zip(expectation.tokens, _probes(tokenizer), strict=True)):
        if not np.array_equal(ours, theirs):
            raise CheckpointError(
                f"the exported tokenizer gives prompt {prompt} other tokens than the training's: "
                f"{theirs.tolist()} instead of {ours.tolist()}"
            )
    worst, largest = (0.0, (0, 0, 0)), 0.0
    for prompt, (tokens, ours) in enumerate(zip(expectation.tokens, expectation.logits, strict=True)):
        difference = np.abs(_torch_logits(model, tokens) - ours)
        if not np.isfinite(difference).all():
            raise CheckpointError("the export cannot be verified: the model's logits are not all finite")
        position, token = np.unravel_index(difference.argmax(), difference.shape)
        worst = max(worst, (float(difference.max()), (prompt, int(position), int(token))))
        largest = max(largest, float(np.abs(ours).max()))
    if worst[0] > TOLERANCE * largest:
        prompt, position, token = worst[1]
        raise CheckpointError(
            f"the export differs from the model: transformers' logit of token {token} at position {position} "
            f"of prompt {prompt} differs by {worst[0]:.2e}, the largest is {largest:.2e}"
        )
    return Verification(
        worst[0], largest, len(expectation.tokens), sum(len(tokens) for tokens in expectation.tokens)
    )


def _open(directory: Path) -> tuple[PreTrainedTokenizerBase, Any]:
    import torch  # an optional package, see `obstacle`

    transformers.utils.logging.disable_progress_bar()
    offline = {"local_files_only": True, "trust_remote_code": False}
    loaded: Any = transformers.AutoModelForCausalLM.from_pretrained(
        directory, dtype=torch.float32, attn_implementation="eager", output_loading_info=True, **offline
    )
    model, info = loaded
    if any(info.values()):
        raise CheckpointError(f"transformers does not read the export as it was written: {info}")
    return transformers.AutoTokenizer.from_pretrained(directory, **offline), model.eval()


def _torch_logits(model: Any, tokens: np.ndarray) -> np.ndarray:
    import torch  # an optional package, see `obstacle`

    with torch.no_grad():
        return model(input_ids=torch.from_numpy(tokens[None].astype(np.int64))).logits[0].numpy()


def _probes(tokenizer: PreTrainedTokenizerBase) -> Sequence[np.ndarray]:
    """Tokens of each prompt: questions rendered by the template, and a text without it."""
    questions = [tokenize_prompt([Message("user", question)], tokenizer) for question in _QUESTIONS]
    return [*questions, np.asarray(tokenizer(_TEXT)["input_ids"], np.int32)]
