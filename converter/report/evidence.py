"""The evidence in a report: parity, quality, calibration, gates and provenance."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from reattend.report.part import Number, Part

Verdict = Literal["pass", "fail", "not-run"]
Role = Literal["original", "converted", "intermediate", "yardstick"]


class ParityCheck(Part):
    """One comparison of numbers that should agree."""

    name: str = Field(min_length=1, description="for example `cached decode`")
    compared: str = Field(description="what with what, for example `logits, converted/original`")
    verdict: Verdict
    shape: tuple[int, ...] = Field(default=(), description="shape of the compared tensor")
    max_abs: Number | None = Field(default=None, description="largest absolute difference")
    relative: Number | None = Field(
        default=None, description="norm of difference / norm of expected"
    )
    cosine: Number | None = None
    top1: Number | None = Field(default=None, description="share of positions with the same argmax")
    tolerance: Number | None = Field(default=None, description="limit on `judged_by`")
    judged_by: Literal["max_abs", "relative", "cosine", "top1"] = "relative"
    noise_floor: Number | None = Field(
        default=None, description="the same measure between two summation orders of the original"
    )


class QualityRow(Part):
    """One model measured on the held-out text: ours, the original, or a yardstick."""

    name: str = Field(min_length=1)
    role: Role
    cache_bytes_per_token: Number | None = Field(default=None, description="all layers, batch 1")
    ppl: Number | None = Field(default=None, description="perplexity per token")
    kl: Number | None = Field(default=None, description="mean KL(original || this) per token, nats")
    top1: Number | None = Field(
        default=None, description="share of tokens with the original's argmax"
    )
    recall: dict[str, Number] = Field(
        default_factory=dict, description="accuracy by task: copy, passkey, multi_key"
    )
    gain: dict[str, Number] = Field(
        default_factory=dict,
        description="nats per token that having seen it before is worth, by task",
    )


class PeerCell(Part):
    """Another preset at one size, untrained: what was measured, or why it was not made."""

    preset: str = Field(min_length=1)
    size: str = Field(min_length=1, description="for example `25 %` (cache) or `1/4 of pairs`")
    refused: str = Field(default="", description="why there is no such model")
    widths: tuple[tuple[int, int], ...] = Field(
        default=(), description="rotary width and latent rank of every site"
    )
    row: QualityRow | None = None


class Quality(Part):
    """The quality table. The last row of role `converted` is the model that was published."""

    rows: tuple[QualityRow, ...] = Field(min_length=1)
    peers: tuple[PeerCell, ...] = Field(default=(), description="presets by sizes, in this order")
    data: str = Field(default="", description="name of the held-out text; never a path")
    tokens: int | None = Field(default=None, ge=0, description="tokens measured")
    context: int | None = Field(default=None, ge=1, description="tokens per sequence")
    recall_data: str = Field(default="", description="where recall has rows of its own")

    def last(self, role: Role) -> QualityRow | None:
        """The last row of `role`, or None."""
        rows = [row for row in self.rows if row.role == role]
        return rows[-1] if rows else None

    def recall_tasks(self) -> tuple[str, ...]:
        """Names of the recall tasks in the table: the three known ones first."""
        known = ("copy", "passkey", "multi_key")
        named = {task for row in self.rows for task in row.recall}
        return (*[t for t in known if t in named], *sorted(named.difference(known)))


class Stage(Part):
    """One calibration stage; progress is counted in tokens, never in time."""

    name: str = Field(min_length=1, description="statistics, layerwise, end-to-end")
    tokens: int = Field(default=0, ge=0, description="tokens seen by this stage")
    loss: tuple[tuple[int, Number], ...] = Field(default=(), description="(tokens seen, loss)")
    loss_name: str = Field("loss", description="what the loss is, with its unit")


class Calibration(Part):
    """What the conversion learned from."""

    stages: tuple[Stage, ...] = ()
    data: str = Field(default="", description="`self`, or the name of the data; never a path")
    note: str = Field(
        default="", description="for example: no data was given, the model's own samples"
    )


class Gate(Part):
    """One limit of the plan and what was measured."""

    name: str = Field(min_length=1, description="the plan's key, for example max_ppl_increase")
    verdict: Verdict
    limit: Number | None = None
    value: Number | None = None
    relation: Literal["<=", ">=", "=="] = Field(default="<=", description="value relation limit")
    reason: str = Field(default="", description="why it failed or did not run")


class Provenance(Part):
    """From what, with what. Hashes are `sha256:...` over contents, never over paths or dates."""

    weights: dict[str, str] = Field(default_factory=dict, description="hash by tensor file")
    plan: str = ""
    data: dict[str, str] = Field(default_factory=dict, description="hash by sample set")
    seeds: dict[str, int] = Field(default_factory=dict)
    versions: dict[str, str] = Field(
        default_factory=dict, description="python, torch, transformers, reattend, ..."
    )
