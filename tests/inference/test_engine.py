"""Laws of generation: the cache changes nothing, and an answer depends on its request alone."""

from __future__ import annotations

import dataclasses
import functools
import math
import re
import threading
from collections.abc import Iterator

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec
from support.forward import forward
from support.tiny_model import FAMILIES, write_tiny_model

from middo_jax.config import MeshSettings
from middo_jax.inference import engine as engine_module
from middo_jax.inference import programs
from middo_jax.inference.engine import Engine
from middo_jax.inference.programs import CHUNK, PromptChunk, made_cache
from middo_jax.inference.sampling import Request, Sampling, keep_likely, sample
from middo_jax.inference.slots import Completion
from middo_jax.models.config import DecoderConfig, LayerKind, LinearRope
from middo_jax.models.decoder import Decoder, KVCache, split
from middo_jax.models.loading import load, locate
from middo_jax.models.model import Model, bound
from middo_jax.parallel.mesh import fitting_spec, make_mesh

CONFIG = DecoderConfig(
    vocab_size=97,
    hidden_size=32,
    intermediate_size=64,
    num_layers=2,
    num_heads=4,
    num_kv_heads=2,
    head_dim=8,
    max_position_embeddings=512,
    tie_word_embeddings=True,
)
# Layers of two kinds, and everything else in which a family may differ.
LOCAL_CONFIG = dataclasses.replace(
    CONFIG,
    num_layers=3,
    kinds=(LayerKind(window=20), LayerKind(rope_theta=1e6, rope_scaling=LinearRope(8.0))),
    kind_of_layer=(0, 1, 0),
    hidden_act="gelu_tanh",
    qkv_bias=True,
    qk_norm=True,
    post_norms=True,
    norm_offset=1.0,
    embed_scale=0.5,
    query_scale=0.3,
    attention_soft_cap=20.0,
    final_soft_cap=30.0,
)
CONTEXT = 200  # neither a power of two nor a multiple of one


def random_model(config: DecoderConfig):
    """Random parameters, ten times the usual size: at the usual size every answer repeats one token."""
    graphdef, params = split(Decoder(config, jax.random.key(0)))
    return graphdef, jax.tree.map(lambda x: 10 * x, params)


@pytest.fixture(scope="module")
def model():
    return random_model(CONFIG)


@pytest.fixture(scope="module")
def local_model():
    return random_model(LOCAL_CONFIG)


@pytest.fixture(scope="module")
def engine(model) -> Iterator[Engine]:
    with Engine(*model, max_batch=3, max_context=CONTEXT) as engine:
        yield engine


read_whole = jax.jit(forward, static_argnums=0)


def prompt(length: int, seed: int = 0) -> list[int]:
    return np.random.default_rng([length, seed]).integers(0, CONFIG.vocab_size, length).tolist()


def engine_of(model: Model, **sizes: int) -> Engine:
    return Engine(model.graphdef, model.params, **sizes)


def full_forward_greedy(model, tokens: list[int], count: int) -> list[int]:
    """Greedy decoding without a cache: the whole text is read again for every token."""
    graphdef, params = model
    tokens, length = list(tokens), len(tokens)
    for _ in range(count):
        padded = np.zeros((1, CONTEXT), np.int32)
        padded[0, : len(tokens)] = tokens
        segments = np.where(np.arange(CONTEXT) < len(tokens), 0, -1)[None]
        hidden = read_whole(graphdef, params, padded, segments, np.arange(CONTEXT)[None])
        logits = bound(graphdef, params).unembed(hidden[:, len(tokens) - 1])
        tokens.append(int(jnp.argmax(logits)))
    return tokens[length:]


@pytest.mark.parametrize("length", [1, 31, 32, 33, 100, 190])
def test_greedy_decoding_with_the_cache_is_greedy_decoding_without(model, engine, length):
    request = Request(prompt(length), max_tokens=10)
    expected = full_forward_greedy(model, prompt(length), 10)
    assert engine.generate([request]) == [Completion(expected, "length")]
    assert len(set(expected)) > 3, "the law says little of an answer that repeats itself"


