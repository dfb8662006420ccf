"""Compiled decoding with FASA on a static cache, on CPU or CUDA: python evals/bench/decode.py [MODEL] [PROMPT]."""

import sys
import time

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, StaticCache

from fasa_flex import FasaConfig, calibrate, enable
from fasa_flex.hf.compatibility import cache_argument

NEW_TOKENS = 64
device = "cuda" if torch.cuda.is_available() else "cpu"
if len(sys.argv) > 1:  # any checkpoint
    tokenizer = AutoTokenizer.from_pretrained(sys.argv[1])
    model = AutoModelForCausalLM.from_pretrained(sys.argv[1], dtype="auto").to(device).eval()
    ids = tokenizer(sys.argv[2] if len(sys.argv) > 2 else "Sparse attention. " * 200, return_tensors="pt").input_ids
else:  # random weights: shows that it runs
    heads = {"num_hidden_layers": 4, "num_attention_heads": 8, "num_key_value_heads": 2}
    config = LlamaConfig(**heads, vocab_size=1024, hidden_size=512, intermediate_size=1024)
    tokenizer, model = None, AutoModelForCausalLM.from_config(config).to(device).eval()
    ids = torch.randint(3, 1024, (1, 1024), generator=torch.Generator().manual_seed(0))
# once for each model, on text like its later prompts; profile.save_pretrained keeps the profile
profile = calibrate(model, [ids[0]], top_k=min(256, ids.shape[1] // 2), max_new_tokens=8, progress=False)

with enable(model, profile, FasaConfig(n_fac=256)) as fasa, torch.no_grad():
    cache = StaticCache(config=model.config, max_cache_len=ids.shape[1] + NEW_TOKENS)
    held = cache_argument(model, cache)  # cache=, or past_key_values= before transformers 5.24
    token = model(ids.to(device), **held).logits[:, -1:].argmax(-1)  # the prefill, dense
    tokens, step = [token], torch.compile(model, mode="reduce-overhead" if device == "cuda" else None, fullgraph=True)
    for number in range(NEW_TOKENS - 1):
        token = step(token, **held).logits[:, -1:].argmax(-1)  # sparse; one graph for all steps
        tokens.append(token)
        if number == 1:  # two steps to compile
            begun = (token.item(), time.perf_counter())[1]
    seconds = (token.item(), time.perf_counter())[1] - begun
    answer = torch.cat(tokens, dim=1)[0]
    print(tokenizer.decode(answer) if tokenizer else answer.tolist())
    print(f"{(NEW_TOKENS - 3) / seconds:.1f} tok/s on {device}; {fasa.stats}")
