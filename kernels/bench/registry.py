"""Every problem that is measured on a GPU, the most telling ones first, and those of the sweep.

A run with a time limit stops somewhere in this list, so each goal of `goals.py` has its first
problem near the beginning.
"""

from __future__ import annotations

from cases import Case

RANK, ROPE = 512, 64
_DECODE_GOALS = ("copy bandwidth", "bytes of the original")


def _count(tokens: int) -> str:
    return f"{tokens // 1024}k"


def _mla(b: int, h: int, m: int) -> Case:
    name = f"mla decode {_count(m)}, batch {b}, {h} heads"
    return Case(name, "latent_attention", b, h, 1, 1, m, RANK, ROPE, goals=_DECODE_GOALS)


def _sparse(n: int, pattern: str, goals: tuple[str, ...], backward: bool = False) -> Case:
    name = f"sparse prefill {_count(n)}, {pattern}"
    return Case(
        name, "sparse_attention", 1, 32, 8, n, n, 128,
        pattern=pattern, goals=goals + ("backward",) * backward, backward=backward,
    )  # fmt: skip


def _sparse_decode(b: int, m: int, pattern: str) -> Case:
    name = f"sparse decode {_count(m)}, batch {b}, {pattern}"
    return Case(
        name, "sparse_attention", b, 32, 8, 1, m, 128, pattern=pattern, goals=("bytes of dense",)
    )


def _routed(n: int, share: float, backward: bool = False) -> Case:
    name = f"routed prefill {_count(n)}, {share:.0%} of 8 groups"
    return Case(
        name, "routed_attention", 1, 32, 8, n, n, 128,
        share=share, goals=("share of dense",) + ("backward",) * backward, backward=backward,
    )  # fmt: skip


def _routed_decode(b: int, m: int, share: float) -> Case:
    name = f"routed decode {_count(m)}, batch {b}, {share:.0%} of 8 groups"
    return Case(
        name, "routed_attention", b, 32, 8, 1, m, 128, share=share, goals=("share of dense",)
    )


def _linear(b: int, n: int, decay: str, dtype: str = "bfloat16") -> Case:
    kind = {"": "no decay", "head": "decay per head", "feature": "decay per feature"}[decay]
    name = f"linear {_count(n)}, batch {b}, {kind}" + (", fp32" if dtype == "float32" else "")
    goals = ("fla forward", "fla backward", "backward") if dtype == "bfloat16" else ()
    return Case(
        name, "linear_attention", b, 32, 32, n, n, 128,
        decay=decay, dtype=dtype, backward=True, goals=goals,
    )  # fmt: skip


def _linear_step(b: int, decay: str) -> Case:
    name = f"linear decode, batch {b}" + (f", decay per {decay}" if decay else "")
    return Case(
        name, "linear_attention", b, 32, 32, 1, 1, 128, decay=decay, goals=("copy bandwidth",)
    )


