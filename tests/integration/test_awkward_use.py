"""Caches, masks and modes used otherwise than `generate` uses them: the same result, or a sentence and nothing lost."""

from __future__ import annotations

import copy
import io
import pickle
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from families import tiny
from generation import Ids, profile_of
from sentences import raises_sentence
from torch import Tensor
from transformers import Cache, DynamicCache, PreTrainedModel, StaticCache

from fasa_flex import FasaCache, FasaConfig, FasaProfile, RotaryLayout, calibrate, enable, fasa_attention
from fasa_flex.backends.gather import whole_buffer
from fasa_flex.baselines import channel_weights
from fasa_flex.core.packed_keys import PackedKeys
from fasa_flex.model.forwards import Forwards

pytestmark = pytest.mark.filterwarnings("ignore:without an accelerator")
CONFIG = FasaConfig(n_fac=12, n_tip=3)
LOWEST = torch.finfo(torch.float32).min


def step(model: PreTrainedModel, token: int, cache: Cache, rows: int = 1, **options: Any) -> Tensor:
    """Logits of one decoded token, the same in every row."""
    ids = torch.full((rows, 1), token, dtype=torch.long)
    logits: Tensor = model(ids, past_key_values=cache, **options).logits[:, -1]
    return logits


def lengths(cache: Cache) -> list[int]:
    return [int(layer.get_seq_length()) for layer in cache.layers]


# Masks.


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_a_mask_that_is_written_to_between_steps(
    llama: PreTrainedModel, ids: Ids, mode: Callable[[], AbstractContextManager[None]]
) -> None:
    """Tensors of inference mode have no version that would tell."""

    def decode(renew: Callable[[Tensor], Tensor]) -> tuple[Tensor, float]:
        with enable(llama, profile_of(llama), CONFIG) as fasa, mode():
            cache = StaticCache(config=llama.config, max_cache_len=64)
            llama(ids(30, rows=1), past_key_values=cache)
            mask = torch.full((1, 1, 1, 64), LOWEST)
            mask[..., :30] = 0
            logits = []
            for slot in range(30, 36):
                mask[..., slot] = 0
                logits.append(step(llama, 5, cache, attention_mask=renew(mask), position_ids=torch.tensor([[slot]])))
            return torch.cat(logits), fasa.stats.per_layer[1].mean_valid

    written, counted = decode(lambda mask: mask)
    expected, valid = decode(Tensor.clone)
    assert torch.equal(written, expected)
    assert counted == valid == 33.5


