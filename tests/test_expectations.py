"""What is expected of transformers and lm-eval by name: it holds, and where it does not, that is said."""

from __future__ import annotations

import re
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from families import tiny
from generation import Ids, profile_of
from sentences import raises_sentence
from torch import nn
from transformers import AttentionInterface, AttentionMaskInterface, DynamicCache, PreTrainedModel, StaticCache
from transformers.cache_utils import DynamicLayer

from fasa_flex import FasaConfig, RotaryLayout, calibrate, enable
from fasa_flex.hf.attention_call import cache_among
from fasa_flex.hf.compatibility import CACHE_METHODS, LM_EVAL_HOOKS, TESTED, cache_argument, check_lm_eval

ROOT = Path(__file__).parents[1]
Change = Callable[[pytest.MonkeyPatch, PreTrainedModel], None]


def test_a_continuation_on_a_static_cache_is_that_on_a_growing_one() -> None:
    """The cache is found: of a static one the keys alone do not say where the queries begin (issue 22)."""
    torch.manual_seed(0)
    model = tiny("Llama")
    x = torch.randint(3, 60, (1, 60))
    profile = calibrate(model, [x[0, :40]], top_k=8, max_new_tokens=2, progress=False)
    out = []
    with torch.no_grad(), enable(model, profile, FasaConfig(n_fac=6, n_tip=2, dense_layers=())) as fasa:
        for cache in (DynamicCache(config=model.config), StaticCache(config=model.config, max_cache_len=100)):
            held = cache_argument(model, cache)
            model(x[:, :40], **held)
            with fasa.sparse_from(torch.tensor([50])):
                out.append(model(x[:, 40:], **held).logits)
            assert all(layer.packed is not None for layer in cache.layers)
    assert (out[0] - out[1]).abs().max() < 1e-4


def test_a_sequence_beyond_the_model_is_refused_on_a_cache(llama: PreTrainedModel, ids: Ids) -> None:
    held = cache_argument(llama, DynamicCache(config=llama.config))
    with torch.no_grad(), enable(llama, profile_of(llama)):
        llama(ids(500, rows=1), **held)
        with pytest.raises(ValueError, match="at most 512"):
            llama(ids(300, rows=1), **held)


@pytest.mark.parametrize("name", ["cache", "past_key_values", "layer_past"])
def test_a_cache_of_another_kind_is_refused_in_a_sentence(name: str) -> None:
    class OtherCache: ...

    cache = DynamicCache()
    assert cache_among({name: cache, "attention_mask": None}) is cache
    assert cache_among({name: None}) is None
    with raises_sentence(ValueError, match=r"OtherCache.*DynamicCache.*disable"):
        cache_among({name: OtherCache()})


# Each expectation taken away is a refusal.


def handing(rename: dict[str, str], drop: tuple[str, ...] = ()) -> Change:
    """Attention modules that are handed their arguments under other names."""

    def change(monkeypatch: pytest.MonkeyPatch, model: PreTrainedModel) -> None:
        def before(module: nn.Module, args: Any, kwargs: dict[str, Any]) -> Any:
            return args, {rename.get(name, name): argument for name, argument in kwargs.items()}

        for layer in model.model.layers:
            module, forward = layer.self_attn, layer.self_attn.forward
            module.register_forward_pre_hook(before, with_kwargs=True)

            def called(*args: Any, forward: Callable[..., Any] = forward, **kwargs: Any) -> Any:
                kept = {new: old for old, new in rename.items() if old not in drop}
                return forward(*args, **{kept.get(name, name): kwargs[name] for name in kwargs if name not in drop})

            monkeypatch.setattr(module, "forward", called, raising=False)

    return change


