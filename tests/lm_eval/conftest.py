"""A random Llama with a byte-level tokenizer on disk, its profile, and a way to load it as `fasa_hf` or `hf`."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from lm_eval.api.instance import Instance
from lm_eval.models.huggingface import HFLM
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from fasa_flex import calibrate
from fasa_flex.baselines import unheard
from fasa_flex.lm_eval.haystack import heldout_text
from fasa_flex.lm_eval.model import FasaHFLM

LAYERS, POSITIONS = 3, 768


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of a random 3-layer Llama (float32, at most 768 tokens) and a tokenizer."""
    folder = tmp_path_factory.mktemp("checkpoint")
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=400, special_tokens=["<pad>", "<eos>"], initial_alphabet=alphabet, show_progress=False
    )
    backend.train_from_iterator([heldout_text()[:50_000]], trainer)
    PreTrainedTokenizerFast(tokenizer_object=backend, pad_token="<pad>", eos_token="<eos>").save_pretrained(folder)
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=backend.get_vocab_size(),
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=LAYERS,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=POSITIONS,
        initializer_range=0.2,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=1,
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def profile(checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of the checkpoint's profile."""
    model = LlamaForCausalLM.from_pretrained(checkpoint)
    sample = torch.randint(2, 400, (300,), generator=torch.Generator().manual_seed(1))
    folder = tmp_path_factory.mktemp("profile")
    calibrate(model, [sample], top_k=32, max_new_tokens=8, progress=False).save_pretrained(folder)
    return folder


@pytest.fixture
def sparse(checkpoint: Path, profile: Path) -> Callable[..., FasaHFLM]:
    """`sparse(n_fac=16, ...)`: the checkpoint as `fasa_hf`, with 2 chunks of 8 and 16 tokens unless told otherwise."""

    def load(**arguments: object) -> FasaHFLM:
        defaults = {"profile": str(profile), "n_fac": 16, "device": "cpu", "batch_size": 1}
        defaults |= {} if "n_tip" in unheard(str(arguments.get("method", "fasa"))) else {"n_tip": 2}
        return FasaHFLM(str(checkpoint), **{**defaults, **arguments})

    return load


@pytest.fixture
def dense(checkpoint: Path) -> Callable[..., HFLM]:
    """`dense(...)`: the checkpoint as `hf`."""

    def load(**arguments: object) -> HFLM:
        return HFLM(str(checkpoint), **{"device": "cpu", "batch_size": 1, **arguments})

    return load


@pytest.fixture
def requests() -> Callable[..., list[Instance]]:
    """`requests("loglikelihood", (context, continuation), ...)`: as lm-eval's tasks make them."""

    def build(kind: str, *arguments: tuple[object, ...]) -> list[Instance]:
        return [Instance(kind, doc={}, arguments=args, idx=i) for i, args in enumerate(arguments)]

    return build


@pytest.fixture(scope="session")
def gguf_checkpoint(checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[str, str]:
    """The checkpoint's folder and file as GGUF."""
    pytest.importorskip("gguf")
    from gguf_files import write_gguf

    file = tmp_path_factory.mktemp("gguf") / "tiny.gguf"
    tokenizer = PreTrainedTokenizerFast.from_pretrained(checkpoint)
    write_gguf(file, LlamaForCausalLM.from_pretrained(checkpoint, dtype=torch.float32), tokenizer)
    return str(file.parent), file.name
