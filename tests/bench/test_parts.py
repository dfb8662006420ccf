"""What a benchmark measures with: rivals, shapes, caches and clocks; never their speed."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from bench.settings import CPU, settings
from transformers import StaticCache

from fasa_flex.bench import caches, op, rivals, step, timing
from fasa_flex.bench.launches import launches_of
from fasa_flex.bench.shapes import SHAPES, random_chunks, random_profile

TINY = SHAPES["tiny"]


def test_rounds_are_interleaved_and_begin_with_another_rival() -> None:
    called: list[str] = []

    def rival(name: str) -> Callable[[], None]:
        return lambda: called.append(name)

    times = timing.interleave({name: rival(name) for name in "abc"}, CPU, repeats=3)
    assert "".join(called) == "abc" + "bca" + "cab"
    assert all(len(timing_.seconds) == 3 for timing_ in times.values())


def test_rounds_end_when_time_is_up_but_not_before_a_few() -> None:
    assert len(timing.interleave({"a": lambda: None}, CPU, repeats=100, seconds=0)["a"].seconds) == timing.LEAST_ROUNDS


def test_ratios_are_of_the_same_round() -> None:
    slow_rounds, rival = timing.Timing((1.0, 10.0, 1.0)), timing.Timing((2.0, 20.0, 2.0))
    assert slow_rounds.ratio(rival) == (2, 2, 2)
    assert timing.Timing((1.0, 2.0, 3.0, 4.0, 100.0)).median == 3
    assert timing.Timing((1.0, 2.0, 3.0, 4.0, 100.0)).quartiles() == (2, 4)


def test_dense_rivals_compute_the_same_and_grouped_sdpa_is_among_them() -> None:
    x = rivals.Inputs.random(TINY, 2, 40, settings())
    expected = torch.softmax(x.q @ x.k.repeat_interleave(2, 1).mT / 4, -1) @ x.v.repeat_interleave(2, 1)
    dense = rivals.dense_rivals(settings(modes=("eager",)))
    assert {"SDPA", "grouped SDPA"} <= set(dense)
    for call in dense.values():
        torch.testing.assert_close(call(x), expected)


def test_a_rival_that_computes_something_else_or_fails_is_left_out() -> None:
    def wrong(x: rivals.Inputs) -> torch.Tensor:
        return 2 * rivals.sdpa(x)

    def broken(x: rivals.Inputs) -> torch.Tensor:
        raise RuntimeError("no kernel")

    x = rivals.Inputs.random(TINY, 1, 40, settings())
    asked = {"SDPA": rivals.sdpa, "wrong": wrong, "broken": broken, "absent": "a reason"}
    good, _, left_out = op._warmed(asked, {"SDPA", "wrong", "broken"}, x)
    assert set(good) == {"SDPA"}
    assert left_out["absent"] == "a reason"
    assert "no kernel" in left_out["broken"]
    assert "differs" in left_out["wrong"]


@pytest.mark.parametrize("packed_dtype", [None, "bfloat16", "int8", "int4"])
def test_the_limit_of_a_call_counts_the_packed_keys_that_are_there(packed_dtype: str | None) -> None:
    chosen = settings(n_fac=16, packed_dtype=packed_dtype)
    x = rivals.Inputs.random(TINY, 1, 64, chosen)
    least = {None: 4, "bfloat16": 2, "int8": 1, "int4": 0.5}[packed_dtype] * 2 * 64 * 2 * chosen.chunks_of(TINY)
    assert least <= x.packed.n_bytes <= 2 * least
    assert op.reads_of(x, TINY, chosen).sparse == x.packed.n_bytes + 2 * 16 * 2 * 16 * 4 + 2 * 17 * 16 * 4


def test_shapes_state_their_weights() -> None:
    for shape in (TINY, SHAPES["qwen2.5-7b"]):
        small = torch.device("meta") if shape is not TINY else CPU
        model = shape.model(1, 64, torch.float32, small)
        matrices = sum(p.numel() for p in model.parameters() if p.dim() == 2)
        assert matrices == shape.layer_parameters() + shape.head_parameters()
        assert model.config.num_key_value_heads == shape.kv_heads
    assert SHAPES["llama-3.2-1b"].head_parameters() == 128256 * 2048  # the embedding is the output head
    assert SHAPES["llama-2-7b"].query_heads == SHAPES["llama-2-7b"].kv_heads


def test_random_chunks_and_profile_fit() -> None:
    chunks = random_chunks(TINY, 2, CPU)
    assert chunks.shape == (2, 2, 2)
    assert (chunks[..., 1] - chunks[..., 0] == 8).all()  # planes of a half-split head
    model = TINY.model(2, 64, torch.float32, CPU)
    random_profile(TINY, model, 2).check_fits(model)


def test_a_twin_shares_weights_and_nothing_else() -> None:
    model = TINY.model(2, 64, torch.float32, CPU)
    other = step.twin(model, 1)
    assert len(other.model.layers) == other.config.num_hidden_layers == 1
    assert len(model.model.layers) == model.config.num_hidden_layers == 2
    assert other.lm_head.weight is model.lm_head.weight
    assert other.model.layers[0].mlp.up_proj.weight is model.model.layers[0].mlp.up_proj.weight


def test_a_cache_is_filled_shared_rewound_and_counted() -> None:
    model = TINY.model(2, 64, torch.float32, CPU)
    cache, other = (StaticCache(config=model.config, max_cache_len=32) for _ in range(2))
    caches.fill(cache, 2, TINY, 3, 31, torch.float32, CPU)
    assert cache.get_seq_length() == 31
    assert caches.share(other, cache, 32)
    assert other.layers[1].keys is cache.layers[1].keys
    caches.rewind(other, 5)
    assert (cache.get_seq_length(), other.get_seq_length()) == (31, 5)
    counters = 2 * 8
    assert caches.nbytes(cache) == {"cpu": 2 * 2 * 3 * 2 * 32 * 16 * 4 + counters}


def test_a_shared_cache_needs_the_same_length() -> None:
    model = TINY.model(2, 64, torch.float32, CPU)
    cache, longer = (StaticCache(config=model.config, max_cache_len=length) for length in (32, 64))
    caches.fill(cache, 2, TINY, 1, 31, torch.float32, CPU)
    assert not caches.share(longer, cache, 64)


def test_as_many_layers_as_fit_beside_what_transformers_repeats(monkeypatch: pytest.MonkeyPatch) -> None:
    shape, chosen = SHAPES["llama-3.1-8b"], settings(shapes=("llama-3.1-8b",), contexts=(32768,))
    free = 40_000_000_000
    monkeypatch.setattr("fasa_flex.bench.step.free_memory", lambda device: free)
    layers = step.layers_that_fit(shape, 1, 32768, chosen)
    repeated = 2 * 32768 * 32 * 128 * 4
    each = shape.layer_parameters() * 4 + 2 * 32768 * 8 * 128 * 4
    assert 1 < layers < 32
    assert shape.head_parameters() * 4 + layers * each + repeated < 0.8 * free
    monkeypatch.setattr("fasa_flex.bench.step.free_memory", lambda device: shape.head_parameters() * 4 + repeated)
    assert step.layers_that_fit(shape, 1, 32768, chosen) == 0


def test_permuted_keys_give_what_packed_ones_give() -> None:
    chosen = settings(modes=("eager",), backends=("gather", "permuted"), n_fac=16, packed_dtype=None)
    x = rivals.Inputs.random(TINY, 2, 80, chosen)
    sparse = rivals.sparse_rivals(chosen)
    packed, permuted = sparse["FASA-C gather"], sparse["FASA permuted keys"]
    assert not isinstance(packed, str)
    assert not isinstance(permuted, str)
    torch.testing.assert_close(permuted(x.clone()), packed(x))


def test_launches_are_counted_with_their_own_time() -> None:
    x = torch.ones(64, 64)
    found = launches_of(lambda: (x @ x).softmax(-1) + x + x, torch.device("cpu"))
    by_name = {entry["name"]: entry for entry in found["longest"]}
    assert by_name["aten::add"]["count"] == 2
    assert by_name["aten::mm"]["count"] == 1
    assert found["seconds"] == pytest.approx(sum(entry["seconds"] for entry in found["longest"]))
    assert found["count"] >= 4
