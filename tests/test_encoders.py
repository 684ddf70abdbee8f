"""Models that end with hidden states: converted and trained on rows of unequal length."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from reattend import convert
from reattend.calibrate.layerwise import Layerwise
from reattend.calibrate.ranks import Ranks
from reattend.calibrate.working import working_copies
from reattend.errors import DataError

RULE = {"sites": "*", "to": "moh", "route": "head", "select_shared": "first", "shared": 1}

SHORT = {"calibrate": {"seq_len": 16}}


def encoder() -> Any:
    from transformers import BertConfig, BertModel

    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=61, hidden_size=32, intermediate_size=48, num_hidden_layers=2,
        num_attention_heads=4, max_position_embeddings=32, initializer_range=0.2,
    )  # fmt: skip
    return BertModel(config).eval()


def rows() -> dict[str, torch.Tensor]:
    ids = torch.randint(1, 61, (40, 16), generator=torch.Generator().manual_seed(1))
    mask = (torch.arange(16) < torch.arange(5, 45)[:, None].clamp(max=16)).long()
    return {"input_ids": ids * mask, "attention_mask": mask}


def test_an_encoder_learns_to_leave_heads_out() -> None:
    model, data = encoder(), rows()
    held = {name: t[:8] for name, t in data.items()}
    with torch.no_grad():
        wanted = model(**held).last_hidden_state[held["attention_mask"].bool()]
    far, start = [], {name: t.clone() for name, t in model.state_dict().items()}
    for tokens in (0, 6000):
        calibrate = {"tokens": tokens, "seq_len": 16, "batch_size": 4}
        plan = {"rules": [{**RULE, "top_k": 1}], "calibrate": calibrate}
        result = convert(model, plan=plan, data=data)
        assert not result.report.quality
        with torch.no_grad():
            got = result.model(**held).last_hidden_state[held["attention_mask"].bool()]
        far.append(float((got - wanted).norm() / wanted.norm()))
    assert far[1] < 0.8 * far[0]
    now, path = result.model.state_dict(), "encoder.layer.{}.attention.output.dense.weight"
    trained = {path.format(0), path.format(1)}  # the projections, which are another module's
    trained |= {name.replace("weight", "bias") for name in trained}
    assert {n for n in start if n in now and not torch.equal(now[n], start[n])} == trained
    assert all(torch.equal(t, start[name]) for name, t in model.state_dict().items())


def test_blocks_are_compared_behind_their_projection() -> None:
    """The first loss is that of what the next module reads."""
    model, data = encoder(), rows()
    result = convert(model, plan={"rules": [{**RULE, "top_k": 1}], **SHORT}, data=data)
    working = working_copies(model, result.model)
    stage = Layerwise(working, Ranks(torch.device("cpu")))
    got = stage.accumulate(data, False)
    path = "encoder.layer.0.attention"
    assert f"{path}.output.dense.weight" in stage.groups[f"{path}.self"]
    seen = []
    for m in (model, result.model):
        keep = m.get_submodule(f"{path}.output.dense").register_forward_hook(
            lambda _, args, y: seen.append(y[data["attention_mask"].bool()])
        )
        with torch.no_grad():
            m(**data)
        keep.remove()
    expected = (seen[1] - seen[0]).square().sum() / seen[0].square().sum()
    torch.testing.assert_close(got[f"{path}.self"], expected)


def test_gates_about_answers_are_refused() -> None:
    plan = {"rules": [RULE], **SHORT, "verify": {"max_kl": 1.0}}
    with pytest.raises(DataError, match="this model gives none"):
        convert(encoder(), plan=plan, data=rows())


def test_a_fitted_router_knows_a_projection_that_another_module_owns() -> None:
    """Ranks of single heads are by what each adds behind the projection."""
    model, data = encoder(), {name: t[:4] for name, t in rows().items()}
    rule = {**RULE, "shared": 0, "gate": "hard", "router_start": "output-norm"}
    result = convert(model, plan={"rules": [rule], **SHORT}, data=data)
    block, real = model.encoder.layer[0].attention, data["attention_mask"].bool()
    seen = []
    block.self.register_forward_hook(lambda _, args, y: seen.extend([args[0], y[0]]))
    with torch.no_grad():
        model(**data)
    x, heads = (t[real].double() for t in seen)
    columns = block.output.dense.weight.detach().double().split(8, 1)
    added = [part @ w.t() for part, w in zip(heads.split(8, 1), columns, strict=True)]
    target = torch.stack([t.norm(dim=-1).log() for t in added], 1)
    target = target - target.mean(1, keepdim=True)
    more = (1e-3 * x.square().sum() / x.shape[1]) ** 0.5 * torch.eye(x.shape[1]).double()
    fitted = torch.linalg.lstsq(torch.cat([x, more]), torch.cat([target, torch.zeros(32, 4)]))
    got = result.model.encoder.layer[0].attention.self.mixer.router.routed.weight
    torch.testing.assert_close(got.double(), fitted.solution.t(), rtol=1e-3, atol=1e-4)