@pytest.mark.parametrize("low", [LOWEST, -torch.inf, -1e9, -1e4])
def test_what_masks_a_key_by_any_custom(llama: PreTrainedModel, ids: Ids, low: float) -> None:
    """With a budget of all 31 valid keys the tokens are the dense model's."""
    prompt, causal = ids(40, rows=1), torch.ones(40, 40, dtype=torch.bool).tril()
    mask = torch.zeros(1, 1, 40, 40).masked_fill(~causal, low)
    mask[..., :10] = low
    mask[0, 0, range(10), range(10)] = 0
    positions = (torch.arange(40)[None] - 10).clamp(min=0)

    def decode() -> Tensor:
        cache = DynamicCache(config=llama.config)
        llama(prompt, attention_mask=mask, past_key_values=cache, position_ids=positions)
        later = torch.zeros(1, 1, 1, 41)
        later[..., :10] = low
        return step(llama, 7, cache, attention_mask=later, position_ids=torch.tensor([[30]]))

    with torch.no_grad():
        dense = decode()
        with enable(llama, profile_of(llama), FasaConfig(n_fac=31, n_tip=3)):
            torch.testing.assert_close(decode(), dense, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("bias", [-2.5, 0.5])
def test_a_bias_is_refused_before_the_cache_is_written(llama: PreTrainedModel, ids: Ids, bias: float) -> None:
    mask = torch.zeros(1, 1, 1, 31)
    mask[..., 4] = bias
    with enable(llama, profile_of(llama), CONFIG), torch.no_grad():
        cache = DynamicCache(config=llama.config)
        llama(ids(30, rows=1), past_key_values=cache)
        with pytest.raises(ValueError, match=f"adds {bias:g} to a logit") as error:
            step(llama, 7, cache, attention_mask=mask)
    assert "\n" not in str(error.value)
    assert set(lengths(cache)) == {30}


def test_forwards_that_take_turns_find_their_own_masks() -> None:
    """As in two threads, each of which may run at any point of the other's."""
    forwards, shape, device = Forwards(lambda: None, None), (1, 1, 8), torch.device("cpu")
    masks = [torch.zeros(1, 1, 1, 8).index_fill(3, torch.arange(hidden), LOWEST) for hidden in (2, 5)]
    first, second = (forwards.visible(mask, shape, device, begins=True) for mask in masks)
    assert [int(visible.n_valid) for visible in (second, first, second)] == [3, 6, 3]
    assert int(forwards.visible(masks[0], shape, device, begins=False).n_valid) == 6


# Refusals that lose nothing.


def test_a_boundary_for_other_rows_is_refused_before_the_cache_is_written(llama: PreTrainedModel, ids: Ids) -> None:
    with enable(llama, profile_of(llama), CONFIG) as fasa, torch.no_grad():
        cache = DynamicCache(config=llama.config)
        llama(ids(30, rows=2), past_key_values=cache)
        with pytest.raises(ValueError, match="start names 3 rows"), fasa.sparse_from(torch.tensor([30, 30, 30])):
            llama(ids(4, rows=2), past_key_values=cache)
    assert set(lengths(cache)) == {30}


def test_too_long_a_prompt_is_refused_before_the_cache_is_written(ids: Ids) -> None:
    model = tiny("Llama", max_position_embeddings=64)
    with enable(model, profile_of(model), CONFIG), torch.no_grad():
        cache = DynamicCache(config=model.config)
        model(ids(60, rows=1), past_key_values=cache)
        with pytest.raises(ValueError, match="65 tokens and the model takes at most 64"):
            model(ids(5, rows=1), past_key_values=cache)
        assert set(lengths(cache)) == {60}
        for token in range(6):  # a token decoded beyond is the model's own affair
            step(model, 3 + token, cache)
    assert set(lengths(cache)) == {66}


@pytest.mark.parametrize("stretched", [{"rope_type": "yarn", "factor": 4.0}, {"rope_type": "dynamic", "factor": 2.0}])
def test_stretched_rope_takes_longer_prompts(ids: Ids, stretched: dict[str, Any]) -> None:
    rope = {"rope_theta": 10000.0, "original_max_position_embeddings": 64, **stretched}
    model = tiny("Llama", max_position_embeddings=64, rope_parameters=rope)
    with torch.no_grad():
        dense = model(ids(200, rows=1)).logits
        with enable(model, profile_of(model), CONFIG):
            assert torch.equal(model(ids(200, rows=1)).logits, dense)
            if stretched["rope_type"] == "yarn":
                with pytest.raises(ValueError, match="at most 256"):
                    model(ids(257, rows=1))


# Caches that change hands, modes and dtypes.


@pytest.mark.parametrize("change", ["crop", "reset"])
def test_a_host_cache_filled_in_inference_mode_changes_outside_of_it(
    llama: PreTrainedModel, ids: Ids, change: str
) -> None:
    profile, prompt = profile_of(llama), ids(30, rows=1)
    logits = []
    for mode in (torch.no_grad, torch.inference_mode):
        cache = FasaCache(llama, profile, CONFIG, placement="host")
        with enable(llama, profile, CONFIG):
            with mode():
                llama(prompt, past_key_values=cache)
                step(llama, 5, cache)
            cache.crop(-5) if change == "crop" else cache.reset()
            with torch.no_grad():
                logits.append(step(llama, 6, cache))
        assert set(lengths(cache)) == {27 if change == "crop" else 1}
    assert torch.equal(*logits)


def reloaded(cache: Cache) -> Cache:
    buffer = io.BytesIO()
    torch.save(cache, buffer)
    buffer.seek(0)
    loaded: Cache = torch.load(buffer, weights_only=False)
    return loaded


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda cache: pickle.loads(pickle.dumps(cache)), reloaded])
@pytest.mark.parametrize("length", [None, 64])
@pytest.mark.parametrize("placement", ["device", "host"])
def test_a_copied_cache_goes_on_as_the_original(
    llama: PreTrainedModel, ids: Ids, placement: Any, length: int | None, copied: Callable[[Cache], Cache]
) -> None:
    profile = profile_of(llama)

    def decode(copying: Callable[[Cache], Cache]) -> Tensor:
        cache: Cache = FasaCache(llama, profile, CONFIG, placement=placement, max_cache_len=length)
        with enable(llama, profile, CONFIG), torch.no_grad():
            llama(ids(30, rows=2), past_key_values=cache)
            cache = copying(cache)
            step(llama, 5, cache, rows=2)
            cache.reorder_cache(torch.tensor([1, 0]))
            return step(llama, 7, cache, rows=2)

    assert torch.equal(decode(copied), decode(lambda cache: cache))


