"""The Triton kernels in Triton's interpreter, against the oracle; on a GPU evals/bench/check_cuda.py compares them."""

from __future__ import annotations

import math
import os
import re
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import oracle
import pytest
import torch
from cases import generator, integers, pick_chunks
from generation import Ids, profile_of
from torch import Tensor
from torch._inductor.utils import run_and_get_code
from transformers import PreTrainedModel

from fasa_flex import FasaCache, FasaConfig, enable, fasa_attention
from fasa_flex.held_rows import HeldRows
from fasa_flex.packing import PackedKeys
from fasa_flex.scoring import DominantChunks

pytest.importorskip("triton")
ops, dense = (pytest.importorskip(f"fasa_flex.{name}") for name in ("decode", "dense"))

FUNCTIONS = ("sparse_decode", "select_slots", "hold_slots", "attend_slots")

pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")  # the interpreter's log(0) of masked lanes


@dataclass(frozen=True)
class Step:
    """One decode step."""

    length: int
    batch: int = 1
    kv_heads: int = 2
    group: int = 2
    dim: int = 16
    n_tip: int = 2
    n_fac: int = 6
    how: str = "max"
    softcap: float | None = None
    sinks: bool = False
    forced: int = 0
    masked: float = 0.0
    limit: int = 2


STEPS = {
    "a search over tiles": Step(1100, n_fac=16),
    "no more tiles than budget": Step(200),
    "more budget than keys": Step(5, n_fac=16),
    "a single key": Step(1),
    "softmax": Step(700, batch=2, group=4, how="softmax"),
    "mean": Step(300, group=3, how="mean", n_fac=16),
    "one query head": Step(90, group=1, how="softmax"),
    "all scores equal": Step(600, limit=0),
    "padding and an empty row": Step(130, batch=2, masked=0.4),
    "sinks and recent": Step(90, forced=2, masked=0.3, how="softmax"),
    "softcap": Step(100, softcap=2.0, group=4),
    "learned sinks": Step(100, sinks=True, how="softmax"),
    "an odd width": Step(70, dim=24, n_tip=3, n_fac=7),
}


@pytest.mark.parametrize("step", STEPS.values(), ids=STEPS)
def test_decode_equals_the_oracle(step: Step) -> None:
    heads = step.kv_heads * step.group
    q = integers(step.batch, heads, 1, step.dim, seed=1, limit=step.limit)
    k = integers(step.batch, step.kv_heads, step.length, step.dim, seed=2, limit=step.limit)
    v = torch.randn(step.batch, step.kv_heads, step.length, step.dim, generator=generator(3))
    chunks = pick_chunks(step.kv_heads, step.n_tip, dim=step.dim)
    sinks = torch.randn(heads, generator=generator(4)) if step.sinks else None
    real = torch.rand(step.batch, step.length, generator=generator(5)) >= step.masked
    if step.masked:
        real[0] = step.batch == 1
    scorer = DominantChunks.from_chunks(chunks)
    packed, real_codes = scorer.pack(k), codes(real, step.forced)
    scaling = step.dim**-0.5
    ranked = (scorer.dims, packed, None, real_codes, step.n_fac, step.how, scaling)
    slots = ops.select_slots(q, *ranked)
    outs = {
        "apart": ops.attend_slots(q, k, v, slots, scaling, step.softcap, sinks),
        "at once": ops.sparse_decode(q, k, v, *ranked, step.softcap, sinks),
    }
    expected = oracle.fasa(
        *(x.double().numpy() for x in (q, k, v)),
        chunks.numpy(),
        n_fac=step.n_fac,
        n_sink=step.forced,
        n_recent=step.forced,
        group_reduce=step.how,
        key_mask=real.numpy(),
        softcap=step.softcap,
        sinks=None if sinks is None else sinks.double().numpy(),
    )
    for how, out in outs.items():
        np.testing.assert_allclose(out.numpy(), expected.out, atol=1e-5, err_msg=how)


