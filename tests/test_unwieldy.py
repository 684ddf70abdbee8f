"""Images whose sizes are too tangled to stay symbolic are captured at one size, which is held."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor, nn

from reattend import convert, find_attention
from reattend.capture import capture
from reattend.errors import ArgumentError
from reattend.unwieldy import FIXED

WIDTH, HEADS, SIDE = 16, 2, 3


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.qkv, self.o = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor, height: int, width: int) -> Tensor:
        """Tokens [B, H W, D] of an image, in windows of 3 x 3 after the norm."""
        b = x.shape[0]
        rows, columns = height // SIDE, width // SIDE
        x = x.view(b, rows, SIDE, columns, SIDE, WIDTH).transpose(2, 3).reshape(-1, SIDE**2, WIDTH)
        q, k, v = self.qkv(x).unflatten(-1, (3, HEADS, -1)).permute(2, 0, 3, 1, 4)
        y = self.o(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))
        y = y.view(b, rows, columns, SIDE, SIDE, WIDTH).transpose(2, 3)
        return y.reshape(b, height * width, WIDTH)


class Stages(nn.Module):
    """Pads to whole windows, attends, halves; again and again."""

    def __init__(self, stages: int) -> None:
        super().__init__()
        self.patches = nn.Conv2d(3, WIDTH, 2, 2)
        self.stages = nn.ModuleList(Attention() for _ in range(stages))

    def forward(self, pixels: Tensor) -> Tensor:
        """[B, 3, H, W]."""
        x = self.patches(pixels)
        for stage in self.stages:
            height, width = x.shape[-2:]
            x = F.pad(x, (0, (SIDE - width % SIDE) % SIDE, 0, (SIDE - height % SIDE) % SIDE))
            height, width = x.shape[-2:]
            y = stage(x.flatten(2).transpose(1, 2), height, width)
            x = F.avg_pool2d(x + y.transpose(1, 2).reshape(x.shape), 2, ceil_mode=True)
        return x.mean((2, 3))


def pixels(height: int, width: int, batch: int = 2) -> dict[str, Tensor]:
    return {"pixels": torch.randn(batch, 3, height, width)}


def test_a_simple_image_stays_symbolic() -> None:
    captured = capture(nn.Conv2d(3, 4, 2).eval(), {"input": torch.randn(2, 3, 8, 10)})
    assert not captured.gm.meta.get(FIXED)


@pytest.mark.slow
def test_a_tangled_one_is_kept_and_other_sizes_are_refused() -> None:
    torch.manual_seed(0)
    model = Stages(4).eval()
    seen = find_attention(model, pixels(32, 32))
    assert seen.capture.gm.meta[FIXED]
    assert len(seen.sites) == 4
    converted = convert(model, plan="identity", inputs=pixels(32, 32)).model
    with torch.no_grad():
        given = pixels(32, 32, batch=3)
        assert float((converted(**given) - model(**given)).abs().max()) <= 1e-5
        for height, width in ((16, 64), (64, 16), (44, 44)):
            model(**pixels(height, width))
            with pytest.raises(ArgumentError, match="image of another size"):
                converted(**pixels(height, width))