def test_keys_that_are_replaced_by_hand_are_packed_anew(llama: PreTrainedModel, ids: Ids) -> None:
    def decode(swap: Callable[[DynamicCache], None]) -> Tensor:
        cache = DynamicCache(config=llama.config)
        with enable(llama, profile_of(llama), CONFIG), torch.no_grad():
            llama(ids(40, rows=2), past_key_values=cache)
            swap(cache)
            return step(llama, 5, cache, rows=2)

    def by_hand(cache: DynamicCache) -> None:
        for layer in cache.layers:
            layer.keys, layer.values = layer.keys[[1, 0]], layer.values[[1, 0]]

    assert torch.equal(decode(by_hand), decode(lambda cache: cache.reorder_cache(torch.tensor([1, 0]))))


def test_a_growing_cache_lets_go_of_rows_that_it_no_longer_has(llama: PreTrainedModel, ids: Ids) -> None:
    def held(cache: Cache) -> int:
        tensors = [tensor for layer in cache.layers for tensor in tensors_of(vars(layer).values())]
        storages = {tensor.untyped_storage().data_ptr(): tensor.untyped_storage().nbytes() for tensor in tensors}
        return sum(storages.values())

    with enable(llama, profile_of(llama), CONFIG), torch.no_grad():
        cache = DynamicCache(config=llama.config)
        llama(ids(300, rows=4), past_key_values=cache)
        before = held(cache)
        cache.reorder_cache(torch.tensor([1, 0, 3, 3]))
        assert held(cache) <= before
        cache.batch_select_indices(torch.tensor([0]))
        assert held(cache) <= before / 3.5


def tensors_of(values: Any) -> Iterator[Tensor]:
    for value in values:
        if isinstance(value, Tensor):
            yield value
        elif isinstance(value, tuple):
            yield from tensors_of(value)
        elif isinstance(value, PackedKeys):
            yield value.tiles


def test_a_prefill_under_autocast_and_a_decode_without(llama: PreTrainedModel, ids: Ids) -> None:
    """The cache takes the wider dtype, as transformers' own does; a budget for all keys is the dense model."""

    def decode() -> Tensor:
        cache = DynamicCache(config=llama.config)
        with torch.no_grad():
            with torch.autocast("cpu", torch.bfloat16):
                llama(ids(40, rows=1), past_key_values=cache)
            step(llama, 3, cache)
            return step(llama, 4, cache)

    dense = decode()
    with enable(llama, profile_of(llama), FasaConfig(n_fac=42, n_tip=3)):
        torch.testing.assert_close(decode(), dense, atol=1e-4, rtol=1e-4)


def test_free_slots_hold_numbers(llama: PreTrainedModel, ids: Ids) -> None:
    """A block of keys that flex attends to may end in free slots, whose values it multiplies by 0."""
    torch.use_deterministic_algorithms(True)  # which fills new memory with NaN
    try:
        with enable(llama, profile_of(llama), CONFIG), torch.no_grad():
            cache = DynamicCache(config=llama.config)
            llama(ids(40, rows=1), past_key_values=cache)
            step(llama, 5, cache)
    finally:
        torch.use_deterministic_algorithms(False)
    for layer in cache.layers[1:]:
        buffer = whole_buffer(layer.values)
        assert buffer.shape[2] > layer.values.shape[2]
        assert buffer.isfinite().all()


# Gradients, modes and copies of the model.


@pytest.mark.parametrize("backend", ["gather", "reference"])
def test_gradients_of_one_layers_queries_alone(llama: PreTrainedModel, ids: Ids, backend: Any) -> None:
    """Its keys need none, and are not written over all the same."""
    for parameter in llama.parameters():
        parameter.requires_grad_(False)
    weight = llama.model.layers[1].self_attn.q_proj.weight.requires_grad_(True)

    def gradient() -> Tensor:
        cache = DynamicCache(config=llama.config)
        losses = [llama(ids(40, rows=1), past_key_values=cache).logits[:, -1].logsumexp(-1).sum()]
        losses += [step(llama, token, cache).logsumexp(-1).sum() for token in (3, 4, 5)]
        weight.grad = None
        torch.stack(losses).sum().backward()
        assert weight.grad is not None
        return weight.grad.clone()

    dense = gradient()
    with enable(llama, profile_of(llama), FasaConfig(n_fac=43, n_tip=3, backend=backend)):
        torch.testing.assert_close(gradient(), dense, atol=1e-4, rtol=1e-4)


