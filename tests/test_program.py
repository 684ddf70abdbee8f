"""A piece of a graph as data: cut, stored as JSON, rebuilt, equal; and what it refuses."""

from __future__ import annotations

import json

import pytest
import torch
from torch import Tensor, fx, nn

from reattend.capture import capture
from reattend.errors import ModelError
from reattend.passes.evaluate import Evaluator, attribute
from reattend.passes.normalize import normalize
from reattend.program import Program, ProgramModule, Step, Uncuttable, cut


class Block(nn.Module):
    """Norm, projection, positions made inside, a cast, a table of integers, a residual."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.lin = nn.LayerNorm(8), nn.Linear(8, 8)
        self.register_buffer("order", torch.tensor([3, 1, 2, 0, 4, 5, 7, 6]))

    def forward(self, x: Tensor, r: Tensor) -> Tensor:
        b, n, _ = x.shape
        at = torch.arange(n, device=x.device, dtype=x.dtype)
        y = self.lin(self.norm(x))[..., self.order] * torch.sigmoid(at)[None, :, None]
        y = y.masked_fill(y > 3.0, float("-inf"))
        y = torch.softmax(y, -1).view(b, n, 2, 4).transpose(1, 2).reshape(b, n, 8)
        return y + r


def graph_of(module: nn.Module) -> tuple[fx.GraphModule, list[fx.Node], fx.Node]:
    inputs = {"x": torch.randn(2, 5, 8), "r": torch.randn(2, 5, 8)}
    gm = capture(module, inputs).gm
    normalize(gm)
    nodes = list(gm.graph.nodes)
    out = next(n for n in nodes if n.op == "output").args[0][0]  # type: ignore[index, union-attr]
    assert isinstance(out, fx.Node)
    return gm, [n for n in nodes if n.op == "placeholder"], out


def rebuilt(gm: fx.GraphModule, program: Program, sources: dict[str, str]) -> ProgramModule:
    again = Program.model_validate(json.loads(program.model_dump_json()))
    assert again == program
    module = ProgramModule(again)
    module.load_state_dict({name: attribute(gm, at) for name, at in sources.items()})
    return module


def test_it_computes_the_same_at_any_size() -> None:
    block = Block()
    gm, (x, r), out = graph_of(block)
    program, sources = cut(gm, out, {x: "x", r: "r"})
    assert sorted(sources.values()) == [
        "lin.bias",
        "lin.weight",
        "norm.bias",
        "norm.weight",
        "order",
    ]
    module = rebuilt(gm, program, sources)
    assert [n for n, _ in module.named_buffers()] and len(list(module.parameters())) == 4
    for shape in ((2, 5, 8), (3, 11, 8), (1, 1, 8)):
        a, b = torch.randn(shape), torch.randn(shape)
        torch.testing.assert_close(module(a, b), block(a, b), rtol=0, atol=0)
    a, b = torch.randn(2, 6, 8).double(), torch.randn(2, 6, 8).double()
    gap = module.double()(a, b) - block.double()(a, b)
    assert float(gap.detach().abs().max()) < 1e-14  # no float32 hidden inside


def test_gradients_pass_and_it_exports_again() -> None:
    gm, (x, r), out = graph_of(Block())
    module = rebuilt(gm, *cut(gm, out, {x: "x", r: "r"}))
    module(torch.randn(2, 5, 8), torch.randn(2, 5, 8)).sum().backward()
    assert all(p.grad is not None for p in module.parameters())

    class Owner(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.after = module

        def forward(self, x: Tensor, r: Tensor) -> Tensor:
            return self.after(x, r)

    gm, (x, r), out = graph_of(Owner())
    twice = rebuilt(gm, *cut(gm, out, {x: "x", r: "r"}))
    a, b = torch.randn(3, 7, 8), torch.randn(3, 7, 8)
    torch.testing.assert_close(twice(a, b), module(a, b), rtol=0, atol=0)


def test_what_was_not_given_is_named() -> None:
    gm, (x, r), out = graph_of(Block())
    with pytest.raises(Uncuttable, match="input 'r'") as caught:
        cut(gm, out, {x: "x"})
    assert caught.value.node is r


def test_only_named_operators_are_run() -> None:
    for call in ("os.system", "aten.nonsense.default", "prims.add", "aten.add", "builtins.eval"):
        step = Step(name="s0", call=call, args=({"value": "x"},))
        with pytest.raises(ModelError, match="operation"):
            ProgramModule(Program(inputs=("x",), steps=(step,), output="s0"))


def test_integers_divided_are_as_wide_as_the_input() -> None:
    """Quotients are float32 for torch; what is computed of them in a float64 run is not."""

    class Shares(nn.Module):
        def forward(self, x: Tensor, r: Tensor) -> Tensor:
            at = torch.arange(1, x.shape[1] + 1)
            return x * (at / (at + 2)).log()[:, None] + r

    gm, (x, r), out = graph_of(Shares())
    program, sources = cut(gm, out, {x: "x", r: "r"})
    module = rebuilt(gm, program, sources)
    a, b = torch.randn(2, 6, 8), torch.randn(2, 6, 8)
    torch.testing.assert_close(module(a, b), Shares()(a, b), rtol=0, atol=0)
    wide = {x: a.double(), r: b.double()}
    wanted = Evaluator(gm, promote=torch.float64).run([out], wide)[0]
    torch.testing.assert_close(module.double()(a.double(), b.double()), wanted, rtol=0, atol=1e-15)
