"""A prefill by blocks with an estimator of one's own, beside dense attention, from the checkout's folder."""

from pydoc_data.topics import topics  # Python's language reference: some long text

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer

from fasa_flex import FasaConfig, calibrate, enable
from fasa_flex.prefill.estimators import Blocks, pooled
from fasa_flex.prefill.grid import BLOCK


def by_means(blocks: Blocks) -> Tensor:
    """An example: one mean query and one mean key of each block, in the dominant dimensions alone."""
    query = blocks.mean_queries(BLOCK)[..., 0, :].float()  # [B, Hkv, G, M, P] of M blocks
    key = blocks.mean_keys(BLOCK)[..., 0, :].float()  # [B, Hkv, N, P] of N blocks
    return (blocks.softmax.scaling * query @ key[:, :, None].mT).exp()  # [B, Hkv, G, M, N]


MODEL = "evals/reference_model"  # or another folder, or a name on the Hub

device = "cuda" if torch.cuda.is_available() else "cpu"
tokenizer = AutoTokenizer.from_pretrained(MODEL)
model = AutoModelForCausalLM.from_pretrained(MODEL, dtype="auto").to(device)
profile = calibrate(model, [topics["import"]], tokenizer=tokenizer, progress=False)
ids = tokenizer(topics["strings"], return_tensors="pt").input_ids[:, :3000].to(device)

config = FasaConfig(prefill="blocks", prefill_share=0.3)
with torch.no_grad():
    logits = {"dense": model(ids).logits[0]}
    for name, estimator in {"pooled": pooled, "by means": by_means}.items():
        with enable(model, profile, config, estimator=estimator) as fasa:
            logits[name] = model(ids).logits[0]
            print(f"{name}: {fasa.stats.block_share:.0%} of the blocks")
for name, found in logits.items():
    nats = torch.nn.functional.cross_entropy(found[:-1].float(), ids[0, 1:])
    print(f"{name}: {nats:.3f} nats a token")
