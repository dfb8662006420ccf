"""The whole method as one function, without a model: one decoded token attends to 256 of 4096 keys."""

import torch
from torch.nn.functional import scaled_dot_product_attention

from fasa_flex import fasa_attention

batch, query_heads, kv_heads, keys, head_dim = 1, 8, 2, 4096, 64
generator = torch.Generator().manual_seed(0)
q = torch.randn(batch, query_heads, 1, head_dim, generator=generator)  # as after RoPE
k, v = torch.randn(2, batch, kv_heads, keys, head_dim, generator=generator)

# 16 of 32 chunks, the same for both key/value heads: RoPE turns dimensions i and i + 32 together in Llama's layout
first = torch.arange(16)
chunks = torch.stack([first, first + head_dim // 2], dim=-1).expand(kv_heads, -1, -1)  # [Hkv, n_tip, 2]

sparse = fasa_attention(q, k, v, chunks, n_fac=256, backend="gather")  # [B, Hq, 1, D]; "flex" compiles first
print(f"256 of {keys} keys: {sparse.shape}")

everything = fasa_attention(q, k, v, chunks, n_fac=keys, backend="gather")
torch.testing.assert_close(everything, scaled_dot_product_attention(q, k, v, enable_gqa=True))
print("a budget of all keys is dense attention")
