"""Calibration of baselines: Double Sparsity's heavy channels, and chunks of adjacent dimensions."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from fasa_flex.calibration.from_texts import encode_samples
from fasa_flex.calibration.rotary import RotaryLayout
from fasa_flex.hf.attention_call import AttentionCall
from fasa_flex.hf.attention_routing import reading
from fasa_flex.hf.head_shard import HeadShard
from fasa_flex.hf.model_structure import check_supported, device_of, evaluating
from fasa_flex.hf.wrappers import run_decoder, unwrapped


def adjacent_pairs(layout: RotaryLayout) -> RotaryLayout:
    """A layout of the chunks (2i, 2i + 1) of FASA's released code, for ``calibrate(layout=...)``."""
    chunks = RotaryLayout.interleaved(layout.head_dim).chunks
    return RotaryLayout(chunks, len(chunks), None, layout.unrotated_layers, layout.unserved_layers)


@torch.no_grad()
def channel_weights(
    model: PreTrainedModel,
    samples: Sequence[Tensor] | Sequence[str],
    tokenizer: PreTrainedTokenizerBase | None = None,
) -> Tensor:
    """Weight of each channel of a head by Double Sparsity's offline calibration (Yang et al., 2024).

    As in the published code: the mean of ``|q_d * k_d|`` over tokens, each query with the key of its own token,
    post-RoPE, in dense forwards, averaged over the query heads of a group.

    Args:
        model: a transformers causal language model.
        samples: 1-D LongTensors of token ids, or texts with ``tokenizer=``. Every token has the same weight.
        tokenizer: encodes samples that are texts.

    Returns:
        float32 [layers, Hkv, D], on CPU.

    Raises:
        ValueError: samples that are empty or too long for the model.
    """
    model = unwrapped(model)
    check_supported(model)
    encoded = encode_samples(model, samples, tokenizer)
    totals: dict[int, Tensor] = {}
    shard = HeadShard.of(model)

    def measure(call: AttentionCall) -> None:
        grouped = call.query.unflatten(1, (call.key.shape[1], -1)).double()
        added = (grouped * call.key.double()[:, :, None]).abs().mean(2).sum((0, 2)).cpu()
        totals[call.layer] = totals.get(call.layer, 0.0) + shard.whole(added)

    with evaluating(model), reading(model, measure):
        for ids in encoded:
            run_decoder(model, input_ids=ids[None].to(device_of(model)), use_cache=False)
    tokens = sum(len(ids) for ids in encoded)
    return torch.stack([totals[layer] for layer in sorted(totals)]).div(tokens).float()


def heavy_channels(weights: Tensor, count: int) -> Tensor:
    """The ``count`` channels of largest weight: int64 [layers, Hkv, count], ascending; ties to the lower channel.

    Args:
        weights: float32 [layers, Hkv, D], from `channel_weights`.
        count: channels of a head, 1 to D.

    Raises:
        ValueError: another shape, or ``count`` out of range.
    """
    if weights.dim() != 3 or not 1 <= count <= weights.shape[2]:
        raise ValueError(
            f"double_sparsity takes 1 to D channels of weights [layers, Hkv, D], got {count} of "
            f"{tuple(weights.shape)}; pass the result of channel_weights(model, samples), and 2 * n_tip of at most D."
        )
    return weights.argsort(dim=-1, descending=True, stable=True)[..., :count].sort(dim=-1).values
