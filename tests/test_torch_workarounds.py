"""Minimal reproductions of torch's faults that the package works around: one that passes ends its workaround.

Seen in torch 2.11 and 2.13. When a newer torch makes a test here fail, remove the workaround that the test names.
"""

from __future__ import annotations

import os
import subprocess
import sys
from contextvars import ContextVar
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._dynamo.exc import Unsupported
from torch._dynamo.testing import CompileCounter
from torch._inductor.exc import InductorError
from torch.backends import cuda
from torch.nn import functional as F
from torch.nn.attention.flex_attention import BlockMask, flex_attention

from fasa_flex.core.compiler import keep_rounding, realize

KEYS, BLOCK = 64, 16
pytestmark = pytest.mark.usefixtures("fresh_compiler")


def attend(query: Tensor, key: Tensor, value: Tensor, selected: Tensor, **options: Any) -> Tensor:
    """All blocks of keys, of which a mask function takes the selected ones."""
    blocks = torch.arange(key.shape[2] // BLOCK, dtype=torch.int32).expand(1, 1, 1, -1).contiguous()
    mask = BlockMask.from_kv_blocks(
        torch.full((1, 1, 1), key.shape[2] // BLOCK, dtype=torch.int32),
        blocks,
        BLOCK_SIZE=(128, BLOCK),
        mask_mod=lambda b, h, row, key: selected[b, h, row, key],
        seq_lengths=(query.shape[2], key.shape[2]),
        compute_q_blocks=False,
    )
    out: Any = flex_attention(query, key, value, block_mask=mask, kernel_options=options or None)
    assert isinstance(out, Tensor)
    return out


def arguments(queries: int = 4, keys: int = KEYS) -> list[Tensor]:
    return [torch.randn(1, 1, rows, 16) for rows in (queries, keys, keys)] + [torch.randn(1, 1, queries, keys)]


def test_a_mask_function_may_not_read_what_its_graph_computes() -> None:
    """Works around it: `fasa_flex.core.method.to_block_mask`, by `realize`."""

    def plain(query: Tensor, key: Tensor, value: Tensor, scores: Tensor) -> Tensor:
        return attend(query, key, value, scores > scores.mean(-1, keepdim=True))

    def mended(query: Tensor, key: Tensor, value: Tensor, scores: Tensor) -> Tensor:
        return attend(query, key, value, realize(scores > scores.mean(-1, keepdim=True)))

    given = arguments()
    torch.testing.assert_close(torch.compile(mended, fullgraph=True)(*given), plain(*given))
    with pytest.raises(InductorError, match="NoValidChoicesError"):
        torch.compile(plain, fullgraph=True)(*given)


def test_a_fused_cast_to_16_bits_does_not_round() -> None:
    """Works around it: `fasa_flex.core.compiler.keep_rounding`, whose two views alone would cancel."""

    def plain(numbers: Tensor) -> Tensor:
        return (numbers * 1.37).to(torch.float16).float() * 3.0

    def viewed(numbers: Tensor) -> Tensor:
        return (numbers * 1.37).to(torch.float16).view(torch.int16).view(torch.float16).float() * 3.0

    def mended(numbers: Tensor) -> Tensor:
        return keep_rounding((numbers * 1.37).to(torch.float16)).float() * 3.0

    numbers = torch.randn(64, 64)
    assert torch.compile(mended, fullgraph=True)(numbers).equal(plain(numbers))
    assert not torch.compile(plain, fullgraph=True)(numbers).equal(plain(numbers))
    assert not torch.compile(viewed, fullgraph=True)(numbers).equal(plain(numbers))


def test_nothing_may_follow_attention_in_its_graph() -> None:
    """Works around it: `fasa_flex.core.method.flex_focused`, by `realize`."""

    def plain(query: Tensor, key: Tensor, value: Tensor, scores: Tensor) -> Tensor:
        return attend(query, key, value, realize(scores > 0)) * 2.0 + 1.0

    with pytest.raises(InductorError, match="epilogue_nodes"):
        torch.compile(plain, fullgraph=True)(*arguments())


@pytest.mark.skipif(torch.__version__ < (2, 13), reason="torch 2.11 has no template for one query on a CPU")
def test_one_query_needs_full_blocks() -> None:
    """Works around it: `fasa_flex.core.method.flex_focused`, by a partition longer than any cache."""

    def mended(query: Tensor, key: Tensor, value: Tensor, scores: Tensor) -> Tensor:
        return attend(query, key, value, realize(scores > 0), PARTITION_SIZE=1 << 20)

    def plain(query: Tensor, key: Tensor, value: Tensor, scores: Tensor) -> Tensor:
        return attend(query, key, value, realize(scores > 0))

    given = arguments(queries=1, keys=512)
    torch.testing.assert_close(torch.compile(mended, fullgraph=True)(*given), plain(*given))
    with pytest.raises(InductorError, match="full_kv_num_blocks"):
        torch.compile(plain, fullgraph=True)(*given)


def test_a_comparison_is_not_padded() -> None:
    """Works around it: `fasa_flex.core.method.to_block_mask`, by int8."""
    order = torch.randint(0, 9, (2, 5, 304))

    def plain(order: Tensor) -> Tensor:
        return F.pad(order > 3, (0, 0, 0, 3))

    def mended(order: Tensor) -> Tensor:
        return F.pad((order > 3).to(torch.int8), (0, 0, 0, 3))

    assert torch.equal(torch.compile(mended, fullgraph=True)(order).bool(), plain(order))
    with pytest.raises(InductorError, match="VecMask"):
        torch.compile(plain, fullgraph=True)(order)


def test_a_length_by_some_names_does_not_compile() -> None:
    """Works around it: `fasa_flex.backends.specialization.attend_compiled`, by one number of queries per graph.

    Inductor calls the sizes of a CPU block ks1 and ks2 (with two lengths ks2 and ks3) and replaces these names as text:
    in ks24, too, a length that Dynamo numbers by a hash of its argument's name.
    """

    def plain(query: Tensor, key: Tensor, value: Tensor, focus: Tensor) -> Tensor:
        return attend(query, key, value, realize(focus > 0))

    given = arguments(queries=6)
    torch.testing.assert_close(torch.compile(plain, fullgraph=True, dynamic=False)(*given), plain(*given))
    for states in (given[0], given[3]):
        torch._dynamo.mark_dynamic(states, 2)
    with pytest.raises(InductorError, match="cur_kvSplitSize4"):
        torch.compile(plain, fullgraph=True)(*given)


def test_a_mask_of_tiles_is_of_a_length_that_its_kernel_does_not_know() -> None:
    """Works around it: `fasa_flex.backends.table`, where flex scores keys and not their tiles on a CPU.

    The mask function has the keys' length, which Inductor then finds to be 16 times the number of tiles; it hands this
    number to the CPU kernel only if it is a length itself.
    """

    def plain(query: Tensor, key: Tensor, value: Tensor, tiles: Tensor) -> Tensor:
        length = key.shape[2]
        scores = (tiles[:, :, : -(-length // BLOCK)] + 0.0).flatten(2)[..., :length].view(1, 2, 1, length)
        return attend(query, key, value, realize(scores[:, :1].expand(-1, -1, query.shape[2], -1) > 0))

    given = [*arguments()[:3], torch.randn(1, 2, KEYS // BLOCK, BLOCK)]
    torch.testing.assert_close(torch.compile(plain, fullgraph=True, dynamic=False)(*given), plain(*given))
    for states in given[1:]:
        torch._dynamo.mark_dynamic(states, 2)
    with pytest.raises(InductorError, match=r"error: .ks\d+. was not declared"):
        torch.compile(plain, fullgraph=True)(*given)


@pytest.mark.skipif(torch.__version__ >= (2, 12), reason="Inductor has the view since torch 2.12 or 2.13")
def test_a_bool_has_no_view_as_bytes() -> None:
    """Works around it: `fasa_flex.core.selection.flags`; goes with torch 2.11."""
    with pytest.raises(InductorError, match=r"torch\.bool is not supported"):
        torch.compile(lambda marked: marked.view(torch.uint8) + 1, fullgraph=True)(torch.rand(2, 300) > 0.5)


def test_take_along_dim_makes_lengths_constant() -> None:
    """Works around it: `fasa_flex.core.scoring.DominantChunks`, by `Tensor.gather`."""
    index, graphs = torch.zeros(1, 2, 1, 3, dtype=torch.long), []
    for take in (
        lambda key: key.gather(-1, index.expand(-1, -1, key.shape[2], -1)),
        lambda key: torch.take_along_dim(key, index, -1),
    ):
        counter = CompileCounter()
        for length in (7, 8, 9):
            torch.compile(take, fullgraph=True, backend=counter)(torch.randn(1, 2, length, 16))
        graphs.append(counter.frame_count)
    assert graphs == [2, 3]


def test_a_graph_reads_no_context_variable() -> None:
    """Works around it: `fasa_flex.model.forwards`, by a copy in ``traced_boundary``."""
    number = ContextVar("number", default=3)
    with pytest.raises(Unsupported, match="ContextVar"):
        torch.compile(lambda states: states + number.get(), fullgraph=True, backend="eager")(torch.ones(3))


def test_a_graph_does_not_ask_for_cudnn() -> None:
    """Works around it: `fasa_flex.backends.dense.grouped_attention`."""
    with pytest.raises(Unsupported, match="non-Tensor"):
        torch.compile(lambda states: states + cuda.cudnn_sdp_enabled(), fullgraph=True, backend="eager")(torch.ones(3))


@pytest.mark.parametrize("wanted", ["apart", "alike"])
def test_a_search_for_numbers_alike_in_all_rows_does_not_compile(wanted: str, tmp_path: Path) -> None:
    """Works around it: `fasa_flex.core.ranking.where_reached`, on a GPU, which need not be there."""
    pytest.importorskip("triton")
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    done = subprocess.run(
        [sys.executable, str(Path(__file__).with_name("compile_search.py")), wanted],
        env={**environment, "TRITON_CACHE_DIR": str(tmp_path)},
        capture_output=True,
        text=True,
        timeout=600,
        check=False,
    )
    fault = "Loop-carried variable low has initial type"
    assert (done.returncode == 0, fault in done.stderr) == ((True, False) if wanted == "apart" else (False, True))
