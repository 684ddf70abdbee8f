"""The keys of a plan's rule with `to: sparse`: what the heads see, or how that is found."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Literal

from pydantic import Field, PositiveInt, ValidationError, model_validator

from reattend.mixers.config import Frozen
from reattend.mixers.sparse_config import HeadClass
from reattend.passes.rewrite.sparse_profile import ProfileOptions
from reattend.patterns.grids import GridWindow
from reattend.patterns.pattern import HeadPattern, laid_out


class SparseOptions(Frozen):
    """What the heads see.

    Attributes:
        pattern: of every KV head that nothing below names. A stride starts at a place of its own
            in each head.
        heads_full: KV heads that see every key.
        head_patterns: patterns of single KV heads.
        keep_full: share of the KV heads of all sites together that see every key; the others have
            `pattern`.
        candidates: patterns that each head may get, chosen by measuring (`sparse_search`).
        kv_density: share of the keys that all heads together may read and keep, for `candidates`.
        density_at: the length in tokens where that share is counted.
        finder: how heads are chosen (`sparse_find`). For `keep_full`: `search` measures every head
            once, `alpha` trains a number for each as DuoAttention does, in `steps` steps,
            `retrieval` counts how often it looks at what the model copies, `instant` asks its mean
            query and key. For `kv_density`: `search`, or `profile` as MoA does. `gate`
            trains the selectors that learn (`sparse_teach`), in `steps` steps.
        profile: how that looks; without candidates it has a grid of its own.
        steps: how many `alpha` and `gate` train for, one batch each.
        chosen: what a finder says of its choice; not for plans.
        evict: whether caches forget what no later query sees; None: where the pattern allows it.
        image_grid: places of the image (height, width) or video (frames, height, width), in tokens,
            for patterns over a grid that do not say it themselves.
        text_before: tokens before the grid: a class token, a prompt.
        text_after: tokens behind it; None: any number.
    """

    pattern: HeadPattern = HeadPattern(full=True)
    heads_full: tuple[int, ...] = ()
    head_patterns: tuple[HeadClass, ...] = ()
    keep_full: float | None = Field(default=None, ge=0.0, le=1.0)
    candidates: tuple[HeadPattern, ...] = ()
    kv_density: float | None = Field(default=None, gt=0.0, le=1.0)
    density_at: int = Field(default=4096, gt=0, le=1 << 24)
    finder: Literal["search", "alpha", "profile", "retrieval", "instant", "gate"] = "search"
    steps: int = Field(default=2000, gt=0)
    profile: ProfileOptions = ProfileOptions()
    chosen: str = ""
    evict: bool | None = None
    image_grid: tuple[PositiveInt, ...] = Field(default=(), max_length=3)
    text_before: int = Field(default=0, ge=0)
    text_after: int | None = Field(default=0, ge=0)

    @model_validator(mode="before")
    @classmethod
    def _over_the_grid(cls, given: Any) -> Any:
        if not isinstance(given, Mapping) or not given.get("image_grid"):
            return given
        where = {
            "shape": given["image_grid"],
            "text_before": given.get("text_before", 0),
            "text_after": given.get("text_after", 0),
        }
        try:
            GridWindow(radius=1, **where)
        except ValidationError:  # the option itself will be named
            return given
        found = {**given}
        if "pattern" in given:
            found["pattern"] = laid_out(given["pattern"], where)
        if isinstance(given.get("candidates"), Sequence):
            found["candidates"] = tuple(laid_out(p, where) for p in given["candidates"])
        if isinstance(given.get("head_patterns"), Sequence):
            found["head_patterns"] = tuple(_class_over(c, where) for c in given["head_patterns"])
        return found

    @property
    def searches(self) -> bool:
        """Whether heads are chosen by measuring."""
        return self.keep_full is not None or self.kv_density is not None

    @property
    def patterns(self) -> tuple[HeadPattern, ...]:
        """All that heads may get."""
        return (self.pattern, *self.candidates, *(c.pattern for c in self.head_patterns))

    def decided(self, patterns: Mapping[int, HeadPattern]) -> SparseOptions:
        """With the pattern of each KV head."""
        full = tuple(h for h, p in patterns.items() if p.full)
        rest = tuple(HeadClass(kv_heads=(h,), pattern=p) for h, p in patterns.items() if not p.full)
        return SparseOptions(
            heads_full=full, head_patterns=rest, evict=self.evict, density_at=self.density_at
        )

    @model_validator(mode="after")
    def _are_consistent(self) -> SparseOptions:
        named = [*self.heads_full, *(h for c in self.head_patterns for h in c.kv_heads)]
        if len(named) != len(set(named)) or min(named, default=0) < 0:
            raise ValueError(
                "heads_full and head_patterns must name a KV head at most once, from 0"
            )
        if self.keep_full is not None and self.pattern.full:
            raise ValueError("keep_full needs a `pattern` for the heads that do not stay full")
        if self.keep_full is not None and (named or self.candidates):
            raise ValueError("keep_full chooses heads for one `pattern`: name no heads beside it")
        own_grid = self.finder == "profile"
        if own_grid and self.kv_density is None:
            raise ValueError("finder: profile chooses by kv_density")
        if bool(self.candidates) != (self.kv_density is not None) and not own_grid:
            raise ValueError("candidates and kv_density go together")
        if self.finder in ("alpha", "retrieval", "instant") and self.keep_full is None:
            raise ValueError(f"finder: {self.finder} chooses by keep_full")
        kinds = [p.select.kind for p in self.patterns if p.select is not None and p.select.trained]
        if bool(kinds) != (self.finder == "gate"):
            kind = kinds[0] if kinds else "gate"
            raise ValueError(f"select: {kind} and finder: gate go together: it is trained")
        if self.finder == "gate" and self.searches:
            raise ValueError("gates are trained for `pattern` or `head_patterns`, not to be chosen")
        if self.image_grid and not any(p.grids or p.select for p in self.patterns):
            raise ValueError("image_grid is for a pattern over a grid: give grid, tiles or radial")
        if self.kv_density is not None and (named or not self.pattern.full):
            raise ValueError("candidates are chosen for every head: give no pattern beside them")
        return self


def _class_over(given: Any, where: dict[str, Any]) -> Any:
    """An entry of `head_patterns`, its pattern laid out."""
    found = given.model_dump() if isinstance(given, HeadClass) else given
    if not isinstance(found, Mapping) or "pattern" not in found:
        return found
    return {**found, "pattern": laid_out(found["pattern"], where)}
