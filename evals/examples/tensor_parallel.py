"""Sparse `generate` of one model on several GPUs: ``torchrun --nproc-per-node 2 evals/examples/tensor_parallel.py``."""

import os
from pydoc_data.topics import topics  # Python's language reference: some long text

from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.distributed import DistributedConfig

from fasa_flex import FasaConfig, enable

MODEL = "evals/reference_model"  # or another folder, or a name on the Hub

tokenizer = AutoTokenizer.from_pretrained(MODEL)
parallel = DistributedConfig(tp_size=int(os.environ["WORLD_SIZE"]))
model = AutoModelForCausalLM.from_pretrained(MODEL, dtype="auto", distributed_config=parallel)

prompt = tokenizer(topics["import"][:4000], return_tensors="pt").to(model.device)
with enable(model, config=FasaConfig(n_fac=128)) as fasa:  # or with a profile: every process calls enable alike
    answer = model.generate(**prompt, max_new_tokens=30, do_sample=False)

if os.environ["RANK"] == "0":
    print(tokenizer.decode(answer[0, prompt.input_ids.shape[1] :], skip_special_tokens=True))
    print(fasa.stats)  # the whole model's, in every process