def test_enabled_in_inference_mode_and_used_outside(llama: PreTrainedModel, ids: Ids) -> None:
    with torch.inference_mode():
        fasa = enable(llama, profile_of(llama), CONFIG)
    cache = DynamicCache(config=llama.config)
    with fasa:
        llama(ids(30, rows=1), past_key_values=cache)
        step(llama, 5, cache).sum().backward()
        assert fasa.stats.sparse_queries > 0


def test_calibrated_on_a_prompt_in_inference_mode_and_trained_outside(llama: PreTrainedModel, ids: Ids) -> None:
    with enable(llama, None, CONFIG) as fasa:
        with torch.inference_mode():
            llama(ids(200, rows=1))
        cache = DynamicCache(config=llama.config)
        llama(ids(30, rows=1), past_key_values=cache)
        step(llama, 5, cache).sum().backward()
        assert fasa.stats.sparse_queries > 0


def test_scores_are_float32_whatever_the_default_dtype_is() -> None:
    """Uncompiled, they are written block by block into a tensor of their own."""
    query, rows = torch.randn(1, 2, 4, 16), torch.randn(1, 2, 9000, 16)
    packed = PackedKeys.of(rows)
    expected = packed.scores(query, 9000)
    torch.set_default_dtype(torch.bfloat16)
    try:
        assert torch.equal(packed.scores(query, 9000), expected)
    finally:
        torch.set_default_dtype(torch.float32)


def test_an_enabled_model_is_not_copied(llama: PreTrainedModel) -> None:
    """The copy would attend and count through the original's handle."""
    with (
        enable(llama, profile_of(llama), CONFIG),
        raises_sentence(ValueError, match=r"cannot be copied; disable\(\)"),
    ):
        copy.deepcopy(llama)
    copy.deepcopy(llama)


def test_a_method_that_cannot_be_enabled_leaves_the_model_as_it_was(llama: PreTrainedModel) -> None:
    class Miscounted:
        def reads(self) -> int:
            return 3

        def __call__(self, query: Tensor, key: Tensor, packed_keys: Any = None) -> Tensor:
            return key.float().norm(dim=-1)[:, :, None, None].expand(-1, -1, 1, query.shape[2], -1)

    implementation = llama.config._attn_implementation
    with pytest.raises(TypeError):
        enable(llama, None, CONFIG, scorer=lambda layer: Miscounted())
    assert llama.config._attn_implementation == implementation
    enable(llama, profile_of(llama), CONFIG).disable()


def test_a_vision_towers_attention_stays_its_own() -> None:
    text = {
        "vocab_size": 64,
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 16,
        "query_pre_attn_scalar": 16,
        "layer_types": ["full_attention"] * 3,
        "initializer_range": 0.2,
        "max_position_embeddings": 512,
        "eos_token_id": None,
    }
    vision = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    config = transformers.Gemma3Config(
        text_config=text,
        vision_config={**vision, "image_size": 28, "patch_size": 14},
        mm_tokens_per_image=4,
        image_token_id=60,
    )
    torch.manual_seed(0)
    model = transformers.Gemma3ForConditionalGeneration(config).eval()
    prompt = torch.arange(150)[None] % 50 + 3
    prompt[0, 20:24] = 60
    options = {
        "pixel_values": torch.randn(1, 3, 28, 28),
        "token_type_ids": (prompt == 60).long(),
        "attention_mask": torch.ones_like(prompt),
        "max_new_tokens": 4,
        "do_sample": False,
    }
    dense = model.generate(prompt, **options)
    with enable(model, None, FasaConfig(n_fac=200, n_tip=2)):
        assert torch.equal(model.generate(prompt, **options), dense)
    with enable(model, None, FasaConfig(n_fac=12, n_tip=2)) as fasa:
        model.generate(prompt, **options)
        assert fasa.stats.sparse_queries > 0


# What probing, calibrating and a scorer of one's own leave behind.


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_dynamic_rope_is_as_before_a_probe(ids: Ids, dtype: torch.dtype) -> None:
    rope = {"rope_type": "dynamic", "rope_theta": 10000.0, "factor": 2.0, "original_max_position_embeddings": 128}
    model = tiny("Llama", max_position_embeddings=128, rope_parameters=rope).to(dtype)
    with torch.no_grad():
        before = model(ids(200, rows=1)).logits
        enable(model).disable()
        assert torch.equal(model(ids(200, rows=1)).logits, before)


