"""Recall probes: an oracle that looks back scores 1, one that cannot gains nothing."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from reattend.errors import DataError
from reattend.verify.recall import KEY, MARKER, PAIRS, probes, score

VOCAB = 700


@pytest.fixture(scope="module")
def rows() -> Tensor:
    return torch.randint(0, VOCAB, (6, 300), generator=torch.Generator().manual_seed(1))


def copying(ids_BN: Tensor, mask_BN: Tensor, context: int = 2) -> Tensor:
    """Predicts what followed the latest earlier occurrence of the last `context` tokens."""
    logits = torch.zeros(*ids_BN.shape, VOCAB)
    for row, ids in enumerate(ids_BN.tolist()):
        seen: dict[tuple[int, ...], int] = {}
        for at in range(context - 1, len(ids)):
            key = tuple(ids[at - context + 1 : at + 1])
            if key in seen:
                logits[row, at, ids[seen[key] + 1]] = 20.0
            seen[key] = at
    return logits


def forgetting(ids_BN: Tensor, mask_BN: Tensor) -> Tensor:
    """Knows the current token only."""
    table = torch.randn(VOCAB, VOCAB, generator=torch.Generator().manual_seed(2))
    return table[ids_BN]


@pytest.mark.parametrize("name", ["copy", "passkey", "multi_key"])
def test_oracles(rows: Tensor, name: str) -> None:
    probe = probes(rows)[name]
    found = score(probe, copying, batch_size=4)
    blind = score(probe, forgetting, batch_size=4)
    assert found.accuracy > 0.98  # the copy's second token has one token of context only
    assert found.gain > 6  # log(700) = 6.55
    assert blind.accuracy < 0.05
    assert blind.gain == pytest.approx(0, abs=1e-6)
    assert found.tokens == int(probe.target.sum())
    assert found.to_dict()["gain"] == found.gain


def test_multi_key_needs_the_whole_marker(rows: Tensor) -> None:
    """Markers begin alike, so following their beginning finds the latest pair, not the asked."""
    probe = probes(rows)["multi_key"]
    size = MARKER + KEY
    shared = probe.ids[0, -size : -size + MARKER // 2]
    starts = [
        at for at in range(300 - MARKER) if torch.equal(probe.ids[0, at : at + MARKER // 2], shared)
    ]
    assert len(starts) == PAIRS + 1
    assert len({tuple(probe.ids[0, at + MARKER : at + size].tolist()) for at in starts}) == PAIRS
    assert starts[-2] < 225


def test_source_is_far_back_and_control_lacks_it(rows: Tensor) -> None:
    built = probes(rows)
    copy, passkey = built["copy"], built["passkey"]
    assert torch.equal(copy.ids[:, -100:], copy.ids[:, :100])
    assert not torch.equal(copy.control[:, :100], copy.ids[:, :100])
    for probe in built.values():
        assert torch.equal(probe.ids[probe.target], probe.control[probe.target])
    key = passkey.ids[0, -KEY:]
    places = [at for at in range(292) if torch.equal(passkey.ids[0, at : at + KEY], key)]
    assert len(places) == 1
    assert places[0] + KEY <= 150
    assert not any(torch.equal(passkey.control[0, at : at + KEY], key) for at in range(292))


def test_seeded(rows: Tensor) -> None:
    first, again, other = (probes(rows, seed=s)["passkey"].ids for s in (0, 0, 1))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


def test_rows_too_small(rows: Tensor) -> None:
    with pytest.raises(DataError, match="seq_len=128"):
        probes(rows[:, :100])
    with pytest.raises(DataError, match="different tokens"):
        probes(rows % 10)
