"""However requests are run, side by side, in parts or on one prefill, they score as if decoded token by token."""

from __future__ import annotations

import random
import weakref
from contextlib import nullcontext
from typing import Any

import pytest
import torch
from generation import log_likelihood as decoded
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel

from fasa_flex import FasaConfig, FasaProfile, calibrate, enable
from fasa_flex.baselines import scorer_factory
from fasa_flex.lm_eval.passes import Limits, Passes, parts
from fasa_flex.lm_eval.windows import Window

pytestmark = pytest.mark.filterwarnings("error:.past_key_values.*is deprecated:FutureWarning")

SMALL = Limits(whole=16, part=32, rows=4)  # everything longer than 16 tokens runs in parts
Pair = tuple[list[int], list[int]]


@pytest.fixture(scope="module")
def model() -> PreTrainedModel:
    """Weights of a moderate size, so that a log-likelihood of 80 nats still has six digits behind the point."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=400,
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=768,
        initializer_range=0.08,
        eos_token_id=None,
    )
    return LlamaForCausalLM(config).eval()


@pytest.fixture(scope="module")
def profile(model: PreTrainedModel) -> FasaProfile:
    sample = torch.randint(2, 400, (300,), generator=torch.Generator().manual_seed(1))
    return calibrate(model, [sample], top_k=32, max_new_tokens=8, progress=False)


def pairs(count: int, seed: int = 7) -> list[Pair]:
    """Contexts of 8 to 200 tokens with continuations of 1 to 11."""
    rng = random.Random(seed)

    def tokens(least: int, most: int) -> list[int]:
        return [rng.randrange(2, 400) for _ in range(rng.randrange(least, most))]

    return [(tokens(8, 200), tokens(1, 12)) for _ in range(count)]


def scored(passes: Passes, windows: list[Window], batch_size: int = 8) -> list[float]:
    answers: dict[int, float] = {}
    for numbers, results in passes.score(windows, batch_size, nullcontext()):
        answers.update((number, total) for number, (total, _) in zip(numbers, results, strict=True))
    return [answers[number] for number in range(len(windows))]


def test_two_hundred_pairs_in_padded_batches_equal_token_by_token_decode(
    model: PreTrainedModel, profile: FasaProfile
) -> None:
    with enable(model, profile, FasaConfig(n_tip=2, n_fac=16)) as fasa:
        stepped = [decoded(model, *pair, prompt=len(pair[0])) for pair in pairs(200)]
        beside = scored(Passes(model, fasa, pad=0), [Window.of(*pair, 768) for pair in pairs(200)])
    assert max(abs(a - b) for a, b in zip(beside, stepped, strict=True)) < 1e-5
    drawn = pairs(200)
    several = [i for i, (context, continuation) in enumerate(drawn) if len(context) > 40 and len(continuation) > 1]
    dense = {i: decoded(model, *drawn[i], prompt=len(drawn[i][0])) for i in several[:20]}
    assert all(abs(stepped[i] - dense[i]) > 1e-4 for i in dense)  # ten times the bound: sparse it was


@pytest.mark.parametrize("sparse_tail", [0, 1, 5])
def test_in_parts_equals_token_by_token_decode(model: PreTrainedModel, profile: FasaProfile, sparse_tail: int) -> None:
    few = pairs(12, seed=3)
    windows = [Window.of(*pair, 768, sparse_tail=sparse_tail) for pair in few]
    with enable(model, profile, FasaConfig(n_tip=2, n_fac=16)) as fasa:
        stepped = [decoded(model, *pair, prompt=len(pair[0]) - sparse_tail) for pair in few]
        assert scored(Passes(model, fasa, pad=0, limits=SMALL), windows) == pytest.approx(stepped, abs=1e-5)


def test_rolling_in_parts_equals_one_pass(model: PreTrainedModel, profile: FasaProfile) -> None:
    text = pairs(1, seed=5)[0][0] * 3
    windows = [Window.of([1], text, 768, dense_prefix=prefix) for prefix in (0, 60)]
    with enable(model, profile, FasaConfig(n_tip=2, n_fac=16)) as fasa:
        together = scored(Passes(model, fasa, pad=0), windows)
        assert scored(Passes(model, fasa, pad=0, limits=SMALL), windows) == pytest.approx(together, abs=1e-4)
    assert together[0] != pytest.approx(together[1], abs=1e-3)


def test_choices_share_one_prefill(model: PreTrainedModel, profile: FasaProfile) -> None:
    rng = random.Random(9)
    context = [rng.randrange(2, 400) for _ in range(300)]
    choices = [[5], [6, 7], [8, 9, 10, 11, 12, 13], [6, 7]]
    with enable(model, profile, FasaConfig(n_tip=2, n_fac=16)) as fasa:
        stepped = [decoded(model, context, choice, prompt=len(context)) for choice in choices]
        passes = Passes(model, fasa, pad=0)
        fasa.stats.reset()
        assert scored(passes, [Window.of(context, choice, 768) for choice in choices]) == pytest.approx(
            stepped, abs=1e-5
        )
        assert passes.shared_prefills == 1
        once = 3 * (len(context) - 2)  # layers times the queries that no choice scores
        rest = 3 * sum(len(choice) + 1 for choice in choices)
        assert fasa.stats.dense_queries + fasa.stats.sparse_queries == once + rest
        assert fasa.stats.sparse_queries == 2 * sum(len(choice) - 1 for choice in choices)


@pytest.mark.parametrize(("method", "shared"), [("quest", 1), ("snapkv", 0)])
def test_prefills_are_shared_by_methods_that_remember_nothing(
    model: PreTrainedModel, profile: FasaProfile, method: Any, shared: int
) -> None:
    rng = random.Random(9)
    context, choices = [rng.randrange(2, 400) for _ in range(300)], [[5, 9], [6, 7, 8]]
    config = FasaConfig(n_fac=48)
    with enable(model, None, config, scorer=scorer_factory(method, profile)) as fasa:
        stepped = [decoded(model, context, choice, prompt=len(context)) for choice in choices]
        passes = Passes(model, fasa, pad=0)
        windows = [Window.of(context, choice, 768) for choice in choices]
        assert scored(passes, windows) == pytest.approx(stepped, abs=1e-5)
        assert passes.shared_prefills == shared
        assert fasa.remembers == (not shared)


def test_short_contexts_and_sliding_windows_share_nothing(
    model: PreTrainedModel, profile: FasaProfile, monkeypatch: pytest.MonkeyPatch
) -> None:
    def shared(length: int) -> int:
        passes = Passes(model, fasa, pad=0)
        scored(passes, [Window.of([3] * length, [token], 768) for token in (4, 5)])
        return passes.shared_prefills

    with enable(model, profile, FasaConfig(n_tip=2, n_fac=16)) as fasa:
        assert (shared(100), shared(400)) == (0, 1)
        for name, value in (("sliding_window", 64), ("layer_types", ["full_attention", "sliding_attention"])):
            with monkeypatch.context() as changed:  # a cache that drops slots cannot be cropped back
                changed.setattr(model.config, name, value, raising=False)
                passes = Passes(model, fasa, pad=0)
            scored(passes, [Window.of([3] * 400, [token], 768) for token in (4, 5)])
            assert passes.shared_prefills == 0


@pytest.mark.parametrize("size", [1, 2, 3, 4, 7, 100])
@pytest.mark.parametrize("length", [0, 1, 2, 3, 4, 5, 8, 9, 99, 100, 101])
def test_parts_are_contiguous_and_no_token_is_alone(length: int, size: int) -> None:
    cut = list(parts(10, 10 + length, size))
    assert [slot for start, stop in cut for slot in range(start, stop)] == list(range(10, 10 + length))
    assert all(2 <= stop - start <= max(size, 3) for start, stop in cut) or length == 1


class LiveBytes(TorchDispatchMode):
    """The most bytes of tensors that were alive at one time, beside those that were there before."""

    def __init__(self) -> None:
        super().__init__()
        self.sizes: dict[int, int] = {}
        self.now = self.peak = self.largest = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(out):
            if isinstance(tensor, Tensor):
                self.watch(tensor.untyped_storage())
        self.peak = max(self.peak, self.now)
        return out

    def watch(self, storage: torch.UntypedStorage) -> None:
        key = storage._cdata
        if key not in self.sizes:
            self.sizes[key] = storage.nbytes()
            self.now += storage.nbytes()
            self.largest = max(self.largest, storage.nbytes())
            weakref.finalize(storage, self.free, key)

    def free(self, key: int) -> None:
        self.now -= self.sizes.pop(key, 0)


def test_the_peak_stays_below_two_kv_caches() -> None:
    """The shape of the reference model at 4096 tokens; never [L, V], nor anything else of that size."""
    length, vocabulary, layers, kv_heads, head_dim = 4096, 1024, 4, 2, 64
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=vocabulary,
        hidden_size=128,
        intermediate_size=352,
        num_hidden_layers=layers,
        num_attention_heads=4,
        num_key_value_heads=kv_heads,
        head_dim=head_dim,
        max_position_embeddings=length,
        eos_token_id=None,
    )
    model = LlamaForCausalLM(config).eval()
    profile = calibrate(model, [torch.arange(64) + 2], top_k=16, max_new_tokens=2, progress=False)
    tokens = torch.randint(2, vocabulary, (length + 1,), generator=torch.Generator().manual_seed(0)).tolist()
    with enable(model, profile, FasaConfig(n_tip=8, n_fac=256)) as fasa, LiveBytes() as live:
        passes = Passes(model, fasa, pad=0, limits=Limits.of(model, whole=512))
        scored(passes, [Window.of(tokens[:-32], tokens[-32:], length)])
        assert fasa.stats.sparse_queries == 3 * 31
    cache = 2 * layers * kv_heads * head_dim * length * 4
    assert cache < live.peak < 2 * cache + 4 * vocabulary
    assert live.largest < 4 * length * vocabulary


@pytest.mark.parametrize("limits", [None, Limits(whole=16, part=200, rows=8)], ids=["beside", "in parts"])
def test_a_prefill_by_blocks_scores_as_decoded_after_one_prefill(
    model: PreTrainedModel, profile: FasaProfile, limits: Limits | None
) -> None:
    """Parts of a context end where blocks do, whether continuations share it or not."""
    rng = random.Random(3)
    context = [rng.randrange(2, 400) for _ in range(700)]
    continuations = [[rng.randrange(2, 400) for _ in range(count)] for count in (9, 1, 30)]
    asked = [(context, each) for each in continuations] + [(context[:530], continuations[0])]
    with enable(model, profile, FasaConfig(n_fac=16, prefill="blocks", prefill_share=0.6)) as fasa:
        stepped = [decoded(model, *pair, prompt=len(pair[0])) for pair in asked]
        fasa.stats.reset()
        assert scored(
            Passes(model, fasa, 0, limits=limits), [Window.of(*pair, 768) for pair in asked]
        ) == pytest.approx(stepped, abs=1e-4)
        assert fasa.stats.block_queries
    with enable(model, profile, FasaConfig(n_fac=16)):
        assert decoded(model, *asked[0], prompt=700) != pytest.approx(stepped[0], abs=1e-3)


def test_parts_end_at_whole_blocks() -> None:
    assert list(parts(0, 700, 200, 128)) == [(0, 128), (128, 256), (256, 512), (512, 700)]
    assert list(parts(0, 100, 40, 128)) == [(0, 100)]
    assert list(parts(512, 700, 300, 128)) == [(512, 700)]
