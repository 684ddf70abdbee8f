"""Tile sizes of every shipped kernel: the one table, no autotuning.

Key: (target, kernel, width class, bytes per element). The width class is the smallest listed width
that holds max(d, e) for `attention`, `routed` and `sparse`, max(f, e) for `linear`, and r for
`latent`. A shape the table does not hold runs the torch implementation. Every entry is compiled
ahead of time for its target by `reattend.kernels.aot`, which checks shared memory, registers and
spill (`spills.py` names what spills on NVIDIA). Entries of `MEASURED` are the fastest of a sweep on
that device (`kernels/bench/sweep.py`); all others were chosen by the compiler's report.
`latent_decode_wide` and `latent_decode_tall` are the decode kernel with taller tiles, for many
heads: every tile of rows reads the cache once.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, replace

from reattend.kernels.spills import ALL_REGISTERS, EIGHT_WARPS, FREE, NARROW

WHOLE = 1024  # a slice that is wider than any rank
DECODE_QUERIES = 16  # more new tokens than this run the prefill kernel
# more (query, head) pairs than this decode with a kernel of taller tiles, where one is listed
WIDE_ROWS, TALL_ROWS = 16, 32


@dataclass(frozen=True)
class KernelConfig:
    """Tile and launch options of one kernel.

    Attributes:
        rows: rows (queries, or query-head pairs) of a tile; tokens of a chunk.
        keys: keys of a tile; of `linear`, features and values of a tile.
        warps: warps per program.
        stages: depth of the load pipeline.
        resident: programs one multiprocessor runs at once; only the number of splits depends on it.
        registers: that a thread may take; 0: as many as the compiler likes. It likes to spill a few
            where that lets more programs run side by side.
        slice: of a latent rank, the columns that a product takes at once; 0: all.
    """

    rows: int
    keys: int
    warps: int
    stages: int
    resident: int = 1
    registers: int = 0
    slice: int = 0

    @property
    def spread(self) -> bool:
        """Whether warps outnumber the 16-row slabs that warp-group products divide rows into."""
        return self.rows >= 64 and self.warps * 16 > self.rows

    @property
    def spread_keys(self) -> bool:
        """The same where a product's rows are keys."""
        return self.keys >= 64 and self.warps * 16 > self.keys

    @property
    def told(self) -> dict[str, int]:
        """As reports name it: `registers` and `slice` where they are given."""
        return {k: v for k, v in asdict(self).items() if v or k not in ("registers", "slice")}

    @property
    def launch(self) -> dict[str, int]:
        """Launch options."""
        limit = {"maxnreg": self.registers} if self.registers else {}
        return {"num_warps": self.warps, "num_stages": self.stages, **limit}


Rows = dict[tuple[str, int], dict[int, KernelConfig]]
Tile = tuple[int, ...]


def _heads(*tiles: Tile) -> dict[int, KernelConfig]:
    """Configs (rows, keys, warps, stages[, resident]) for head widths up to 64, 128 and 256."""
    return {w: KernelConfig(*t) for w, t in zip((64, 128, 256), tiles, strict=True)}


def _ranks(*tiles: Tile) -> dict[int, KernelConfig]:
    """Configs (rows, keys, warps, stages, ...) for latent ranks up to 128, 256 and 512."""
    return {w: KernelConfig(*t) for w, t in zip((128, 256, 512), tiles, strict=True)}


def _linear(size: int, chunk: Tile, *, step: Tile) -> Rows:
    """Kernels over chunks have one tile, whose rows are the tokens of a chunk; any width up to 256.

    They go through features and values tile by tile, so widths make no classes.
    """
    names = ("state", "read", "state_back", "read_back")
    found = {(f"linear_{name}", size): {256: KernelConfig(*chunk)} for name in names}
    return found | {("linear_step", size): {256: KernelConfig(*step)}}


def _channels() -> Rows:
    """Where every feature decays, a program has all features of a head: at most 128 fit."""
    narrow, wide = KernelConfig(16, 32, 4, 1), KernelConfig(16, 16, 8, 1)
    return {
        ("linear_channels", 2): {64: narrow, 128: narrow},
        ("linear_channels", 4): {64: narrow, 128: wide},
    }


def _routed(table: Rows) -> Rows:
    """`routed` kernels take the tiles of `attention`: the same sweep, with other rows.

    The rows' own addresses take registers, so large prefill tiles of 2 bytes spill: they have their
    own.
    """
    phases = ("prefill", "decode", "dq", "dkv")
    found = {(f"routed_{p}", s): table[f"attention_{p}", s] for p in phases for s in (2, 4)}
    return found | {k: c for k, c in table.items() if k[0].startswith("routed")}


