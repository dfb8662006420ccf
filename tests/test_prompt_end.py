"""Where the prompt ends, and decoding begins: a last chunk or a suffix of one token is still the prompt."""

from __future__ import annotations

import pytest
import torch
from generation import Ids, generate, profile_of
from transformers import DynamicCache, PreTrainedModel

from fasa_flex import FasaConfig, enable
from fasa_flex.hf.compatibility import cache_argument

CONFIG = FasaConfig(n_fac=5, n_tip=2)


@pytest.mark.parametrize("chunk", [1, 15, 30, 31])
def test_chunks_of_a_prompt_change_nothing(llama: PreTrainedModel, ids: Ids, chunk: int) -> None:
    """A prompt of 31 ends on a chunk of one token for 1, 15 and 30."""
    prompt = ids(31, rows=2)
    with enable(llama, profile_of(llama), CONFIG) as fasa:
        expected, counts = generate(llama, prompt), fasa.stats.as_dict()
        fasa.stats.reset()
        tokens, logits = generate(llama, prompt, prefill_chunk_size=chunk)
        assert fasa.stats.as_dict() == counts
    assert torch.equal(tokens, expected[0])
    torch.testing.assert_close(logits, expected[1], atol=1e-4, rtol=1e-4)


@torch.no_grad()
def test_a_suffix_of_one_token_is_read_densely(llama: PreTrainedModel, ids: Ids) -> None:
    """A chat that goes on with one token more, on the cache of what was said."""
    said = ids(32, rows=1)
    with enable(llama, profile_of(llama), CONFIG) as fasa:
        expected = generate(llama, said)
        cache = DynamicCache(config=llama.config)
        llama(said[:, :-1], **cache_argument(llama, cache))
        fasa.stats.reset()
        tokens, logits = generate(llama, said, **cache_argument(llama, cache))
        assert [layer.sparse_queries for layer in fasa.stats.per_layer] == [0, 11, 11]
    assert torch.equal(tokens, expected[0])
    torch.testing.assert_close(logits, expected[1], atol=1e-4, rtol=1e-4)


@torch.no_grad()
def test_a_boundary_decides_for_single_tokens_too(llama: PreTrainedModel, ids: Ids) -> None:
    """Rows end their prompts at 20 and at 23: token by token as in one forward, also where rows differ."""
    prompt, start = ids(26, rows=2), torch.tensor([20, 23])
    with enable(llama, profile_of(llama), CONFIG) as fasa, fasa.sparse_from(start):
        whole, counts = llama(prompt).logits, fasa.stats.as_dict()
        fasa.stats.reset()
        cache = DynamicCache(config=llama.config)
        steps = [llama(prompt[:, at : at + 1], **cache_argument(llama, cache)).logits for at in range(26)]
        assert fasa.stats.as_dict() == counts
        assert fasa.stats.sparse_queries == 2 * (6 + 3)
    torch.testing.assert_close(torch.cat(steps, 1), whole, atol=1e-4, rtol=1e-4)
