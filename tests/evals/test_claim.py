"""What the project is for: a 32nd of the context is enough for FASA, and not for sinks and recent tokens."""

from __future__ import annotations

import copy
from pathlib import Path
from random import Random

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer, DynamicCache

from evals.reference_model.corpus import training_text
from fasa_flex import FasaConfig, calibrate, enable
from fasa_flex.baselines import scorer_factory
from fasa_flex.lm_eval.haystack import document

MODEL = Path(__file__).parents[2] / "evals" / "reference_model"
LENGTH, BUDGET, DOCUMENTS = 2048, 64, 16


@pytest.mark.slow
@torch.no_grad()
def test_fasa_keeps_the_needles_that_sinks_and_recent_tokens_lose() -> None:
    model, tokenizer = AutoModelForCausalLM.from_pretrained(MODEL), AutoTokenizer.from_pretrained(MODEL)

    def encode(text: str) -> Tensor:
        return torch.tensor(tokenizer(text).input_ids)

    def hidden(seed: str, length: int, text: str | None = None) -> tuple[Tensor, Tensor]:
        found = document(
            Random(seed), length=length, count_tokens=lambda string: len(encode(string)), n_facts=8, text=text
        )
        return encode(found.prompt), encode(found.answer)

    text = training_text()
    samples = [hidden(f"sample {number}", LENGTH - 64, text)[0] for number in range(4)]
    profile = calibrate(model, samples, max_new_tokens=5, progress=False)
    prefilled = []
    for number in range(DOCUMENTS):
        prompt, answer = hidden(f"claim {number}", LENGTH)
        cache = DynamicCache(config=model.config)
        first = model(prompt[None], past_key_values=cache, logits_to_keep=1).logits.argmax()
        prefilled.append((cache, first, answer))

    def score() -> float:
        right = 0
        for cache, first, answer in prefilled:
            grown, token, written = copy.deepcopy(cache), first, []
            for _ in answer:
                written.append(int(token))
                token = model(token.view(1, 1), past_key_values=grown).logits.argmax()
            right += written == answer.tolist()
        return right / DOCUMENTS

    dense = score()
    with enable(model, profile, FasaConfig(n_tip=8, n_fac=BUDGET)) as fasa:
        sparse = score()
        assert fasa.stats.kv_share < 1 / 30
    with enable(model, profile, FasaConfig(n_fac=BUDGET, n_sink=8), scorer=scorer_factory("streaming_llm")):
        control = score()
    assert dense >= 0.95
    assert sparse >= 0.97 * dense
    assert control <= 0.3 * dense
