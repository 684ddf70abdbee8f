"""Which components stay rotated, and the maps that follow."""

from __future__ import annotations

import itertools

import pytest
import torch
from mla_blocks import config, dense, moments

from reattend.passes.rewrite.mla_mixing import components
from reattend.passes.rewrite.mla_moments import key_moment
from reattend.passes.rewrite.mla_options import MlaOptions
from reattend.passes.rewrite.mla_phase import stand_in
from reattend.passes.rewrite.mla_select import mean_key, query_energy, select

CONFIG = config(4, 2, pairs=3, width=8)


@pytest.fixture(scope="module")
def found():
    torch.manual_seed(0)
    mixer = dense(CONFIG)
    return mixer, moments(mixer)


def chosen(found, rope, cfg=CONFIG, **options):
    mixer, statistics = found
    options = MlaOptions(kv_keep=0.5, **options)
    keys = key_moment(mixer, statistics, options.mixing == "balanced")
    return select(cfg, keys, statistics, stand_in(cfg, statistics, options.phase), options, rope)


SELECTIONS = [
    {"mixing": "real"},
    {"mixing": "complex"},
    {"mixing": "balanced", "phase": "one"},
    {"mixing": "balanced", "rope_select": "per-frequency"},
    {"mixing": "none", "rope_select": "per-head"},
]


@pytest.mark.parametrize("options", SELECTIONS, ids=lambda o: "-".join(o.values()))
@pytest.mark.parametrize("rope", [0, 12])
def test_rotated_and_unrotated_rows_rebuild_every_key(found, options, rope) -> None:
    """query_rope^T key_rope + nope_up key_nope = 1, so scores are unchanged if all rotate."""
    choice = chosen(found, rope, **options)
    assert choice.key_rope.shape == (rope, 16)
    whole = choice.query_rope.t() @ choice.key_rope + choice.nope_up @ choice.key_nope
    # The rotated part of the query is conj(decode), so its transpose is real decoding.
    assert torch.allclose(whole, torch.eye(16, dtype=torch.float64), atol=1e-10)


@pytest.mark.parametrize("options", SELECTIONS, ids=lambda o: "-".join(o.values()))
def test_rotated_rows_turn_as_keys_turn(found, options) -> None:
    """key_rope T k = T' key_rope k for the rotation T' of the slots."""
    choice = chosen(found, 12, **options)
    angle = torch.tensor([0.3, 1.1, 2.5], dtype=torch.float64)
    turn = torch.eye(8, dtype=torch.float64)
    i = torch.arange(3)
    turn[i, i] = turn[3 + i, 3 + i] = angle.cos()
    turn[3 + i, i], turn[i, 3 + i] = angle.sin(), -angle.sin()
    slot = angle[list(choice.columns)]
    slots = torch.cat(
        [
            torch.cat([torch.diag(slot.cos()), -torch.diag(slot.sin())], 1),
            torch.cat([torch.diag(slot.sin()), torch.diag(slot.cos())], 1),
        ]
    )
    left = choice.key_rope @ torch.block_diag(turn, turn)
    assert torch.allclose(left, slots @ choice.key_rope, atol=1e-10)
    query = choice.query_rope @ torch.block_diag(turn, turn)
    assert torch.allclose(query, slots @ choice.query_rope, atol=1e-10)


@pytest.mark.parametrize("slots", [1, 2, 4])
def test_global_selection_loses_least_of_all_subsets(found, slots) -> None:
    mixer, statistics = found
    phase = stand_in(CONFIG, statistics, "mean")
    parts = components(
        CONFIG, key_moment(mixer, statistics, weighted=True), query_energy(CONFIG, statistics, 3),
        phase, "balanced",
    )  # fmt: skip
    best = max(itertools.combinations(parts, slots), key=lambda s: sum(c.lost for c in s))
    expected = sorted(c.frequency for c in best)
    assert list(chosen(found, 2 * slots).columns) == expected


def test_per_head_keeps_the_largest_products_of_lengths(found) -> None:
    _, statistics = found
    score = statistics.attention.query_norms.reshape(2, 2, 3).sum(1)
    score = score * statistics.attention.key_norms
    choice = chosen(found, 4, mixing="none", rope_select="per-head")
    for g in range(2):
        best = int(score[g].argmax())
        slot = [s for s in range(2) if float(choice.key_rope[s, 8 * g : 8 * g + 8].abs().sum())]
        assert [choice.columns[s] for s in slot] == [best]
        assert float(choice.key_rope[slot[0], 8 * g + best]) == 1.0


@pytest.mark.parametrize(("rope", "columns"), [(6, (0, 1, 2)), (12, (0, 0, 1, 1, 2, 2)), (2, (0,))])
def test_per_frequency_spreads_evenly(found, rope, columns) -> None:
    assert chosen(found, rope, rope_select="per-frequency").columns == columns


def test_mean_key_is_the_mean_of_the_last_dimensions() -> None:
    choice = mean_key(config(4, 2, pairs=4, width=8), 4)
    k = torch.randn(2, 8, dtype=torch.float64)
    expected = k[:, 4:].mean(0)
    assert torch.allclose(choice.key_rope @ k.flatten(), expected[[0, 2, 1, 3]])
    assert choice.columns == (0, 2)
    assert torch.equal(choice.key_nope @ k.flatten(), k[:, :4].flatten())
    q = torch.randn(8, dtype=torch.float64)
    assert torch.equal(choice.query_rope[:, 8:] @ q, q[[4, 6, 5, 7]])
