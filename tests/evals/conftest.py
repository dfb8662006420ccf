"""Make the repository's `evals` importable, behind the installed package; a chat model that takes seconds."""

import logging
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import transformers
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

sys.path.append(str(Path(__file__).parents[2]))

from evals.quality import topics


@pytest.fixture(scope="session")
def chatting() -> tuple[LlamaForCausalLM, PreTrainedTokenizerFast]:
    """A random Llama and a byte-level tokenizer that learnt Python's language reference."""
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=500, special_tokens=["<eos>"], initial_alphabet=alphabet, show_progress=False
    )
    backend.train_from_iterator([topics.text_of("debugger")], trainer)
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<eos>", bos_token="<eos>")
    tokenizer.chat_template = (
        "{% for message in messages %}<eos>{{ message['role'] }}\n{{ message['content'] }}{% endfor %}"
        "{% if add_generation_prompt %}<eos>assistant\n{% endif %}"
    )
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=backend.get_vocab_size(),
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=2048,
        initializer_range=0.3,
        bos_token_id=0,
        eos_token_id=0,
        pad_token_id=0,
    )
    return LlamaForCausalLM(config).eval(), tokenizer


@pytest.fixture(scope="module", autouse=True)
def as_loud_as_before() -> Iterator[None]:
    """Scripts quieten lm-eval, transformers and this package for the whole process."""
    loggers = [logging.getLogger(name) for name in ("lm_eval", "fasa_flex")]
    levels, verbosity = [logger.level for logger in loggers], transformers.logging.get_verbosity()
    yield
    for logger, level in zip(loggers, levels, strict=True):
        logger.setLevel(level)
    transformers.logging.set_verbosity(verbosity)
