"""Dense attention of a decode step that reads each key once for its group of query heads.

With a mask, which a static cache needs, transformers copies keys and values for every query head. On an H100 a step of
32 layers at 128k tokens then takes 117 ms, without a mask 15 ms. On two CPU cores a compiled step of 16 layers at 32k
tokens takes 1.3 s, with `grouped_attention` 0.3 s. Without a mask (growing cache) PyTorch on a CPU reads each key once
per query head, which takes 2 to 3.5 times as long from 4k tokens on; on an H100 (torch 2.11) cuDNN makes a new plan for
every length, 42 to 69 ms per token (evals/results), which flash attention avoids.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.backends import cuda
from torch.nn import functional as F

from fasa_flex.backends.triton.dispatch import in_rows, why_not_these
from fasa_flex.core.softmax import Softmax


def decodes_grouped(query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, softmax: Softmax) -> bool:
    """Whether a dense layer should run `grouped_attention` instead of the model's own attention, which is slower."""
    if query.shape[2] != 1 or query.shape[1] == key.shape[1] or query.device != key.device:
        return False
    if not query.is_cuda:
        return softmax.plain
    planned_once = attention_mask is None and torch.compiler.is_compiling()
    return not planned_once and why_not_these(query, key, value) is None


def grouped_attention(
    query: Tensor, key: Tensor, value: Tensor, valid: Tensor, softmax: Softmax, all_valid: bool = False
) -> Tensor:
    """Compute dense attention of one query per batch row; call it if `decodes_grouped`.

    Args:
        query: float [B, Hq, 1, D].
        key: float [B, Hkv, T, D].
        value: float [B, Hkv, T, Dv].
        valid: bool [B or 1, 1, 1, 1, T], the keys that each query may attend to.
        softmax: scaling, logit cap and learned sinks of the model's attention.
        all_valid: whether the caller knows that all keys are valid.

    Returns:
        [B, Hq, 1, Dv].
    """
    if query.is_cuda and not (all_valid and softmax.plain and _flash_has(key, value)):
        from fasa_flex.backends.triton.dense import dense_decode  # Triton is installed with CUDA only

        return dense_decode(
            query.contiguous(), key, value, in_rows(valid), softmax.scaling, softmax.softcap, softmax.sinks
        )
    batch, query_heads, _, dim = query.shape
    rows, mask = query.reshape(batch, key.shape[1], -1, dim), None if all_valid else valid[:, 0]
    # Dynamo cannot trace the switch of cuDNN, and a compiled graph plans its lengths once
    attend = F.scaled_dot_product_attention if torch.compiler.is_compiling() else _without_cudnn
    return attend(rows, key, value, attn_mask=mask, scale=softmax.scaling).reshape(batch, query_heads, 1, -1)


def _without_cudnn(query: Tensor, key: Tensor, value: Tensor, **options: Any) -> Tensor:
    """Run PyTorch's attention with cuDNN's kernel disabled."""
    former = cuda.cudnn_sdp_enabled()
    cuda.enable_cudnn_sdp(False)
    try:
        return F.scaled_dot_product_attention(query, key, value, **options)
    finally:
        cuda.enable_cudnn_sdp(former)


def _flash_has(key: Tensor, value: Tensor) -> bool:
    """Whether PyTorch's flash attention, which makes no plan per length, has a kernel for these keys and values."""
    return key.element_size() == 2 and key.shape[3] == value.shape[3] <= 256
