"""Image and diffusion models with linear attention: trained on made-up images, stored, exported."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import zoo_models
from mla_blocks import HIDDEN, dense
from test_everywhere import EXACT, WAYS, both_ways, built
from torch import Tensor, nn

from reattend import convert, export, load
from reattend.errors import ArgumentError, RefusedError
from reattend.mixers.base import Context
from reattend.plan import Plan
from reattend.report import Report

#: what makes the presets choose among the few tokens of small models
SMALL: dict[str, dict[str, Any]] = {
    "linfusion": {"mlp_width": 8},
    "flowformer": {},
    "sla": {"sparse_top": 0.3, "sparse_block": 4},
    "scatterbrain": {"sparse_top": 0.3, "sparse_block": 4, "feature_dim": 16},
    "sea": {"sparse_top": 0.25, "estimate": 8, "feature_dim": 16},
}
TRAINED = {"tokens": 64, "stages": ["layerwise"], "batch_size": 4, "lr": 1e-2}
OTHERS = [pytest.param(name, marks=pytest.mark.slow) for name in SMALL if name != "linfusion"]


def plan(preset: str, **more: Any) -> dict[str, Any]:
    """The preset for small models, with some training."""
    rule = Plan.load(preset).rules[0].options.model_dump(exclude_unset=True) | SMALL[preset]
    rules = [{"sites": "*", "to": "linear", **rule}]
    return {"rules": rules, "calibrate": TRAINED, "on_refusal": "keep", **more}


def learned(report: Report) -> bool:
    """Whether blocks were converted, labelled so, and came closer to the original's."""
    done = {s.exactness for s in report.sites if s.action == "converted"}
    assert report.calibration is not None
    loss = report.calibration.stages[-1].loss
    return done == {"learned"} and loss[-1][1] < 0.9 * loss[0][1]


def images(rows: int = 4) -> list[dict[str, Tensor]]:
    generator = torch.Generator().manual_seed(0)
    return [{"pixel_values": torch.randn(rows, 3, 16, 16, generator=generator)} for _ in range(4)]


@pytest.mark.parametrize("preset", ["linfusion", *OTHERS])
def test_an_image_model_learns_is_stored_and_exported(preset: str, tmp_path: Path) -> None:
    data, model = images(), zoo_models.build("vit", None)
    result = convert(model, plan=plan(preset), inputs=data[0], data=data, out=tmp_path / "m")
    assert learned(result.report)
    loaded = load(tmp_path / "m")
    with torch.no_grad():
        assert torch.equal(loaded(**data[1]).logits, result.model(**data[1]).logits)
    with pytest.raises(RefusedError, match="pass inputs="):
        export(result.model, out=tmp_path / "no")
    if preset == "linfusion":  # the others' graphs are exported below
        made = export(tmp_path / "m", out=tmp_path / "x", inputs=data[0])
        assert made.max_error <= 1e-5
        assert [entry.op for entry in made.manifest.layers] == ["linear"] * 2
        assert [check.batch for check in made.manifest.checks] == [4, 5]


def test_all_blocks_and_nothing_trained_is_verified_as_exact() -> None:
    rule = {"sites": "*", "to": "linear", "direction": "bidirectional", "window": 0}
    rule |= {"feature_map": "softmax", "sparse_top": 1.0}
    model, image = zoo_models.build("vit", None), images()[0]
    result = convert(model, plan={"rules": [rule]}, inputs=image)
    assert {site.exactness for site in result.report.sites} == {"exact"}
    with torch.no_grad():
        assert (result.model(**image).logits - model(**image).logits).abs().max() <= 1e-5


class Every(nn.Module):
    """A block of each kind that has more than products, on the same tokens."""

    def __init__(self) -> None:
        super().__init__()
        block = dense(both_ways())
        self.parts = nn.ModuleDict(
            {name: built(block, **WAYS[name]) for name in ("flowformer", *EXACT)}
        )

    def forward(self, x: Tensor, valid: Tensor) -> dict[str, Tensor]:
        found = {}
        for name, part in self.parts.items():
            found[name] = part(x, Context(mask=valid)) * valid[..., None]
        return found


@pytest.mark.slow
def test_blocks_of_every_kind_give_the_same_in_onnx_runtime(tmp_path: Path) -> None:
    """Padding on either side; another number of tokens than traced."""
    pytest.importorskip("onnxruntime")
    import onnx_ir as ir
    import onnxruntime

    from reattend.targets.onnx.forward import export_graph

    model = Every().float()

    def given(rows: int, n: int) -> dict[str, Tensor]:
        valid = torch.ones(rows, n, dtype=torch.bool)
        valid[0, :3] = valid[1, n - 5 :] = False
        return {"x": torch.randn(rows, n, HIDDEN), "valid": valid}

    torch.manual_seed(0)
    ir.save(export_graph(model, given(3, 18)), str(tmp_path / "m.onnx"))
    session = onnxruntime.InferenceSession(str(tmp_path / "m.onnx"))
    for rows, n in ((3, 18), (2, 31)):
        call = given(rows, n)
        with torch.no_grad():
            expected = model(**call)
        got = session.run(list(expected), {name: x.numpy() for name, x in call.items()})
        for a, b in zip(got, expected.values(), strict=True):
            assert (torch.from_numpy(a) - b).abs().max() <= 1e-4 * b.abs().max()


