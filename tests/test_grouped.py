"""Dense layers of a decode step: each key is read once for its group, and the result is the model's."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from cases import generator
from generation import Ids, profile_of
from torch import Tensor
from torch.nn import functional as F
from transformers import DynamicCache, PreTrainedModel, StaticCache

from fasa_flex import FasaConfig, enable
from fasa_flex.backends.dense import decodes_grouped, grouped_attention
from fasa_flex.core.softmax import Softmax
from fasa_flex.model import layer


def states(heads: int, length: int, seed: int) -> Tensor:
    return torch.randn(2, heads, length, 16, generator=generator(seed))


def test_grouped_attention_is_attention_to_repeated_keys() -> None:
    q, k, v = states(6, 1, 1), states(2, 50, 2), states(2, 50, 3)
    valid = torch.rand(2, 1, 1, 1, 50, generator=generator(4)) > 0.3
    repeated = (x.repeat_interleave(3, dim=1) for x in (k, v))
    expected = F.scaled_dot_product_attention(q, *repeated, attn_mask=valid[:, 0], scale=0.3)
    torch.testing.assert_close(grouped_attention(q, k, v, valid, Softmax(0.3)), expected)


def test_where_all_keys_are_valid_cudnn_is_not_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    """It would plan every length of a growing cache anew; what may be asked afterwards is as before."""
    q, k, v = states(6, 1, 1), states(2, 50, 2), states(2, 50, 3)
    expected = F.scaled_dot_product_attention(q, *(x.repeat_interleave(3, dim=1) for x in (k, v)), scale=0.3)
    attend, during, former = F.scaled_dot_product_attention, [], torch.backends.cuda.cudnn_sdp_enabled()

    def watched(*args: Any, **options: Any) -> Tensor:
        during.append(torch.backends.cuda.cudnn_sdp_enabled())
        return attend(*args, **options)

    monkeypatch.setattr(F, "scaled_dot_product_attention", watched)
    for allowed in (not former, former):
        torch.backends.cuda.enable_cudnn_sdp(allowed)
        out = grouped_attention(q, k, v, torch.ones(1, 1, 1, 1, 50, dtype=torch.bool), Softmax(0.3), all_valid=True)
        torch.testing.assert_close(out, expected)
        assert torch.backends.cuda.cudnn_sdp_enabled() is allowed
    assert during == [False, False]


def test_it_serves_one_query_of_a_group() -> None:
    q, k, mask, plain = states(6, 1, 1), states(2, 50, 2), torch.ones(2, 1, 1, 50, dtype=torch.bool), Softmax(0.3)
    assert decodes_grouped(q, k, k, mask, plain)
    assert decodes_grouped(q, k, k, None, plain)
    assert not decodes_grouped(states(6, 2, 1), k, k, mask, plain)
    assert not decodes_grouped(states(2, 1, 1), k, k, mask, plain)
    assert not decodes_grouped(q, k, k, mask, Softmax(0.3, softcap=2.0))


@pytest.mark.parametrize("backend", ["auto", "fastest"])
@pytest.mark.parametrize("cache", [StaticCache, DynamicCache])
@pytest.mark.filterwarnings("ignore:every layer of")
def test_dense_layers_read_each_key_once_for_its_group(
    llama: PreTrainedModel, ids: Ids, backend: str, cache: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """All layers dense, by name or by the crossover: the logits are the model's, by attention of ours."""
    layers = (0, 1, 2) if backend == "auto" else (0,)
    calls: list[int] = []
    ours = layer.grouped_attention

    def counted(query: Tensor, *rest: Any, **options: Any) -> Tensor:
        calls.append(query.shape[2])
        return ours(query, *rest, **options)

    monkeypatch.setattr(layer, "grouped_attention", counted)

    def logits() -> Tensor:
        held = cache(config=llama.config, **({"max_cache_len": 40} if cache is StaticCache else {}))
        llama(ids(20, rows=2), past_key_values=held)
        return llama(ids(1, rows=2), past_key_values=held).logits

    with torch.no_grad():
        expected = logits()
        assert not calls
        config = FasaConfig(n_fac=4, n_tip=3, dense_layers=layers, backend=backend)
        with enable(llama, profile_of(llama), config):
            torch.testing.assert_close(logits(), expected, rtol=1e-4, atol=1e-4)
    assert calls == [1, 1, 1]
