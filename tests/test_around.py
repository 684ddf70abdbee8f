"""Owners that do more than their block: replaced as a whole, saved, loaded, decoded, exported."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import around_models as models
import pytest
import torch
from torch import Tensor, nn

from reattend import convert, find_attention, load
from reattend.errors import ArgumentError
from reattend.install.adapter import Adapter
from reattend.install.around import Around
from reattend.install.pieces import AroundConfig, Feed, Piece
from reattend.install.stored import describe
from reattend.program import Program
from reattend.sharing import address


#: owner -> the programs that are expected around its mixer
class UnderSlice(models.Attention):
    """Writes into a tensor of which a part is read afterwards."""

    def forward(self, x: Tensor, residual: Tensor, mask: Tensor, *_: Tensor) -> models.Result:
        h = self.norm(x)
        half = h[..., : models.WIDTH // 2]
        y = self.attend(x, mask)
        return y + h.mul_(2.0) + half.repeat(1, 1, 2), None


OWNERS: dict[type[models.Attention], list[str]] = {
    models.ResidualInside: ["after.0"],
    models.NormAfter: ["after.0"],
    models.NormBefore: ["before.hidden"],
    models.InPlace: ["before.hidden", "after.0"],
    models.Parallel: ["before.hidden", "after.0"],
    models.ValidityOnly: ["after.0"],
    models.MaskInside: ["before.mask", "after.0"],
    models.AnglesInside: ["before.hidden", "before.cos", "before.sin"],
    UnderSlice: ["after.0"],
    models.Windows: ["before.hidden", "after.0"],
}
MLA = {"rules": [{"sites": "*", "to": "mla", "kv_lora_rank": 14, "qk_rope_head_dim": 8}]}


@pytest.mark.parametrize("owner", OWNERS, ids=lambda o: o.__name__)
def test_the_owner_is_replaced_as_a_whole(owner: type[models.Attention], tmp_path: Path) -> None:
    model = models.tower(owner)
    fixed = owner is models.Windows
    inputs = models.example(64 if fixed else 17)
    result = convert(model, plan="identity", inputs=inputs, out=tmp_path / "out")
    block = result.model.blocks[0]
    assert isinstance(block, Adapter) and block.binding.around is not None
    assert list(block.binding.around.pieces()) == OWNERS[owner]
    loaded = load(tmp_path / "out", model=models.tower(owner), inputs=inputs)
    for length, batch in ((64, 3),) if fixed else ((17, 2), (29, 3)):
        other = models.example(length, 4, batch)
        with torch.no_grad():
            expected = model(**other)
            for converted in (result.model, loaded):
                assert (converted(**other) - expected).abs().max() <= 1e-5


def test_what_a_parallel_branch_reads_is_computed_once() -> None:
    model = models.tower(models.Parallel)
    result = convert(model, plan="identity", inputs=models.example())
    kept = {address(p) for p in model.parameters()}
    moved = [p for n, p in result.model.named_parameters() if ".around." in n]
    assert all(address(p) in kept for p in moved)  # nothing unchanged is copied
    names = [n for n, _ in result.model.blocks[0].named_parameters()]
    assert sum("norm" in n or ".w" in n for n in names if n.startswith("around")) == 4
    assert [n for n in names if n.startswith("around.before")] == [
        "around.before.hidden.w0", "around.before.hidden.w1",
    ]  # fmt: skip


def test_lost_dropout_is_reported() -> None:
    for owner, lacks in ((models.Parallel, ("dropout while training",)), (models.NormAfter, ())):
        report = convert(models.tower(owner), plan="identity", inputs=models.example()).report
        assert {s.owner.lacks for s in report.sites if s.owner} == {lacks}


def test_an_owner_that_is_the_block_is_stored_as_before() -> None:
    class Exactly(models.Attention):
        def forward(self, x: Any, residual: Any, mask: Any, *_: Any) -> Any:
            return self.attend(x, mask), None

    result = convert(models.tower(Exactly), plan="identity", inputs=models.example())
    assert all("around" not in site["binding"] for site in describe(result.model))
    assert not any("around" in name for name in result.model.state_dict())


def test_gradients_reach_the_programs() -> None:
    result = convert(models.tower(models.Parallel), plan="identity", inputs=models.example())
    result.model(**models.example()).sum().backward()
    grads = {n: p.grad for n, p in result.model.named_parameters() if ".around." in n}
    assert len(grads) == 8
    assert all(g is not None and bool((g != 0).any()) for g in grads.values())


def test_a_missing_argument_is_named() -> None:
    program = Program(inputs=("x0",), steps=(), output="x0")
    piece = Piece(program=program, feeds=(Feed(path=("r",)),))
    around = Around(AroundConfig(before={"hidden": piece}))
    given = torch.ones(1, 2, 3)
    assert around.prepare({"r": given})["before."]["hidden"] is given
    with pytest.raises(ArgumentError, match="argument 'r'"):
        around.prepare({"x": given})
    optional = Around(AroundConfig(before={"mask": piece}))
    assert optional.prepare({"x": given})["before."] == {"mask": None}


@pytest.fixture(scope="module")
def inlined() -> tuple[Any, Any]:
    """A Llama with attention written out in its layers, and its identity conversion."""
    torch.set_num_threads(1)
    model = models.llama(models.InlinedLayer)
    return model, convert(model, plan="identity").model


def test_a_layer_with_inlined_attention_generates(inlined: tuple[Any, Any]) -> None:
    model, converted = inlined
    prompts = models.prompts()
    real = prompts["attention_mask"].bool()
    with torch.no_grad():
        expected = model(**prompts, use_cache=False).logits[real]
        assert (converted(**prompts, use_cache=False).logits[real] - expected).abs().max() <= 1e-5
    run = {"max_new_tokens": 24, "do_sample": False}
    uncached = model.generate(**prompts, **run, use_cache=False)
    assert bool((converted.generate(**prompts, **run) == uncached).all())


def test_hidden_states_are_still_recorded(inlined: tuple[Any, Any]) -> None:
    model, converted = inlined
    prompts = models.prompts()
    real = prompts["attention_mask"].bool()
    run = {**prompts, "use_cache": False, "output_hidden_states": True}
    with torch.no_grad():
        expected, got = model(**run).hidden_states, converted(**run).hidden_states
    assert len(got) == len(expected) == 3
    assert all((a - b)[real].abs().max() <= 1e-5 for a, b in zip(got, expected, strict=True))


LOADED = """
import sys, torch, reattend
torch.set_num_threads(1)
model = reattend.load(sys.argv[1])
ids = torch.tensor([[0, 0, 5, 9, 13], [7, 8, 5, 9, 13]])
mask = (ids != 0).long()
print("IDS", model.generate(ids, attention_mask=mask, max_new_tokens=9, do_sample=False).tolist())
seen = model(ids, attention_mask=mask, output_hidden_states=True).hidden_states
print("STATES", len(seen))
"""


@pytest.mark.slow
def test_it_becomes_latent_and_loads_in_a_fresh_process(tmp_path: Path) -> None:
    model, data = models.llama(models.InlinedLayer), torch.randint(3, 97, (8, 40))
    result = convert(model, plan=MLA, data=data, out=tmp_path / "out")
    assert result.report.totals.converted == 2
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(
        [sys.executable, "-c", LOADED, str(tmp_path / "out")],
        capture_output=True, text=True, env=environment, check=False, timeout=300,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]
    ids = torch.tensor([[0, 0, 5, 9, 13], [7, 8, 5, 9, 13]])
    mask = (ids != 0).long()
    expected = result.model.generate(
        ids, attention_mask=mask, max_new_tokens=9, do_sample=False, use_cache=False
    ).tolist()
    assert [x for x in done.stdout.splitlines() if x.startswith(("IDS", "STATES"))] == [
        f"IDS {expected}", "STATES 3",
    ]  # fmt: skip
    twice = convert(convert(model, plan="identity").model, plan=MLA, data=data).model
    with torch.no_grad():  # converted before: the programs stay
        gap = twice(ids, attention_mask=mask).logits - result.model(ids, attention_mask=mask).logits
    assert gap[mask.bool()].abs().max() <= 1e-3


def test_full_rank_is_exact_and_training_sees_the_owner() -> None:
    """Statistics are taken behind `before`, and losses where the owner's result is."""
    model, data = models.llama(models.InlinedLayer, 1), torch.randint(3, 97, (12, 40))
    whole = {"sites": "*", "to": "mla", "kv_lora_rank": 16, "qk_rope_head_dim": 16}
    exact = convert(model, plan={"rules": [whole]}, data=data)
    assert {s.exactness for s in exact.report.sites} == {"exact"}
    assert exact.report.parity[0].verdict == "pass"
    training = {"tokens": 6000, "stages": ["layerwise"], "seq_len": 40, "lr": 3e-3}
    rule = MLA["rules"][0] | {"mixing": "real", "rope_select": "per-frequency", "phase": "one",
                              "latent": "pca", "center": False}  # fmt: skip
    trained = convert(model, plan={"rules": [rule], "calibrate": training}, data=data).report
    untrained = convert(model, plan={"rules": [rule]}, data=data).report
    before, after = (
        [s.error.output_relative for s in r.sites if s.error] for r in (untrained, trained)
    )
    assert all(a < 0.95 * b for a, b in zip(after, before, strict=True))


