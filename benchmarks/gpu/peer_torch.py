"""Scoring and training speed of PyTorch on one GPU: the peers of this project's own loops.

  score      per-example losses and prompt embeddings: packed, compiled, logits of target positions only
  published  the losses of the published pipeline: transformers, batches of 8 in file order, whole logits
  lora       a training step: rank-16 adapters on all seven matrices, frozen bfloat16 base
  full       a training step: all parameters, float32 master weights, bfloat16 matrix products

usage: python -m benchmarks gpu.peer_torch --job score --shape 8b --lengths lengths.npz --out score.json

`--lengths` has two arrays of int: `tokens_n`, tokens per example, and `targets_n`, how many of them, the last
ones, are targets. Token ids and weights are random. Rotary angles are without Llama 3's scaling.

Axes: t position, s segment, n example, d model width, f MLP width, v vocabulary, h query heads, k key/value
heads, c chunk of targets, m slot of a chunk.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

PEAK_FLOPS = 989e12  # per second, dense bfloat16, H100 and H200
CHUNK, CHUNK_MULTIPLE = 4096, 256  # target positions whose logits exist at one time
RANK, ADAPTER_SCALE = 16, 2.0
TOKENS_PER_BATCH = {"score": 16384, "published": 16384, "lora": 8192, "full": 16384}
OPTIMIZER = "fused AdamW, float32 state and master weights, gradients clipped by global norm"


class Shape(NamedTuple):
    """The dimensions of a Llama model."""

    d: int
    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    mlp: int
    vocab: int
    tied: bool

    @property
    def matrices(self) -> dict[str, tuple[int, list[int]]]:
        """(inputs, outputs of its parts) by matrix of a layer; parts with the same input are one matrix."""
        q, k = self.heads * self.head_dim, self.kv_heads * self.head_dim
        return {
            "qkv": (self.d, [q, k, k]),
            "out": (q, [self.d]),
            "gate_up": (self.d, [self.mlp, self.mlp]),
            "down": (self.mlp, [self.d]),
        }


SHAPES = {
    "8b": Shape(4096, 32, 32, 8, 128, 14336, 128256, tied=False),
    "1b": Shape(2048, 16, 32, 8, 64, 8192, 128256, tied=True),
    "tiny": Shape(64, 2, 4, 2, 16, 160, 512, tied=True),
}


class Model(NamedTuple):
    """All weights, matrices as [out, in]. A layer's adapters are `NAME_a` and `NAME_b0`, `NAME_b1` ..."""

    embed_vd: Tensor
    layers: list[dict[str, Tensor]]
    norm_d: Tensor
    unembed_vd: Tensor


class Work(NamedTuple):
    """What a batch computes: real tokens, targets, and pairs of positions i >= j within an example."""

    tokens: int
    targets: int
    pairs: int

    def flops(self, shape: Shape, job: str) -> float:
        """Multiplications and additions that the batch needs, without what is recomputed."""
        sizes = shape.layers * np.array(
            [(a * sum(b), len(b) * a + sum(b)) for a, b in shape.matrices.values()]
        )
        (elements, adapters), head = sizes.sum(0), shape.vocab * shape.d * self.targets
        attention = shape.heads * shape.head_dim * self.pairs * shape.layers
        if job == "full":
            return 6.0 * elements * self.tokens + 6.0 * head + 12.0 * attention
        if job == "lora":
            return (4.0 * elements + 6.0 * RANK * adapters) * self.tokens + 4.0 * head + 12.0 * attention
        return 2.0 * elements * self.tokens + 2.0 * head + 4.0 * attention


class Pack(NamedTuple):
    """Examples one after the other. A last segment, of no example, fills a pack up to a fixed length."""

    tokens_t: Tensor
    positions_t: Tensor
    starts_s: Tensor  # int32, of each segment, then the number of positions
    ruler: Tensor  # as long as the longest segment: compiled code takes a size, not an int, as a variable
    segment_t: Tensor
    prompt_weight_t: Tensor  # 1 / prompt length at prompt positions, else 0
    rows_cm: Tensor  # positions whose next token is a target; 0 in slots past the last one
    targets_cm: Tensor  # those next tokens
    example_cm: Tensor
    weight_cm: Tensor  # 1 / number of targets of the example; 0 in slots past the last target
    work: Work


