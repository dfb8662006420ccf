"""PackedKeys: rows survive tiles, scores equal the oracle, room to grow changes nothing."""

from __future__ import annotations

import dataclasses

import numpy as np
import oracle
import pytest
import torch
from cases import EXACT, Case, generator, integers, plain_attention
from torch import Tensor

from fasa_flex.caches.static_packed_layer import StaticPackedLayer
from fasa_flex.core import packed_keys as packing
from fasa_flex.core.packed_keys import PackedDtype, PackedKeys, as_packed, packed_bytes
from fasa_flex.core.scoring import DominantChunks

LENGTHS = (1, 15, 16, 17, 101)
PAIRS = [[0, 1], [2, 3]]


@pytest.fixture(autouse=True, params=[16, 1], ids=["tiles of 16", "rows"])
def tile(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> int:
    """Keys of a tile: on CPU, and elsewhere."""
    monkeypatch.setattr(packing, "tile_of", lambda device: request.param)
    monkeypatch.setattr(packing, "_BLOCK", 3)  # so that blocks are several heads, or a part of the 7 tiles of one
    size: int = request.param
    return size


def test_tiles_are_of_16_keys_on_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()
    assert [packing.tile_of(torch.device(device)) for device in ("cpu", "cuda", "xpu")] == [16, 1, 1]


@pytest.mark.parametrize("length", LENGTHS)
@pytest.mark.parametrize("dtype", [None, "bfloat16", "float16"])
@pytest.mark.parametrize("capacity", [0, 200])
def test_rows_come_back_as_they_were(length: int, dtype: str | None, capacity: int, tile: int) -> None:
    rows = integers(2, 3, length, 4, seed=1)
    packed = PackedKeys.of(rows, dtype, capacity)
    assert packed.scales is None
    assert packed.tiles.dtype == (torch.float32 if dtype is None else getattr(torch, dtype))
    assert packed.tiles.shape == (2, 3, -(-max(length, capacity) // 16) * 16 // tile, 4, tile)
    assert packed.tiles.is_contiguous()
    assert packed.capacity == packed.tiles.shape[2] * tile
    assert packed.n_bytes == packed.tiles.numel() * packed.tiles.element_size()
    assert packed.rows(length).float().equal(rows)
    for slot in range(length):  # a tile holds its keys side by side
        assert packed.tiles[:, :, slot // tile, :, slot % tile].float().equal(rows[:, :, slot])
    assert not packed.rows(packed.capacity)[:, :, length:].any()


@pytest.mark.parametrize("dtype", [None, "bfloat16", "float16", "int8", "int4"])
@pytest.mark.parametrize("cache_dtype", [torch.float32, torch.bfloat16])
def test_a_key_takes_as_many_bytes_as_are_told_ahead(dtype: PackedDtype | None, cache_dtype: torch.dtype) -> None:
    packed = PackedKeys.of(integers(2, 3, 64, 6, seed=1).to(cache_dtype), dtype)
    assert packed.n_bytes == 2 * 3 * 64 * packed_bytes(6, dtype, cache_dtype)


@pytest.mark.parametrize("length", LENGTHS)
@pytest.mark.parametrize("dtype", [None, "bfloat16", "int8", "int4"])
def test_scores_equal_the_oracle(length: int, dtype: str | None) -> None:
    """Of the rows as they are held; integers are within half a step of the largest number, a 127th or 7th of it."""
    rows = torch.randn(2, 3, length, 4, generator=generator(2))
    rows[0, 0, 0] = 0.0
    query = torch.randn(2, 3, 5, 4, generator=generator(3))
    packed = PackedKeys.of(rows, dtype, 100)
    held = packed.rows(length).double()
    scores = packed.scores(query, length)
    assert scores.dtype == torch.float32
    assert scores.shape == (2, 3, 5, length)
    for b, h, g in np.ndindex(2, 3, 5):
        expected = oracle.score(query[b, h, g].double().numpy(), held[b, h].numpy(), PAIRS)
        np.testing.assert_allclose(scores[b, h, g].numpy(), expected, atol=1e-5)
    step = {None: 0.0, "bfloat16": 2**-8, "int8": 0.51 / 127, "int4": 0.503 / 7}[dtype]
    largest = rows.abs().amax(-1, keepdim=True)
    assert ((held - rows).abs() <= step * largest + 1e-12).all()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert packed.scores(query, length).equal(scores)
    assert packed.scores(query, 0).shape == (2, 3, 5, 0)


@pytest.mark.parametrize("length", LENGTHS)
@pytest.mark.parametrize("dtype", [None, "bfloat16", "int8", "int4"])
def test_scores_pass_gradients_to_the_query(length: int, dtype: PackedDtype | None) -> None:
    """A completion's share depends on the scores."""
    packed = PackedKeys.of(torch.randn(2, 3, length, 4, generator=generator(2)), dtype, 100)
    query = torch.randn(2, 3, 5, 4, generator=generator(3), requires_grad=True)
    weights = torch.randn(2, 3, 5, length, generator=generator(4))
    (packed.scores(query, length) * weights).sum().backward()
    assert query.grad is not None
    torch.testing.assert_close(query.grad, weights @ packed.rows(length).float())


@pytest.mark.parametrize("by", ["slots", "first slot"])
@pytest.mark.parametrize("dtype", [None, "float16", "int8", "int4"])
def test_writing_key_by_key_is_packing_at_once(dtype: str | None, by: str) -> None:
    rows = torch.randn(2, 3, 70, 4, generator=generator(4))
    whole, written = PackedKeys.of(rows, dtype), PackedKeys.of(torch.zeros(2, 3, 1, 4), dtype, 70)
    for start, end in ((0, 1), (1, 5), (5, 40), (40, 41), (41, 70)):
        written.write(rows[:, :, start:end], torch.arange(start, end) if by == "slots" else start)
    assert written.rows(70).equal(whole.rows(70))
    assert written.grown(100).rows(70).equal(as_packed(rows, dtype).to(written.rows(70)))
    assert (written.scales is None) == (dtype not in ("int8", "int4"))


@pytest.mark.parametrize("dtype", [None, "int8", "int4"])
def test_growing_and_reordering_keep_rows(dtype: str | None, tile: int) -> None:
    rows = torch.randn(2, 3, 40, 4, generator=generator(5))
    packed = PackedKeys.of(rows, dtype)
    grown = packed.grown(100)
    assert grown.capacity == 112
    assert grown.rows(40).equal(packed.rows(40))
    assert not grown.rows(100)[:, :, 64:].any()
    turned = packed.change(lambda tensor: tensor.flip(0))
    assert turned.rows(40).equal(packed.rows(40).flip(0))
    if packed.scales is not None:
        assert packed.scales.dtype == torch.float16
        assert packed.n_bytes == packed.tiles.numel() + 2 * packed.scales.numel()
        largest = {"int8": 127, "int4": (7 + 8) * 16 + 15}[dtype]  # of a byte: a code, or two beside their 8
        assert int(packed.tiles.int().abs().max()) in range(largest - 15 * (dtype == "int4"), largest + 1)


@pytest.mark.parametrize("dtype", ["int8", "int4"])
def test_integers_hold_tiny_and_zero_keys(dtype: PackedDtype) -> None:
    rows = torch.tensor([0.0, 1e-9, 1e4]).view(1, 1, 3, 1).expand(1, 1, 3, 2)
    held = PackedKeys.of(rows, dtype).rows(3)[0, 0, :, 0]
    assert held[0] == 0
    assert abs(held[1]) < 1e-4
    torch.testing.assert_close(held[2], torch.tensor(1e4), rtol=1e-3, atol=0)


def test_packed_keys_serve_one_query_a_row_of_the_shape_they_were_made_for() -> None:
    case = Case("packed", batch=2, length=40)
    q, k, v, chunks = case.tensors()
    packed = PackedKeys.of(torch.stack([k[:, n][..., chunks[n].flatten()] for n in range(2)], 1), capacity=70)
    for backend in EXACT:
        plain = case.run(q, k, v, chunks, backend)
        assert plain_attention(q, k, v, chunks, n_fac=6, packed_keys=packed, backend=backend).equal(plain)
    two = q.expand(-1, -1, 2, -1)
    with pytest.raises(ValueError, match="score one query a row, got 2"):
        plain_attention(two, k, v, chunks, n_fac=6, packed_keys=packed, backend="gather")
    for wrong in (
        PackedKeys.of(packed.rows(40)[:1]),
        PackedKeys.of(packed.rows(40)[:, :1]),
        PackedKeys.of(packed.rows(40)[..., :2]),
        PackedKeys.of(packed.rows(40)[:, :, :32]),
    ):
        with pytest.raises(ValueError, match="packed_keys must be"):
            plain_attention(q, k, v, chunks, n_fac=6, packed_keys=wrong, backend="gather")


def test_four_bits_are_codes_of_at_most_7_two_in_a_byte(tile: int) -> None:
    """A key's first half in the low bits, its second in the high ones, 8 added; the oracle's numbers."""
    rows = torch.randn(2, 3, 33, 6, generator=generator(8)) * torch.logspace(-3, 3, 33)[:, None]
    packed = PackedKeys.of(rows, "int4")
    assert packed.tiles.dtype == torch.uint8
    assert packed.tiles.shape[3] * 2 == packed.width == 6
    held = packed.rows(33)
    for b, h, slot in np.ndindex(2, 3, 33):
        of_key = packed.tiles[b, h, slot // tile, :, slot % tile].int()
        codes = torch.cat([of_key % 16, of_key // 16]) - 8
        assert codes.abs().max() == 7
        scale = packed.scales[b, h, slot // tile, slot % tile].float()
        assert held[b, h, slot].equal(codes * scale)
        assert ((held[b, h, slot] - rows[b, h, slot]).abs() <= 0.502 * scale).all()
        np.testing.assert_array_equal(held[b, h, slot].numpy(), oracle.rounded(rows[b, h, slot].double().numpy(), 4))


@pytest.mark.usefixtures("fresh_compiler")
@pytest.mark.parametrize("dtype", [None, "int8", "int4"])
def test_a_tracer_sees_the_same_scores(dtype: str | None) -> None:
    """Under the compiler they are sums of products, for one fused pass."""
    rows, query = torch.randn(2, 3, 70, 4, generator=generator(6)), torch.randn(2, 3, 5, 4, generator=generator(7))
    packed = PackedKeys.of(rows, dtype)
    traced = torch.compile(lambda packed, query: packed.scores(query, 70), fullgraph=True, backend="eager")
    torch.testing.assert_close(traced(packed, query), packed.scores(query, 70), atol=1e-5, rtol=0)


def test_they_are_themselves_and_do_not_change() -> None:
    one, other = (PackedKeys.of(integers(1, 1, 3, 2, seed=1)) for _ in range(2))
    assert one == one
    assert one != other
    with pytest.raises(dataclasses.FrozenInstanceError):
        one.tiles = other.tiles


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["int8", "int4"])
@pytest.mark.parametrize("cache_dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.usefixtures("fresh_compiler")
def test_a_compiled_step_packs_the_codes_of_an_eager_one(dtype: PackedDtype, cache_dtype: torch.dtype) -> None:
    """Inductor drops roundings to 16 bits; the codes of a part of the keys, in bfloat16 of most, would differ."""
    dims = torch.stack([torch.randperm(32, generator=generator(head))[:16] for head in range(8)])
    scorer = DominantChunks(dims, torch.randn(8, 32, generator=generator(1)), dtype=dtype)
    states = torch.randn(8, 8, 1, 32, generator=generator(2)).to(cache_dtype)

    def step(layer: StaticPackedLayer, states: Tensor) -> Tensor:
        return layer.update(states * 1.37, states)[0]

    with torch.no_grad():
        eager, compiled = (StaticPackedLayer(scorer, 16) for _ in range(2))
        for layer in (eager, compiled):
            layer.update(states, states)
        torch.testing.assert_close(torch.compile(step, fullgraph=True)(compiled, states), step(eager, states))
    assert eager.packed is not None
    assert compiled.packed is not None
    assert compiled.packed.tiles.equal(eager.packed.tiles)
    assert compiled.packed.scales is not None
    assert eager.packed.scales is not None
    assert compiled.packed.scales.equal(eager.packed.scales)