def test_so_it_is_with_windows(local_model):
    with Engine(*local_model, max_batch=3, max_context=CONTEXT) as engine:
        for length in (15, 100):
            expected = full_forward_greedy(local_model, prompt(length), 15)
            assert engine.generate([Request(prompt(length), max_tokens=15)]) == [
                Completion(expected, "length")
            ]
            assert len(set(expected)) > 3


def mixed_requests() -> list[Request]:
    """Greedy and sampled in every way, of several lengths; more than the engine has slots."""
    ways = [
        {},
        {"temperature": 1.0},
        {"temperature": 0.7, "top_p": 0.8},
        {"temperature": 1.3, "top_k": 5},
        {"temperature": 0.9, "top_p": 0.9, "top_k": 20},
    ]
    return [
        Request(prompt(5 + 23 * i, i), max_tokens=4 + 5 * i, seed=i // 2, **ways[i % len(ways)])
        for i in range(8)
    ]


def test_an_answer_depends_on_its_request_alone(engine):
    requests = mixed_requests()
    alone = [engine.generate([request])[0] for request in requests]
    assert engine.generate(requests) == alone
    assert engine.generate(requests[::-1]) == alone[::-1]
    assert len({tuple(completion.tokens[:4]) for completion in alone}) > 5


def test_a_prompt_that_begins_like_another_has_the_same_answer(model, monkeypatch):
    """Whole chunks are copied from the slots of earlier requests, busy or free, and nothing changes."""
    read = []
    prefill = engine_module.prefill
    monkeypatch.setattr(
        engine_module, "prefill", lambda *args: read.append(int(args[3].n_tokens)) or prefill(*args)
    )
    long = 3 * CHUNK + 7
    stem = prompt(2 * CHUNK + 40)
    prompts = [stem + prompt(long - len(stem), seed) for seed in range(4)] + [stem[: CHUNK + 1], stem[:CHUNK]]
    requests = [Request(tokens, max_tokens=6) for tokens in prompts]
    with Engine(*model, max_batch=2, max_context=512) as engine:
        alone = []
        for request in requests:
            with Engine(*model, max_batch=1, max_context=512) as fresh:
                alone += fresh.generate([request])
        whole = sum(read)
        assert whole == sum(map(len, prompts))
        assert engine.generate(requests) == alone
        # Two come at once and are read whole; of what follows, two more share two chunks and one shares one.
        assert sum(read) - whole <= whole - 5 * CHUNK
        assert engine.generate(requests[::-1]) == alone[::-1]
    assert len({tuple(completion.tokens) for completion in alone}) > 4


def test_a_long_prompt_does_not_keep_others_waiting(model, monkeypatch):
    """Between two decode steps at most CHUNKS_PER_STEP chunks of a prompt are read."""
    steps = []
    for name in ("prefill", "decode"):
        run = getattr(engine_module, name)
        monkeypatch.setattr(engine_module, name, lambda *args, n=name, run=run: steps.append(n) or run(*args))
    monkeypatch.setattr(engine_module, "CHUNKS_PER_STEP", 1)
    with Engine(*model, max_batch=2, max_context=512) as engine:
        futures = [engine.submit(Request(prompt(length), max_tokens=12)) for length in (5, 3 * CHUNK + 1)]
        for future in futures:
            future.result(timeout=60)
    text = "".join(name[0] for name in steps)
    assert "pdpdpd" in text
    assert "pp" not in text


@pytest.mark.parametrize("which", ["model", "local_model"])
def test_logits_are_the_same_bits_in_every_slot_among_any_neighbours(which, request):
    graphdef, params = request.getfixturevalue(which)
    layers = bound(graphdef, params).config.num_layers
    read = jax.jit(lambda cache, tokens, at: bound(graphdef, params).hidden_cached(tokens, at, cache)[0])
    rng = np.random.default_rng(0)
    own = rng.normal(size=(2, layers, CONTEXT, CONFIG.num_kv_heads, CONFIG.head_dim))
    seen = set()
    for slot in range(3):
        for neighbours_at in (0, 40, CONTEXT - 1, CONTEXT):
            others = rng.normal(size=(2, layers, 3, *own.shape[2:]))
            others[:, :, slot] = own
            cache = KVCache(*jnp.asarray(others, jnp.float32))
            tokens, positions = rng.integers(0, 97, (3, 1)), np.full((3, 1), neighbours_at)
            tokens[slot], positions[slot] = 7, 60
            seen.add(np.asarray(read(cache, tokens, positions))[slot].tobytes())
    assert len(seen) == 1


@pytest.mark.parametrize("family", ["llama3", "gemma3"])
def test_a_mesh_of_eight_devices_answers_as_one_device_does(tmp_path, family):
    """Greedy and sampled, in every slot, with copied chunks; and each as if it were asked alone."""
    source = locate(write_tiny_model(tmp_path, **FAMILIES[family]))
    requests = [
        dataclasses.replace(request, prompt_tokens=[7] * CHUNK + list(request.prompt_tokens))
        for request in mixed_requests()
    ]
    with engine_of(load(source), max_batch=4, max_context=512) as engine:
        expected = engine.generate(requests)
    mesh = make_mesh(MeshSettings(data=2, fsdp=2, tensor=2))
    with engine_of(load(source, mesh=mesh), max_batch=4, max_context=512) as engine:
        assert engine.generate(requests) == expected
        assert [engine.generate([request])[0] for request in requests] == expected
        spec = PartitionSpec(None, ("data", "fsdp"), None, ("tensor",))
        for x_lbskd in engine._cache:
            assert x_lbskd.sharding.is_equivalent_to(NamedSharding(mesh, spec), 5)
    assert len({tuple(completion.tokens[:4]) for completion in expected}) > 5


def test_slots_and_heads_that_the_mesh_does_not_divide_stay_whole(tmp_path):
    source = locate(write_tiny_model(tmp_path, num_key_value_heads=1))
    request = Request(prompt(40), max_tokens=8)
    with engine_of(load(source), max_batch=3, max_context=CONTEXT) as engine:
        expected = engine.generate([request] * 3)
    mesh = make_mesh(MeshSettings(data=4, fsdp=2, tensor=1))
    with engine_of(load(source, mesh=mesh), max_batch=3, max_context=CONTEXT) as engine:
        assert engine.generate([request] * 3) == expected
        assert engine._cache.keys.sharding.is_fully_replicated
        assert len(engine._cache.keys.sharding.device_set) == 8


@pytest.mark.parametrize("program", ["prefill", "decode", "copy_chunks"])
def test_devices_exchange_rows_of_the_cache_and_never_all_of_it(tmp_path, program):
    """No collective is as large as what two slots hold: whatever it collects is one slot's, or no cache."""
    slots, context = 8, 1024
    mesh = make_mesh(MeshSettings(data=2, fsdp=2, tensor=2))
    loaded = load(locate(write_tiny_model(tmp_path)), mesh=mesh)
    graphdef, params, config = loaded.graphdef, loaded.params, loaded.config
    sampling = [(Request((), 0), 0)]
    with jax.set_mesh(mesh):
        cache = made_cache(config, slots, context)
        one, row = np.int32(1), np.zeros((1, CHUNK), np.int32)
        operands = {
            "prefill": (
                PromptChunk(row, row, one, one, one, np.bool_(True)),
                Sampling.of(sampling),
            ),
            "decode": (np.zeros(slots, np.int32), np.zeros(slots, np.int32), Sampling.of(sampling * slots)),
            "copy_chunks": (one, one, one),
        }[program]
        model = () if program == "copy_chunks" else (graphdef, params)
        compiled = getattr(programs, program).lower(*model, cache, *operands).compile().as_text()
    moved = [
        math.prod(int(n) for n in shape.split(",") if n)
        for line in compiled.splitlines()
        if (found := re.search(r"= (.*?) (?:all-gather|all-reduce|all-to-all|collective-permute)\(", line))
        for shape in re.findall(r"[a-z]+\d*\[([\d,]*)\]", found[1])
    ]
    assert moved
    a_slot = config.num_layers * context * config.num_kv_heads * config.head_dim
    assert max(moved) < 2 * a_slot


def test_an_axis_is_split_as_far_as_it_divides():
    mesh = make_mesh(MeshSettings(data=2, fsdp=2, tensor=2))
    for slots, names in ((8, ("data", "fsdp")), (6, ("data",)), (3, None)):
        assert fitting_spec(mesh, (5, slots, 3), None, "batch", "kv_heads") == PartitionSpec(
            None, names, None
        )
    assert fitting_spec(mesh, (4,), "kv_heads") == PartitionSpec(("tensor",))


def test_a_seed_repeats_an_answer_and_another_seed_changes_it(engine):
    request = Request(prompt(20), max_tokens=16, temperature=1.0, seed=3)
    other = dataclasses.replace(request, seed=4)
    first, second, third = engine.generate([request, request, other])
    assert first == second != third


def test_a_stop_token_ends_the_answer_and_is_not_part_of_it(engine):
    request = Request(prompt(20), max_tokens=30)
    whole = engine.generate([request])[0].tokens
    stop = whole[7]
    stopped = engine.generate([dataclasses.replace(request, stop_ids=frozenset({stop}))])[0]
    assert stopped == Completion(whole[: whole.index(stop)], "stop")
    at_once = engine.generate([dataclasses.replace(request, stop_ids=frozenset({whole[0]}))])[0]
    assert at_once == Completion([], "stop")


def test_an_answer_ends_where_the_context_is_full(model, engine):
    completion = engine.generate([Request(prompt(190), max_tokens=1000)])[0]
    assert completion == Completion(full_forward_greedy(model, prompt(190), 10), "length")
    assert len(engine.generate([Request(prompt(CONTEXT - 1), max_tokens=5)])[0].tokens) == 1


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"prompt_tokens": prompt(CONTEXT)}, r"200 tokens; it must have from 1 to 199"),
        ({"prompt_tokens": []}, r"0 tokens"),
        ({"prompt_tokens": [97]}, r"outside the vocabulary of 97"),
        ({"max_tokens": 0}, r"max_tokens=0"),
        ({"temperature": -1.0}, r"temperature=-1.0"),
        ({"temperature": 1e300}, r"from 0 to 100"),
        ({"temperature": math.nan}, r"temperature=nan"),
        ({"top_p": 0.0}, r"top_p=0.0"),
        ({"top_k": -1}, r"top_k=-1"),
    ],
)
def test_an_impossible_request_is_refused_with_numbers(engine, change, message):
    with pytest.raises(ValueError, match=message):
        engine.submit(dataclasses.replace(Request(prompt(3), max_tokens=1), **change))