# one problem of every goal
_FIRST = (
    _mla(64, 16, 8192),
    Case(
        "mla prefill 4k, 16 heads", "latent_attention", 1, 16, 1, 4096, 4096, RANK, ROPE,
        backward=True, goals=("flash at equal FLOPs", "backward"),
    ),
    Case(
        "gqa prefill 4k", "attention", 1, 32, 8, 4096, 4096, 128,
        backward=True, goals=("backward",),
    ),
    _sparse(16384, "10 % of blocks", ("density",), backward=True),
    _sparse(131072, "sinks and window of 1k", ("40 x flash", "layout")),
    _sparse(131072, "s2 of period 64", ("25.3 x flash",)),
    _sparse_decode(8, 32768, "s2"),
    _routed(4096, 0.75, backward=True),
    _routed(4096, 0.5, backward=True),
    _routed_decode(8, 32768, 0.5),
    _linear(4, 4096, "head"),
    _linear(4, 4096, "feature"),
    _linear_step(64, "head"),
)  # fmt: skip
_DENSE = (
    Case("gqa prefill 16k", "attention", 1, 32, 8, 16384, 16384, 128),
    Case("mha prefill 4k", "attention", 1, 32, 32, 4096, 4096, 128),
    Case("gqa prefill 4k, width 64", "attention", 1, 32, 8, 4096, 4096, 64),
    Case("gqa prefill 4k, width 256", "attention", 1, 16, 4, 4096, 4096, 256),
    Case("gqa 512 new on 16k", "attention", 1, 32, 8, 512, 16384, 128),
    Case("gqa decode 8k, batch 8", "attention", 8, 32, 8, 1, 8192, 128),
    Case("gqa decode 32k, batch 1", "attention", 1, 32, 8, 1, 32768, 128),
    Case("mha decode 8k, batch 8", "attention", 8, 32, 32, 1, 8192, 128),
    Case(
        "mla prefill 4k, 32 heads, rank 256", "latent_attention", 1, 32, 1, 4096, 4096, 256, ROPE,
        backward=True, goals=("flash at equal FLOPs", "backward"),
    ),
    Case(
        "mla prefill 16k, 16 heads", "latent_attention", 1, 16, 1, 16384, 16384, RANK, ROPE,
        goals=("flash at equal FLOPs",),
    ),
    Case(
        "mla decode 8k, batch 64, 32 heads, rank 256", "latent_attention", 64, 32, 1, 1, 8192, 256,
        ROPE, goals=_DECODE_GOALS,
    ),
    Case(
        "mla decode 8k, batch 64, 16 heads, pages of 64", "latent_attention", 64, 16, 1, 1, 8192,
        RANK, ROPE, page=64, goals=_DECODE_GOALS,
    ),
)  # fmt: skip
_GRID = tuple(_mla(b, h, m) for m in (8192, 32768, 131072) for b in (1, 8, 64) for h in
              (16, 32, 64, 128))  # fmt: skip
_SPARSE = (
    *(_sparse(16384, f"{p} % of blocks", ("density",)) for p in (2, 5, 25, 50)),
    *(_sparse(32768, f"{p} % of blocks", ("density",)) for p in (2, 10)),
    *(_sparse(131072, f"{p} % of blocks", ("density",)) for p in (2, 10)),
    _sparse(131072, "s2", ("density", "25.3 x flash")),
    *(_sparse(n, "s2", ("density",)) for n in (16384, 32768)),
    *(_sparse(n, "sinks and window of 1k", ("density",)) for n in (16384, 32768)),
    _sparse_decode(8, 131072, "s2"),
    _sparse_decode(8, 131072, "sinks and window of 1k"),
    _sparse_decode(1, 131072, "10 % of blocks"),
)
_ROUTED = (
    _routed(16384, 0.75),
    _routed(16384, 0.5),
    _routed_decode(8, 32768, 0.75),
    _routed_decode(1, 131072, 0.5),
)
_LINEAR = (
    _linear(4, 4096, ""),
    _linear(1, 32768, ""),
    _linear(1, 32768, "head"),
    _linear(1, 32768, "feature"),
    _linear(4, 4096, "head", "float32"),
    _linear_step(64, "feature"),
    _linear_step(1, "head"),
)
_DTYPES = (
    Case("gqa prefill 4k, fp16", "attention", 1, 32, 8, 4096, 4096, 128, dtype="float16"),
    Case("gqa prefill 4k, fp32", "attention", 1, 32, 8, 4096, 4096, 128, dtype="float32"),
    Case("gqa prefill 4k, width 80", "attention", 1, 32, 8, 4096, 4096, 80),
    Case(
        "mla prefill 4k, 16 heads, fp32", "latent_attention", 1, 16, 1, 4096, 4096, RANK, ROPE,
        dtype="float32", backward=True, goals=("backward",),
    ),
    Case("gqa decode 8k, batch 8, fp32", "attention", 8, 32, 8, 1, 8192, 128, dtype="float32"),
    Case("gqa decode 8k, batch 8, width 96", "attention", 8, 32, 8, 1, 8192, 96),
)  # fmt: skip


