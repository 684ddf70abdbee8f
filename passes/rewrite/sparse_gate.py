"""`finder: gate`: trains the gates of a block by the attention that the block itself pays.

SeerAttention, Gao et al., arXiv 2410.13276: all weights are frozen but the gates'; the target of a
query is its largest probability in every block of keys, over the heads that share them, normalised;
the loss is KL(target || softmax of the gate). AdamW at 1e-3 with warm-up and a cosine, no decay.
Inputs are rows of the original model's own stream, so layers are trained apart, one after another.
Attention is formed for one KV head and some queries at a time. What differs: a query's own block
takes no part (it is always read), the warm-up is a twentieth of the steps, and the last eighth of
the rows is not trained on but measured.

Nothing here depends on chance other than a generator of its own: equal rows give equal gates.

Layout letters: as in `mixers/selecting/gate.py`; n tokens of a text, R queries at a time.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from reattend.calibrate.schedule import factor
from reattend.errors import DataError, TrainingError
from reattend.mixers.base import Context
from reattend.mixers.scores import own_pattern, per_head
from reattend.mixers.selecting.base import Asked, reach
from reattend.mixers.selecting.gate import GateMethod, pooled
from reattend.mixers.sparse import SparseAttention
from reattend.mixers.sparse_config import SparseConfig
from reattend.parts import query_heads
from reattend.patterns.selectors import Gate
from reattend.statistics import TEXT_ROWS

LEARNING_RATE = 1e-3
#: Texts per step, and queries whose attention is formed at a time.
BATCH, QUERIES = 4, 256


@dataclass(frozen=True)
class Lesson:
    """The queries of a text that have a choice, pooled keys [1, G, Q, 3 d], what to learn, and
    which blocks are ranked.
    """

    q_1HNd: Tensor
    pooled_1GQd: Tensor
    target_GNQ: Tensor
    ranked_NQ: Tensor


def taught(mixer: SparseAttention, texts: list[Tensor] | None, steps: int) -> dict[str, Any]:
    """Start the gates of a mixer and train them; what the report says of it.

    Args:
        mixer: its gates are changed.
        texts: rows of the block's input [n, D]; None leaves the gates at their start.
        steps: of training.

    Raises:
        DataError: the rows are too short to have blocks to choose from.
        TrainingError: the loss is not a number.
    """
    told: list[str] = []
    count = 0
    for number, c in enumerate(mixer.config.classes):
        if not isinstance(c.pattern.select, Gate):
            continue
        gate = mixer.selecting[str(number)]
        assert isinstance(gate, GateMethod)
        gate.start(mixer.config.core)
        count += sum(p.numel() for p in gate.parameters())
        if texts:
            lessons = [_lesson(mixer, x, c.kv_heads, gate.block) for x in texts]
            told.append(_train(gate, [x for x in lessons if x is not None], steps))
    return {"gate_parameters": count} | ({"gate_kl": "; ".join(told)} if told else {})


@torch.no_grad()
def _lesson(
    mixer: SparseAttention, x_ND: Tensor, kv_heads: tuple[int, ...], block: int
) -> Lesson | None:
    """None: no query of the text has two blocks to choose from."""
    like, core = mixer.q_proj.weight, mixer.config.core
    # the blocks before a query's own that it can reach at all
    i, whole = torch.arange(len(x_ND), device=like.device)[:, None], len(x_ND) // block
    earlier = torch.arange(whole, device=like.device) < i // block
    ranked = earlier & reach(core, i, block, whole, len(x_ND))
    rows = (ranked.sum(-1) > 1).nonzero()[:, 0]
    if len(rows) == 0:
        return None
    x = x_ND[None].to(like)
    q, new = mixer.project(x, x, Context(), None)
    heads = query_heads(core, kv_heads)
    wide = torch.float64 if like.dtype == torch.float64 else torch.float32
    q_HNd, k_GNd = q[0, heads].to(wide), new.keys[0, list(kv_heads)].to(wide)
    sinks = per_head(mixer.sinks)
    sinks = None if sinks is None else sinks[heads].to(wide)
    group = core.heads // core.kv_heads
    one = core.model_copy(update={"heads": group, "kv_heads": 1})
    target = []
    for g in range(len(kv_heads)):
        own = slice(g * group, (g + 1) * group)
        asked = Asked(q_HNd[None, own], k_GNd[None, g : g + 1], one)
        target.append(_target(asked, ranked, block, None if sinks is None else sinks[own]))
    keys = pooled(k_GNd[None, :, : whole * block].unflatten(2, (whole, block)))
    return Lesson(q_HNd[None, :, rows], keys, torch.stack(target)[:, rows], ranked[rows])


def _target(asked: Asked, ranked_NQ: Tensor, block: int, sinks_H11: Tensor | None) -> Tensor:
    """Shares [n, Q] of the ranked blocks: the largest probability in each, over keys and heads."""
    i, j = asked.positions()
    m = j.shape[1]
    blocks, found = ranked_NQ.shape[1], []
    for begin in range(0, m, QUERIES):
        rows = slice(begin, min(begin + QUERIES, m))
        scores = asked.scores(asked.q_BHNd[:, :, rows], asked.k_BGMd)[0]
        scores = scores.masked_fill(~own_pattern(asked.core, i[rows], j), float("-inf"))
        if sinks_H11 is not None:
            scores = torch.cat([scores, sinks_H11.expand(-1, scores.shape[1], 1)], -1)
        p = scores.softmax(-1)[..., : blocks * block].amax(0)
        best = p.unflatten(-1, (blocks, block)).amax(-1)
        best = best * ranked_NQ[rows]
        found.append(best / best.sum(-1, keepdim=True).clamp_min(torch.finfo(best.dtype).tiny))
    return torch.cat(found)


def _train(gate: GateMethod, lessons: list[Lesson], steps: int) -> str:
    """KL before and after, in words."""
    if not lessons:
        raise DataError(
            "the calibration rows are too short to train a gate on",
            where="finder: gate",
            why=f"rows of more than two blocks of {gate.block} tokens have blocks to choose from",
            next_step="raise calibrate.seq_len, or give the gate smaller blocks",
        )
    measured = lessons[-max(1, len(lessons) // 8) :]
    trained = lessons[: len(lessons) - len(measured)] or lessons
    student = copy.deepcopy(gate).to(trained[0].q_1HNd.dtype).requires_grad_()
    before = _mean(student, measured)
    optimizer = torch.optim.AdamW(student.parameters(), lr=LEARNING_RATE, weight_decay=0.0)
    generator = torch.Generator().manual_seed(0)
    order: list[int] = []
    with torch.enable_grad():
        for step in range(steps):
            while len(order) < BATCH:
                order += torch.randperm(len(trained), generator=generator).tolist()
            batch, order = order[:BATCH], order[BATCH:]
            for options in optimizer.param_groups:
                options["lr"] = LEARNING_RATE * factor((step + 0.5) / steps)
            optimizer.zero_grad()
            for number in batch:
                loss = _loss(student, trained[number]) / BATCH
                if not bool(torch.isfinite(loss)):
                    raise TrainingError(
                        "training a gate diverged: the loss is not a number",
                        where=f"finder: gate, step {step}",
                        next_step="convert in float32, or lower `steps`",
                    )
                loss.backward()
            optimizer.step()
    gate.load_state_dict(student.state_dict())
    where = "rows not trained on" if len(trained) < len(lessons) else "row trained on"
    return f"{before:.4f} -> {_mean(student, measured):.4f} nats on {len(measured)} {where}"


@torch.no_grad()
def _mean(gate: GateMethod, lessons: list[Lesson]) -> float:
    return float(torch.stack([_loss(gate, x) for x in lessons]).mean())


def _loss(gate: GateMethod, lesson: Lesson) -> Tensor:
    """KL(target || gate), mean over queries and KV heads."""
    scores = gate.scores(lesson.q_1HNd, lesson.pooled_1GQd @ gate.key_Gdw)[0]
    log = scores.masked_fill(~lesson.ranked_NQ, float("-inf")).log_softmax(-1)
    target = lesson.target_GNQ
    # what is not ranked has log -inf and target 0, and must not reach the gradient
    log = log.masked_fill(~lesson.ranked_NQ, 0.0)
    apart = torch.xlogy(target, target) - target * log
    return apart.sum(-1).mean()


def effort(config: SparseConfig, steps: int, length: int) -> tuple[float, float]:
    """Floating-point operations and bytes of `taught`, on as many texts as statistics hold."""
    core, work, held = config.core, 0.0, 0.0
    group = core.heads // core.kv_heads
    for c in config.classes:
        if isinstance(c.pattern.select, Gate):
            blocks, heads = length / c.pattern.select.block, len(c.kv_heads)
            maps = heads * c.pattern.select.gate_dim * (group * core.qk_head_dim + blocks)
            # a probability is about as much work as a product over 8 numbers
            attention = 2.0 * heads * group * length**2 * (core.qk_head_dim + 8)
            work += TEXT_ROWS * attention + 6.0 * steps * BATCH * length * maps
            held += 4.0 * TEXT_ROWS * length * heads * (group * core.qk_head_dim + blocks)
    return work, held
