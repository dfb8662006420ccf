"""A scorer of one's own in one file, beside FASA at the same budget, from the checkout's folder."""

from pydoc_data.topics import topics  # Python's language reference: some long text

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer

from fasa_flex import FasaConfig, Scorer, calibrate, enable
from fasa_flex.core.bytes_read import ReadShare
from fasa_flex.core.packed_keys import PackedKeys


class LargestKeys(Scorer):
    """An example: ranks keys by their norm, whatever the query."""

    def score(self, query: Tensor, key: Tensor, packed_keys: PackedKeys | Tensor | None = None) -> Tensor:
        """As `Scorer`: from query [B, Hq, Q, D] and key [B, Hkv, T, D] to scores [B, Hkv, 1, Q, T]."""
        norm: Tensor = key.float().norm(dim=-1)  # [B, Hkv, T]
        return norm[:, :, None, None].expand(-1, -1, 1, query.shape[2], -1)

    def reads(self, head_dim: int, query_heads: int, kv_heads: int) -> ReadShare:
        """A norm for each key."""
        return ReadShare(ranking=1 / (2 * head_dim), together=True)


MODEL = "evals/reference_model"  # or another folder, or a name on the Hub

device = "cuda" if torch.cuda.is_available() else "cpu"
tokenizer = AutoTokenizer.from_pretrained(MODEL)
model = AutoModelForCausalLM.from_pretrained(MODEL, dtype="auto").to(device)
profile = calibrate(model, [topics["import"]], tokenizer=tokenizer, progress=False)
ids = tokenizer(topics["strings"], return_tensors="pt").input_ids.to(device)

config = FasaConfig(n_fac=64)
methods = {
    "FASA": lambda: enable(model, profile, config),
    "largest keys": lambda: enable(model, None, config, scorer=lambda layer: LargestKeys()),
}
boundary = torch.tensor([ids.shape[1] - 128], device=device)  # queries from this slot on are sparse
for name, opened in methods.items():
    with opened() as fasa, fasa.sparse_from(boundary), torch.no_grad():
        logits = model(ids).logits[0, -129:-1].float()
    nats = torch.nn.functional.cross_entropy(logits, ids[0, -128:])
    print(f"{name}: {nats:.3f} nats a token; {fasa.stats}")
