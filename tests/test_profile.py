"""FasaProfile: exact round trip, dominant chunks, and refusal of files and models that do not fit."""

from __future__ import annotations

import dataclasses
import json
import re
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import oracle
import pytest
import torch
from sentences import raises_sentence
from torch import Tensor
from transformers import PreTrainedModel

from fasa_flex import FasaConfig, FasaProfile, calibrate, enable
from fasa_flex.calibration.provenance import known_hashes

HEADS, KV_HEADS, CHUNKS, LAYERS = 4, 2, 8, 3


@pytest.fixture(scope="module")
def profile() -> FasaProfile:
    from conftest import tiny, token_ids

    return calibrate(tiny("Llama"), [token_ids(40)], top_k=8, max_new_tokens=6, progress=False)


def with_table(profile: FasaProfile, table: Tensor) -> FasaProfile:
    return FasaProfile(table, profile.layout, profile.provenance)


def test_round_trip_is_exact(profile: FasaProfile, tmp_path: Path) -> None:
    profile.save_pretrained(tmp_path / "profile")
    loaded = FasaProfile.from_pretrained(tmp_path / "profile")
    assert torch.equal(loaded.agreement, profile.agreement)
    assert loaded.agreement.dtype == torch.float32
    assert torch.equal(loaded.layout.chunks, profile.layout.chunks)
    assert dataclasses.asdict(loaded.provenance) == dataclasses.asdict(profile.provenance)
    assert loaded.fingerprint == profile.fingerprint


def test_saving_what_was_loaded_writes_the_same_bytes(profile: FasaProfile, tmp_path: Path) -> None:
    profile.save_pretrained(tmp_path / "first")
    FasaProfile.from_pretrained(tmp_path / "first").save_pretrained(tmp_path / "second")
    first = {path.name: path.read_bytes() for path in (tmp_path / "first").iterdir()}
    assert first == {path.name: path.read_bytes() for path in (tmp_path / "second").iterdir()}


def test_files_are_safetensors_and_json_and_nothing_else(profile: FasaProfile, tmp_path: Path) -> None:
    profile.save_pretrained(tmp_path)
    suffixes = {path.suffix for path in tmp_path.iterdir()}
    assert {".safetensors", ".json"} <= suffixes
    assert suffixes <= {".safetensors", ".json", ".md"}


def test_a_path_given_as_text_works_too(profile: FasaProfile, tmp_path: Path) -> None:
    profile.save_pretrained(str(tmp_path))
    assert torch.equal(FasaProfile.from_pretrained(str(tmp_path)).agreement, profile.agreement)


def test_provenance_says_where_it_came_from(profile: FasaProfile) -> None:
    provenance = profile.provenance
    assert (provenance.top_k, provenance.max_new_tokens, provenance.kv_heads) == (8, 6, KV_HEADS)
    assert provenance.model_type == "llama"
    assert len(provenance.sample_hashes) == 1
    assert {"fasa_flex", "torch", "transformers"} <= set(provenance.versions)


@pytest.mark.parametrize("n_tip", [1, 3, CHUNKS])
def test_dominant_chunks_equal_the_oracle(profile: FasaProfile, n_tip: int) -> None:
    # eighths are exact in float32, and so are their means over a group; ties are common
    table = torch.randint(0, 9, (LAYERS, HEADS, CHUNKS), generator=torch.Generator().manual_seed(0)) / 8
    made = with_table(profile, table)
    for per, heads, kv_heads in (("kv_head", KV_HEADS, KV_HEADS), ("query_head", HEADS, None)):
        dominant = made.dominant(n_tip, per=per)
        assert dominant.shape == (LAYERS, heads, n_tip)
        assert dominant.dtype == torch.long
        for layer in range(LAYERS):
            assert dominant[layer].tolist() == oracle.dominant(table[layer].numpy(), n_tip, kv_heads).tolist()
    assert torch.equal(made.dominant(n_tip), made.dominant(n_tip, per="kv_head"))