def test_a_context_beyond_the_models_positions_is_refused(model):
    with pytest.raises(ValueError, match="max_position_embeddings=512"):
        Engine(*model, max_batch=1, max_context=513)


def test_cancelled_requests_free_their_places(engine):
    futures = [engine.submit(Request(prompt(5), max_tokens=190)) for _ in range(9)]
    assert all(future.cancel() for future in futures[::-1])  # the last ones are in the queue
    assert len(engine.generate([Request(prompt(5), max_tokens=3)])[0].tokens) == 3


def test_closing_fails_what_is_not_answered(model):
    engine = Engine(*model, max_batch=3, max_context=CONTEXT)
    futures = [engine.submit(Request(prompt(5), max_tokens=190)) for _ in range(6)]
    engine.close()
    assert not engine.is_running
    for future in futures[3:]:
        with pytest.raises(RuntimeError, match="closed"):
            future.result(timeout=5)
    with pytest.raises(RuntimeError, match="takes no more requests"):
        engine.submit(Request(prompt(5), max_tokens=1))


def failing_with(run, poison: int, error: Exception):
    """A device program that fails while a slot's last token is `poison`, after its cache is donated."""

    def broken(graphdef, params, cache, tokens, *rest):
        if poison in np.asarray(tokens).tolist():
            for x in cache:
                x.delete()
            raise error
        return run(graphdef, params, cache, tokens, *rest)

    return broken