def passing(**options: Any) -> Change:
    """An attention function that is handed other options; None is for one that is not handed at all."""

    def change(monkeypatch: pytest.MonkeyPatch, model: PreTrainedModel) -> None:
        found = AttentionInterface.get_interface

        def get(self: AttentionInterface, name: str, default: Any) -> Callable[..., Any]:
            function = found(self, name, default)
            return lambda *args, **kwargs: function(
                *args, **{k: v for k, v in {**kwargs, **options}.items() if v is not None}
            )

        monkeypatch.setattr(AttentionInterface, "get_interface", get)

    return change


def without(owner: Any, name: str, instead: Any = None) -> Change:
    return lambda monkeypatch, model: monkeypatch.setattr(owner, name, instead)


def unnumbered(monkeypatch: pytest.MonkeyPatch, model: PreTrainedModel) -> None:
    for layer in model.model.layers:
        layer.self_attn.number = layer.self_attn.__dict__.pop("layer_idx")


def scaled(monkeypatch: pytest.MonkeyPatch, model: PreTrainedModel) -> None:
    for layer in model.model.layers:
        layer.self_attn.scaling = 0.3
    passing(scaling=None)(monkeypatch, model)


def ignored(monkeypatch: pytest.MonkeyPatch, model: PreTrainedModel) -> None:
    for layer in model.model.layers:
        module = layer.self_attn
        monkeypatch.setattr(module, "forward", lambda hidden_states, **_: (hidden_states, None), raising=False)


def mask_of(shape: tuple[int, ...], dtype: torch.dtype = torch.bool) -> Change:
    return without(
        AttentionMaskInterface,
        "_global_mapping",
        dict.fromkeys(["sdpa", "eager"], lambda *_, **__: torch.ones(shape).to(dtype)),
    )


TAKEN: dict[str, tuple[Change, str]] = {
    "the cache's name": (handing({"cache": "kv", "past_key_values": "kv"}), "no cache under a known name"),
    "the hidden states' name": (handing({"hidden_states": "states"}), "no hidden_states"),
    "the mask's name": (handing({"attention_mask": "bias"}), "under another name than attention_mask="),
    "the mask": (handing({"attention_mask": "mask"}, drop=("mask",)), "no attention mask for a row with padding"),
    "layer_idx": (unnumbered, "no layer_idx"),
    "calls by name": (ignored, "attention function of its registry for none"),
    "a mask's dimensions": (mask_of((1, 4)), r"mask of shape \(1, 4\)"),
    "a mask for all heads": (mask_of((1, 4, 4, 4)), r"mask of shape \(1, 4, 4, 4\)"),
    "a mask's dtype": (mask_of((1, 1, 4, 4), torch.int64), "torch.int64"),
    "what is added to logits": (passing(position_bias=torch.ones(1)), "position_bias"),
    "scaling": (scaled, "no scaling="),
    "attention functions": (without(AttentionInterface, "_global_mapping", {}), "no AttentionInterface.register"),
    "their registration": (without(AttentionInterface, "register"), "no AttentionInterface.register"),
    "masks": (without(AttentionMaskInterface, "_global_mapping", {}), "no AttentionMaskInterface.register"),
    "the sign of crop": (
        without(DynamicLayer, "crop", lambda self, to: None),
        r"leaves (\d+) of \1 tokens .*crop\(-1\)",
    ),
    "the length of a layer": (without(DynamicLayer, "get_seq_length", lambda self: 0), "counts 0 tokens"),
    **{
        f"{kind.__name__}.{method}": (without(kind, method), f"no method {method} in {kind.__name__}")
        for kind, methods in CACHE_METHODS.items()
        for method in methods
    },
}


