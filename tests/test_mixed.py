"""Head groups of different kinds in one block: exact, one cache, and refused by name."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from mla_blocks import CASES, HIDDEN, GrowingState, config, dense, moments
from pydantic import ValidationError
from torch import Tensor

from reattend.errors import UnsupportedCacheError
from reattend.mixers.base import Context, Mixer
from reattend.mixers.config import NormConfig, RelativeConfig, StreamConfig
from reattend.mixers.dense import DenseAttention
from reattend.mixers.kinds import build_mixer
from reattend.mixers.mixed import GroupConfig, MixedConfig, runs
from reattend.passes.base import Refusal
from reattend.passes.rewrite.mixed import Mixed, MixedOptions, PartOptions
from reattend.passes.rewrite.mla import MlaOptions, ToMla
from reattend.passes.rewrite.registry import conversion

# four KV groups of two query heads, taken apart so that no group's heads are neighbours only
APART = ((0, 3), (1,), (2,))


def options(original: DenseAttention, exact: bool = True) -> MixedOptions:
    """Groups 0 and 3 to one latent, 1 to another, 2 stays."""
    made = []
    for heads in APART:
        part_of = original.config.model_copy(
            update={
                "core": original.config.core.model_copy(
                    update={"heads": 2 * len(heads), "kv_heads": len(heads)}
                )
            }
        )
        if heads == (2,):
            made.append(PartOptions(heads=heads, to="dense", options=conversion("dense").Options()))
            continue
        chosen = ToMla().exact_setting(part_of)
        if not exact:
            rope = 2 if original.config.rotary else 0
            chosen = MlaOptions(kv_lora_rank=6 * len(heads), qk_rope_head_dim=rope)
        made.append(PartOptions(heads=heads, to="mla", options=chosen))
    return MixedOptions(groups=tuple(made))


def wide(case: str) -> Any:
    """A case of test_mla with eight heads in four KV groups."""
    found = CASES[case]
    core = found.core.model_copy(update={"heads": 8, "kv_heads": 4})
    alibi = None if found.alibi is None else tuple(s * f for s in found.alibi for f in (1.0, 0.7))
    return found.model_copy(update={"core": core, "alibi": alibi})


@pytest.mark.smoke
@pytest.mark.parametrize("case", CASES)
def test_exact_parts_equal_the_original(case: str) -> None:
    original = dense(wide(case))
    chosen = options(original)
    assert Mixed().check(original.config, chosen) is None
    built = Mixed().build(original, moments(original), chosen)
    assert built.exactness == "exact"
    x = torch.randn(2, 13, HIDDEN, dtype=torch.float64)
    with torch.no_grad():
        expected, got = original(x, Context()), built.mixer(x, Context())
    assert (got - expected).abs().max() <= 1e-12 * expected.abs().max()


@pytest.mark.parametrize("chunk", [1, 4])
@pytest.mark.parametrize("case", ["gqa", "bias", "qk-norm", "no-rotary", "window", "v-width"])
def test_packed_rows_give_what_one_pass_gives(case: str, chunk: int) -> None:
    original = dense(wide(case))
    mixer = Mixed().build(original, moments(original), options(original, exact=False)).mixer
    x = torch.randn(2, 12, HIDDEN, dtype=torch.float64)
    state = GrowingState()
    with torch.no_grad():
        expected = mixer(x, Context())
        steps = [mixer(x[:, i : i + chunk], Context(), state) for i in range(0, 12, chunk)]
    assert (torch.cat(steps, 1) - expected).abs().max() <= 1e-12 * expected.abs().max()
    assert state.rows is not None
    held = sum(t.numel() for t in state.rows) // (2 * 12)
    core = original.config.core
    rope = 4 if original.config.rotary else 0
    assert held == mixer.cache_per_token == 18 + rope + core.qk_head_dim + core.v_head_dim
    assert held < original.cache_per_token


def test_a_state_that_keeps_groups_apart_is_not_packed() -> None:
    class Apart(GrowingState):
        def __init__(self) -> None:
            super().__init__()
            self.parts = [GrowingState() for _ in APART]

        def group(self, index: int) -> GrowingState:
            return self.parts[index]

        def seen(self) -> int:
            return self.parts[0].seen()

    original = dense(wide("gqa"))
    mixer = Mixed().build(original, moments(original), options(original, exact=False)).mixer
    x = torch.randn(2, 12, HIDDEN, dtype=torch.float64)
    state = Apart()
    with torch.no_grad():
        expected = mixer(x, Context())
        steps = [mixer(x[:, i : i + 3], Context(), state) for i in range(0, 12, 3)]
    assert (torch.cat(steps, 1) - expected).abs().max() <= 1e-12 * expected.abs().max()
    assert state.rows is None
    shapes = [[tuple(t.shape) for t in part.rows or ()] for part in state.parts]
    assert shapes == [
        [(2, 1, 12, 12), (2, 1, 12, 2)], [(2, 1, 12, 6), (2, 1, 12, 2)],
        [(2, 1, 12, 8), (2, 1, 12, 8)],
    ]  # fmt: skip


def test_a_group_with_its_own_state_needs_a_state_of_groups() -> None:
    class Recurrent(DenseAttention):
        def store(self, new: Any, state: Any) -> Any:
            return new

    original = dense(wide("gqa"))
    mixer: Any = Mixed().build(original, moments(original), options(original)).mixer
    mixer.groups[2] = Recurrent(mixer.groups[2].config).double()
    x = torch.randn(2, 3, HIDDEN, dtype=torch.float64)
    with pytest.raises(UnsupportedCacheError, match="state of its own"):
        mixer(x, Context(), GrowingState())


def relative_pair() -> tuple[DenseAttention, Mixer]:
    plain = wide("no-rotary")
    bias = RelativeConfig(buckets=(0, 0, 1, 2, 2), rows=3)
    original = dense(plain.model_copy(update={"relative": bias}))
    parts = tuple(
        PartOptions(heads=h, to="dense", options=conversion("dense").Options()) for h in APART
    )
    return original, Mixed().build(original, None, MixedOptions(groups=parts)).mixer


def test_a_relative_bias_goes_with_its_heads() -> None:
    original, mixer = relative_pair()
    x = torch.randn(2, 9, HIDDEN, dtype=torch.float64)
    with torch.no_grad():
        expected, got = original(x, Context()), mixer(x, Context())
        state = GrowingState()
        steps = [mixer(x[:, i : i + 3], Context(), state) for i in range(0, 9, 3)]
    assert (got - expected).abs().max() <= 1e-12 * expected.abs().max()
    assert (torch.cat(steps, 1) - expected).abs().max() <= 1e-12 * expected.abs().max()
    assert mixer.adds_bias and original.adds_bias
    ours, theirs = mixer.score_bias(4, 9, 5), original.score_bias(4, 9, 5)
    assert ours is not None and theirs is not None
    assert torch.equal(ours, theirs)


def test_a_mask_per_head_is_divided_among_the_groups() -> None:
    original = dense(wide("gqa"))
    mixer = Mixed().build(original, moments(original), options(original)).mixer
    x = torch.randn(2, 9, HIDDEN, dtype=torch.float64)
    mask = (torch.rand(2, 8, 9, 9) < 0.5) | torch.eye(9, dtype=torch.bool)
    with torch.no_grad():
        expected, got = original(x, Context(mask=mask)), mixer(x, Context(mask=mask))
    assert (got - expected).abs().max() <= 1e-12 * expected.abs().max()


def test_cross_attention_reads_what_it_stored() -> None:
    class Memory(GrowingState):
        def stored(self) -> tuple[Tensor, Tensor] | None:
            return self.rows

    plain = wide("no-rotary")
    core = plain.core.model_copy(update={"pattern": "full"})
    original = dense(plain.model_copy(update={"memory_size": HIDDEN, "core": core}))
    parts = tuple(
        PartOptions(heads=h, to="dense", options=conversion("dense").Options()) for h in APART
    )
    mixer = Mixed().build(original, None, MixedOptions(groups=parts)).mixer
    x, memory = (torch.randn(2, n, HIDDEN, dtype=torch.float64) for n in (5, 7))
    state = Memory()
    with torch.no_grad():
        expected = original(x, Context(), None, memory)
        first = mixer(x[:, :2], Context(), state, memory)
        rest = mixer(x[:, 2:], Context(), state, None)
    assert (torch.cat([first, rest], 1) - expected).abs().max() <= 1e-12 * expected.abs().max()
    assert state.seen() == 7


def test_what_a_checkpoint_stores_builds_the_same_block() -> None:
    original = dense(wide("bias"))
    mixer = Mixed().build(original, moments(original), options(original)).mixer
    again = build_mixer(**mixer.described()).double()
    again.load_state_dict(mixer.state_dict(), strict=True)
    x = torch.randn(2, 5, HIDDEN, dtype=torch.float64)
    with torch.no_grad():
        assert torch.equal(again(x, Context()), mixer(x, Context()))


@pytest.mark.parametrize("heads", [((0,), (0, 1)), ((0,), (2,)), ((),)])
def test_groups_carry_every_head_once(heads: Any) -> None:
    groups = tuple(GroupConfig(kv_heads=h, kind="dense", config={}) for h in heads)
    with pytest.raises(ValidationError, match="exactly once"):
        MixedConfig(groups=groups, out_features=None)


def test_runs() -> None:
    assert runs((0, 1, 2)) == [(0, 3)]
    assert runs((3, 1, 2, 5)) == [(0, 1), (1, 2), (3, 1)]


def test_predicted_cost_is_what_is_built() -> None:
    original = dense(wide("bias"))
    chosen = options(original, exact=False)
    cost = Mixed().cost(original.config, chosen)
    built = Mixed().build(original, moments(original), chosen)
    assert cost.cache == built.mixer.cache_per_token
    assert cost.parameters == sum(p.numel() for p in built.mixer.parameters())


def test_refusals_name_the_heads() -> None:
    original = dense(wide("gqa"))
    parts = list(options(original).groups)
    parts[0] = parts[0].model_copy(update={"options": MlaOptions(kv_lora_rank=99)})
    refusal = Mixed().check(original.config, MixedOptions(groups=tuple(parts)))
    assert isinstance(refusal, Refusal)
    assert "heads [0, 3] (to: mla): kv_lora_rank 99 is larger than possible: 2 kv" in refusal.reason


def test_a_norm_over_all_heads_cannot_be_divided() -> None:
    norm = NormConfig(kind="rms", scope="full", eps=1e-6)
    tied = config(8, 4).model_copy(update={"k": StreamConfig(norm=norm)})
    refusal = Mixed().check(tied, options(dense(wide("gqa"))))
    assert isinstance(refusal, Refusal)
    assert "keys are normalised over all heads at once" in refusal.reason
