"""A compiled decoding loop of one's own, on a static cache, from the checkout's folder."""

import time
from pydoc_data.topics import topics  # Python's language reference: some long text

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, StaticCache

from fasa_flex import FasaConfig, calibrate, enable
from fasa_flex.hf.compatibility import cache_argument

MODEL = "evals/reference_model"  # or another folder, or a name on the Hub
NEW_TOKENS = 64

device = "cuda" if torch.cuda.is_available() else "cpu"
tokenizer = AutoTokenizer.from_pretrained(MODEL)
model = AutoModelForCausalLM.from_pretrained(MODEL, dtype="auto").to(device)
profile = calibrate(model, [topics["import"]], tokenizer=tokenizer, progress=False)
ids = tokenizer(topics["strings"], return_tensors="pt").input_ids.to(device)

with enable(model, profile, FasaConfig(n_fac=128)) as fasa, torch.no_grad():
    cache = StaticCache(config=model.config, max_cache_len=ids.shape[1] + NEW_TOKENS)
    held = cache_argument(model, cache)  # cache=, or past_key_values= before transformers 5.24
    step = torch.compile(model, mode="reduce-overhead" if device == "cuda" else None, fullgraph=True)
    token = model(ids, **held).logits[:, -1:].argmax(-1)  # the prefill, dense
    tokens = [token.item()]
    for number in range(1, NEW_TOKENS):
        token = step(token, **held).logits[:, -1:].argmax(-1)  # sparse; one graph serves all steps
        tokens.append(token.item())
        if number == 2:  # the first two steps compile
            start = time.perf_counter()
    seconds = time.perf_counter() - start

print(tokenizer.decode(tokens))
print(f"{(NEW_TOKENS - 3) / seconds:.1f} tokens/s on {device}; {fasa.stats}")
