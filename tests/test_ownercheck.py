"""The proof of an owner as a whole must catch any mistake in its programs or its binding."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import around_models as models
import pytest
from test_surround import places

from reattend.install.binding import Binding
from reattend.install.pieces import AroundConfig, Piece
from reattend.locate import Place
from reattend.ownercheck import Watched, owner_check
from reattend.passes.find.sites import Found

Change = Callable[[Piece], Piece]
ALL = (
    models.ResidualInside, models.NormAfter, models.NormBefore, models.Parallel,
    models.ValidityOnly, models.MaskInside, models.AnglesInside, models.Windows,
)  # fmt: skip


def first(owner: type[models.Attention]) -> tuple[Watched, Found, Place]:
    inputs = models.example(64 if owner is models.Windows else 17)
    captured, found, located = places(models.tower(owner), inputs)
    return Watched(captured, {located[0].path}), found[0], located[0]


def changed(place: Place, **pieces: Any) -> Place:
    """The same place with other programs."""
    assert place.binding is not None and place.surrounding is not None
    config = place.surrounding.config.model_copy(update=pieces)
    return with_config(place, config)


def with_config(place: Place, config: AroundConfig) -> Place:
    assert place.binding is not None and place.surrounding is not None
    return replace(
        place,
        binding=place.binding.model_copy(update={"around": config}),
        surrounding=replace(place.surrounding, config=config),
    )


def rebound(place: Place, **fields: Any) -> Place:
    assert isinstance(place.binding, Binding)
    return replace(place, binding=place.binding.model_copy(update=fields))


@pytest.mark.parametrize("owner", ALL, ids=lambda o: o.__name__)
def test_what_was_cut_rightly_passes(owner: type[models.Attention]) -> None:
    assert owner_check(*first(owner)) == ""


def edited(piece: Piece, call: str, change: Callable[[Any], Any]) -> Piece:
    """The piece with the first step of that operator changed."""
    steps, done = [], False
    for step in piece.program.steps:
        if not done and step.call.startswith(call):
            step, done = change(step), True
        steps.append(step)
    assert done
    program = piece.program.model_copy(update={"steps": tuple(steps)})
    return piece.model_copy(update={"program": program})


def test_another_constant_is_caught() -> None:
    watched, found, place = first(models.NormBefore)
    assert place.surrounding is not None
    before = place.surrounding.config.before["hidden"]

    def eps(step: Any) -> Any:
        return step.model_copy(update={"args": (*step.args[:4], 1.1e-5, *step.args[5:])})

    wrong = changed(place, before={"hidden": edited(before, "aten.layer_norm", eps)})
    assert "differs by" in owner_check(watched, found, wrong)


def test_a_wrong_sign_and_a_lost_residual_are_caught() -> None:
    watched, found, place = first(models.ResidualInside)
    assert place.surrounding is not None
    after = place.surrounding.config.after[0]

    def minus(step: Any) -> Any:
        return step.model_copy(update={"call": "aten.sub.Tensor"})

    def once(step: Any) -> Any:
        return step.model_copy(update={"args": (step.args[0], 0.0)})

    for change in (minus, once):
        wrong = changed(place, after=(edited(after, "aten.add", change),))
        assert "differs by" in owner_check(watched, found, wrong)


def test_another_argument_is_caught() -> None:
    watched, found, place = first(models.ResidualInside)
    assert "differs by" in owner_check(watched, found, rebound(place, hidden=("residual",)))
    assert place.surrounding is not None
    after = place.surrounding.config.after[0]
    swapped = after.model_copy(update={"feeds": after.feeds[::-1]})
    feeds = [f.model_copy(update={"path": ("x",)}) for f in after.feeds[1:]]
    other = after.model_copy(update={"feeds": (after.feeds[0], *feeds)})
    assert owner_check(watched, found, changed(place, after=(swapped,))) == ""  # a sum
    assert "differs by" in owner_check(watched, found, changed(place, after=(other,)))


def test_a_mask_that_is_not_read_is_caught() -> None:
    for owner in (models.ResidualInside, models.ValidityOnly, models.MaskInside):
        watched, found, place = first(owner)
        assert "differs by" in owner_check(watched, found, rebound(place, mask=None))


def test_tables_of_another_angle_are_caught() -> None:
    watched, found, place = first(models.AnglesInside)
    assert place.surrounding is not None and place.binding is not None
    before = place.surrounding.config.before
    wrong = changed(place, before={**before, "cos": before["sin"]})
    assert "differs by" in owner_check(watched, found, wrong)