@pytest.mark.parametrize("theta", [1e4, 1e8, 1e9, 1e11])
def test_planes_that_hardly_turn_are_found(theta: float) -> None:
    model = tiny("Llama", head_dim=128, rope_parameters={"rope_type": "default", "rope_theta": theta})
    assert torch.equal(RotaryLayout.detect(model).chunks, RotaryLayout.half_split(128).chunks)


def test_calibration_decodes_greedily_whatever_the_model_would_do(llama: PreTrainedModel, ids: Ids) -> None:
    samples = [ids(40, rows=1)[0]]

    def measure() -> Tensor:
        return calibrate(llama, samples, top_k=8, max_new_tokens=6, progress=False).agreement

    expected = measure()
    llama.generation_config.update(
        do_sample=True,
        return_dict_in_generate=True,
        num_return_sequences=2,
        repetition_penalty=1.5,
        max_time=1e-4,
        forced_eos_token_id=5,
        no_repeat_ngram_size=2,
    )
    state = llama.generation_config.to_dict()
    assert torch.equal(measure(), expected)
    assert llama.generation_config.to_dict() == state


def test_modules_keep_their_mode(llama: PreTrainedModel, ids: Ids) -> None:
    llama.train()
    llama.model.layers[1].eval()
    modes = [module.training for module in llama.modules()]
    calibrate(llama, [ids(40, rows=1)[0]], top_k=8, max_new_tokens=2, progress=False)
    enable(llama).disable()
    channel_weights(llama, [ids(40, rows=1)[0]])
    assert [module.training for module in llama.modules()] == modes


@pytest.mark.parametrize(
    "change",
    [
        lambda scores: scores[..., :1],
        lambda scores: scores[..., :-1],
        lambda scores: scores[:, :1],
        lambda scores: scores[:, :, 0],
        lambda scores: scores.expand(-1, -1, 3, -1, -1),
        lambda scores: scores.numpy(),
        lambda scores: None,
    ],
    ids=["one key", "a key too few", "one head", "no group", "another group", "NumPy's", "nothing"],
)
def test_scores_of_another_shape_are_refused(llama: PreTrainedModel, ids: Ids, change: Callable[[Tensor], Any]) -> None:
    def scorer(query: Tensor, key: Tensor, packed_keys: Any = None) -> Any:
        return change(key.float().norm(dim=-1)[:, :, None, None].expand(-1, -1, 1, query.shape[2], -1))

    with enable(llama, None, CONFIG, scorer=lambda layer: scorer), torch.no_grad():
        cache = DynamicCache(config=llama.config)
        llama(ids(40, rows=2), past_key_values=cache)
        with pytest.raises(ValueError, match=r"a scorer must return scores \(2, 2, 2, 1, 41\)") as error:
            step(llama, 5, cache, rows=2)
    assert "\n" not in str(error.value)


def test_a_factory_without_a_scorer_is_refused(llama: PreTrainedModel) -> None:
    with pytest.raises(ValueError, match="the scorer of layer 1 is None"):
        enable(llama, None, CONFIG, scorer=lambda layer: None)  # type: ignore[arg-type, return-value]  # the mistake


def test_a_broken_off_prefill_leaves_nothing_sparse(llama: PreTrainedModel, ids: Ids) -> None:
    def interrupt(*_: Any) -> None:
        raise KeyboardInterrupt

    with enable(llama, None, CONFIG) as fasa, torch.no_grad():
        hook = llama.model.layers[2].register_forward_pre_hook(interrupt)
        with pytest.raises(KeyboardInterrupt):
            llama(ids(200, rows=1))
        hook.remove()
        cache = DynamicCache(config=llama.config)
        llama(ids(60, rows=1), past_key_values=cache)
        step(llama, 5, cache)
        assert fasa.stats.sparse_queries == 0
        llama(ids(200, rows=1))
        step(llama, 6, cache)
        assert fasa.stats.sparse_queries > 0