def test_dominant_per_kv_head_is_the_mean_over_the_group_written_out(profile: FasaProfile) -> None:
    table = torch.zeros(1, 4, CHUNKS)
    table[0, 0, 2], table[0, 1, 2], table[0, 1, 7] = 0.5, 0.5, 0.75  # group 0: chunk 2 has mean 0.5, chunk 7 0.375
    table[0, 2, 6], table[0, 3, 1] = 1.0, 0.875  # group 1: chunk 6 has mean 0.5, chunk 1 0.4375
    made = with_table(profile, table)
    assert made.dominant(1).tolist() == [[[2], [6]]]
    assert made.dominant(2).tolist() == [[[2, 7], [1, 6]]]
    assert made.dominant(1, per="query_head").tolist() == [[[2], [7], [6], [1]]]


def test_equal_hits_over_a_group_tie_whatever_float32_makes_of_them(profile: FasaProfile) -> None:
    """6 decode queries and K = 8: entries are counts of 48. All chunks have 5 hits of 96 in a group: the lowest win."""
    hits = torch.tensor([[0, 5, 1, 4, 2, 3, 1, 4], [5, 0, 4, 1, 3, 2, 4, 1]])
    table = (hits.double() / 48).float().repeat(1, 2, 1).view(1, HEADS, CHUNKS)
    assert table.view(2, 2, CHUNKS).mean(1).unique().numel() > 1, "float32 sees no difference: the example is weak"
    assert with_table(profile, table).dominant(3).tolist() == [[[0, 1, 2], [0, 1, 2]]]


@pytest.mark.parametrize("n_tip", [0, -1, CHUNKS + 1])
def test_an_impossible_number_of_chunks_is_refused(profile: FasaProfile, n_tip: int) -> None:
    with pytest.raises(ValueError, match=str(n_tip)):
        profile.dominant(n_tip)


def test_an_unknown_sharing_is_refused(profile: FasaProfile) -> None:
    with pytest.raises(ValueError, match="per must be one of 'kv_head', 'query_head', got 'layer'"):
        profile.dominant(1, per="layer")


@pytest.mark.parametrize(
    ("name", "changes", "reason"),
    [
        ("Llama", {"num_hidden_layers": 2}, "layers"),
        ("Llama", {"num_attention_heads": 2}, "heads|head"),
        ("Llama", {"num_key_value_heads": 4}, "heads|head"),
        ("Llama", {"head_dim": 32}, "head"),
        ("Llama", {"rope_parameters": {"rope_type": "default", "rope_theta": 777.0}}, "rot|rope|config|theta"),
        ("Qwen2", {}, "qwen2"),
        ("Cohere", {}, "cohere"),
    ],
)
def test_a_profile_of_another_model_is_refused_with_the_reason(
    profile: FasaProfile, make_model: Callable[..., PreTrainedModel], name: str, changes: dict[str, object], reason: str
) -> None:
    other = make_model(name, **changes)
    with raises_sentence(ValueError, match=f"(?i){reason}"):
        enable(other, profile, FasaConfig(n_fac=4))
    assert other.config._attn_implementation == "sdpa"  # refused before anything was changed


def test_a_profile_fits_other_weights_of_the_same_configuration(
    profile: FasaProfile, make_model: Callable[..., PreTrainedModel]
) -> None:
    profile.check_fits(make_model("Llama", seed=1))
    profile.check_fits(make_model("Llama", seed=1).to(torch.bfloat16))


def test_whole_numbers_and_floats_are_one_rotary_configuration(
    profile: FasaProfile, make_model: Callable[..., PreTrainedModel]
) -> None:
    """GGUF says 777.0 where config.json says 777; the first version told them apart, and its profiles fit on."""
    models = [make_model("Llama", rope_parameters={"rope_type": "default", "rope_theta": t}) for t in (777, 777.0)]
    hashes = [known_hashes(model) for model in models]
    assert hashes[0][0] == hashes[1][0] == hashes[1][1] != hashes[0][1]
    for hash_ in set(sum(hashes, ())):
        made = FasaProfile(
            profile.agreement, profile.layout, dataclasses.replace(profile.provenance, config_hash=hash_)
        )
        made.check_fits(models[0])
    with pytest.raises(ValueError, match="rotary configuration"):
        profile.check_fits(models[0])


