"""What `examples/blanks.py` asks is what its prompts tell; its passes fill in every blank once."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "examples"))
blanks: Any = __import__("blanks")
sparse_diffusion: Any = __import__("sparse_diffusion")
sys.path.pop(0)


@pytest.fixture(scope="module")
def text() -> Any:
    return blanks.Texts(ROOT / "examples/models/pycode-gqa/heldout.txt")


@pytest.fixture(scope="module")
def forms(text: Any) -> Any:
    return text.forms(24, torch.Generator().manual_seed(3))


def test_the_far_answer_is_the_value_behind_the_same_key(forms: Any) -> None:
    far = forms.distance_BN > 0
    row, place = far.nonzero().unbind(1)
    told = place - forms.distance_BN[far]
    ids, shown = forms.ids_BN, forms.shown
    assert torch.equal(ids[row, told], ids[row, place])
    assert torch.equal(ids[row, told - 1], ids[row, place - 1])
    is_key = (ids >= blanks.CHARACTERS) & (ids < blanks.CHARACTERS + blanks.KEYS)
    assert bool(is_key[row, place - 1].all()), "the token before a value is its key"
    assert torch.equal(is_key.sum(1), torch.full((24,), sum(blanks.RECORDS)))
    assert torch.equal(shown[row, told], ids[row, told]) and bool((told < blanks.PROMPT).all())
    assert bool((shown[row, place] == blanks.MASK).all())
    assert torch.equal(shown[:, : blanks.PROMPT], ids[:, : blanks.PROMPT])
    apart = forms.distance_BN[far]
    for inside in (apart <= 64, (apart > 64) & (apart <= 128), apart > 128):
        assert inside.float().mean() > 0.1


def test_keys_and_the_prompt_s_values_are_shown_in_training(text: Any) -> None:
    made = text.draw(32, torch.Generator().manual_seed(1))
    hidden = made.blank_BN
    assert bool((made.distance_BN[hidden & (made.ids_BN >= blanks.CHARACTERS)] > 0).all())
    maskable = (made.ids_BN < blanks.CHARACTERS) | (made.distance_BN > 0)
    share = hidden.sum(1) / maskable.sum(1)
    assert float((share - made.share_B).abs().max()) < 0.15
    assert float(share.min()) < 0.15 and float(share.max()) > 0.85


def test_every_blank_is_filled_once_and_by_what_the_model_says(forms: Any) -> None:
    passes, seen = 7, []
    due = sparse_diffusion.schedule(forms.blank_BN, passes, torch.Generator().manual_seed(0))
    assert torch.equal(due >= 0, forms.blank_BN)
    for row in due:
        counts = torch.bincount(row[row >= 0], minlength=passes)
        assert int(counts.max() - counts.min()) <= 1 and len(counts) == passes

    def knows(ids: torch.Tensor) -> torch.Tensor:
        """The text's own tokens, as sure as nine to one."""
        seen.append(ids == blanks.MASK)
        other = torch.full((*ids.shape, blanks.MASK), 0.1 / (blanks.MASK - 1))
        return other.scatter(-1, forms.ids_BN[..., None], 0.9).log()

    ids, nats = sparse_diffusion.filled(knows, forms, due)
    assert torch.equal(ids, forms.ids_BN)
    assert len(seen) == passes
    for number, masked in enumerate(seen):
        assert torch.equal(masked, due >= number)
    right = torch.where(forms.blank_BN, -torch.tensor(0.9).log(), torch.zeros(()))
    assert torch.allclose(nats, right, atol=1e-5)


def test_the_first_head_begins_as_one_that_looks_at_the_token_before() -> None:
    torch.manual_seed(0)
    first = blanks.Denoiser().layers[0]
    width = blanks.WIDTH // blanks.HEADS
    q, k = (first.turned(x.bias[:width].expand(1, 1, 12, width))[0, 0] for x in (first.q, first.k))
    assert (q @ k.T).argmax(1)[1:].tolist() == list(range(11))


def test_the_shipped_model_finds_what_is_far(text: Any, forms: Any) -> None:
    model, seconds = blanks.trained(text, 0, ROOT / "examples/models/blanks")
    with torch.no_grad():
        right = model(forms.shown).argmax(-1) == forms.ids_BN
    far = forms.distance_BN > 0
    assert float(right[far].float().mean()) > 0.9 and seconds > 0
    assert float(right[forms.blank_BN & ~far].float().mean()) > 0.35


def test_observed_blocks_keep_what_a_window_of_as_many_pairs_loses() -> None:
    """In the committed table: far values, and that half and a quarter of the pairs were read."""
    file = ROOT / "examples/results/sparse_diffusion.json"
    rows = {row["name"]: row for row in json.loads(file.read_text("utf-8"))["rows"]}
    for share in (50, 25):
        sparsed, window = rows[f"sparsed {share} %"], rows[f"window {share} %"]
        for row in (sparsed, window):
            assert row["read"] == pytest.approx(share / 100, abs=0.01)
        assert min(sparsed["far"][1:]) > max(window["far"][2], 0.2)
        dense = sparse_diffusion.DENSE / sparse_diffusion.PASSES
        assert sparsed["read_in_all"] == pytest.approx(
            dense + (1 - dense) * sparsed["read"], abs=0.01
        )
