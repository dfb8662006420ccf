"""Many requests at once by transformers' continuous batching under FASA, from the checkout's folder."""

from pydoc_data.topics import topics  # Python's language reference: some long text

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, ContinuousBatchingConfig, GenerationConfig

from fasa_flex import FasaConfig, calibrate, enable

MODEL = "evals/reference_model"  # or another folder, or a name on the Hub

device = "cuda" if torch.cuda.is_available() else "cpu"
tokenizer = AutoTokenizer.from_pretrained(MODEL)
model = AutoModelForCausalLM.from_pretrained(MODEL, dtype="auto").to(device)
profile = calibrate(model, [topics["import"]], tokenizer=tokenizer, progress=False)

prompts = [tokenizer(topics[name]).input_ids for name in ("assignment", "class", "function")]
generation = GenerationConfig(max_new_tokens=20, do_sample=False)
batching = ContinuousBatchingConfig(num_blocks=80, use_cuda_graph=False)  # without num_blocks: all free memory
with enable(model, profile, FasaConfig(n_fac=128)) as fasa:
    answers = model.generate_batch(
        prompts, generation_config=generation, continuous_batching_config=batching, progress_bar=False
    )

for answer in answers.values():
    print(repr(tokenizer.decode(answer.generated_tokens)))
print(fasa.stats)
