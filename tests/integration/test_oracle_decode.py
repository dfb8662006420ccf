"""Every family against a decode written with the oracle: no seam, no scorer, no selection of the library."""

from __future__ import annotations

import re
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import oracle
import pytest
import torch
from cases import plain
from conftest import token_ids
from families import FAMILIES, Family, tiny
from generation import by_the_oracle, generate, profile_of
from torch import Tensor
from transformers import AttentionInterface, PreTrainedModel
from transformers.masking_utils import AttentionMaskInterface
from ways import prompts

from fasa_flex import FasaConfig, FasaProfile, enable

CONFIGS = (
    plain(n_fac=6, n_sink=1, n_recent=2, group_reduce="max"),
    plain(n_fac=0.2, n_tip=3, group_reduce="mean"),
    plain(n_fac=5, per="query_head"),
    plain(n_fac=6),
    FasaConfig(n_fac=16, packed_dtype=None),
)


@contextmanager
def decoding_by_the_oracle(
    model: PreTrainedModel, family: Family, profile: FasaProfile, config: FasaConfig
) -> Iterator[None]:
    """Single queries of the layers that the family says are sparse go through the oracle, all others stay dense."""
    former = model.config._attn_implementation
    numbers = {module: re.search(r"\blayers\.(\d+)\.", name) for name, module in model.named_modules()}
    places = {module: int(found[1]) for module, found in numbers.items() if found}  # Zamba's have no layer_idx

    def attend(
        module: torch.nn.Module, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, **options: Any
    ) -> tuple[Tensor, Tensor | None]:
        layer = places[module]
        if query.shape[2] > 1 or layer not in family.sparse:
            if former == "eager":
                dense = sys.modules[type(module).__module__].eager_attention_forward
            else:
                dense = AttentionInterface._global_mapping[former]
            return dense(module, query, key, value, mask, **options)
        sinks = options.get("s_aux")
        result = oracle.fasa(
            *(x.detach().double().numpy() for x in (query, key, value)),
            **by_the_oracle(profile, config, layer, family.pairs, key.shape[1]),
            scaling=options["scaling"],
            softcap=options.get("softcap"),
            sinks=None if sinks is None else sinks.detach().double().numpy(),
        )
        return torch.from_numpy(result.out).to(query.dtype).transpose(1, 2).contiguous(), None

    AttentionInterface.register("by_oracle", attend)
    AttentionMaskInterface.register("by_oracle", AttentionMaskInterface._global_mapping[former])
    model.set_attn_implementation("by_oracle")
    try:
        yield
    finally:
        model.set_attn_implementation(former)


@pytest.mark.parametrize("config", CONFIGS, ids=lambda c: f"{c.n_fac} {c.n_sink}+{c.n_recent} {c.per} {c.group_reduce}")
@pytest.mark.parametrize(
    "family", [family for family in FAMILIES.values() if family.sparse], ids=lambda family: family.name
)
def test_decodes_as_the_oracle(family: Family, config: FasaConfig) -> None:
    model = tiny(family.name)
    completes = config.completion != "none"
    profile = profile_of(model, mean_key=completes)
    prompt = token_ids(66, rows=1) if completes else prompts(rows=1)  # 64 keys are the first that are completed
    with decoding_by_the_oracle(model, family, profile, config):
        expected_tokens, expected = generate(model, prompt, max_new_tokens=5)
    with enable(model, profile, config):
        tokens, logits = generate(model, prompt, max_new_tokens=5)
    assert torch.equal(tokens, expected_tokens)
    torch.testing.assert_close(logits, expected, atol=5e-4 * float(expected.abs().max()), rtol=1e-3)
