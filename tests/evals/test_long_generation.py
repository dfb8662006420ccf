"""Long answers beside dense attention's, on a tiny random model: where they part, and what dense thinks of them."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from evals.quality import generation_tables
from evals.quality import long_generation as long
from evals.quality.arms import PartLedger
from fasa_flex import FasaConfig, FasaProfile, calibrate

PAD, END = 0, 1


@pytest.fixture(scope="module")
def model() -> LlamaForCausalLM:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=64,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        initializer_range=0.3,
        eos_token_id=END,
    )
    return LlamaForCausalLM(config).eval()


@pytest.fixture(scope="module")
def profile(model: LlamaForCausalLM) -> FasaProfile:
    return calibrate(model, [torch.randint(2, 64, (80,))], top_k=16, max_new_tokens=4, progress=False)


@pytest.fixture(scope="module")
def prompts() -> list[long.Prompt]:
    torch.manual_seed(1)
    return [long.Prompt("text", "random", torch.randint(2, 64, (length,))) for length in (40, 70)]


def test_prompts_run_together_as_alone(model: LlamaForCausalLM, prompts: list[long.Prompt]) -> None:
    ids = [prompt.ids for prompt in prompts]
    together = long.generate(model, ids, 12, PAD)
    alone = [long.generate(model, [prompt], 12, PAD)[0] for prompt in ids]
    for mine, theirs in zip(together, alone, strict=True):
        assert mine.tolist() == theirs.tolist()


def test_answers_end_with_the_models_end(model: LlamaForCausalLM, prompts: list[long.Prompt]) -> None:
    (free,) = long.generate(model, [prompts[0].ids], 12, PAD)
    end = int(free[3])
    model.generation_config.eos_token_id = end
    try:
        (own,) = long.generate(model, [prompts[0].ids], 12, PAD)
    finally:
        model.generation_config.eos_token_id = END
    assert own.tolist() == free.tolist()[: free.tolist().index(end) + 1]


def test_greedy_answers_are_what_their_logits_say(model: LlamaForCausalLM, prompts: list[long.Prompt]) -> None:
    (own,) = long.generate(model, [prompts[1].ids], 12, PAD)
    assert long.logits_of(model, prompts[1].ids, own).argmax(-1).tolist() == own.tolist()


def test_an_arm_is_compared_with_dense(
    model: LlamaForCausalLM, profile: FasaProfile, prompts: list[long.Prompt], monkeypatch: pytest.MonkeyPatch
) -> None:
    arms = {"dense": None, "all": FasaConfig(n_fac=500), "few": FasaConfig.paper(n_fac=4)}
    monkeypatch.setattr(long, "ARMS", arms)
    dense = long.measure(model, profile, "dense", prompts, 12, PAD, None)
    own = long.answers({"rows": dense})
    assert all(row["first_divergence"] is None for row in dense)
    few = long.measure(model, profile, "few", prompts, 12, PAD, own)
    for mine, theirs in zip(few, dense, strict=True):
        at = mine["first_divergence"]
        assert at is not None
        assert at > 0  # the first token is the dense prefill's
        assert mine["written"].split()[:at] == theirs["written"].split()[:at]
        assert mine["written"].split()[at] != theirs["written"].split()[at]
        assert mine["margin"] > 0
    with pytest.raises(ValueError, match="all had no sparse query"):
        long.measure(model, profile, "all", prompts, 12, PAD, own)


def test_divergence_is_the_first_other_token_or_end() -> None:
    dense = torch.tensor([5, 6, 7])
    assert long.first_divergence(dense, dense) is None
    assert long.first_divergence(torch.tensor([5, 9, 7]), dense) == 1
    assert long.first_divergence(torch.tensor([5, 6]), dense) == 2


def test_the_table_pairs_prompts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(generation_tables, "RESULTS", tmp_path)
    ledger = PartLedger(tmp_path / "long_generation.json", {})
    for arm in long.ARMS:
        for at in (0, 10, 2):  # numbers, not names, decide the order
            own = arm != "dense"
            row = {"log_likelihood": -1.0 - at - own, "distinct_fours": 0.5}
            row |= {"first_divergence": 7 if own and at else None, "margin": 0.25 if own and at else None}
            ledger.keep(f"{arm}/{at}", {}, 1, [row])
    dense, default = generation_tables.long_generation().splitlines()[2:4]
    assert dense == "| dense | - | - | - | -5.000 | - | 0.50 |"
    assert default == "| default, 256 tokens | 1 of 3 | 7 | 0.25 | -6.000 | -1.000 [-1.000, -1.000] | 0.50 |"
