"""The ops of reattend: `reattend::attention`, `reattend::latent_attention`, `reattend::cache_put`.

One package per op, each with a plain torch reference (`reference.py`), the registration of the
torch custom op (`register.py`) and, for the two attention ops, Triton kernels for CUDA and ROCm
(`triton_kernel.py`, `launch.py`). Importing this package imports neither torch nor Triton:
importing an op's package registers it (``from reattend.kernels.attention import attention``),
and our Triton kernels are imported at the first launch on a GPU.

Letters in tensor names: B batch, N queries, M keys (capacity of the cache), H query heads,
G KV heads, d width of q and k, e width of v, r latent rank, R rotary width, P pages.
"""