class Lora(nn.Module):
    """An unmerged low-rank update, as peft attaches it."""

    def __init__(self, base: nn.Module) -> None:
        super().__init__()
        self.base = base
        self.low = nn.Linear(models.WIDTH, 2, bias=False)
        self.up = nn.Linear(2, base.weight.shape[0], bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.base(x) + self.up(self.low(x))


def test_lora_trains_inside_the_programs() -> None:
    model = convert(models.llama(models.InlinedLayer, 1), plan="identity").model
    model.requires_grad_(False)
    for layer in model.model.layers:
        layer.mixer.q_proj = Lora(layer.mixer.q_proj)
    prompts = models.prompts()
    model(**prompts, labels=prompts["input_ids"]).loss.backward()
    grads = [p.grad for p in model.parameters() if p.requires_grad]
    assert len(grads) == 2
    assert all(g is not None and bool((g != 0).any()) for g in grads)
    run = {"max_new_tokens": 9, "do_sample": False}
    whole = model.generate(**prompts, **run, use_cache=False)
    assert bool((model.generate(**prompts, **run) == whole).all())


@pytest.mark.slow
def test_it_exports_to_onnx(inlined: tuple[Any, Any], tmp_path: Path) -> None:
    onnx = pytest.importorskip("onnx")
    pytest.importorskip("onnxruntime")
    from reattend.targets.onnx import Session, export_onnx

    art = export_onnx(inlined[1], tmp_path / "onnx")
    assert art.max_error <= 1e-4  # prefill and decode, measured by the export itself
    graph = onnx.load(str(art.model), load_external_data=False).graph
    assert sum(n.op_type == "Attention" for n in graph.node) == 2
    prompts = models.prompts()
    run = {"max_new_tokens": 9, "do_sample": False}
    expected = inlined[0].generate(**prompts, **run)[:, 13:]
    session = Session(art.path, threads=1)
    got = session.generate(
        prompts["input_ids"].numpy(), prompts["attention_mask"].numpy(), max_new_tokens=9
    )
    assert torch.as_tensor(got)[:, -9:].tolist() == expected.tolist()


def test_a_module_called_twice_is_one_site() -> None:
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embed, self.block = nn.Embedding(50, models.WIDTH), models.NormAfter()

        def forward(self, ids: Any) -> Any:
            x = self.embed(ids)
            for _ in range(3):
                x = self.block(x, x, None)[0]
            return x

    torch.manual_seed(0)
    model = Twice().eval()
    inputs = {"ids": torch.randint(0, 50, (2, 17))}
    found = find_attention(model, inputs)
    assert [s.path for s in found.sites] == ["block"] and not found.refused
    converted = convert(model, plan="identity", inputs=inputs).model
    with torch.no_grad():
        assert (converted(**inputs) - model(**inputs)).abs().max() <= 1e-5