def test_an_error_fails_its_request_and_no_other(model, engine, monkeypatch):
    """All others get the tokens of an engine in which nothing failed, each of them once."""
    requests = mixed_requests()
    expected = engine.generate(requests)
    only_in_third = set(expected[3].tokens[:-1]).difference(
        *(each.tokens for i, each in enumerate(expected) if i != 3)
    )
    error = FloatingPointError("device lost")
    monkeypatch.setattr(engine_module, "decode", failing_with(programs.decode, only_in_third.pop(), error))
    with Engine(*model, max_batch=3, max_context=CONTEXT) as fresh:
        seen = [[] for _ in requests]
        futures = [fresh.submit(request, steps.append) for request, steps in zip(requests, seen, strict=True)]
        assert futures[3].exception(timeout=60) is error
        for i, future in enumerate(futures):
            if i != 3:
                assert future.result(timeout=60) == expected[i]
                assert [step.token for step in seen[i]] == expected[i].tokens
        assert fresh.is_running
        assert fresh.generate(requests[:3]) == expected[:3]


def test_a_device_that_always_fails_fails_each_request_and_is_asked_again(model, monkeypatch):
    def broken(*_: object) -> None:
        raise FloatingPointError("device lost")

    request = Request(prompt(5), max_tokens=5)
    with Engine(*model, max_batch=3, max_context=CONTEXT) as engine:
        expected = engine.generate([request])
        with monkeypatch.context() as patched:
            patched.setattr(engine_module, "decode", broken)
            for future in [engine.submit(request) for _ in range(4)]:
                assert isinstance(future.exception(timeout=60), FloatingPointError)
        assert engine.generate([request]) == expected


