"""fasa_attention under torch.compile: one graph, few compilations while a cache grows, the eager result.

A handful of shapes only: a flex kernel takes tens of seconds to compile on CPU.
"""

from __future__ import annotations

import numpy as np
import oracle
import pytest
import torch
from cases import plain_attention, unrounded
from generation import Ids, profile_of
from torch import Tensor
from torch._dynamo.testing import CompileCounterWithBackend
from torch._dynamo.utils import counters
from transformers import CompileConfig, PreTrainedModel, StaticCache

from fasa_flex import RotaryLayout, enable

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("fresh_compiler")]

DIM, GROWTH = 16, (40, 41, 42, 50, 64, 65, 129)


def step(length: int, queries: int = 1) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """q, k, v, chunks and a left-padded key mask for two rows; whole numbers, so that rankings are exact."""
    generator = torch.Generator().manual_seed(length)
    q = torch.randint(-2, 3, (2, 4, queries, DIM), generator=generator).float()
    k = torch.randint(-2, 3, (2, 2, length, DIM), generator=generator).float()
    v = torch.randn(2, 2, length, DIM, generator=generator)
    chunks = RotaryLayout.half_split(DIM).chunks[torch.tensor([[0, 3], [2, 5]])]
    key_mask = torch.arange(length) >= torch.tensor([[0], [7]])
    return q, k, v, chunks, key_mask


def expected(q: Tensor, k: Tensor, v: Tensor, chunks: Tensor, key_mask: Tensor, n_fac: float) -> np.ndarray:
    tensors = (x.double().numpy() for x in (q, k, v))
    return oracle.fasa(*tensors, chunks.numpy(), n_fac=n_fac, n_sink=1, n_recent=2, key_mask=key_mask.numpy()).out


@pytest.mark.parametrize("backend", ["gather", "flex"])
@torch.no_grad()
def test_one_graph_and_two_compilations_for_a_growing_cache(backend: str) -> None:
    counter = CompileCounterWithBackend("inductor")

    @torch.compile(fullgraph=True, backend=counter)
    def compiled(q: Tensor, k: Tensor, v: Tensor, chunks: Tensor, key_mask: Tensor) -> Tensor:
        return plain_attention(
            q,
            k,
            v,
            chunks,
            n_fac=8,
            n_sink=1,
            n_recent=2,
            key_mask=key_mask,
            backend=backend,
        )

    for length in GROWTH:
        np.testing.assert_allclose(compiled(*step(length)).numpy(), expected(*step(length), n_fac=8), atol=1e-5)
    assert 0 < counter.frame_count <= 2, f"{counter.frame_count} compilations for {len(GROWTH)} lengths"


@torch.no_grad()
def test_eager_flex_compiles_itself_at_most_twice_for_a_growing_cache() -> None:
    counters.clear()
    for length in GROWTH:
        q, k, v, chunks, key_mask = step(length)
        out = plain_attention(q, k, v, chunks, n_fac=8, n_sink=1, n_recent=2, key_mask=key_mask, backend="flex")
        np.testing.assert_allclose(out.numpy(), expected(q, k, v, chunks, key_mask, n_fac=8), atol=1e-5)
    graphs = counters["stats"]["unique_graphs"]
    assert 0 < graphs <= 2, f"{graphs} compilations for {len(GROWTH)} lengths"


@pytest.mark.parametrize("queries", [1, 3])
@torch.no_grad()
def test_a_share_is_one_graph_too(queries: int) -> None:
    """The budget of a share depends on the number of valid keys, a tensor; the shapes must not. Traced only."""
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(plain_attention, fullgraph=True, backend=counter)
    for length in GROWTH:
        q, k, v, chunks, key_mask = step(length, queries)
        out = compiled(q, k, v, chunks, n_fac=0.25, n_sink=1, n_recent=2, key_mask=key_mask, backend="gather")
        np.testing.assert_allclose(out.numpy(), expected(q, k, v, chunks, key_mask, n_fac=0.25), atol=1e-5)
    assert 0 < counter.frame_count <= 2


@torch.no_grad()
def test_a_whole_model_on_a_static_cache_is_one_graph_for_200_steps(llama: PreTrainedModel, ids: Ids) -> None:
    """Decode of the compiled model: no graph break, tokens and counts as in eager, the buffer's tail never selected."""
    options = {"max_new_tokens": 200, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    static = {"cache_implementation": "static", "compile_config": CompileConfig(fullgraph=True, mode=None)}
    static["compile_config"]._compile_all_devices = True  # generate compiles on accelerators only, unless told
    with enable(llama, profile_of(llama), unrounded(n_fac=6, n_tip=3, backend="gather")) as fasa:
        eager = llama.generate(ids(30, rows=1), **options)
        counts = fasa.stats.as_dict()
        fasa.stats.reset()
        counters.clear()
        assert llama.generate(ids(30, rows=1), **options, **static).equal(eager)
        assert fasa.stats.as_dict() == counts
        assert counters["stats"]["unique_graphs"] == 1
        llama.generate(ids(50, seed=1, rows=1), **{**options, "max_new_tokens": 180}, **static)  # as long in all
        assert counters["stats"]["unique_graphs"] == 1
    assert not counters["graph_break"]


def test_a_compiled_model_in_inference_mode(llama: PreTrainedModel, ids: Ids) -> None:
    prompt, compiled = ids(30, rows=1), torch.compile(llama, fullgraph=True, backend="aot_eager")

    def decode(model: PreTrainedModel) -> Tensor:
        cache = StaticCache(config=llama.config, max_cache_len=64)
        llama(prompt, past_key_values=cache)
        return torch.cat([model(ids(1, seed=step, rows=1), past_key_values=cache).logits for step in range(3)])

    with enable(llama, profile_of(llama), unrounded(n_fac=6, n_tip=3)), torch.inference_mode():
        torch.testing.assert_close(decode(compiled), decode(llama), atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@torch.no_grad()
def test_compiled_under_autocast(dtype: torch.dtype) -> None:
    """Whole numbers below 256 are exact in half precision: the ranking must be too."""
    compiled = torch.compile(plain_attention, fullgraph=True, backend="aot_eager")
    q, k, v, chunks, key_mask = step(40)
    with torch.autocast("cpu", dtype=dtype):
        out = compiled(q, k, v, chunks, n_fac=8, n_sink=1, n_recent=2, key_mask=key_mask, backend="gather")
    np.testing.assert_allclose(out.float().numpy(), expected(q, k, v, chunks, key_mask, n_fac=8), atol=0.03)
