"""Watching a model run says which module computes each core, and leaves nothing behind."""

from __future__ import annotations

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor, nn

from reattend.corewatch import cores_by_module


class Attend(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        y = self.inner(x)
        return F.scaled_dot_product_attention(y[:, None], y[:, None], y[:, None])[:, 0]


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList([Attend(), Attend()])
        self.router = nn.Softmax(-1)

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = layer(layer(x))
        scores = torch.softmax(x @ x.transpose(1, 2), -1)
        return (scores @ x) * self.router(x.mean(1))[:, None]


def test_the_smallest_module_is_named() -> None:
    model = Model()
    cores = cores_by_module(model, {"x": torch.randn(2, 5, 8)})
    assert cores == {"layers.0": 2, "layers.1": 2, "": 1}
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())


class Pooled(nn.Module):
    """Weights that a layer gives: a dynamic kernel or a pooling, no attention."""

    def __init__(self) -> None:
        super().__init__()
        self.weigh = nn.Linear(8, 5)

    def forward(self, x: Tensor) -> Tensor:
        return torch.softmax(self.weigh(x), -1) @ x


class Shifted(nn.Module):
    """A softmax written as exp(s - logsumexp(s))."""

    def forward(self, x: Tensor) -> Tensor:
        scores = x @ x.transpose(1, 2)
        probs = torch.exp(scores - torch.logsumexp(scores, -1, keepdim=True))
        return probs @ x


def test_scores_are_products_of_activations_and_any_softmax_of_them_counts() -> None:
    x = torch.randn(2, 5, 8)
    assert not cores_by_module(Pooled(), {"x": x})
    assert cores_by_module(Shifted(), {"x": x}) == {"": 1}