def test_an_engine_that_cannot_have_its_cache_back_ends(model, monkeypatch):
    def broken(*_: object) -> None:
        raise FloatingPointError("device lost")

    request = Request(prompt(5), max_tokens=5)
    with Engine(*model, max_batch=3, max_context=CONTEXT) as engine:
        monkeypatch.setattr(engine_module, "decode", broken)
        monkeypatch.setattr(engine_module, "made_cache", broken)
        for future in [engine.submit(request) for _ in range(2)]:
            assert future.exception(timeout=60) is not None
        engine._thread.join(timeout=60)
        assert not engine.is_running
        with pytest.raises(RuntimeError, match="takes no more requests: device lost"):
            engine.submit(request)


def test_a_callers_own_exception_fails_its_request_alone(engine):
    def broken(_: object) -> None:
        raise KeyError("mine")

    request = Request(prompt(5), max_tokens=5)
    mine, other = engine.submit(request, broken), engine.submit(request)
    assert isinstance(mine.exception(timeout=60), KeyError)
    assert len(other.result(timeout=60).tokens) == 5


def test_a_huge_top_k_is_no_limit(engine):
    request = Request(prompt(5), max_tokens=5, temperature=1.0)
    huge = dataclasses.replace(request, top_k=2**200)
    assert engine.generate([huge]) == engine.generate([request])


def test_groups_take_turns(model, monkeypatch):
    """A request of another group is answered after one turn of those that came before, not after all."""
    order = []
    with Engine(*model, max_batch=1, max_context=CONTEXT) as engine:
        gate = threading.Event()

        def wait(_: object) -> None:
            gate.wait(60)

        first = engine.submit(Request(prompt(3), max_tokens=2), wait)
        named = [("many", i) for i in range(4)] + [("one", 0), ("many", 4), ("another", 0)]
        futures = [
            engine.submit(Request(prompt(3), max_tokens=1), lambda _, name=name: order.append(name), name[0])
            for name in named
        ]
        gate.set()
        for future in (first, *futures):
            future.result(timeout=60)
    assert order == [("many", 0), ("one", 0), ("another", 0), *(("many", i) for i in range(1, 5))]


