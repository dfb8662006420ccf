"""An installed wheel at work: a tiny random model calibrates, decodes under FASA and is dense again."""

import sys

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from fasa_flex import FasaConfig, calibrate, enable
from fasa_flex.lm_eval import TASKS_PATH
from fasa_flex.lm_eval.haystack import heldout_text

sizes = {"hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
model = LlamaForCausalLM(LlamaConfig(vocab_size=64, num_key_value_heads=2, **sizes)).eval()
prompt = torch.randint(3, 64, (1, 60), generator=torch.Generator().manual_seed(0))
profile = calibrate(model, [prompt[0]], top_k=8, max_new_tokens=4, progress=False)
with enable(model, profile, FasaConfig(n_fac=16, dense_layers=())) as fasa:
    made = model.generate(prompt, max_new_tokens=8, min_new_tokens=8, do_sample=False)
    assert made.shape == (1, 68), made.shape
    assert fasa.stats.sparse_queries > 0, fasa.stats
assert model.config._attn_implementation in ("sdpa", "eager")
assert "fasa_needle.yaml" in {path.name for path in TASKS_PATH.iterdir()}
assert len(heldout_text()) > 100_000
assert "_fasa_flex_startup" in sys.modules, "the start-up hook did not run"
print("a tiny model decoded under FASA, by", sys.modules["fasa_flex"].__file__)