def test_equal_counts_tie_in_large_calibrations(llama: PreTrainedModel) -> None:
    """Of two query heads whose counts add up to the same in every chunk, float32 makes different means."""
    made = profile_of(llama)
    layers, heads, chunks = made.agreement.shape
    provenance = replace(made.provenance, queries=30_000, top_k=256)
    counts = torch.randint(0, 30_000 * 256, (layers, heads, chunks), generator=torch.Generator().manual_seed(0))
    counts[:, 1::2] = 30_000 * 256 - counts[:, ::2]
    profile = FasaProfile((counts.double() / (30_000 * 256)).float(), made.layout, provenance)
    assert torch.equal(profile.dominant(3), torch.arange(3).expand(layers, made.provenance.kv_heads, -1))


# One call of the function.


@pytest.mark.parametrize("group_reduce", ["max", "softmax", "none"])
@pytest.mark.parametrize("sinks", [False, True])
def test_a_row_without_a_key_has_no_gradient(group_reduce: Any, sinks: bool) -> None:
    q, k, v = (tensor.requires_grad_() for tensor in states())
    mask = torch.ones(2, 20, dtype=torch.bool)
    mask[0] = False
    learned = torch.randn(4) if sinks else None
    gradients = {}
    for backend in ("gather", "reference"):
        options: dict[str, Any] = {"n_fac": 6, "group_reduce": group_reduce, "sinks": learned, "backend": backend}
        out = fasa_attention(q, k, v, CHUNKS, key_mask=mask, **options)
        assert not out[0].any()
        gradients[backend] = torch.autograd.grad(out.square().sum(), (q, k, v))
        assert not any(gradient[0].any() for gradient in gradients[backend])
    torch.testing.assert_close(gradients["gather"], gradients["reference"], atol=1e-5, rtol=1e-4)


def test_gradients_by_torch_func() -> None:
    q, k, v = states()

    def loss(value: Tensor, backend: Any) -> Tensor:
        return fasa_attention(q, k, value, CHUNKS, n_fac=6, backend=backend).square().sum()

    found, expected = (torch.func.grad(loss)(v, backend) for backend in ("gather", "reference"))
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-4)


def test_calls_that_do_not_fit_are_refused() -> None:
    q, k, v = states()
    for call, reason in (
        (lambda: fasa_attention(q[:0], k[:0], v[:0], CHUNKS), "at least one row"),
        (lambda: fasa_attention(q, k, v[..., 0], CHUNKS), "does not fit k"),
        (lambda: fasa_attention(q, k, v, CHUNKS, sinks=torch.zeros(3)), "one number for each of 4 query heads"),
    ):
        with raises_sentence(ValueError, match=reason):
            call()


def states() -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(2, heads, length, 16, generator=generator) for heads, length in ((4, 1), (2, 20), (2, 20)))
    return q, k, v


CHUNKS = RotaryLayout.half_split(16).chunks[:3].expand(2, -1, -1)


# Numbers of other libraries, and sizes.


def test_numbers_of_numpy_are_numbers(llama: PreTrainedModel, ids: Ids) -> None:
    assert FasaConfig(n_fac=np.int64(8)) == FasaConfig(n_fac=8)
    shares = FasaConfig(n_fac=np.float64(0.5), layer_budgets=np.ones(3), n_tip=3, backend="reference")
    assert shares == FasaConfig(n_fac=0.5, layer_budgets=(1.0, 1.0, 1.0), n_tip=3, backend="reference")
    with enable(llama, profile_of(llama), shares), torch.no_grad():
        cache = DynamicCache(config=llama.config)
        llama(ids(40, rows=1), past_key_values=cache)
        step(llama, 5, cache)


@pytest.mark.parametrize("weights", [(1e308,) * 3, (1.0, 5e-324, 5e-324)])
def test_weights_beyond_all_proportion_are_refused(weights: tuple[float, ...]) -> None:
    with pytest.raises(ValueError, match="layer_budgets must be"):
        FasaConfig(layer_budgets=weights)


@pytest.mark.parametrize("length", [0, -1, 1.5, True, "64"])
def test_lengths_that_are_none_are_refused(llama: PreTrainedModel, length: Any) -> None:
    with pytest.raises(ValueError, match="max_cache_len must be an integer of at least 1"):
        FasaCache(llama, profile_of(llama), CONFIG, max_cache_len=length)


def test_no_more_rows_are_held_than_there_are_slots(llama: PreTrainedModel, ids: Ids) -> None:
    cache = FasaCache(llama, profile_of(llama), FasaConfig(n_fac=256, n_tip=3), placement="host", max_cache_len=64)
    with torch.no_grad():
        llama(ids(40, rows=1), past_key_values=cache)
    assert [layer.resident.count for layer in cache.layers[1:]] == [64, 64]