@pytest.mark.parametrize("length", [1, 2, CHUNK, CHUNK + 1, 190])
def test_logprobs_are_those_of_a_forward_without_a_cache(length):
    """Of parameters of the usual size: ten times that, attention would multiply rounding errors."""
    graphdef, params = split(Decoder(CONFIG, jax.random.key(0)))
    request = Request(prompt(length), max_tokens=4, logprobs=True, prompt_logprobs=True, temperature=1.0)
    plain = dataclasses.replace(request, logprobs=False, prompt_logprobs=False)
    with Engine(graphdef, params, max_batch=3, max_context=CONTEXT) as engine:
        completion, same = engine.generate([request, plain])
    assert completion.tokens == same.tokens
    text = np.array([*request.prompt_tokens, *completion.tokens], np.int32)
    hidden = read_whole(graphdef, params, text[None], np.zeros_like(text)[None], np.arange(len(text))[None])
    logprobs_tv = np.asarray(jax.nn.log_softmax(bound(graphdef, params).unembed(hidden[0])))
    near = functools.partial(np.testing.assert_allclose, rtol=1e-5, atol=1e-5)
    assert completion.prompt_logprobs is not None
    assert completion.logprobs is not None
    assert completion.prompt_logprobs[0] is None
    found = [*completion.prompt_logprobs[1:], *completion.logprobs]
    assert len(found) == len(text) - 1
    for at, logprob in enumerate(found):
        assert logprob is not None
        near(logprob.logprob, logprobs_tv[at, text[at + 1]])
        ids, values = zip(*logprob.top, strict=True)
        near(values, np.sort(logprobs_tv[at])[::-1][:20])
        near(logprobs_tv[at][list(ids)], values)
        if text[at + 1] == ids[0]:
            assert logprob.logprob == values[0]  # to the bit: so a client finds out what is greedy


def test_a_prompt_that_fills_the_context_can_be_scored_without_an_answer(engine):
    request = Request(prompt(CONTEXT), max_tokens=0, prompt_logprobs=True)
    completion = engine.generate([request])[0]
    assert (completion.tokens, completion.finish_reason) == ([], "length")
    assert completion.prompt_logprobs is not None
    assert len(completion.prompt_logprobs) == CONTEXT


def test_weights_that_are_not_finite_fail_a_request_for_logprobs(model):
    graphdef, params = model
    broken = jax.tree.map(lambda x: jnp.full_like(x, jnp.nan), params)
    with Engine(graphdef, broken, max_batch=2, max_context=CONTEXT) as engine:
        plain = Request(prompt(5), max_tokens=2)
        for request in (
            dataclasses.replace(plain, logprobs=True),
            dataclasses.replace(plain, prompt_logprobs=True),
        ):
            future = engine.submit(request)
            assert isinstance(future.exception(timeout=60), FloatingPointError)
        assert engine.is_running


def brute_force_kept(logits: np.ndarray, top_k: int, top_p: float) -> np.ndarray:
    """The textbook's way: sort, cut to top_k, then to the smallest prefix that holds top_p."""
    order = np.argsort(-logits)[: top_k or None]
    share = np.exp(logits[order].astype(np.float64))
    before = np.cumsum(share) / share.sum() - share / share.sum()
    kept = np.zeros(logits.shape, bool)
    kept[order[before < top_p]] = True
    return kept


@pytest.mark.parametrize("scale", [0.01, 1.0, 30.0])
def test_thresholds_are_those_of_a_sort(scale):
    settings = [(0, 1.0), (0, 0.9), (1, 1.0), (7, 1.0), (50, 0.7), (0, 0.01), (400, 0.999), (5000, 0.5)]
    settings += [(0, 1e-50), (7, 1e-50)]  # 0 in float32
    logits = scale * np.random.default_rng(0).normal(size=(len(settings), 1000)).astype(np.float32)
    top_k, top_p = (np.array(column) for column in zip(*settings, strict=True))
    kept = np.isfinite(keep_likely(jnp.asarray(logits), jnp.asarray(top_k), jnp.asarray(top_p, jnp.float32)))
    for row, (k, p) in enumerate(settings):
        np.testing.assert_array_equal(kept[row], brute_force_kept(logits[row], k, p), err_msg=f"{k=} {p=}")


def test_samples_follow_the_softmax():
    rows = 20_000
    logits = jnp.asarray([0.0, 1.0, 2.0, -1.0, 0.5])
    requests = [(Request([0], 1, temperature=2.0, seed=7), index) for index in range(rows)]
    drawn = jax.jit(sample)(jnp.tile(logits, (rows, 1)), Sampling.of(requests))
    frequency = np.bincount(np.asarray(drawn), minlength=5) / rows
    # Four standard errors of a share of a half.
    np.testing.assert_allclose(frequency, jax.nn.softmax(logits / 2.0), atol=4 * 0.5 / rows**0.5)
