"""Checks `generate` on a static cache on this device: the logits of every step against those on a growing cache.

    python -m evals.bench.check_generate                 # on CUDA, some minutes
    python -m evals.bench.check_generate --device cpu    # a small model, without CUDA graphs: a dry run

A model with random weights answers a random prompt in float32. It runs uncompiled, compiled without CUDA graphs, with
them, with them again, and with them but no kernel launched before the one before it ends; all runs read the same
tokens. Prints a line for each with its largest difference. The exit code is 1 if one is above the bound, or if the two
equal runs differ in a bit, as they do where a kernel reads what another still writes. Where keys nearly tie, another
one may be selected, for a difference of 1e-3 to 1e-1 in single steps; another ``--seed`` tells.
"""

from __future__ import annotations

import argparse
import contextlib
import sys
import time
from collections.abc import Iterator
from unittest import mock

import torch
from torch import Tensor
from transformers import CompileConfig, LogitsProcessor, LogitsProcessorList, PreTrainedModel

from fasa_flex import FasaConfig, enable
from fasa_flex.bench.shapes import SHAPES, random_profile

GRAPHS, AGAIN, IN_TURN = "with CUDA graphs", "with CUDA graphs again", "with CUDA graphs, one kernel after another"


class Given(LogitsProcessor):
    """Chooses given tokens [n] after a prompt of ``length`` tokens."""

    def __init__(self, tokens: Tensor, length: int) -> None:
        self.tokens, self.length = tokens, length

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        """Return scores in which the next given token is the best."""
        return torch.full_like(scores, -torch.inf).index_fill(1, self.tokens[input_ids.shape[1] - self.length], 0.0)


@contextlib.contextmanager
def kernels_in_turn() -> Iterator[None]:
    """Context in which no kernel of FASA's starts before the one before it ends."""
    prefix = "fasa_flex.backends.triton"
    modules = [each for name, each in list(sys.modules.items()) if name.startswith(prefix)]
    with contextlib.ExitStack() as patches:
        for module in modules:
            if hasattr(module, "overlapping"):
                patches.enter_context(mock.patch.object(module, "overlapping", return_value=(False, {})))
        yield


def logits_of(model: PreTrainedModel, prompt: Tensor, count: int, tokens: Tensor | None, mode: str | None) -> Tensor:
    """Logits [count, V] of each step, on a growing cache without ``tokens``, else on a static one.

    Args:
        model: a model under FASA.
        prompt: int64 [1, n].
        count: number of steps.
        tokens: tokens to choose, int64 [count]; None: the best ones.
        mode: how to compile the steps on the static cache; None: not at all.
    """
    options = {"cache_implementation": "dynamic" if tokens is None else "static", "do_sample": False}
    options |= {"max_new_tokens": count, "min_new_tokens": count, "output_logits": True}
    if tokens is not None:
        options["logits_processor"] = LogitsProcessorList([Given(tokens, prompt.shape[1])])
    if mode is None:
        options["disable_compile"] = True
    else:
        options["compile_config"] = compiling = CompileConfig(mode=mode)
        compiling._compile_all_devices = True  # generate compiles on accelerators only, unless told
    out = model.generate(prompt, return_dict_in_generate=True, **options)
    return torch.cat(out.logits).float()


def main() -> int:
    """Run every way."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--shape", choices=SHAPES, help="shape of the model (default: llama-3.1-8b on CUDA, else tiny)")
    parser.add_argument("--context", type=int, help="tokens of the prompt (default: 8192 on CUDA, else 512)")
    parser.add_argument("--tokens", type=int, default=32, help="steps of an answer (default: 32)")
    parser.add_argument("--seed", type=int, default=0, help="of weights and prompt (default: 0)")
    parser.add_argument("--bound", type=float, default=1e-3, help="largest difference of logits (default: 1e-3)")
    parser.add_argument("--packed-dtype", help="precision of packed keys (default: FasaConfig's)")
    options = parser.parse_args()
    device, begun = torch.device(options.device), time.monotonic()
    torch.backends.cuda.matmul.allow_tf32 = False
    torch.manual_seed(options.seed)
    cuda = device.type == "cuda"
    shape = SHAPES[options.shape or ("llama-3.1-8b" if cuda else "tiny")]
    length = options.context or (8192 if cuda else 512)
    model = shape.model(2, length + options.tokens, torch.float32, device)
    prompt = torch.randint(3, shape.vocabulary, (1, length), device=device)
    packed = {"packed_dtype": options.packed_dtype} if options.packed_dtype else {}
    ways: dict[str, str | None] = {"uncompiled": None, "compiled": "default"}
    if cuda:
        ways |= dict.fromkeys((GRAPHS, AGAIN, IN_TURN), "reduce-overhead")
    failed, found = [], dict[str, Tensor]()
    with enable(model, random_profile(shape, model, 2), FasaConfig(dense_layers=(), **packed)) as fasa:
        wanted = logits_of(model, prompt, options.tokens, None, None)
        for name, mode in ways.items():
            if name != AGAIN:
                torch._dynamo.reset()
            before = fasa.stats.sparse_queries
            with kernels_in_turn() if name == IN_TURN else contextlib.nullcontext():
                found[name] = logits_of(model, prompt, options.tokens, wanted.argmax(1), mode)
            by_step = (found[name] - wanted).abs().amax(1)
            most, sparse = float(by_step.max()), fasa.stats.sparse_queries - before
            failed += [] if most <= options.bound and sparse else [name]
            print(
                f"{name}: at most {most:.1e}, in step {int(by_step.argmax())}; {by_step.median():.1e} in half of the "
                f"steps; {sparse} sparse queries; {time.monotonic() - begun:.0f} s",
                flush=True,
            )
    if cuda and not found[GRAPHS].equal(found[AGAIN]):
        failed.append("two equal runs with CUDA graphs differ")
    print(f"failed: {', '.join(failed)}" if failed else f"{len(ways)} ways are right")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