# `attend(q_thd, k_tkd, v_tkd, places)`, and the function that makes `places` of a pack.
Attention = tuple[Callable[[Tensor, Tensor, Tensor, Any], Tensor], Callable[[Pack], Any]]


def plan(tokens_n: np.ndarray, size: int) -> list[list[int]]:
    """Batches of example indices: longest first, the rest of each batch filled from the shortest examples."""
    if tokens_n.max() > size:
        sys.exit(f"--tokens-per-batch {size}: the longest example has {tokens_n.max()} tokens. Raise it.")
    order, batches = np.argsort(-tokens_n, kind="stable").tolist(), []
    while order:
        batch, room = [], size
        for end in (0, -1):
            while order and tokens_n[order[end]] <= room:
                room -= int(tokens_n[order[end]])
                batch.append(order.pop(end))
        batches.append(batch)
    return batches


def work_of(tokens_n: np.ndarray, targets_n: np.ndarray) -> Work:
    """The counts of some examples."""
    return Work(int(tokens_n.sum()), int(targets_n.sum()), int((tokens_n * (tokens_n + 1) // 2).sum()))


def dynamic(x: Tensor) -> Tensor:
    """The tensor, whose first size becomes a variable of compiled code."""
    torch._dynamo.maybe_mark_dynamic(x, 0)
    return x


def make_pack(tokens_n: np.ndarray, targets_n: np.ndarray, ids_t: np.ndarray, device: torch.device) -> Pack:
    """A pack of examples of `tokens_n` tokens; `ids_t` has the ids of all, then of the filling.

    tokens_n [3, 2], targets_n [1, 1], 6 ids  ->  starts_s [0, 3, 5, 6], positions_t [0, 1, 2, 0, 1, 0],
      rows_cm [[1, 3, 0, ...]], prompt_weight_t [.5, .5, 0, 1, 0, 0]
    """
    filling = len(ids_t) - int(tokens_n.sum())
    lengths_s = np.append(tokens_n, filling) if filling else tokens_n
    prompt_s = np.append(tokens_n - targets_n, filling)
    starts_s = np.append(0, np.cumsum(lengths_s))
    segment_t = np.repeat(np.arange(len(lengths_s)), lengths_s)
    positions_t = np.arange(len(ids_t)) - starts_s[segment_t]
    is_prompt_t = positions_t < prompt_s[segment_t]
    prompt_weight_t = is_prompt_t * (segment_t < len(tokens_n)) / prompt_s[segment_t]
    targets = np.flatnonzero(~is_prompt_t)
    chunks = -(-len(targets) // CHUNK)
    slots = -(-len(targets) // (chunks * CHUNK_MULTIPLE)) * CHUNK_MULTIPLE

    def tensor(values: np.ndarray, dtype: torch.dtype = torch.int64) -> Tensor:
        return torch.tensor(values, dtype=dtype, device=device)

    def chunked(values: np.ndarray, dtype: torch.dtype = torch.int64) -> Tensor:
        return tensor(np.pad(values, (0, chunks * slots - len(values))).reshape(chunks, slots), dtype)

    example = segment_t[targets]
    rows_cm, targets_cm, example_cm = (chunked(values) for values in (targets - 1, ids_t[targets], example))
    return Pack(
        tensor(ids_t),
        tensor(positions_t),
        dynamic(tensor(starts_s, torch.int32)),
        dynamic(tensor(np.zeros(lengths_s.max()), torch.int8)),
        tensor(segment_t),
        tensor(prompt_weight_t, torch.float32),
        rows_cm,
        targets_cm,
        example_cm,
        chunked(1 / targets_n[example], torch.float32),
        work_of(tokens_n, targets_n),
    )


def make_model(shape: Shape, device: torch.device, dtype: torch.dtype, job: str) -> Model:
    """Random weights in `dtype`, made on the device. `lora` adds float32 adapters."""

    def matrix(*size: int, dtype: torch.dtype = dtype, grad: bool = job == "full") -> Tensor:
        return torch.empty(size, dtype=dtype, device=device).normal_(std=0.02).requires_grad_(grad)

    adapter = partial(matrix, dtype=torch.float32, grad=True)
    embed_vd, layers = matrix(shape.vocab, shape.d), []
    norms = [torch.ones_like(embed_vd[0], requires_grad=job == "full") for _ in range(2 * shape.layers + 1)]
    for number in range(shape.layers):
        weights = {"attention_norm": norms[2 * number], "mlp_norm": norms[2 * number + 1]}
        for name, (inputs, parts) in shape.matrices.items():
            weights[name] = matrix(sum(parts), inputs)
            if job == "lora":
                weights[f"{name}_a"] = adapter(RANK * len(parts), inputs)
                weights |= {f"{name}_b{i}": adapter(part, RANK) for i, part in enumerate(parts)}
        layers.append(weights)
    return Model(embed_vd, layers, norms[-1], embed_vd if shape.tied else matrix(shape.vocab, shape.d))


def trained(model: Model) -> list[Tensor]:
    """The tensors that need gradients, each once."""
    tensors = [model.embed_vd, model.norm_d, model.unembed_vd, *(x for w in model.layers for x in w.values())]
    return list({id(x): x for x in tensors if x.requires_grad}.values())


def rms_norm(x_td: Tensor, weight_d: Tensor) -> Tensor:
    """Root-mean-square norm."""
    return F.rms_norm(x_td, x_td.shape[-1:], weight_d.to(x_td.dtype), 1e-5)


def make_layer(
    shape: Shape, attend: Callable[[Tensor, Tensor, Tensor, Any], Tensor]
) -> Callable[..., Tensor]:
    """The function of one layer. Weights are its arguments, so that all layers share one compilation."""

    def project(x: Tensor, weights: dict[str, Tensor], name: str) -> list[Tensor]:
        parts = shape.matrices[name][1]
        outputs = list(F.linear(x, weights[name].to(x.dtype)).split(parts, -1))
        if f"{name}_a" in weights:
            lows = F.linear(x, weights[f"{name}_a"].to(x.dtype)).chunk(len(parts), -1)
            for i, low in enumerate(lows):
                outputs[i] = outputs[i] + ADAPTER_SCALE * F.linear(low, weights[f"{name}_b{i}"].to(x.dtype))
        return outputs

    def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        low, high = x.unflatten(-1, (-1, shape.head_dim)).float().chunk(2, -1)
        return torch.cat([low * cos - high * sin, high * cos + low * sin], -1).to(x.dtype)

    def layer(x_td: Tensor, weights: dict[str, Tensor], cos: Tensor, sin: Tensor, places: Any) -> Tensor:
        q, k, v = project(rms_norm(x_td, weights["attention_norm"]), weights, "qkv")
        v_tkd = v.unflatten(-1, (-1, shape.head_dim))
        attended = attend(rotate(q, cos, sin), rotate(k, cos, sin), v_tkd, places).flatten(-2)
        x_td = x_td + project(attended, weights, "out")[0]
        gate_tf, up_tf = project(rms_norm(x_td, weights["mlp_norm"]), weights, "gate_up")
        return x_td + project(F.silu(gate_tf) * up_tf, weights, "down")[0]

    return layer


def hidden_states(
    model: Model,
    pack: Pack,
    places: Any,
    runs: Sequence[Callable[..., Tensor]],
    head_dim: int,
    dtype: torch.dtype,
) -> Tensor:
    """[t, d] after the final norm. `runs` has the function of each layer."""
    x_td = F.embedding(pack.tokens_t, model.embed_vd).to(dtype)
    if torch.is_grad_enabled() and not x_td.requires_grad:
        x_td.requires_grad_()  # A first layer whose input alone needs no gradient would be compiled again.
    powers = torch.arange(0, head_dim, 2, device=x_td.device) / head_dim
    angles = pack.positions_t[:, None, None].float() * 500_000.0**-powers
    cos, sin = angles.cos(), angles.sin()
    for run, weights in zip(runs, model.layers, strict=True):
        x_td = run(x_td, weights, cos, sin, places)
    return rms_norm(x_td, model.norm_d)


def chunk_loss(
    hidden_md: Tensor, unembed_vd: Tensor, targets_m: Tensor, weight_m: Tensor, gradients: int
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """(weighted losses, float32 [m]; gradients of their sum by the hidden states and by the unembedding).

    `gradients`: 0 computes neither, 1 that by the hidden states, 2 both.
    """
    logits_mv = F.linear(hidden_md, unembed_vd).float()
    shifted_mv = logits_mv - logits_mv.amax(-1, keepdim=True)
    sum_m1 = shifted_mv.exp().sum(-1, keepdim=True)
    loss_m = (sum_m1.log() - shifted_mv.gather(-1, targets_m[:, None]))[:, 0] * weight_m
    if not gradients:
        return loss_m, None, None
    is_target_mv = torch.arange(len(unembed_vd), device=targets_m.device) == targets_m[:, None]
    d_logits_mv = (shifted_mv.exp() / sum_m1 - is_target_mv.float()) * weight_m[:, None]
    d_logits_mv = d_logits_mv.to(hidden_md.dtype)
    return loss_m, d_logits_mv @ unembed_vd, d_logits_mv.T @ hidden_md if gradients == 2 else None


class ChunkedLoss(torch.autograd.Function):
    """Mean loss of a pack's targets. The gradient of each chunk is computed while its logits exist."""

    @staticmethod
    def forward(ctx: Any, hidden_td: Tensor, unembed_vd: Tensor, pack: Pack, chunk: Callable) -> Tensor:
        """float32 scalar. `chunk` is `chunk_loss`, compiled."""
        trains_head, head_vd = ctx.needs_input_grad[1], unembed_vd.to(hidden_td.dtype)
        loss = hidden_td.new_zeros((), dtype=torch.float32)
        ctx.d_hidden_td = torch.zeros_like(hidden_td)
        ctx.d_unembed_vd = torch.zeros_like(unembed_vd) if trains_head else None
        weight_cm = (pack.weight_cm > 0) / pack.work.targets
        for rows_m, targets_m, weight_m in zip(pack.rows_cm, pack.targets_cm, weight_cm, strict=True):
            slots = map(dynamic, (targets_m, weight_m))
            chunked = chunk(dynamic(hidden_td[rows_m]), head_vd, *slots, 2 if trains_head else 1)
            loss += chunked[0].sum()
            ctx.d_hidden_td.index_add_(0, rows_m, chunked[1])
            if trains_head:
                ctx.d_unembed_vd += chunked[2]
        return loss

    @staticmethod
    def backward(ctx: Any, d_loss: Tensor) -> tuple[Tensor | None, ...]:
        """The gradients of the forward pass times that of the loss."""
        d_unembed_vd = None if ctx.d_unembed_vd is None else ctx.d_unembed_vd.mul_(d_loss)
        return ctx.d_hidden_td.mul_(d_loss), d_unembed_vd, None, None


def example_scores(
    hidden_td: Tensor, unembed_vd: Tensor, pack: Pack, chunk: Callable
) -> tuple[Tensor, Tensor]:
    """(mean loss per segment [s], mean hidden state of each segment's prompt [s, d]), float32."""
    loss_s = hidden_td.new_zeros(len(pack.starts_s) - 1, dtype=torch.float32)
    chunks = zip(pack.rows_cm, pack.targets_cm, pack.weight_cm, pack.example_cm, strict=True)
    for rows_m, targets_m, weight_m, example_m in chunks:
        slots = map(dynamic, (targets_m, weight_m))
        loss_s.index_add_(0, example_m, chunk(dynamic(hidden_td[rows_m]), unembed_vd, *slots, 0)[0])
    embedding_sd = hidden_td.new_zeros((len(loss_s), hidden_td.shape[1]), dtype=torch.float32)
    return loss_s, embedding_sd.index_add_(0, pack.segment_t, hidden_td * pack.prompt_weight_t[:, None])


def make_attention(name: str, device: torch.device) -> Attention:
    """`masked` is the definition: a dense mask. `varlen` is flash attention; `flex` has a mask of blocks."""
    if name == "varlen":
        from torch.nn.attention.varlen import varlen_attn

        def varlen(q_thd: Tensor, k_tkd: Tensor, v_tkd: Tensor, places: tuple[Tensor, Tensor]) -> Tensor:
            segments = places[0], places[0], places[1].shape[0], places[1].shape[0]
            return varlen_attn(q_thd, k_tkd, v_tkd, *segments, window_size=(-1, 0))  # takes grouped heads

        return varlen, lambda pack: (pack.starts_s, pack.ruler)
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    build = torch.compile(create_block_mask) if device.type == "cuda" else create_block_mask

    def attend(q_thd: Tensor, k_tkd: Tensor, v_tkd: Tensor, mask: Any) -> Tensor:
        q, k, v = (x.transpose(0, 1)[None] for x in (q_thd, k_tkd, v_tkd))
        if name == "masked":
            return F.scaled_dot_product_attention(q, k, v, mask, enable_gqa=True)[0].transpose(0, 1)
        q, k, v = (x.contiguous() for x in (q, k, v))
        return flex_attention(q, k, v, block_mask=mask, enable_gqa=True)[0].transpose(0, 1)

    def places(pack: Pack) -> Any:
        size = len(segment_t := pack.segment_t)
        if name == "masked":
            return (segment_t[:, None] == segment_t).tril()
        return build(
            lambda b, h, i, j: (i >= j) & (segment_t[i] == segment_t[j]), None, None, size, size, device
        )

    return attend, places


def self_test(attention: Attention, shape: Shape, device: torch.device, backward: bool) -> None:
    """Compares a small pack with the dense mask in float32, on the device. Exits where they differ."""
    lengths_n = np.array([150, 2, 3, 90])
    pack = make_pack(lengths_n, lengths_n - 1, np.zeros(256, np.int64), device)
    sizes = [(256, heads, shape.head_dim) for heads in (shape.heads, shape.kv_heads, shape.kv_heads)]
    inputs = [torch.randn(size, device=device).bfloat16().requires_grad_(backward) for size in sizes]

    def values(attend: Callable, places: Callable, dtype: torch.dtype) -> list[Tensor]:
        out = attend(*(x.to(dtype) for x in inputs), places(pack)).float()
        return [out, *(torch.autograd.grad(out.square().sum(), inputs) if backward else ())]

    found = values(torch.compile(attention[0], fullgraph=True), attention[1], torch.bfloat16)
    exact = values(*make_attention("masked", device), torch.float32)
    for name, a, b in zip(("output", "dq", "dk", "dv"), found, exact, strict=False):
        difference = ((a - b).abs().max() / b.abs().max()).item()
        if not difference < 0.05:
            sys.exit(f"attention: {name} differs from a dense mask by {difference:.3g} of its maximum")


def choose_attention(wanted: str, shape: Shape, device: torch.device, backward: bool) -> dict[str, str]:
    """The name and the reason. On a GPU varlen, or flex where that is missing or raises; on a CPU masked."""
    reason, known = "passed its self-test", ("varlen", "flex") if device.type == "cuda" else ("masked",)
    for name in known if wanted == "auto" else (wanted,):
        try:
            self_test(make_attention(name, device), shape, device, backward)
        except Exception as error:
            reason = f"{name} failed: {type(error).__name__}: {error}"[:1000]
            continue
        print(f"attention: {name} ({reason})", file=sys.stderr, flush=True)
        return {"attention": name, "attention_reason": reason}
    sys.exit(f"attention: {reason}")


def spread(batches: list[list[int]], steps: int) -> list[list[int]]:
    """The first and the last batch, to warm up, then `steps` evenly spread. The rest is left out."""
    batches = batches[:-1] or batches
    return [
        batches[0],
        batches[-1],
        *(batches[i] for i in np.linspace(0, len(batches) - 1, steps).astype(int)),
    ]


def measure(step: Callable, batches: list[Any], works: list[Work], shape: Shape, job: str) -> dict[str, Any]:
    """Medians over all batches but the first two; each is timed from an idle device to an idle device."""
    wait = torch.cuda.synchronize if torch.cuda.is_available() else lambda: None
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
    counters, seconds, losses, compiled = torch._dynamo.utils.counters["stats"], [], [], 0
    for number, batch in enumerate(batches):
        compiled = compiled if number > 2 else counters["unique_graphs"]
        wait()
        began = time.perf_counter()
        loss = step(batch)
        wait()
        seconds.append(time.perf_counter() - began)
        losses.append(float(loss))
    if not all(abs(loss - np.log(shape.vocab)) < 3 for loss in losses):
        sys.exit(f"losses {losses}: random weights give about {np.log(shape.vocab):.1f}")
    timed = list(zip(works, seconds, strict=True))[2:]
    return {
        "seconds_per_batch": statistics.median(seconds[2:]),
        "tokens_per_second": statistics.median(work.tokens / s for work, s in timed),
        "share_of_peak": statistics.median(work.flops(shape, job) / s / PEAK_FLOPS for work, s in timed),
        "tokens_per_batch": statistics.mean(work.tokens for work, _ in timed),
        "targets_per_batch": statistics.mean(work.targets for work, _ in timed),
        "compilations_while_timed": counters["unique_graphs"] - compiled,
        "seconds": seconds,
        "losses": losses,
    }


def kept_layers(shape: Shape, tokens: int, parameters: list[Tensor], device: torch.device) -> int:
    """Layers whose activations fit beside gradients, optimizer state and a chunk's logits."""
    if device.type != "cuda":
        return shape.layers
    layer = 2 * tokens * sum(inputs + sum(parts) for inputs, parts in shape.matrices.values())
    rest = 12 * sum(x.numel() for x in parameters) + 8 * CHUNK * shape.vocab + 12 * tokens * shape.mlp
    return max(0, min(shape.layers, int((0.95 * torch.cuda.mem_get_info()[0] - rest) / layer)))


def published_job(
    tokens_n: np.ndarray,
    targets_n: np.ndarray,
    shape: Shape,
    arguments: argparse.Namespace,
    device: torch.device,
) -> dict[str, Any]:
    """Padded batches of 8 in file order, whole logits in float32."""
    from transformers import AutoModelForCausalLM, LlamaConfig

    config = LlamaConfig(
        vocab_size=shape.vocab,
        hidden_size=shape.d,
        intermediate_size=shape.mlp,
        num_hidden_layers=shape.layers,
        num_attention_heads=shape.heads,
        num_key_value_heads=shape.kv_heads,
        head_dim=shape.head_dim,
        tie_word_embeddings=shape.tied,
    )
    with device:
        model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16, attn_implementation="sdpa")
    model.to(device).eval()

    @torch.no_grad()
    def step(batch: list[int]) -> float:
        ids = torch.zeros((len(batch), tokens_n[batch].max()), dtype=torch.long)
        labels, mask = torch.full_like(ids, -100), torch.zeros_like(ids)
        for row, (end, targets) in enumerate(zip(tokens_n[batch], targets_n[batch], strict=True)):
            ids[row, :end], mask[row, :end] = torch.randint(shape.vocab, (end,)), 1
            labels[row, end - targets : end] = ids[row, end - targets : end]
        ids, labels, mask = ids.to(device), labels.to(device), mask.to(device)
        logits, target = model(input_ids=ids, attention_mask=mask).logits[:, :-1], labels[:, 1:]
        nll = F.cross_entropy(logits.reshape(-1, shape.vocab).float(), target.reshape(-1), reduction="none")
        keep = target != -100
        return statistics.mean(((nll.view(target.shape) * keep).sum(-1) / keep.sum(-1)).tolist())

    eights = [list(range(i, min(i + 8, len(tokens_n)))) for i in range(0, len(tokens_n), 8)]
    batches = spread(eights, arguments.steps)
    works = [work_of(tokens_n[batch], targets_n[batch]) for batch in batches]
    return {"attention": "sdpa, padding mask"} | measure(step, batches, works, shape, "published")


def check_packed(
    model: Model,
    pack: Pack,
    place: Any,
    run: Callable[..., Tensor],
    shape: Shape,
    dtype: torch.dtype,
) -> None:
    """Compares one layer of a packed example with the example alone, uncompiled, under a dense mask."""
    one, n = model._replace(layers=model.layers[:1]), len(pack.starts_s) // 2 - 1
    begin, end = pack.starts_s[n : n + 2].tolist()
    tokens_t, device = pack.tokens_t[begin:end].cpu().numpy(), pack.tokens_t.device
    attend_densely, mask = make_attention("masked", device)
    alone = make_pack(np.array([end - begin]), np.ones(1, int), tokens_t, device)
    layer = make_layer(shape, attend_densely)
    wanted = hidden_states(one, alone, mask(alone), [layer], shape.head_dim, dtype)
    found = hidden_states(one, pack, place, [run], shape.head_dim, dtype)[begin:end]
    difference = ((found - wanted).norm() / wanted.norm()).item()
    if not difference < 0.05:
        sys.exit(f"a packed example differs from itself alone by {difference:.3g} of its hidden states' norm")


def packed_job(
    tokens_n: np.ndarray,
    targets_n: np.ndarray,
    shape: Shape,
    arguments: argparse.Namespace,
    device: torch.device,
) -> dict[str, Any]:
    """`score`, `lora` and `full`."""
    job, size = arguments.job, arguments.tokens_per_batch or TOKENS_PER_BATCH[arguments.job]
    rng, dtype = np.random.default_rng(0), torch.bfloat16 if device.type == "cuda" else torch.float32
    packs = [
        make_pack(tokens_n[batch], targets_n[batch], rng.integers(0, shape.vocab, size), device)
        for batch in spread(plan(tokens_n, size), arguments.steps)
    ]
    found = choose_attention(arguments.attention, shape, device, backward=job != "score")
    attend, places = make_attention(found["attention"], device)
    model = make_model(shape, device, torch.float32 if job == "full" else dtype, job)
    run = torch.compile(make_layer(shape, attend), fullgraph=True)
    chunk = torch.compile(chunk_loss, fullgraph=True)

    def hidden(pack: Pack, runs: Sequence[Callable[..., Tensor]]) -> Tensor:
        return hidden_states(model, pack, places(pack), runs, shape.head_dim, dtype)

    @torch.inference_mode()
    def score(pack: Pack) -> Tensor:
        loss_s, _ = example_scores(hidden(pack, [run] * shape.layers), model.unembed_vd, pack, chunk)
        return loss_s.sum() / (loss_s > 0).sum()  # The filling has no loss.

    works = [pack.work for pack in packs]
    with torch.inference_mode(job == "score"):
        check_packed(model, packs[0], places(packs[0]), run, shape, dtype)
    if job == "score":
        return found | measure(score, packs, works, shape, job)
    parameters = trained(model)
    optimizer = torch.optim.AdamW(parameters, lr=1e-5, fused=True)
    recomputed = partial(checkpoint, run, use_reentrant=False, preserve_rng_state=False)

    def train(kept: int, pack: Pack) -> Tensor:
        hidden_td = hidden(pack, [run] * kept + [recomputed] * (shape.layers - kept))
        loss = ChunkedLoss.apply(hidden_td, model.unembed_vd, pack, chunk)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0, foreach=True)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return loss.detach()

    for kept in (kept_layers(shape, size, parameters, device), 0):
        try:
            found |= {"layers_recomputed": shape.layers - kept, "optimizer": OPTIMIZER}
            return found | measure(partial(train, kept), packs, works, shape, job)
        except torch.OutOfMemoryError as error:
            print(
                f"out of memory with {kept} layers kept; recomputing all: {error}",
                file=sys.stderr,
                flush=True,
            )
        optimizer.zero_grad(set_to_none=True)
        torch.cuda.empty_cache()
    sys.exit("out of memory with all layers recomputed. Lower --tokens-per-batch.")


def main() -> None:
    """Runs one job, writes its JSON and prints it as one line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--job", required=True, choices=sorted(TOKENS_PER_BATCH))
    parser.add_argument("--shape", required=True, choices=sorted(SHAPES))
    parser.add_argument("--lengths", required=True, type=Path)
    parser.add_argument("--out", required=True, type=Path)
    parser.add_argument(
        "--steps", type=int, default=10, help="batches that are timed, after two that are not"
    )
    parser.add_argument("--tokens-per-batch", type=int, help=f"default: {TOKENS_PER_BATCH}")
    parser.add_argument("--attention", default="auto", choices=("auto", "varlen", "flex", "masked"))
    arguments, began = parser.parse_args(), time.perf_counter()
    on_gpu = torch.cuda.is_available()
    if not on_gpu and arguments.shape != "tiny":
        sys.exit(f"--shape {arguments.shape} needs a GPU, and torch {torch.__version__} sees none.")
    with np.load(arguments.lengths) as file:
        tokens_n, targets_n = (file[name].astype(np.int64) for name in ("tokens_n", "targets_n"))
    if len(tokens_n) != len(targets_n) or not ((targets_n > 0) & (targets_n < tokens_n)).all():
        sys.exit(f"{arguments.lengths}: each example needs a target, and a token before the first target.")
    torch.manual_seed(0)
    job = published_job if arguments.job == "published" else packed_job
    found = job(
        tokens_n, targets_n, SHAPES[arguments.shape], arguments, torch.device("cuda" if on_gpu else "cpu")
    )
    device = torch.cuda.get_device_name() if on_gpu else "cpu"
    head = {"job": arguments.job, "shape": arguments.shape, "device": device, "torch": torch.__version__}
    peak = {"peak_bytes": torch.cuda.max_memory_allocated() if on_gpu else None}
    text = json.dumps(head | found | peak | {"process_seconds": time.perf_counter() - began})
    arguments.out.write_text(text + "\n", encoding="utf-8")
    print(text)


if __name__ == "__main__":
    main()
