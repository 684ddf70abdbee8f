"""The number of splits of a decode, from sizes alone; which heads prefill together."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from reattend.kernels.attention.launch import L2_BYTES, heads_together
from reattend.kernels.configs import KernelConfig
from reattend.kernels.latent_attention.launch_backward import MAX_PARTS, count_parts
from reattend.kernels.launching import MAX_SPLITS, best_splits, count_splits

SLOTS = 132  # multiprocessors of an H200


def test_a_full_device_does_not_split() -> None:
    assert best_splits(SLOTS, SLOTS, 128) == 1
    assert best_splits(SLOTS, 10 * SLOTS, 128) == 1


def test_few_programs_fill_one_wave() -> None:
    for programs in (1, 8, 16, 64):
        splits = best_splits(SLOTS, programs, 2048)
        assert splits == min(SLOTS // programs, MAX_SPLITS), programs


def test_short_caches_are_not_cut_finely() -> None:
    assert best_splits(SLOTS, 8, 1) == 1
    assert best_splits(SLOTS, 8, 2) == 1
    for tiles in (4, 8, 16, 32):
        assert 1 < best_splits(SLOTS, 1, tiles) <= tiles


def test_waves_are_not_left_half_empty() -> None:
    """100 programs on 132 slots: two splits would make a wave and a half."""
    assert best_splits(SLOTS, 100, 128) in (1, 5)
    splits = best_splits(SLOTS, 100, 128)
    assert 100 * splits / (-(-100 * splits // SLOTS) * SLOTS) > 0.75


def test_the_interpreter_does_not_split() -> None:
    assert count_splits(torch.device("cpu"), 1, 100_000, KernelConfig(16, 64, 4, 2)) == 1
    assert count_parts(torch.device("cpu"), 1, 100_000) == 1


@pytest.mark.parametrize(("programs", "tiles", "parts"), [
    (1, 100_000, MAX_PARTS), (64, 2048, 9), (64, 3, 3), (528, 2048, 1), (10_000, 2048, 1),
])  # fmt: skip
def test_few_tiles_of_a_cache_are_shared(
    monkeypatch: pytest.MonkeyPatch, programs: int, tiles: int, parts: int
) -> None:
    """Four programs per multiprocessor, and none without a tile of its own."""
    device = SimpleNamespace(multi_processor_count=SLOTS)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: device)
    assert count_parts(torch.device("cuda"), programs, tiles) == parts


@pytest.mark.parametrize(("heads", "group"), [(32, 4), (32, 32), (24, 8), (7, 1)])
def test_heads_together_divide_the_heads_and_keep_groups_whole(heads: int, group: int) -> None:
    seen = set()
    for megabytes in (0, 1, 3, 5, 7, 11, 1000):
        together = heads_together(heads, group, megabytes * 1_000_000)
        assert heads % together == 0
        assert together % group == 0
        groups = together // group
        assert groups == 1 or groups * megabytes * 1_000_000 <= L2_BYTES
        seen.add(together)
    assert {heads, group} <= seen


@pytest.mark.parametrize("paged", [False, True])
def test_gradients_without_a_kernel_are_computed_in_torch(paged: bool) -> None:
    """What the dispatcher calls on a GPU, for fp64 and for pages for instance."""
    from reattend.kernels.attention import attention, register
    from reattend.kernels.latent_attention import latent_attention
    from reattend.kernels.latent_attention import register as latent
    from reattend.kernels.routed_attention import register as routed
    from reattend.kernels.routed_attention import routed_attention

    q, k, v = torch.randn(3, 2, 2, 16, 8, dtype=torch.float64)
    rows = (torch.tensor([0, 3]), torch.tensor([16, 16]))
    table = torch.tensor([[1], [0]], dtype=torch.int32) if paged else None
    args = (q, k, v, *rows, table)
    y, lse = attention(*args, scale=0.5)
    grads = (y, lse.nan_to_num(neginf=0.0), y, lse)
    want = register.attention_backward(*grads, *args, scale=0.5)
    torch.testing.assert_close(register._cuda_backward(*grads, *args, scale=0.5), want)
    given = (q, q[..., :4], k[:, 0], k[:, 0, :, :4], *rows, table)
    y, lse = latent_attention(*given, scale=0.5)
    grads = (y, lse.nan_to_num(neginf=0.0), y, lse)
    want = latent.latent_attention_backward(*grads, *given, scale=0.5)
    torch.testing.assert_close(latent._cuda_backward(*grads, *given, scale=0.5), want)
    active = torch.rand(2, 2, 16) < 0.5
    args = (q, k, v, active, *rows)
    y, lse = routed_attention(*args, scale=0.5)
    grads = (y, lse.nan_to_num(neginf=0.0), y, lse)
    want = routed.routed_attention_backward(*grads, *args, scale=0.5)
    torch.testing.assert_close(routed._cuda_backward(*grads, *args, scale=0.5), want)
