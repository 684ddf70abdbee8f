"""Projections made of shared atoms: the best there are, exact with all of them, stored once."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from decoder_models import decoder, prompts
from mla_blocks import config, dense, moments
from safetensors.torch import load_file

from reattend import convert, load
from reattend.errors import RefusedError
from reattend.install.stored import connect
from reattend.mixers.base import Context
from reattend.mixers.kinds import build_mixer
from reattend.passes.rewrite.base import Subject
from reattend.passes.rewrite.masa import MasaOptions, ToMasa, fitted

RULE = {"sites": "*", "to": "masa"}


def blocks(count: int, cfg: Any, **options: Any) -> tuple[list[Subject], dict[str, Any]]:
    """Blocks of one size with weights of their own, and what they become."""
    subjects = []
    for number in range(count):
        block = dense(cfg)
        for parameter in block.parameters():
            parameter.data += 0.3 * number * torch.randn_like(parameter)
        subjects.append(Subject(str(number), block, moments(block), MasaOptions(**options)))
    told = ToMasa().join([(s.path, s.dense.config, s.options) for s in subjects])
    for subject, found in zip(subjects, told, strict=True):
        subject.options = found
    built = ToMasa().build_together(subjects)
    mixers = {path: b.mixer for path, b in built.items()}
    connect(mixers)
    return subjects, mixers


@pytest.mark.parametrize("cfg", [config(bias=True), config(norm=True, v_width=6)])
def test_as_many_atoms_as_layers_change_nothing(cfg: Any) -> None:
    subjects, mixers = blocks(3, cfg, **ToMasa().exact_setting(cfg).model_dump())
    x = torch.randn(2, 9, cfg.hidden_size, dtype=torch.float64)
    for subject in subjects:
        with torch.no_grad():
            got, expected = (m(x, Context()) for m in (mixers[subject.path], subject.dense))
        assert float((got - expected).abs().max() / expected.abs().max()) <= 1e-12


def test_one_atom_is_enough_for_multiples_of_one_layer() -> None:
    weight, root = torch.randn(5, 7).double(), torch.randn(3, 7, 7).double()
    shares, pool, lost = fitted([2 * weight, -weight, 0.5 * weight], list(root @ root.mT), 1)
    assert lost < 1e-20
    assert float(pool.norm()) == pytest.approx(float(weight.norm()) * 3.5 / 3)
    torch.testing.assert_close(shares[0] * pool[0], (2 * weight).flatten().view(5, 7))


def test_no_other_atoms_lose_less() -> None:
    """Under one covariance: the tail of the singular values of all whitened weights."""
    weights, root = torch.randn(4, 5, 7).double(), torch.randn(7, 7).double()
    moment = root @ root.T
    energy = torch.stack([((w @ moment) * w).sum() for w in weights])
    whitened = torch.stack([(w @ torch.linalg.cholesky(moment)).flatten() for w in weights])
    values = torch.linalg.svdvals(whitened / energy[:, None].sqrt())
    for atoms in (1, 2, 3):
        _, _, lost = fitted(list(weights), [moment] * 4, atoms)
        assert lost == pytest.approx(float(values[atoms:].square().sum() / 4))


def test_cost_counts_every_atom_once() -> None:
    cfg = config(8, 4, bias=True)
    subjects, mixers = blocks(3, cfg, atoms=2)
    for subject in subjects:
        found = sum(p.numel() for p in mixers[subject.path].parameters())
        assert found == ToMasa().cost(cfg, subject.options).parameters
        assert mixers[subject.path].config == ToMasa().outcome(cfg, subject.options)
        stored = mixers[subject.path].described()
        assert build_mixer(stored["kind"], stored["config"]).reads == mixers[subject.path].reads


@pytest.mark.parametrize(
    ("options", "cfgs", "reason"),
    [
        ({"atoms": 3}, [config(), config()], "atoms: 3 for 2 layers"),
        ({}, [config(), config(8, 4)], "other sizes"),
    ],
)
def test_groups_that_cannot_share_are_refused(options: Any, cfgs: Any, reason: str) -> None:
    told = ToMasa().join([(str(i), c, MasaOptions(**options)) for i, c in enumerate(cfgs)])
    assert reason in told[1].reason


def test_blocks_that_cannot_share_are_refused() -> None:
    refusal = ToMasa().check(config(out=False), MasaOptions())
    assert refusal is not None and "no output projection" in refusal.reason
    refusal = ToMasa().check(config(), MasaOptions(atoms=0))
    assert refusal is not None and "made of something" in refusal.reason


def test_low_rank_training_would_train_nothing() -> None:
    plan = {"rules": [RULE], "calibrate": {"tokens": 600, "seq_len": 20, "lora_rank": 2}}
    with pytest.raises(RefusedError, match="drop lora_rank"):
        convert(decoder("llama", 2, 2), plan=plan, data=torch.randint(3, 97, (8, 20)))


def test_a_model_stores_and_trains_atoms_once(tmp_path: Any) -> None:
    """Two groups of two layers, one atom each: files, loading, decoding, and both stages."""
    model = decoder("llama", layers=4, groups=2)
    rule = {**RULE, "atoms": 1, "layers_each": 2}
    rows = {"seq_len": 20, "batch_size": 4}
    plan = {"rules": [rule], "calibrate": {**rows, "tokens": 600}}
    data = torch.randint(3, 97, (12, 20))
    untrained = convert(model, plan={"rules": [rule], "calibrate": rows}, data=data)
    start = untrained.model.state_dict()
    result = convert(model, plan=plan, data=data, out=tmp_path / "m")
    layers, now = result.model.model.layers, result.model.state_dict()
    same = [n for n, t in now.items() if torch.equal(t, start[n])]
    assert not any(".pool." in n or n.endswith(".share") for n in same)
    assert all(".mixer." in n for n in now.keys() - same)
    atoms = layers[0].self_attn.mixer.pool.q_proj
    assert layers[1].self_attn.mixer.q_proj.pools[0].q_proj is atoms
    assert layers[3].self_attn.mixer.q_proj.pools[0].q_proj is not atoms
    size = sum(p.numel() for p in model.model.layers[0].self_attn.parameters())
    told = result.report.model
    assert told.parameters_before - told.parameters_after == 2 * size - 4 * 4
    stored = load_file(tmp_path / "m" / "model.safetensors")
    assert sum(t.numel() for t in stored.values()) == told.parameters_after
    loaded = load(tmp_path / "m")
    ids, mask = prompts()
    with torch.no_grad():
        assert torch.equal(loaded(ids).logits, result.model(ids).logits)
    run = {"attention_mask": mask, "max_new_tokens": 5, "do_sample": False}
    got = loaded.generate(ids, **run)
    assert bool((got == result.model.generate(ids, use_cache=False, **run)).all())
