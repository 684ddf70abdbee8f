"""The settings of a plan beside its rules: how to calibrate and what to verify."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Any, Literal

from pydantic import Field, field_validator, model_validator

from reattend.plan_text import Section

Stage = Literal["layerwise", "end-to-end"]
Share = Annotated[float, Field(gt=0, lt=1)]
Relation = Literal["q", "k", "v"]
Peer = Literal["transmla", "transmla-paper", "mha2mla", "x-ecomla", "care"]
GATES = ("max_ppl_increase", "min_top1", "min_recall", "max_kl")


class Calibrate(Section):
    """Which data is read and how the converted model is trained; the default trains nothing.

    Attributes:
        tokens: tokens to train on, over all stages; 0 collects statistics only.
        stages: `layerwise` (each mixer against its own teacher block), then `end-to-end`
            (logits and hidden states); used only where `tokens` is above 0.
        seq_len: tokens per training sequence.
        batch_size: sequences per optimiser step.
        lr: peak learning rate; None leaves it to each stage.
        data: text to read (`.txt`, `.jsonl`, a folder; relative to the current folder), or
            `self` for sequences sampled from the original. `convert(data=...)` wins over it.
        seed: of sampling and training; None takes the seed given to `convert`.
        statistics_tokens: tokens whose second moments are collected.
        loss: `distill`, the distance to the original, or `lm`, the next-token loss of the text
            (TransMLA's way; end-to-end only, because a block alone has no next token).
        lora_rank: train LoRA factors of this rank in place of full weights; None: full weights.
        relations: `layerwise` also compares how queries (`q`), keys (`k`) or values (`v`) of tokens
            relate to one another, as MiniLM does; for blocks that keep heads of their own.
        relation_weight: of their divergence, in nats per token, beside the relative squared error.
        relation_heads: into how many heads all numbers of a stream are cut for it; None: as many
            as leave the heads of both sides whole.
    """

    tokens: Annotated[int, Field(ge=0)] = 0
    stages: tuple[Stage, ...] = ("layerwise", "end-to-end")
    seq_len: Annotated[int, Field(ge=2)] = 256
    batch_size: Annotated[int, Field(ge=1)] = 8
    lr: Annotated[float, Field(gt=0)] | None = None
    data: str | None = None
    seed: int | None = None
    statistics_tokens: Annotated[int, Field(ge=1)] = 65536
    loss: Literal["distill", "lm"] = "distill"
    lora_rank: Annotated[int, Field(ge=1)] | None = None
    relations: tuple[Relation, ...] = ()
    relation_weight: Annotated[float, Field(gt=0)] = 0.1
    relation_heads: Annotated[int, Field(ge=1)] | None = None

    @model_validator(mode="before")
    @classmethod
    def _without_blocks(cls, given: Any) -> Any:
        if isinstance(given, dict) and given.get("loss") == "lm":
            return {"stages": ("end-to-end",), **given}
        return given

    @field_validator("stages", mode="before")
    @classmethod
    def _stages(cls, value: Any) -> Any:
        if (
            isinstance(value, Sequence)
            and not isinstance(value, str)
            and len(set(value)) < len(value)
        ):
            raise ValueError("a stage is listed twice")
        return value

    def contradiction(self) -> str:
        """See `Section`."""
        if self.loss == "lm" and "layerwise" in self.stages:
            return "loss: lm has no layerwise stage; write stages: [end-to-end]"
        if self.relations and "layerwise" not in self.stages:
            return "relations are compared block by block: list layerwise among the stages"
        if len(set(self.relations)) < len(self.relations):
            return "a stream is listed twice under relations"
        return ""

    @property
    def trains(self) -> bool:
        """Whether anything is trained at all."""
        return self.tokens > 0 and bool(self.stages)


class Verify(Section):
    """Gates: a converted model that misses one is not published. None switches a gate off.

    Attributes:
        max_ppl_increase: largest growth of perplexity, as a share (0.05 is 5 %).
        min_top1: smallest share of positions whose most likely token is the original's, 0 to 1.
        min_recall: smallest share of the original's recall score that is kept, 0 to 1.
        max_kl: largest mean KL(original || converted), nats per token.
        yardsticks: measure beside it what the original does at about the same cache bytes (no
            gate).
        peers: measure beside it what these presets make of the same sites at the same cache, from
            the same statistics and untrained (no gate).
        peer_keep: the peers at these shares of those sites' caches instead: a table of presets.
        peer_pairs: and with these shares of the rotary pairs, everything else kept.
        data: text to measure on, as `calibrate.data`; None: rows held back from the data given.
        rows: how many rows of that text, evenly spaced, of `calibrate.seq_len` tokens.
        recall_tokens: tokens of the rows of that text that recall is measured on, as many tokens in
            all; None: the same rows.
    """

    max_ppl_increase: Annotated[float, Field(ge=0)] | None = None
    min_top1: Annotated[float, Field(ge=0, le=1)] | None = None
    min_recall: Annotated[float, Field(ge=0, le=1)] | None = None
    max_kl: Annotated[float, Field(ge=0)] | None = None
    yardsticks: bool = False
    peers: tuple[Peer, ...] = ()
    peer_keep: tuple[Share, ...] = ()
    peer_pairs: tuple[Share, ...] = ()
    data: str | None = None
    rows: Annotated[int, Field(ge=1)] = 16
    recall_tokens: Annotated[int, Field(ge=2)] | None = None

    @property
    def gates(self) -> dict[str, float]:
        """The gates that are set, by name."""
        limits = self.model_dump(include=set(GATES))
        return {name: value for name, value in limits.items() if value is not None}

    @property
    def peer_rows(self) -> int:
        """How many models `peers` asks for."""
        return len(self.peers) * max(1, len(self.peer_keep) + len(self.peer_pairs))

    @property
    def sized(self) -> bool:
        """Whether peers are asked for at sizes of their own."""
        return bool(self.peer_keep or self.peer_pairs)

    def contradiction(self) -> str:
        """See `Section`."""
        if not self.peers and (self.peer_keep or self.peer_pairs):
            return "peer_keep and peer_pairs are sizes of peers: name some under peers"
        if self.data is None and (self.recall_tokens or "rows" in self.model_fields_set):
            return "rows and recall_tokens are of the text to measure on: name it under data"
        return ""
