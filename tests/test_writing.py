"""What a decoded token adds to a cache by one kernel, interpreted, against what PyTorch's operators write."""

from __future__ import annotations

from dataclasses import replace
from importlib import import_module
from typing import Any

import pytest
import torch
from cases import generator, pick_chunks
from generation import Ids, profile_of
from torch import Tensor
from transformers import PreTrainedModel

from fasa_flex import FasaCache, FasaConfig, enable
from fasa_flex.backends.triton.dispatch import writes_at_once
from fasa_flex.core.packed_keys import PackedKeys
from fasa_flex.core.scoring import DominantChunks

pytest.importorskip("triton")
write_token = import_module("fasa_flex.backends.triton.writing").write_token

BATCH, HEADS, LENGTH = 2, 3, 9


def drawn(*size: int, seed: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(size, generator=generator(seed)).to(dtype)


@pytest.mark.parametrize("side_by_side", [False, True], ids=["apart", "side by side"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("packed_dtype", [None, "float16", "int8", "int4"])
@pytest.mark.parametrize("centred", [False, True], ids=["whole", "less the mean key"])
def test_a_token_is_written_as_by_operators(
    dtype: torch.dtype, packed_dtype: Any, centred: bool, side_by_side: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Keys of an odd width, values of another, new states as a model's views; nothing else changes."""
    monkeypatch.setattr("fasa_flex.core.packed_keys.tile_of", lambda device: 1)
    dim, value_dim, at = 12, 10, 4
    mean_key = drawn(HEADS, dim, seed=3) if centred else None
    scorer = DominantChunks(pick_chunks(HEADS, 3, dim=dim).flatten(1), mean_key)
    rows = drawn(BATCH, HEADS, LENGTH, dim + value_dim, seed=1, dtype=dtype)
    keys, values = rows[..., :dim], rows[..., dim:]
    if not side_by_side:
        keys, values = keys.contiguous(), values.contiguous()
    new = 3 * drawn(BATCH, 1, HEADS, dim + value_dim, seed=2, dtype=dtype).transpose(1, 2)
    if mean_key is not None and dtype == torch.bfloat16:  # to which the interpreter truncates, where a GPU rounds
        mean_key, new = ((4 * x).round() / 4 for x in (mean_key, new))
        scorer = replace(scorer, mean_key=mean_key)
    key, value = new[..., :dim], new[..., dim:]
    packed = PackedKeys.of(scorer.pack(keys), packed_dtype)
    expected = [keys.clone(), values.clone(), packed.change(Tensor.clone)]
    expected[0][:, :, at], expected[1][:, :, at] = key[:, :, 0], value[:, :, 0]
    expected[2].write(scorer.pack(key), torch.tensor([at]))
    length = torch.tensor(at) if side_by_side else at  # as of a static cache, and of a growing one
    scales = None if packed.scales is None else packed.scales.squeeze(3)
    write_token(key, value, keys, values, packed.tiles.squeeze(4), scales, scorer.dims, mean_key, length)
    assert torch.equal(keys, expected[0])
    assert torch.equal(values, expected[1])
    assert torch.equal(packed.tiles, expected[2].tiles)
    assert packed.scales is None or torch.equal(packed.scales, expected[2].scales)


@pytest.mark.parametrize(("packed_dtype", "nothing"), [("int8", 0), ("int4", 0x88)])
def test_a_key_of_zeros_has_a_scale(packed_dtype: Any, nothing: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fasa_flex.core.packed_keys.tile_of", lambda device: 1)
    keys, dims = drawn(1, 1, LENGTH, 8, seed=1), torch.arange(4)[None]
    packed = PackedKeys.of(keys[..., :4].contiguous(), packed_dtype)
    assert packed.scales is not None
    zeros = torch.zeros(1, 1, 1, 8)
    states = (zeros, zeros, keys, keys.clone())
    write_token(*states, packed.tiles.squeeze(4), packed.scales.squeeze(3), dims, None, torch.tensor(2))
    assert (packed.tiles[:, :, 2] == nothing).all()
    assert float(packed.scales[0, 0, 2]) == torch.finfo(torch.float16).tiny


@pytest.mark.parametrize("packed_dtype", [torch.float32, torch.int8, torch.uint8])
def test_beyond_the_end_nothing_is_written(packed_dtype: torch.dtype) -> None:
    """A GPU stops there too, by an assertion that the interpreter does not check."""
    dims, new = torch.arange(4)[None], torch.ones(1, 1, 1, 8)
    wholes = [torch.zeros(1, 1, LENGTH + 1, width, dtype=dtype) for width, dtype in ((8, None), (4, packed_dtype))]
    keys, packed = (whole[:, :, :LENGTH] for whole in wholes)
    scales = torch.zeros(1, 1, LENGTH + 1, dtype=torch.float16)
    held = None if packed_dtype == torch.float32 else scales[:, :, :LENGTH]
    dims = dims.expand(1, 4) if packed_dtype != torch.uint8 else torch.arange(8)[None]
    write_token(new, new, keys, keys, packed, held, dims, torch.zeros(1, 8), torch.tensor(LENGTH))
    assert not any(bool(buffer.any()) for buffer in (*wholes, scales))


@pytest.mark.parametrize(("placement", "capacity"), [("device", 45), ("host", 48), ("device", None)])
def test_a_model_decodes_the_same_by_it(
    llama: PreTrainedModel, ids: Ids, placement: Any, capacity: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As on a GPU: the prefill by operators, then every sparse layer's tokens by the kernel, as many as are counted."""
    monkeypatch.setattr("fasa_flex.core.packed_keys.tile_of", lambda device: 1)
    config, profile = FasaConfig(n_fac=8, n_tip=3, backend="gather"), profile_of(llama)
    prompt, tokens = ids(40, rows=2), [ids(1, seed=step, rows=2) for step in range(3)]
    written: list[int] = []

    def counting(*states: Any) -> None:
        written.append(int(states[-1]))
        write_token(*states)

    def decode() -> tuple[Tensor, FasaCache]:
        cache = FasaCache(llama, profile, config, placement=placement, max_cache_len=capacity)
        with torch.no_grad(), enable(llama, profile, config):
            llama(prompt, past_key_values=cache)
            return torch.cat([llama(token, past_key_values=cache).logits for token in tokens]), cache

    expected, plain = decode()
    monkeypatch.setattr("fasa_flex.backends.triton.writing.write_token", counting)
    monkeypatch.setattr("fasa_flex.caches.keeps_packed_keys.writes_at_once", lambda key, *states: key.shape[2] == 1)
    logits, cache = decode()
    assert torch.equal(logits, expected)
    sparse = llama.config.num_hidden_layers - 1
    assert written == [length for length in (40, 41, 42) for _ in range(sparse)]
    for ours, theirs in zip(cache.layers, plain.layers, strict=True):
        assert ours.get_seq_length() == theirs.get_seq_length() == 43
        assert capacity is None or int(ours.cumulative_length) == ours.written == 43
        assert torch.equal(ours.keys, theirs.keys)
        assert torch.equal(ours.values, theirs.values)


class OnGpu:
    """A tensor that says it is on a GPU."""

    is_cuda = True

    def __init__(self, tensor: Tensor) -> None:
        self.tensor = tensor

    def __getattr__(self, name: str) -> Any:
        return getattr(self.tensor, name)


def call(**changes: Any) -> tuple[Any, ...]:
    """Arguments of `writes_at_once` that it takes, but for the changes."""
    keys, dims = torch.zeros(2, 3, LENGTH, 8), torch.zeros(3, 4, dtype=torch.long)
    packed = PackedKeys(torch.zeros(2, 3, LENGTH, 4, 1))
    key, value = torch.zeros(2, 3, 1, 8), torch.zeros(2, 3, 1, 6)
    arguments = {"key": key, "value": value, "keys": keys, "values": torch.zeros(2, 3, LENGTH, 6), "packed": packed}
    arguments |= {"dims": dims, **changes}
    return (OnGpu(arguments.pop("key")), *arguments.values())


CANNOT = {
    "two tokens": {"key": torch.zeros(2, 3, 2, 8)},
    "another batch": {"key": torch.zeros(1, 3, 1, 8)},
    "another width": {"value": torch.zeros(2, 3, 1, 7)},
    "another dtype": {"key": torch.zeros(2, 3, 1, 8, dtype=torch.bfloat16)},
    "a gradient": {"value": torch.zeros(2, 3, 1, 6, requires_grad=True)},
    "rows with gaps": {"key": torch.zeros(2, 3, 1, 16)[..., ::2]},
    "a cache with gaps": {"values": torch.zeros(2, 3, LENGTH, 12)[..., ::2]},
    "a cache elsewhere": {"keys": torch.zeros(2, 3, LENGTH, 8, device="meta")},
    "dimensions elsewhere": {"dims": torch.zeros(3, 4, dtype=torch.long, device="meta")},
    "packed keys elsewhere": {"packed": PackedKeys(torch.zeros(2, 3, LENGTH, 4, 1, device="meta"))},
    "tiles": {"packed": PackedKeys(torch.zeros(2, 3, 1, 4, 32))},
    "packed keys with gaps": {"packed": PackedKeys(torch.zeros(2, 3, LENGTH, 8, 1)[:, :, :, ::2])},
}


@pytest.mark.parametrize("changes", CANNOT.values(), ids=CANNOT)
def test_operators_write_what_the_kernel_cannot(changes: dict[str, Any]) -> None:
    assert writes_at_once(*call())
    assert not writes_at_once(*call(**changes))


def test_operators_write_on_a_cpu() -> None:
    key, *others = call()
    assert not writes_at_once(key.tensor, *others)
