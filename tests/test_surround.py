"""What an owner does besides its block: what can be cut out of the graph, and what is refused."""

from __future__ import annotations

from typing import Any

import around_models as models
import pytest
import torch

from reattend.capture import Capture, capture
from reattend.frame import call_number, dropouts, frame
from reattend.locate import Place, locate
from reattend.passes.find.sites import Found, find
from reattend.passes.normalize import normalize
from reattend.surround import filled

pytestmark = pytest.mark.filterwarnings("ignore:The tensor attribute")


def places(model: Any, inputs: dict[str, Any]) -> tuple[Capture, list[Found], list[Place]]:
    captured = capture(model, inputs)
    drops = dropouts(captured.gm)
    normalize(captured.gm)

    def inputs_at(length: int | None, padded: bool) -> Any:
        return captured.placeholders(captured.probe(length, padded))

    seen = find(captured.gm, captured.placeholders(), inputs_at)
    found = [f for f in seen if isinstance(f, Found)]
    located = locate(captured, found, drops)
    return captured, found, [located[id(f)] for f in found]


@pytest.mark.parametrize(
    ("owner", "words"),
    [
        (models.Leaking, "blocks.0 hands tanh on by another way than its result"),
        (models.Reaching, "blocks.0 reads mul_2, which is no argument of its call"),
        (models.KeysToo, "blocks.0 uses queries, keys or values outside of its attention"),
        (models.UnderView, "blocks.0 changes a tensor in place that is read elsewhere"),
        (models.Wider, "blocks.0 changes the dtype of to"),
        (models.TwoCores, "blocks.0 holds a second attention core beside this one"),
    ],
)
def test_what_cannot_be_cut_is_named(owner: type[models.Attention], words: str) -> None:
    _, _, located = places(models.tower(owner), models.example())
    assert located[0].binding is None
    assert located[0].reason == words


def test_programs_and_their_weights() -> None:
    model = models.tower(models.Parallel)
    _, _, located = places(model, models.example())
    binding, surrounding = located[1].binding, located[1].surrounding
    assert binding is not None and surrounding is not None
    assert surrounding.config.dropout
    assert binding.hidden == ("before.", "hidden")
    assert binding.mask == ("mask",)
    assert binding.output == {"tuple": [{"path": ["after.", 0]}, None]}
    assert sorted(surrounding.weights["before.hidden"].values()) == [
        "blocks.1.norm.bias", "blocks.1.norm.weight",
    ]  # fmt: skip
    feeds = [f.path for f in surrounding.config.after[0].feeds]
    assert feeds[:2] == [("mixed.",), ("before.", "hidden")]  # the normed states come from before
    assert ("x",) in feeds
    around = filled(surrounding, dict(model.named_parameters()).__getitem__)
    assert around.before["hidden"].w0 is model.blocks[1].norm.weight
    x = torch.randn(3, 5, models.WIDTH)
    made = around.prepare({"x": x})["before."]["hidden"]
    torch.testing.assert_close(made, model.blocks[1].norm(x), rtol=0, atol=0)


def test_a_result_that_only_repeats_an_argument_is_passed_on() -> None:
    class Passing(models.Attention):
        def forward(self, x: Any, residual: Any, mask: Any, *_: Any) -> Any:
            return self.attend(self.norm(x), mask), residual

    _, _, located = places(models.tower(Passing), models.example())
    assert located[0].binding is not None
    assert located[0].binding.output == {"tuple": ["y", {"path": ["residual"]}]}


def test_a_frame_is_one_call_of_a_module() -> None:
    class Twice(models.Tower):
        def forward(self, ids: Any, attention_mask: Any) -> Any:
            x = self.embed(ids)
            for _ in range(2):
                x = self.blocks[0](x, x, None)[0]
            return x

    torch.manual_seed(0)
    captured, found, located = places(Twice(models.NormAfter).eval(), models.example())
    numbers = [call_number(f.region.core, "blocks.0") for f in found]
    assert numbers == [0, 1]
    first, second = (frame(captured.gm, f.region.core, "blocks.0") for f in found)
    assert second.entries[-1] in first.exits
    assert not set(first.exits) & set(second.exits)
    assert [p.number for p in located] == [0, 1]
    assert located[0].binding == located[1].binding
    with pytest.raises(Exception, match="does not show"):
        frame(captured.gm, found[0].region.core, "blocks.1")
