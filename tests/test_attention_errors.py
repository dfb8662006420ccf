"""fasa_attention refuses what does not fit, in one sentence that names the value."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from cases import DIM, EXACT, Case
from sentences import raises_sentence

from fasa_flex import FasaConfig, fasa_attention
from fasa_flex.backends.triton.dispatch import check_kernels
from fasa_flex.core.budget import Budget
from fasa_flex.core.scoring import DominantChunks


@pytest.mark.parametrize("backend", [*EXACT, "flex"])
@pytest.mark.parametrize("where", ["q", "k"])
def test_nan_is_refused(backend: str, where: str) -> None:
    q, k, v, chunks = Case("nan").tensors()
    (q if where == "q" else k)[0, 0, 0, 5] = torch.nan
    with raises_sentence(ValueError, match=r"(?i)nan"):
        fasa_attention(q, k, v, chunks, n_fac=4, backend=backend)


Q, K, V, CHUNKS = Case("errors").tensors()


@pytest.mark.parametrize(
    ("what", "changes", "named"),
    [
        ("heads no multiple of the KV heads", {"q": Q[:, :3]}, "3"),
        ("no batch dimension", {"q": Q[0]}, "4|dim|shape|B, Hq"),
        ("another head dim", {"q": Q[..., :8]}, "8"),
        ("another batch", {"q": Q.expand(2, -1, -1, -1)}, "2"),
        ("more queries than keys", {"q": Q.expand(-1, -1, 25, -1)}, "25"),
        ("fewer keys than values", {"k": K[:, :, :20]}, "20"),
        ("fewer values than keys", {"v": V[:, :, :20]}, "20"),
        ("fewer value heads", {"v": V[:, :1]}, "1"),
        ("another dtype of values", {"v": V.double()}, "(?i)float64|dtype"),
        ("chunks of one head", {"chunks": CHUNKS[:1]}, "1"),
        ("chunks without pairs", {"chunks": CHUNKS.flatten(1)}, "chunks"),
        ("chunks with a dimension too many", {"chunks": CHUNKS[None]}, "chunks must be"),
        ("chunks of three dimensions", {"chunks": torch.cat([CHUNKS, CHUNKS[..., :1]], -1)}, "chunks must be"),
        ("chunks of one dimension", {"chunks": CHUNKS[..., :1]}, "chunks must be"),
        ("chunks of three heads", {"chunks": CHUNKS[:1].expand(3, -1, -1)}, "chunks must be"),
        ("no chunks", {"chunks": CHUNKS[:, :0]}, "chunks"),
        ("more chunks than a head has", {"chunks": CHUNKS[:, :1].expand(-1, 9, -1)}, r"\[2 or 4 heads, 1\.\.8 chunks"),
        ("chunks beyond the head dim", {"chunks": CHUNKS + DIM}, "chunks"),
        ("a chunk just beyond", {"chunks": torch.tensor([[[0, DIM]], [[1, 9]]])}, "0..16 of heads with 16"),
        ("a chunk just below", {"chunks": torch.tensor([[[0, 8]], [[-1, 9]]])}, "-1..9 of heads with 16"),
        ("negative chunks", {"chunks": CHUNKS - DIM}, "chunks"),
        ("chunks of float", {"chunks": CHUNKS.float()}, "chunks"),
        ("a mask too short", {"key_mask": torch.ones(1, 23, dtype=torch.bool)}, "23"),
        ("a mask of another batch", {"key_mask": torch.ones(2, 24, dtype=torch.bool)}, "2"),
        ("a mask of numbers", {"key_mask": torch.ones(1, 24)}, "bool"),
        ("packed keys too narrow", {"packed_keys": K[..., :3]}, "3"),
        ("packed keys too wide", {"packed_keys": K[..., :5]}, "packed_keys must be"),
        ("packed keys too few", {"packed_keys": K[:, :, :23, :4]}, "packed_keys must be"),
        ("packed keys too many", {"packed_keys": K[:, :, :1, :4].expand(-1, -1, 25, -1)}, "packed_keys must be"),
        ("packed keys of one head", {"packed_keys": K[:, :1, :, :4]}, "packed_keys must be"),
        (
            "packed keys with chunks per query head",
            {"packed_keys": K[..., :4], "chunks": CHUNKS.repeat_interleave(2, 0)},
            "and 4 sets",
        ),
        ("queries of integers", {"q": Q.int(), "k": K.int(), "v": V.int()}, "float dtype"),
        ("another dtype of keys", {"k": K.double()}, "float64"),
        ("a mask of another length", {"key_mask": torch.ones(1, 25, dtype=torch.bool)}, r"bool \(1, 24\)"),
        ("no budget", {"n_fac": 0}, "0"),
        ("a negative budget", {"n_fac": -4}, "-4"),
        ("no share", {"n_fac": 0.0}, "0"),
        ("a share above one", {"n_fac": 1.5}, "1.5"),
        ("negative sinks", {"n_sink": -1}, "-1"),
        ("negative recent", {"n_recent": -2}, "-2"),
        ("more forced than budget", {"n_sink": 3, "n_recent": 4}, "n_sink"),
        ("an unknown reduction", {"group_reduce": "median"}, "median"),
        ("an unknown backend", {"backend": "sdpa"}, "sdpa"),
    ],
)
def test_what_does_not_fit_is_refused(what: str, changes: dict[str, Any], named: str) -> None:
    call: dict[str, Any] = {"q": Q, "k": K, "v": V, "chunks": CHUNKS, "n_fac": 6, "backend": "gather"}
    fasa_attention(**call)
    with raises_sentence((ValueError, TypeError), match=named):
        fasa_attention(**{**call, **changes})


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"device": torch.device("cpu")}, "CUDA device"),
        ({"config": FasaConfig(prefill="sparse")}, "one query a row"),
        ({"scorer": object()}, "packed keys of dominant chunks"),
        ({"packs": False}, "packed keys of dominant chunks"),
        ({"budget": Budget((3, 5))}, r"one count or share for all heads, got \(3, 5\)"),
        ({"config": FasaConfig(group_reduce="none")}, "select together"),
    ],
)
def test_kernels_that_would_serve_no_token_are_refused_beforehand(changes: dict[str, Any], named: str) -> None:
    given: dict[str, Any] = {
        "device": torch.device("cuda"),
        "layer": 3,
        "scorer": DominantChunks.from_chunks(CHUNKS),
        "budget": Budget(256),
        "config": FasaConfig(),
        "packs": True,
        "group": 2,
    }
    check_kernels(**given)
    with raises_sentence(ValueError, match=rf"layer 3: .*{named}"):
        check_kernels(**{**given, **changes})


@pytest.mark.parametrize("backend", EXACT)
@pytest.mark.parametrize("group_reduce", ["softmax", "max", "mean", "none"])
def test_nan_in_masked_keys_is_padding(backend: str, group_reduce: str) -> None:
    """As the error for NaN says: padding belongs in key_mask, where it may be anything."""
    q, k, v, chunks = Case("nan").tensors()
    mask = torch.ones(k.shape[0], k.shape[2], dtype=torch.bool)
    mask[:, :3] = False
    options = {"n_fac": 6, "key_mask": mask, "backend": backend, "group_reduce": group_reduce}
    expected = fasa_attention(q, k, v, chunks, **options)
    k[:, :, :3] = torch.nan
    assert torch.equal(fasa_attention(q, k, v, chunks, **options), expected)
    k[0, 0, 5, 5] = torch.nan
    with pytest.raises(ValueError, match="holds NaN"):
        fasa_attention(q, k, v, chunks, **options)