def saved(profile: FasaProfile, folder: Path, suffix: str) -> Path:
    profile.save_pretrained(folder)
    return next(path for path in sorted(folder.iterdir()) if path.suffix == suffix)


def damaged(folder: Path, reason: str) -> str:
    """What is said of a damaged profile, and of nothing else that `from_pretrained` refuses."""
    return rf"^the profile in {re.escape(str(folder))} is damaged or altered \({reason}\); save it again\.$"


@pytest.mark.parametrize("suffix", [".safetensors", ".json"])
@pytest.mark.parametrize("keep", [0, 20, 0.5, -1])
def test_a_truncated_file_is_a_clear_error(profile: FasaProfile, tmp_path: Path, suffix: str, keep: float) -> None:
    path = saved(profile, tmp_path, suffix)
    whole = path.read_bytes()
    path.write_bytes(whole[: int(len(whole) * keep)] if isinstance(keep, float) else whole[:keep])
    reason = r"agreement\.safetensors is not the file that config\.json describes" if suffix == ".safetensors" else ".+"
    with raises_sentence(ValueError, match=damaged(tmp_path, reason)):
        FasaProfile.from_pretrained(tmp_path)


@pytest.mark.parametrize("suffix", [".safetensors", ".json"])
def test_a_missing_file_is_a_clear_error(profile: FasaProfile, tmp_path: Path, suffix: str) -> None:
    path = saved(profile, tmp_path, suffix)
    path.unlink()
    with raises_sentence(ValueError, match=rf"holds no FASA profile: {re.escape(path.name)} is missing; pass"):
        FasaProfile.from_pretrained(tmp_path)


def test_an_empty_folder_is_a_clear_error(tmp_path: Path) -> None:
    with raises_sentence(
        ValueError, match=rf"^{re.escape(str(tmp_path))} holds no FASA profile: config\.json is missing; pass"
    ):
        FasaProfile.from_pretrained(tmp_path)


@pytest.mark.parametrize(
    ("table", "said"),
    [
        (torch.full((LAYERS, HEADS, CHUNKS), torch.nan), "holds numbers that are not finite"),
        (torch.full((LAYERS, HEADS, CHUNKS), 1.5), r"must lie in \[0, 1\]"),
        (torch.full((LAYERS, HEADS, CHUNKS), -0.1), r"must lie in \[0, 1\]"),
        (
            torch.zeros(LAYERS, HEADS, CHUNKS - 1),
            rf"must be .* {CHUNKS} chunks\], got \({LAYERS}, {HEADS}, {CHUNKS - 1}\)",
        ),
        (torch.zeros(HEADS, CHUNKS), rf"must be .* {CHUNKS} chunks\], got \({HEADS}, {CHUNKS}\)"),
    ],
    ids=["nan", "above 1", "below 0", "a chunk too few", "no layers"],
)
def test_a_table_that_means_nothing_is_refused(profile: FasaProfile, table: Tensor, said: str) -> None:
    with pytest.raises(ValueError, match=rf"^agreement {said}"):
        with_table(profile, table)