@pytest.mark.parametrize("limit", ["MOST_COUNTED", "MOST_FOCUSED"])
@pytest.mark.parametrize(
    "step", [STEPS["a search over tiles"], STEPS["softmax"], Step(90, forced=2, masked=0.9)], ids=str
)
def test_long_rows_select_the_same(step: Step, limit: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """From 2048 tiles on the search guesses, from 4096 on it is a kernel of its own.

    The last step's orders span 32 bits, from keys of no use to those that are forced.
    """
    monkeypatch.setattr(ops, limit, 1)
    test_decode_equals_the_oracle(step)


def codes(real: Tensor, forced: int) -> Tensor:
    """0 for padding, 1 for a key, 2 for one of the first or last real ones."""
    nth = real.cumsum(-1)
    ends = (nth <= forced) | (nth > nth[:, -1:] - forced)
    return (real.int() + (real & ends).int() * bool(forced)).to(torch.uint8)


def test_int8_keys_are_scored_with_their_scales() -> None:
    """Keys of very different lengths: without the scales, others would be selected."""
    q, k = integers(1, 2, 1, 16, seed=1), integers(1, 1, 80, 16, seed=2)
    k = k * torch.logspace(-2, 2, 80)[None, None, torch.randperm(80, generator=generator(3)), None]
    v, chunks = torch.randn(1, 1, 80, 16, generator=generator(4)), pick_chunks(1, 3)
    scorer = DominantChunks.from_chunks(chunks)
    packed = PackedKeys.of(scorer.pack(k), "int8")
    rows, scales = packed.tiles.transpose(3, 4).flatten(2, 3).contiguous(), packed.scales.flatten(2)
    everyone = torch.ones(1, 80, dtype=torch.uint8)
    out = ops.sparse_decode(q, k, v, scorer.dims, rows, scales, everyone, 5, "max", 0.25, None, None)
    held = k.clone()
    held[..., scorer.dims[0]] = packed.rows(80)
    ranked = oracle.fasa(*(x.double().numpy() for x in (q, held, v)), chunks.numpy(), n_fac=5)
    rows_of = ranked.selected[0, 0, 0]
    for head in range(2):
        expected = oracle.attend(*(x.double().numpy() for x in (q[0, head, 0], k[0, 0], v[0, 0])), rows_of, 0.25)
        np.testing.assert_allclose(out[0, head, 0].numpy(), expected, atol=1e-5)


@pytest.mark.parametrize(
    "step",
    [Step(70), Step(1100, batch=2, group=3, masked=0.4), Step(90, group=1, dim=24, softcap=2.0), Step(100, sinks=True)],
    ids=["one part", "many parts, padding and an empty row", "softcap", "learned sinks"],
)
def test_dense_decode_equals_the_oracle_with_a_budget_for_all_keys(step: Step, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dense, "PROGRAMS", 16)
    heads = step.kv_heads * step.group
    q = integers(step.batch, heads, 1, step.dim, seed=1, limit=step.limit)
    k = integers(step.batch, step.kv_heads, step.length, step.dim, seed=2, limit=step.limit)
    v = torch.randn(step.batch, step.kv_heads, step.length, step.dim, generator=generator(3))
    sinks = torch.randn(heads, generator=generator(4)) if step.sinks else None
    real = torch.rand(step.batch, step.length, generator=generator(5)) >= step.masked
    if step.masked:
        real[0] = False
    out = dense.dense_decode(q, k, v, codes(real, 0), step.dim**-0.5, step.softcap, sinks)
    expected = oracle.fasa(
        *(x.double().numpy() for x in (q, k, v)),
        pick_chunks(step.kv_heads, step.n_tip, dim=step.dim).numpy(),
        n_fac=step.length,
        key_mask=real.numpy(),
        softcap=step.softcap,
        sinks=None if sinks is None else sinks.double().numpy(),
    )
    np.testing.assert_allclose(out.numpy(), expected.out, atol=1e-5)


def test_held_rows_are_the_selected_ones_step_after_step() -> None:
    """Selections that change in part, one with fewer slots, and a cache that was rewound and written anew."""
    rows, kv_heads, length, wanted = 4, 2, 200, 7
    k = torch.randn(rows // kv_heads, kv_heads, length, 16, generator=generator(1))
    v = torch.randn(rows // kv_heads, kv_heads, length, 8, generator=generator(2))
    held = HeldRows.empty(k[:, :, :0], v[:, :, :0], wanted, torch.tensor(length))
    chosen = [slots_of(rows, wanted, limit=30, seed=step) for step in range(6)]
    chosen[2][1, 3:], chosen[4][1, ::2] = -1, -1  # rows with fewer keys than budget, in whatever order
    chosen[5][:, -1] = length - 1
    fetched = []
    for step, slots in enumerate([*chosen, chosen[5]]):
        if step == 6:
            k[:, :, -1], v[:, :, -1] = 0.5, -0.5  # the last token is another one, and held already
        fresh = held.slots.clone().view(rows, wanted), held.keys.clone(), held.values.clone()
        places = ops.hold_slots(k, v, slots, held.slots, held.places, held.keys, held.values, held.length)
        real = slots >= 0
        assert torch.equal(places >= 0, real)
        for states, found in ((k, held.keys), (v, held.values)):
            expected = states.flatten(0, 1).gather(1, spread(slots, states))
            assert torch.equal(expected[real], found.flatten(0, 1).gather(1, spread(places, found))[real])
        assert torch.equal(held.slots.view(rows, wanted), slots)
        assert torch.equal(held.places.view(rows, wanted).sort(-1).values, torch.arange(wanted).expand(rows, -1).int())
        moved = (held.keys != fresh[1]).any(-1) | (held.values != fresh[2]).any(-1)
        fetched.append(int(moved.sum()))
        known = (slots[:, :, None] == fresh[0][:, None]).any(-1) & (slots < length - 1)
        if not (fresh[0].diff(dim=-1) < 0).any():  # disorder only costs fetches
            assert fetched[-1] == int((real & ~known).sum())
    assert fetched[0] == rows * wanted
    assert 0 < fetched[1] < rows * wanted
    assert fetched[6] == rows  # the rewritten token alone


def slots_of(rows: int, wanted: int, limit: int, seed: int) -> Tensor:
    """Ascending slots below a limit, int32 [rows, wanted]."""
    drawn = torch.stack([torch.randperm(limit, generator=generator(10 * seed + row))[:wanted] for row in range(rows)])
    return drawn.sort(-1).values.to(torch.int32)


def spread(slots: Tensor, states: Tensor) -> Tensor:
    return slots.clamp(min=0).long()[..., None].expand(-1, -1, states.shape[-1])


def test_the_kernels_are_refused_where_they_cannot_run() -> None:
    q, k = integers(1, 2, 1, 16, seed=1), integers(1, 1, 8, 16, seed=2)
    with pytest.raises(ValueError, match=r"CUDA .* backend='auto'") as error:
        fasa_attention(q, k, k, pick_chunks(1, 2), n_fac=4, backend="triton")
    assert "\n" not in str(error.value)


def test_the_kernels_compile_for_a_gpu_that_is_not_there(tmp_path: Path) -> None:
    """In a process without the interpreter, which is more lenient than the compiler."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    script = Path(__file__).with_name("compile_kernels.py")
    done = subprocess.run(
        [sys.executable, str(script)],
        env={**environment, "TRITON_CACHE_DIR": str(tmp_path)},
        capture_output=True,
        text=True,
        timeout=600,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-2000:]


@pytest.mark.slow
@pytest.mark.parametrize("placement", ["device", "host"])
def test_a_compiled_model_decodes_by_kernels_without_copying_its_cache(
    llama: PreTrainedModel, ids: Ids, placement: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As on a GPU, with the kernels interpreted: the reference's logits, and no buffer as long as the cache."""
    monkeypatch.setattr("fasa_flex.packing.tile_of", lambda device: 1)
    monkeypatch.setattr("fasa_flex.attention.why_no_kernels", lambda *call: None)
    profile, length = profile_of(llama), 777
    prompt, tokens = ids(40, rows=2), [ids(1, seed=step, rows=2) for step in range(3)]

    def decode(backend: Any, run: Any) -> Tensor:
        config = FasaConfig(n_fac=8, n_tip=3, dense_layers=(0,), group_reduce="max", backend=backend)
        cache = FasaCache(llama, profile, config, placement=placement, max_cache_len=length)
        with torch.no_grad(), enable(llama, profile, config):
            llama(prompt, past_key_values=cache)
            return torch.cat([run(token, past_key_values=cache).logits for token in tokens])

    torch._dynamo.reset()
    logits, code = run_and_get_code(decode, "auto", torch.compile(llama, fullgraph=True, dynamic=False))
    torch.testing.assert_close(logits, decode("reference", llama), atol=1e-4, rtol=1e-4)
    graph = max(code, key=len)
    called = [name for name in FUNCTIONS if graph.count(f"= torch.ops.fasa_flex.{name}.default(") == 2]
    assert called == (["sparse_decode"] if placement == "device" else ["select_slots", "hold_slots", "attend_slots"])
    shapes = re.findall(r"= empty_strided_cpu\(\(([\d, ]+)\)", graph)
    sizes = [math.prod(int(size) for size in shape.split(",") if size.strip()) for shape in shapes]
    assert sizes
    assert max(sizes) <= 2 * length  # a validity for each row, and nothing for each of its heads
