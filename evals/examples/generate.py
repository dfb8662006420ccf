"""Sparse `generate` of a stock model, from the checkout's folder."""

from pydoc_data.topics import topics  # Python's language reference: some long text

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from fasa_flex import FasaConfig, calibrate, enable

MODEL = "evals/reference_model"  # or another folder, or a name on the Hub

device = "cuda" if torch.cuda.is_available() else "cpu"
tokenizer = AutoTokenizer.from_pretrained(MODEL)
model = AutoModelForCausalLM.from_pretrained(MODEL, dtype="auto").to(device)

# once for each model, on text like what it will read; profile.save_pretrained(FOLDER) keeps it
profile = calibrate(model, [topics["import"]], tokenizer=tokenizer, progress=False)

prompt = tokenizer(topics["strings"], return_tensors="pt").to(device)
with enable(model, profile, FasaConfig(n_fac=128)) as fasa:
    answer = model.generate(**prompt, max_new_tokens=50, do_sample=False)
# here the model is dense again: with its former attention, bit for bit

print(tokenizer.decode(answer[0, prompt.input_ids.shape[1] :], skip_special_tokens=True))
print(fasa.stats)  # dense and sparse queries, the share of keys and of bytes that the sparse ones read