def test_a_tampered_table_is_refused(profile: FasaProfile, tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    path = saved(profile, tmp_path, ".safetensors")
    tensors = load_file(path)
    name = next(name for name, tensor in tensors.items() if tensor.shape == profile.agreement.shape)
    save_file({**tensors, name: tensors[name][:, :, :-1].contiguous()}, path)
    with pytest.raises(ValueError, match=damaged(tmp_path, r"agreement\.safetensors is not the file .*")):
        FasaProfile.from_pretrained(tmp_path)


def edited(profile: FasaProfile, folder: Path, edit: Callable[[dict[str, Any]], object]) -> None:
    path = saved(profile, folder, ".json")
    document = json.loads(path.read_text())
    edit(document["fasa_profile"])
    path.write_text(json.dumps(document))


@pytest.mark.parametrize(
    ("edit", "named"),
    [
        (lambda fields: fields.pop("layout"), "layout"),
        (lambda fields: fields.pop("provenance"), "provenance"),
        (lambda fields: fields["provenance"].pop("top_k"), "top_k"),
        (lambda fields: fields["layout"]["chunks"].pop(), "chunks must pair"),
        (lambda fields: fields["layout"].update(chunks=[[0, 1]] * CHUNKS), "chunks must pair"),
        (lambda fields: fields.update(format="one"), "format must be a whole number, got .one."),
        (lambda fields: fields["provenance"].update(kv_heads=3), "4 query heads do not divide into 3"),
        (lambda fields: fields["provenance"].update(queries=0), "got 0"),
        (lambda fields: fields["provenance"].update(queries=-5), "got -5"),
        (lambda fields: fields["provenance"].update(queries="abc"), "queries .*'abc'"),
        (lambda fields: fields["provenance"].update(top_k=None), "top_k .*None"),
        (lambda fields: fields["provenance"].update(versions=None), "(?:versions|items)"),
        (
            lambda fields: fields["layout"].update(frequencies=[0] * fields["layout"]["n_rotated"]),
            "frequencies must be 8",
        ),
        (lambda fields: fields["layout"]["frequencies"].pop(), "frequencies must be 8"),
        (lambda fields: fields["provenance"].update(config_hash=5), "config_hash .*5"),
        (lambda fields: fields["provenance"].update(model_type=None), "model_type .*None"),
        (lambda fields: fields["provenance"].update(max_new_tokens="many"), "max_new_tokens .*'many'"),
        (lambda fields: fields["layout"].update(unrotated_layers=["x"]), "layers without RoPE .*'x'"),
        (lambda fields: fields["layout"].update(unrotated_layers=[3]), "layers without RoPE .*3"),
        (lambda fields: fields["layout"].update(n_rotated=2.5), r"n_rotated .*2\.5"),
    ],
    ids=[
        "no layout",
        "no provenance",
        "no top_k",
        "a chunk too few",
        "not planes",
        "unknown format",
        "3 KV heads of 4",
        "no queries",
        "fewer",
        "queries of text",
        "top_k of nothing",
        "no versions",
        "chunks that stand still",
        "a frequency too few",
        "a hash of another type",
        "a model of no type",
        "steps of text",
        "a layer of text",
        "a layer beyond",
        "half a chunk",
    ],
)
def test_a_tampered_description_is_refused(
    profile: FasaProfile, tmp_path: Path, edit: Callable[[dict[str, Any]], object], named: str
) -> None:
    edited(profile, tmp_path, edit)
    with raises_sentence(ValueError, match=damaged(tmp_path, f".*{named}.*")):
        FasaProfile.from_pretrained(tmp_path)


def test_a_profile_of_no_layers_is_damaged(profile: FasaProfile, tmp_path: Path) -> None:
    nothing = FasaProfile(profile.agreement[:0], profile.layout, profile.provenance)
    nothing.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="damaged or altered"):
        FasaProfile.from_pretrained(tmp_path)


def test_a_later_format_is_not_damaged(profile: FasaProfile, tmp_path: Path) -> None:
    edited(profile, tmp_path, lambda fields: fields.update(format=999))
    with pytest.raises(ValueError, match="has format 999; upgrade fasa_flex to read it"):
        FasaProfile.from_pretrained(tmp_path)


@pytest.mark.parametrize(
    ("edit", "said"),
    [
        (lambda fields: fields.pop("layout"), "layout is missing"),
        (lambda fields: fields.update(format=None), "format must be a whole number, got None"),
        (lambda fields: fields.update(provenance=[]), r"provenance must be a table of names, got \[\]"),
        (lambda fields: fields["provenance"].pop("kv_heads"), "kv_heads is missing"),
        (lambda fields: fields["provenance"].update(versions=3), "versions must be a table of names, got 3"),
        (lambda fields: fields["provenance"].update(sample_hashes=None), "sample_hashes must be a list, got None"),
        (lambda fields: fields["provenance"].update(colour=1), "provenance has a field 'colour'"),
        (lambda fields: fields["provenance"].update(max_new_tokens=-1), "integer of at least 0, got -1"),
        (lambda fields: fields["layout"].update(chunks="x"), "chunks must be a list, got 'x'"),
        (lambda fields: fields["layout"].update(chunks=["x"]), "chunks and frequencies must be lists of numbers"),
        (lambda fields: fields["layout"].update(frequencies={}), r"frequencies must be a list or null, got \{\}"),
        (lambda fields: fields["layout"].update(unrotated_layers=3), "unrotated_layers must be a list, got 3"),
    ],
)
def test_what_is_wrong_in_a_description_is_said_in_plain_words(
    profile: FasaProfile, tmp_path: Path, edit: Callable[[dict[str, Any]], object], said: str
) -> None:
    edited(profile, tmp_path, edit)
    with pytest.raises(ValueError, match=rf"is damaged or altered \(.*{said}[^.]*\); save it again\.$"):
        FasaProfile.from_pretrained(tmp_path)