@pytest.mark.parametrize(("take", "said"), TAKEN.values(), ids=TAKEN)
def test_what_transformers_no_longer_has_is_refused(
    take: Change, said: str, llama: PreTrainedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    profile = profile_of(llama)
    take(monkeypatch, llama)
    for call in (lambda: enable(llama, profile), lambda: RotaryLayout.detect(llama)):
        with raises_sentence(ValueError, match=said) as error:
            call()
        assert transformers.__version__ in str(error.value)
        assert "{} to {}".format(*TESTED["transformers"]) in str(error.value)
    assert llama.config._attn_implementation == "sdpa"


@pytest.mark.parametrize(("name", "option"), [("Gemma 2", "softcap"), ("gpt-oss", "s_aux")])
def test_a_part_of_the_softmax_that_does_not_arrive_is_refused(
    name: str, option: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = tiny(name)
    profile = profile_of(model)
    passing(**{option: None})(monkeypatch, model)
    with pytest.raises(ValueError, match=f"no {option}="):
        enable(model, profile)


@pytest.mark.parametrize("name", ["forward", "generate"])
def test_a_model_is_given_its_cache_under_the_name_it_takes(name: str, llama: PreTrainedModel, ids: Ids) -> None:
    call = {"forward": llama, "generate": lambda x, **o: llama.generate(x, max_new_tokens=2, **o)}[name]
    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("error", FutureWarning)
        cache = DynamicCache(config=llama.config)
        call(ids(9, rows=1), **cache_argument(llama, cache))
    assert cache.get_seq_length() >= 9


def test_no_call_of_ours_has_the_old_name_of_a_cache() -> None:
    """transformers warns of it since 5.24 and drops it in 5.40."""
    files = [path for folder in ("fasa_flex", "evals") for path in (ROOT / folder).rglob("*.py")]
    assert len(files) > 100
    old = [
        f"{path}:{number}"
        for path in files
        for number, line in enumerate(path.read_text().splitlines(), 1)
        if re.search(r"past_key_values\s*=[^=` ]|\.past_key_values|\[.past_key_values.\]", line)
    ]
    assert not old


def test_pyproject_allows_what_was_tested() -> None:
    text = (ROOT / "pyproject.toml").read_text()
    for package, (oldest, newest) in TESTED.items():
        *front, last = map(int, newest.split("."))
        beyond = ".".join(map(str, [*front, last + 1]))
        assert re.search(rf'"{package.replace("_", ".")}(\[hf\])?>={re.escape(oldest)},<{re.escape(beyond)}"', text)


# lm-eval's hooks.


def hooks(**changed: Any) -> type:
    def method(self: object, requests: Any, disable_tqdm: Any, override_bs: Any) -> None: ...

    names: dict[str, Any] = {}
    for name, arguments in LM_EVAL_HOOKS.items():
        scope: dict[str, Any] = {}
        exec(f"def {name}(self, {', '.join(arguments)}): ...", scope)
        names[name] = scope[name]
    return type("HFLM", (), {**names, **changed})


def test_lm_evals_hooks_are_there(monkeypatch: pytest.MonkeyPatch) -> None:
    huggingface = pytest.importorskip("lm_eval.models.huggingface")
    check_lm_eval(huggingface.HFLM)
    check_lm_eval(hooks())
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(ValueError, match=r"no method gather_object.* tested with lm_eval 0\.4\.12 to"):
        check_lm_eval(hooks())


@pytest.mark.parametrize("name", LM_EVAL_HOOKS)
def test_a_hook_that_lm_eval_no_longer_has_is_refused(name: str) -> None:
    pytest.importorskip("lm_eval")
    with raises_sentence(ValueError, match=rf"^lm_eval \S+ has no method {name} in HFLM.*0\.4\.10 to"):
        check_lm_eval(hooks(**{name: None}))
    if LM_EVAL_HOOKS[name]:
        with pytest.raises(ValueError, match=f"no argument {LM_EVAL_HOOKS[name][0]}.* in HFLM.{name}"):
            check_lm_eval(hooks(**{name: lambda self: None}))


def test_fasa_hf_asks_before_it_loads_a_model(monkeypatch: pytest.MonkeyPatch) -> None:
    huggingface = pytest.importorskip("lm_eval.models.huggingface")
    from fasa_flex.lm_eval.model import FasaHFLM

    monkeypatch.setattr(huggingface.HFLM, "_model_generate", None)
    with pytest.raises(ValueError, match="no method _model_generate"):
        FasaHFLM("no/such/model")
