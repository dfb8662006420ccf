"""A dense layer's decode step in which each key is read once for its group.

Under a mask, as of a static cache, transformers repeats keys and values for every query head: on an H100 a step of 32
layers at 128k tokens then takes 117 ms, without a mask 15; one of 16 layers at 32k, compiled on two CPU cores, 1.3 s,
by grouped rows 0.3. Without one, as of a growing cache, PyTorch reads a key for every query head on a CPU, which takes
two to three and a half times as long from 4k tokens on, and on an H100 (torch 2.11) has cuDNN plan every length anew,
in 42 to 69 ms a token (evals/results); flash attention plans nothing.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.backends import cuda
from torch.nn import functional as F

from fasa_flex.backends.triton.dispatch import codes_of, why_not_these
from fasa_flex.core.softmax import Softmax


def decodes_grouped(query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, softmax: Softmax) -> bool:
    """Whether `grouped_attention` serves a dense layer better than the model's own attention."""
    if query.shape[2] != 1 or query.shape[1] == key.shape[1] or query.device != key.device:
        return False
    if not query.is_cuda:
        return softmax.plain
    planned_once = attention_mask is None and torch.compiler.is_compiling()
    return not planned_once and why_not_these(query, key, value) is None


def grouped_attention(
    query: Tensor, key: Tensor, value: Tensor, valid: Tensor, softmax: Softmax, all_valid: bool = False
) -> Tensor:
    """Dense attention of one query a row where `decodes_grouped`.

    Args:
        query: float [B, Hq, 1, D].
        key: float [B, Hkv, T, D].
        value: float [B, Hkv, T, Dv].
        valid: bool [B or 1, 1, 1, 1, T].
        softmax: the model's.
        all_valid: whether every key is known to be.

    Returns:
        [B, Hq, 1, Dv].
    """
    if query.is_cuda and not (all_valid and softmax.plain and _flash_has(key, value)):
        from fasa_flex.backends.triton.dense import dense_decode  # Triton is there with CUDA only

        return dense_decode(
            query.contiguous(), key, value, codes_of(valid).flatten(1), softmax.scaling, softmax.softcap, softmax.sinks
        )
    batch, query_heads, _, dim = query.shape
    rows, mask = query.reshape(batch, key.shape[1], -1, dim), None if all_valid else valid[:, 0]
    # a compiler does not trace the switch, and has no need of it: a graph's lengths are planned once
    attend = F.scaled_dot_product_attention if torch.compiler.is_compiling() else _without_cudnn
    return attend(rows, key, value, attn_mask=mask, scale=softmax.scaling).reshape(batch, query_heads, 1, -1)


def _without_cudnn(query: Tensor, key: Tensor, value: Tensor, **options: Any) -> Tensor:
    """PyTorch's attention by any kernel but cuDNN's."""
    former = cuda.cudnn_sdp_enabled()
    cuda.enable_cudnn_sdp(False)
    try:
        return F.scaled_dot_product_attention(query, key, value, **options)
    finally:
        cuda.enable_cudnn_sdp(former)


def _flash_has(key: Tensor, value: Tensor) -> bool:
    """Whether PyTorch's flash attention, which plans nothing and splits a row's keys, has a kernel for these."""
    return key.element_size() == 2 and key.shape[3] == value.shape[3] <= 256