def latents(rows: int, *shape: int) -> Tensor:
    return torch.randn(rows, *shape, generator=torch.Generator().manual_seed(rows))


def unet() -> tuple[Any, dict[str, Any]]:
    diffusers: Any = pytest.importorskip("diffusers")
    model = diffusers.UNet2DConditionModel(
        sample_size=8, block_out_channels=(16,), layers_per_block=1, mid_block_type=None,
        down_block_types=("CrossAttnDownBlock2D",), up_block_types=("CrossAttnUpBlock2D",),
        cross_attention_dim=12, attention_head_dim=8, norm_num_groups=4,
    )  # fmt: skip
    inputs = {
        "sample": latents(4, 4, 8, 8), "timestep": torch.tensor([5, 9, 3, 2]),
        "encoder_hidden_states": latents(4, 7, 12), "return_dict": False,
    }  # fmt: skip
    return model, inputs


def dit() -> tuple[Any, dict[str, Any]]:
    diffusers: Any = pytest.importorskip("diffusers")
    model = diffusers.DiTTransformer2DModel(
        num_attention_heads=2, attention_head_dim=8, in_channels=4, num_layers=1, sample_size=8,
        patch_size=2, norm_num_groups=4, num_embeds_ada_norm=10,
    )  # fmt: skip
    inputs = {
        "hidden_states": latents(4, 4, 8, 8), "timestep": torch.tensor([5, 9, 2, 4]),
        "class_labels": torch.tensor([1, 2, 3, 0]), "return_dict": False,
    }  # fmt: skip
    return model, inputs


@pytest.mark.slow
def test_a_circle_of_image_tokens_is_exported_too(tmp_path: Path) -> None:
    """CLEAR on a DiT: a pattern that does not depend on values is a mask in the file."""
    torch.manual_seed(0)
    model, inputs = dit()
    rule = {"sites": "*", "to": "sparse", "pattern": {"grid": {"radius": 1}}, "image_grid": [4, 4]}
    data = [{name: x for name, x in inputs.items() if isinstance(x, Tensor)}]
    plan = {"rules": [rule], "calibrate": TRAINED}
    result = convert(model.eval(), plan=plan, inputs=inputs, data=data)
    assert learned(result.report)
    assert export(result.model, out=tmp_path / "x", inputs=inputs).max_error <= 1e-5


@pytest.mark.slow
@pytest.mark.parametrize(
    ("make", "preset", "kept"), [(unet, "linfusion", 3), (dit, "sla", 0)], ids=["unet", "dit"]
)
def test_diffusion_models_learn_from_random_latents_and_are_exported(
    make: Any, preset: str, kept: int, tmp_path: Path
) -> None:
    """Blocks that read a prompt stay as they are."""
    torch.manual_seed(0)
    model, inputs = make()
    data = [{name: x for name, x in inputs.items() if isinstance(x, Tensor)}]
    result = convert(model.eval(), plan=plan(preset), inputs=inputs, data=data)
    assert learned(result.report)
    assert sum(site.action != "converted" for site in result.report.sites) == kept
    made = export(result.model, out=tmp_path / "x", inputs=inputs)
    assert made.max_error <= 1e-5
    assert {entry.op for entry in made.manifest.layers} == {"linear"}


def test_files_of_one_pass_are_no_sessions_and_causal_blocks_no_part_of_them(
    tmp_path: Path,
) -> None:
    pytest.importorskip("onnxruntime")
    from decoder_models import decoder

    from reattend.targets.onnx import Session
    from reattend.targets.onnx.manifest import MANIFEST, Generation, Manifest

    model = convert(decoder("llama", layers=1, groups=2), plan="identity").model
    with pytest.raises(RefusedError, match="causal block"):
        export(model, out=tmp_path / "x", inputs={"input_ids": torch.zeros(2, 5).long()})
    assert not list(tmp_path.iterdir())
    fields: dict[str, Any] = {
        "dtype": "float32", "opset": 24, "domains": {"": 24}, "functions": [], "model_class": "V",
        "model_sha256": "", "layers": [], "inputs": [], "outputs": [], "states": [], "checks": [],
        "cache_bytes_per_token": 0, "generation": Generation(), "versions": {},
    }  # fmt: skip
    (tmp_path / MANIFEST).write_text(Manifest(**fields).model_dump_json())
    with pytest.raises(ArgumentError, match="does not decode from states"):
        Session(tmp_path)
