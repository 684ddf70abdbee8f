"""Which argument is the mask is told by what it hides."""

from __future__ import annotations

import torch

from reattend.install.masking import match_hiding, match_wider, within


def test_a_mask_that_says_what_is_hidden() -> None:
    seen = torch.ones(2, 1, 5, 5, dtype=torch.bool).tril()
    arguments = {"seen": seen[:, :, :4], "hidden": ~seen[:1], "numbers": seen.float()}
    assert match_hiding(arguments, seen) == ("hidden",)
    assert match_hiding(arguments, torch.where(seen, 0.5, -1e38)) == ("hidden",)
    assert match_hiding({"seen": seen}, seen) is None
    assert match_hiding({"hidden": ~torch.ones_like(seen)}, torch.ones_like(seen)) is None


def test_a_mask_that_hides_less_than_the_block() -> None:
    causal = torch.ones(6, 6, dtype=torch.bool).tril()
    near = causal & ~torch.ones(6, 6, dtype=torch.bool).tril(-3)
    valid = torch.ones(2, 1, 1, 6, dtype=torch.bool)
    valid[0, ..., :2] = False
    arguments = {"valid": valid, "mask": torch.where(valid & causal, 0.0, -3e38)}
    assert match_wider(arguments, valid & near, 3) == ("valid",)
    assert match_wider({"mask": arguments["mask"]}, valid & near, 3) == ("mask",)
    assert match_wider({"mask": arguments["mask"]}, valid & near, 4) is None
    assert match_wider({"mask": arguments["mask"] + 1.0}, valid & near, 3) is None
    assert match_wider(arguments, valid & causal, 0) == ("valid",)
    assert torch.equal(within(valid, 2, 3), (valid & near)[:, :, -2:])