@pytest.mark.parametrize("suffix", ["json", "safetensors"])
def test_an_oversized_file_is_refused_unread(
    profile: FasaProfile, tmp_path: Path, suffix: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    profile.save_pretrained(tmp_path)
    (file,) = tmp_path.glob(f"*.{suffix}")
    with file.open("ab") as stream:
        stream.truncate(1 << 33)  # a hole: eight gigabytes by its size, none on the disk
    monkeypatch.setattr(Path, "read_bytes", lambda self: pytest.fail("was read"))
    with raises_sentence(ValueError, match=str(1 << 33)):
        FasaProfile.from_pretrained(tmp_path)


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ("[" * 100_000, "config.json is no JSON"),
        ("[]", "config.json is no table of names"),
        ('{"fasa_profile": []}', "fasa_profile must be a table of names"),
        (b"\xff\xfe\x00", "config.json is no JSON"),
        ('{"fasa_profile": {"format": 1}}', "tensors_sha256 is missing"),
        ("{}", "fasa_profile is missing"),
    ],
)
def test_json_that_is_no_profile_is_a_clear_error(
    profile: FasaProfile, tmp_path: Path, content: str | bytes, said: str
) -> None:
    profile.save_pretrained(tmp_path)
    (file,) = tmp_path.glob("*.json")
    file.write_bytes(content if isinstance(content, bytes) else content.encode())
    with raises_sentence(ValueError, match=rf"damaged or altered \({said}"):
        FasaProfile.from_pretrained(tmp_path)


def test_a_table_swapped_for_another_is_refused(profile: FasaProfile, tmp_path: Path) -> None:
    """Same shape, valid numbers, not the ones the description was written for."""
    saved(with_table(profile, 1 - profile.agreement), tmp_path / "other", ".json")
    saved(profile, tmp_path / "mine", ".json")
    name = "agreement.safetensors"
    (tmp_path / "mine" / name).write_bytes((tmp_path / "other" / name).read_bytes())
    with pytest.raises(ValueError, match=name):
        FasaProfile.from_pretrained(tmp_path / "mine")


def test_a_folder_with_another_config_is_not_overwritten(profile: FasaProfile, tmp_path: Path) -> None:
    other = tmp_path / "config.json"
    other.write_text('{"model_type": "llama"}')
    with pytest.raises(ValueError, match=r"config\.json"):
        profile.save_pretrained(tmp_path)
    assert json.loads(other.read_text()) == {"model_type": "llama"}


def test_push_to_hub_uploads_table_and_json(profile: FasaProfile, monkeypatch: pytest.MonkeyPatch) -> None:
    """No network: the Hub's client is replaced, and what it is given to upload loads again as the same profile."""
    uploaded: dict[str, FasaProfile] = {}

    class Client:
        def __init__(self, **_: object) -> None: ...

        def create_repo(self, repo_id: str, **_: object) -> SimpleNamespace:
            return SimpleNamespace(repo_id=repo_id)

        def upload_folder(self, *, repo_id: str, folder_path: str, **_: object) -> str:
            uploaded[repo_id] = FasaProfile.from_pretrained(folder_path)
            return "done"

    monkeypatch.setattr("huggingface_hub.hub_mixin.HfApi", Client)
    profile.push_to_hub("someone/profile")
    assert uploaded["someone/profile"].fingerprint == profile.fingerprint