def _without_spills(target: str, table: Rows) -> Rows:
    """The table with what `spills.py` gives some kernels of the target."""
    found = {key: dict(classes) for key, classes in table.items()}
    given = [(entry, {"registers": ALL_REGISTERS}) for entry in FREE[target]]
    given += [(entry, {"warps": 8}) for entry in EIGHT_WARPS[target]]
    for (kernel, size, width), more in given:
        classes = found[kernel, size]
        classes[width] = replace(classes[width], **more)
    for (kernel, size, width), tile in NARROW[target].items():
        classes = found[kernel, size]
        classes[width] = replace(classes[min(w for w in classes if w > width)], **tile)
    return found


# fmt: off
_SM_80: Rows = {  # {(kernel, bytes per element): {width class: config}}
    ("attention_prefill", 2): _heads((128, 64, 4, 3), (128, 64, 8, 2), (64, 32, 8, 2)),
    ("attention_decode", 2): _heads((16, 64, 4, 3), (16, 64, 4, 3), (16, 32, 4, 2)),
    ("latent_prefill", 2): _ranks((64, 64, 8, 2), (64, 32, 8, 2), (32, 32, 8, 2)),
    ("latent_decode", 2): _ranks((16, 64, 4, 2), (16, 32, 4, 2), (16, 32, 4, 2)),
    ("latent_decode_wide", 2): _ranks((32, 64, 4, 2), (32, 32, 8, 2), (32, 32, 8, 2)),
    ("routed_prefill", 2): _heads((64, 64, 4, 3), (64, 64, 8, 2), (64, 32, 8, 2)),
    ("attention_prefill", 4): _heads((64, 32, 8, 2), (32, 16, 8, 2), (16, 16, 8, 2)),
    ("attention_decode", 4): _heads((16, 32, 4, 2), (16, 16, 4, 2), (16, 16, 4, 2)),
    ("latent_prefill", 4): _ranks((16, 16, 8, 2), (16, 16, 8, 2), (16, 16, 8, 2)),
    ("latent_decode", 4): _ranks((16, 32, 8, 2), (16, 32, 8, 2), (16, 16, 8, 1)),
    ("attention_dq", 2): _heads((128, 64, 8, 2), (64, 64, 8, 2), (64, 32, 8, 1)),
    ("attention_dkv", 2): _heads((32, 64, 4, 2), (32, 64, 8, 2), (16, 32, 8, 2)),
    ("attention_dq", 4): _heads((32, 32, 8, 1), (16, 32, 8, 1), (16, 16, 8, 1)),
    ("attention_dkv", 4): _heads((32, 32, 8, 1), (16, 32, 8, 1), (16, 16, 8, 1)),
    ("routed_dkv", 2): _heads((32, 32, 8, 2), (32, 64, 8, 2), (16, 32, 8, 2)),
    ("latent_dq", 2): _ranks((64, 16, 8, 2), (32, 32, 8, 2), (16, 32, 8, 1)),
    ("latent_dkv", 2): _ranks((32, 32, 8, 2), (16, 32, 8, 2), (16, 16, 8, 1)),
    ("latent_dq", 4): _ranks(*3 * [(32, 32, 8, 1, 1, 0, 32)]),
    ("latent_dkv", 4): _ranks(*3 * [(32, 32, 8, 1, 1, 0, 32)]),
    ("sparse_prefill", 2): _heads((64, 64, 4, 3), (64, 64, 8, 2), (64, 32, 8, 2)),
    ("sparse_decode", 2): _heads((16, 64, 4, 3), (16, 64, 4, 2), (16, 32, 4, 2)),
    ("sparse_dq", 2): _heads((64, 32, 8, 2), (64, 32, 8, 2), (32, 32, 8, 1)),
    ("sparse_dkv", 2): _heads((64, 32, 8, 2), (32, 64, 8, 2), (32, 32, 8, 1)),
    ("sparse_prefill", 4): _heads((64, 32, 8, 2), (32, 16, 8, 2), (16, 16, 8, 2)),
    ("sparse_decode", 4): _heads((16, 32, 4, 2), (16, 16, 4, 2), (16, 16, 8, 1)),
    ("sparse_dq", 4): _heads((32, 32, 8, 1), (16, 32, 8, 1), (16, 16, 8, 1)),
    ("sparse_dkv", 4): _heads((32, 32, 8, 1), (16, 32, 8, 1), (16, 16, 8, 1)),
}
_SM_80 |= _routed(_SM_80)
_SM_80 |= _channels()
_SM_80 |= _linear(2, (64, 64, 4, 2), step=(1, 32, 4, 1))
_SM_80 |= _linear(4, (32, 32, 4, 2), step=(1, 32, 4, 1))
_SM_90: Rows = {
    **_SM_80,
    ("attention_prefill", 2): _heads((128, 64, 4, 3), (128, 64, 8, 3), (128, 32, 8, 2)),
    ("routed_prefill", 2): _heads((64, 64, 4, 3), (128, 64, 8, 3), (64, 32, 8, 2)),
    ("sparse_prefill", 2): _heads((64, 64, 4, 3), (64, 64, 4, 2), (64, 32, 8, 2)),
    ("latent_prefill", 2): _ranks((128, 64, 8, 2), (64, 32, 8, 2), (32, 32, 8, 2)),
    ("latent_decode_wide", 2): _ranks((32, 64, 4, 2), (32, 32, 8, 2), (32, 32, 8, 2)),
    ("latent_prefill", 4): _ranks((16, 16, 8, 2), (16, 16, 8, 1), (16, 16, 8, 1)),
    ("attention_decode", 4): _heads((16, 32, 4, 2), (16, 16, 4, 2), (16, 16, 8, 2)),
    ("attention_dq", 2): _heads((128, 64, 8, 3), (128, 64, 8, 3), (64, 64, 8, 2)),
    ("attention_dkv", 2): _heads((32, 128, 8, 3), (32, 64, 8, 2), (32, 32, 8, 2)),
    ("routed_dq", 2): _heads((128, 64, 8, 3), (128, 64, 8, 3), (32, 32, 8, 1)),
    ("routed_dkv", 2): _heads((32, 128, 8, 3), (32, 64, 8, 2), (32, 32, 8, 2)),
    ("latent_dq", 2): _ranks((128, 32, 8, 2), (64, 16, 8, 1), (16, 32, 8, 2)),
    ("latent_dkv", 2): _ranks((32, 128, 8, 2), (32, 64, 8, 2), (32, 16, 8, 2)),
    ("sparse_dq", 2): _heads((64, 64, 4, 2), (64, 32, 8, 2), (32, 32, 8, 1)),
    ("sparse_dkv", 2): _heads((64, 64, 8, 2), (32, 64, 8, 2), (32, 32, 8, 1)),
}
_SM_90 |= _routed(_SM_90)
_SM_100: Rows = _SM_90 | {
    ("routed_prefill", 2): _heads((64, 64, 4, 3), (128, 64, 8, 3), (128, 32, 8, 2)),
    ("sparse_prefill", 2): _heads((64, 64, 4, 3), (64, 64, 8, 2), (64, 32, 8, 2)),
    ("sparse_prefill", 4): _heads((32, 32, 8, 2), (32, 16, 8, 2), (16, 16, 8, 2)),
    ("attention_prefill", 2): _heads((64, 64, 4, 3), (128, 64, 8, 3), (128, 32, 8, 2)),
    ("attention_dkv", 2): _heads((32, 64, 8, 2), (64, 32, 8, 2), (32, 32, 8, 2)),
    ("routed_dkv", 2): _heads((32, 64, 8, 2), (64, 32, 8, 2), (32, 32, 8, 2)),
    ("latent_dq", 2): _ranks((64, 64, 8, 2), (64, 64, 8, 2), (16, 64, 8, 2)),
    ("latent_dkv", 2): _ranks((32, 64, 8, 2), (32, 64, 8, 2), (32, 16, 8, 2)),
}
# fastest of the sweep on an NVIDIA H200, bf16 (fp16 has the same size and instructions)
_H200: Rows = {
    ("attention_prefill", 2): _heads((64, 64, 4, 3), (128, 64, 8, 3), (128, 64, 8, 2)),
    ("attention_decode", 2): _heads((16, 128, 4, 4), (16, 64, 4, 4), (16, 64, 4, 3)),
    ("latent_prefill", 2): _ranks((128, 64, 8, 3), (128, 64, 8, 2), (64, 64, 8, 2)),
    ("latent_decode", 2): _ranks((16, 128, 4, 3), (16, 64, 4, 3, 2), (16, 32, 4, 3, 2)),
    ("latent_decode_wide", 2): _ranks((64, 64, 4, 3), (32, 64, 4, 3, 2), (32, 32, 4, 3, 2)),
    ("latent_decode_tall", 2): _ranks((64, 64, 4, 3), (64, 64, 8, 3), (64, 64, 8, 2)),
}
# with the rows' addresses the widest spills
_SM_90["routed_decode", 2] = _H200["attention_decode", 2] | {
    256: _SM_90["routed_decode", 2][256]
}
_GFX942: Rows = {
    ("attention_prefill", 2): _heads((128, 64, 4, 1), (128, 32, 4, 1), (64, 32, 4, 1)),
    ("attention_decode", 2): _heads((16, 64, 4, 1), (16, 64, 4, 1), (16, 32, 4, 1)),
    ("latent_prefill", 2): _ranks((64, 32, 4, 1), (64, 32, 4, 1), (32, 32, 4, 1)),
    ("latent_decode", 2): _ranks((16, 32, 4, 1), (16, 32, 4, 1), (16, 32, 4, 1)),
    ("latent_decode_wide", 2): _ranks((32, 32, 4, 1), (32, 32, 4, 1), (32, 32, 4, 1)),
    ("attention_prefill", 4): _heads((64, 32, 4, 1), (32, 32, 4, 1), (16, 16, 4, 1)),
    ("attention_decode", 4): _heads((16, 32, 4, 1), (16, 32, 4, 1), (16, 16, 4, 1)),
    ("latent_prefill", 4): _ranks((32, 32, 4, 1), (16, 16, 4, 1), (16, 16, 4, 1)),
    ("latent_decode", 4): _ranks((16, 32, 4, 1), (16, 16, 4, 1), (16, 16, 4, 1)),
    ("attention_dq", 2): _heads((64, 32, 4, 1), (64, 32, 4, 1), (32, 32, 4, 1)),
    ("attention_dkv", 2): _heads((32, 64, 4, 1), (32, 64, 4, 1), (16, 32, 4, 1)),
    ("attention_dq", 4): _heads((16, 32, 4, 1), (16, 16, 4, 1), (16, 16, 4, 1)),
    ("attention_dkv", 4): _heads((16, 16, 4, 1), (16, 16, 4, 1), (16, 16, 4, 1)),
    ("latent_dq", 2): _ranks((64, 32, 4, 1), (32, 32, 4, 1), (16, 32, 4, 1)),
    ("latent_dkv", 2): _ranks((32, 32, 4, 1), (16, 32, 4, 1), (16, 16, 4, 1)),
    ("latent_dq", 4): _ranks(*3 * [(32, 32, 4, 1, 1, 0, 32)]),
    ("latent_dkv", 4): _ranks(*3 * [(32, 32, 4, 1, 1, 0, 32)]),
    ("sparse_prefill", 2): _heads((64, 64, 4, 1), (64, 32, 4, 1), (64, 32, 4, 1)),
    ("sparse_decode", 2): _heads((16, 64, 4, 1), (16, 64, 4, 1), (16, 32, 4, 1)),
    ("sparse_dq", 2): _heads((64, 32, 4, 1), (32, 32, 4, 1), (16, 16, 4, 1)),
    ("sparse_dkv", 2): _heads((32, 32, 4, 1), (32, 32, 4, 1), (16, 16, 4, 1)),
    ("sparse_prefill", 4): _heads((64, 32, 4, 1), (32, 32, 4, 1), (16, 16, 4, 1)),
    ("sparse_decode", 4): _heads((16, 32, 4, 1), (16, 16, 4, 1), (16, 16, 4, 1)),
    ("sparse_dq", 4): _heads((16, 32, 4, 1), (16, 16, 4, 1), (16, 16, 4, 1)),
    ("sparse_dkv", 4): _heads((16, 16, 4, 1), (16, 16, 4, 1), (16, 16, 4, 1)),
}
_GFX942 |= _routed(_GFX942)
_GFX942 |= _channels()
_GFX942 |= _linear(2, (64, 64, 4, 1), step=(1, 32, 4, 1))
_GFX942 |= _linear(4, (32, 32, 4, 1), step=(1, 32, 4, 1))
# fmt: on
MEASURED: dict[str, Rows] = {"sm_90": _H200}
_TABLE: dict[str, Rows] = {
    "sm_80": _without_spills("sm_80", _SM_80),
    "sm_90": _without_spills("sm_90", _SM_90 | _H200),
    "sm_100": _without_spills("sm_100", _SM_100),
    "gfx942": _GFX942,
}


def find_config(target: str, kernel: str, width: int, size: int) -> KernelConfig | None:
    """The configuration of a kernel, or None where none is shipped.

    Args:
        target: name from `reattend.kernels.targets`.
        kernel: kernel of the table above.
        width: max(d, e), or r.
        size: bytes per element, 2 or 4.
    """
    classes = _TABLE.get(target, {}).get((kernel, size), {})
    fitting = [w for w in classes if w >= width]
    return classes[min(fitting)] if fitting else None


def shipped(target: str) -> list[tuple[str, int, int, KernelConfig]]:
    """Every (kernel, width class, bytes, config) of a target, for the ahead-of-time compile."""
    return [
        (kernel, width, size, config)
        for (kernel, size), classes in sorted(_TABLE[target].items())
        for width, config in classes.items()
    ]