def _once(cases: tuple[Case, ...]) -> tuple[Case, ...]:
    """The first of every name, where it is first."""
    found: dict[str, Case] = {}
    for case in cases:
        found.setdefault(case.name, case)
    return tuple(found.values())


#: what `python kernels/bench` times, in this order
SPEED = _once((*_FIRST, *_DENSE, *_SPARSE, *_ROUTED, *_LINEAR, *_GRID, *_DTYPES))

#: what `python kernels/bench/sweep.py` tries configurations on
SWEEP = (
    Case("gqa prefill 4k d128", "attention", 1, 32, 8, 4096, 4096, 128),
    Case("gqa prefill 16k d128", "attention", 1, 32, 8, 16384, 16384, 128),
    Case("gqa prefill 4k d64", "attention", 1, 32, 8, 4096, 4096, 64),
    Case("gqa prefill 4k d256", "attention", 1, 16, 4, 4096, 4096, 256),
    Case("gqa decode 8k b8 d128", "attention", 8, 32, 8, 1, 8192, 128),
    Case("gqa decode 32k b1 d128", "attention", 1, 32, 8, 1, 32768, 128),
    Case("mha decode 8k b8 d128", "attention", 8, 32, 32, 1, 8192, 128),
    Case("gqa decode 8k b8 d64", "attention", 8, 32, 8, 1, 8192, 64),
    Case("gqa decode 8k b8 d256", "attention", 8, 16, 4, 1, 8192, 256),
    Case("mla prefill 4k h16 r512", "latent_attention", 1, 16, 1, 4096, 4096, 512, 64),
    Case("mla prefill 4k h32 r256", "latent_attention", 1, 32, 1, 4096, 4096, 256, 64),
    Case("mla decode 8k b8 h16 r512", "latent_attention", 8, 16, 1, 1, 8192, 512, 64),
    Case("mla decode 8k b8 h32 r512", "latent_attention", 8, 32, 1, 1, 8192, 512, 64),
    Case("mla decode 8k b8 h128 r512", "latent_attention", 8, 128, 1, 1, 8192, 512, 64),
    Case("mla decode 8k b64 h16 r512", "latent_attention", 64, 16, 1, 1, 8192, 512, 64),
    Case("mla decode 8k b64 h32 r512", "latent_attention", 64, 32, 1, 1, 8192, 512, 64),
    Case("mla decode 8k b64 h32 r256", "latent_attention", 64, 32, 1, 1, 8192, 256, 64),
    Case("mla decode 32k b1 h128 r512", "latent_attention", 1, 128, 1, 1, 32768, 512, 64),
    Case("mla decode 128k b8 h16 r512", "latent_attention", 8, 16, 1, 1, 131072, 512, 64),
    Case("mla prefill 4k h32 r128", "latent_attention", 1, 32, 1, 4096, 4096, 128, 64),
    Case("mla decode 8k b8 h128 r256", "latent_attention", 8, 128, 1, 1, 8192, 256, 64),
    Case("mla decode 8k b8 h16 r256", "latent_attention", 8, 16, 1, 1, 8192, 256, 64),
    Case("mla decode 8k b8 h32 r128", "latent_attention", 8, 32, 1, 1, 8192, 128, 64),
    Case("mla decode 8k b8 h32 r256", "latent_attention", 8, 32, 1, 1, 8192, 256, 64),
    _sparse(16384, "10 % of blocks", ()),
    _sparse(131072, "sinks and window of 1k", ()),
    _sparse_decode(8, 32768, "s2"),
    _routed(4096, 0.5),
    _routed_decode(8, 32768, 0.5),
    _linear(4, 4096, "head"),
    _linear_step(64, "head"),
    *(
        Case(f"gqa 4k d{d}, {part}", "attention", 1, 32, 8, 4096, 4096, d, backward=True)
        for d in (128, 64)
        for part in ("dq", "dkv")
    ),
    *(
        Case(f"mla 4k r{r}, {part}", "latent_attention", 1, h, 1, 4096, 4096, r, 64, backward=True)
        for h, r in ((16, 512), (32, 256))
        for part in ("dq", "dkv", "kept")
    ),
)
