"""What the finder has no eye for is still listed."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from reattend import find_attention
from reattend.overlooked import UNREAD


class Halved(nn.Module):
    """Probabilities are halved before they average values, which no known form does."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv, self.out = nn.Linear(16, 24), nn.Linear(8, 16)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(x).unflatten(-1, (3, 2, 4)).permute(2, 0, 3, 1, 4)
        probs = torch.softmax(q @ k.transpose(-1, -2), -1) * 0.5
        return self.out((probs @ v).transpose(1, 2).flatten(2))


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList([Halved(), Halved()])
        self.router = nn.Linear(16, 3)

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = x + layer(x)
        return x * torch.softmax(self.router(x), -1)[..., :1]


def test_a_core_in_no_known_form_is_listed_and_a_router_is_not() -> None:
    found = find_attention(Model().eval(), {"x": torch.randn(2, 7, 16)})
    assert not found.sites
    assert [r.path for r in found.refused] == ["layers.0", "layers.1"]
    assert all("not known as attention" in r.reason for r in found.refused)


class Dropped(nn.Module):
    """Two kinds of tokens; what the second learns is dropped behind the last layer."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv, self.out = nn.Linear(16, 24), nn.Linear(8, 16)

    def forward(self, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        made = []
        for t in (x, y):
            q, k, v = self.qkv(t).unflatten(-1, (3, 2, 4)).permute(2, 0, 3, 1, 4)
            made.append(self.out((torch.softmax(q @ k.mT, -1) @ v).transpose(1, 2).flatten(2)))
        return made[0], made[1]


class Half(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = Dropped()

    def forward(self, x: Tensor) -> Tensor:
        made: Tensor = self.layer(x, x.flip(1) * 2)[0]
        return made


def test_a_core_that_nothing_reads_is_told_apart_from_one_of_no_known_form() -> None:
    found = find_attention(Half().eval(), {"x": torch.randn(2, 7, 16)})
    assert [s.path for s in found.sites] == ["layer"]
    assert [(r.path, r.reason) for r in found.refused] == [("layer", UNREAD)]
