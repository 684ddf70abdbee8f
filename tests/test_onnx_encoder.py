"""Models without caches in ONNX: images, texts, and the passes that fill in a text."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import zoo_models
from transformers import ViTConfig, ViTForImageClassification

from reattend import convert
from reattend.denoising import denoising
from reattend.errors import ArgumentError, RefusedError

pytest.importorskip("onnx")
pytest.importorskip("onnxruntime")

from onnx.reference import ReferenceEvaluator  # noqa: E402

from reattend.targets.onnx import Artifact, EncoderSession, Session, export_onnx  # noqa: E402

TILES: dict[str, Any] = {"kind": "blocks", "tile": [4, 4]}
#: a class token and 8 x 8 patches; what is seen by layer 0, 1, ...
LAYERS: list[Any] = [
    {"grid": {"radius": 1, "norm": "circle"}, "select": None},
    {"select": {**TILES, "queries": "pooled", "topk": 2}},
    {
        "select": {
            "kind": "blocks", "tiles": [[2, 0], [0, 2], [4, 4]], "own": True, "across": "head",
            "topp": 0.25, "measure": "range",
        },
    },
    {"select": {"kind": "low-rank", "ratio": 0.25}},
]  # fmt: skip
OPS = [
    "RegionAttention + MaskedAttention", "ChosenRegionAttention + MaskedAttention",
    "MaskedAttention", "MaskedAttention",
]  # fmt: skip
SEES_LATER = {"kind": "observed", "block": 4, "ratio": 0.3}


def image(batch: int) -> torch.Tensor:
    return torch.randn(batch, 3, 32, 32)


def vit(layers: int = len(LAYERS)) -> Any:
    torch.manual_seed(0)
    config = ViTConfig(
        image_size=32, patch_size=4, hidden_size=16, intermediate_size=16, num_attention_heads=2,
        num_hidden_layers=layers, initializer_range=0.4, num_labels=7,
    )  # fmt: skip
    return ViTForImageClassification(config).eval()


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, Artifact]:
    rule = {"to": "sparse", "image_grid": [8, 8], "text_before": 1}
    learns = [{}, {}, {}, {"finder": "gate", "steps": 2}]
    rules = [
        {"layers": [n], **rule, "pattern": pattern, **learns[n]} for n, pattern in enumerate(LAYERS)
    ]
    data = [{"pixel_values": image(2)} for _ in range(8)]
    given = {"inputs": {"pixel_values": image(2)}, "data": data}
    model = convert(vit(), plan={"rules": rules}, **given).model
    with pytest.MonkeyPatch.context() as patch:  # so few tokens would be faster under a mask
        patch.setattr("reattend.targets.onnx.encoder_regions._STARTING", 0)
        return model, export_onnx(model, tmp_path_factory.mktemp("onnx") / "out")


def test_an_image_model_gives_torchs_logits(images: Any) -> None:
    """Static patterns, tiles, tiles of a head's own, and a trained guess: a layer each."""
    model, artifact = images
    assert [entry.op for entry in artifact.manifest.layers] == OPS
    tiles, masked = (entry.saves for entry in artifact.manifest.layers[1:3])
    assert "tiles they chose" in tiles and "of more than 512 tokens" in masked
    pixels = image(3)
    with torch.no_grad():
        want, plain = model(pixel_values=pixels).logits.numpy(), vit()(pixel_values=pixels).logits
    assert np.abs(plain.numpy() - want).max() > 1e-2
    got = EncoderSession(artifact.path, threads=1).run(pixel_values=pixels)
    assert list(got) == ["logits"]
    assert np.abs(got["logits"] - want).max() <= 1e-4
    (again,) = ReferenceEvaluator(str(artifact.model)).run(None, {"pixel_values": pixels.numpy()})
    assert np.abs(again - want).max() <= 1e-4


def test_inputs_of_an_image_model_are_checked(images: Any) -> None:
    session = EncoderSession(images[1].path, threads=1)
    with pytest.raises(ArgumentError, match="missing input: pixel_values"):
        session.run()
    with pytest.raises(ArgumentError, match="unknown input: input_ids"):
        session.run(pixel_values=image(1), input_ids=np.ones((1, 4)))
    with pytest.raises(ArgumentError, match="steps=3"), session.denoising(3):
        pass
    with pytest.raises(ArgumentError, match="does not decode"):
        Session(images[1].path)


@pytest.fixture(scope="module")
def texts(tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, Artifact]:
    """BERT with heads of two kinds in one layer, and a dense layer, by the plan's own target."""
    pattern = {
        "pattern": {"select": SEES_LATER},
        "head_patterns": [{"kv_heads": [1], "pattern": {"window": 3}}],
    }
    rules = [{"layers": [0], "to": "sparse", **pattern}, {"sites": "*", "to": "dense"}]
    plan = {"rules": rules, "targets": ["onnx"]}
    out = tmp_path_factory.mktemp("texts") / "out"
    torch.manual_seed(0)
    model = convert(zoo_models.build("bert", None), plan=plan, out=out).model
    return model, Artifact(out / "onnx", export_manifest(out / "onnx"))


def export_manifest(folder: Path) -> Any:
    from reattend.targets.onnx.manifest import read_manifest

    return read_manifest(folder)


def test_passes_over_a_text_read_what_one_of_them_saw(texts: Any) -> None:
    model, artifact = texts
    ops = [entry.op for entry in artifact.manifest.layers]
    assert ops == ["ObservedAttention", "BandAttention", "MaskedAttention"]
    assert [c.steps for c in artifact.manifest.checks] == [0, 5]
    session = EncoderSession(artifact.path, threads=1)
    for steps, tokens, new in ((6, 22, 9), (3, 17, 0)):
        ids = torch.randint(8, 97, (2, tokens))
        apart = []
        with denoising(model, steps, new), session.denoising(steps, new):
            for _ in range(steps):
                ids = torch.cat([ids[:, : tokens - new], torch.randint(8, 97, (2, new))], 1)
                with torch.no_grad():
                    want = model(input_ids=ids).logits.numpy()
                got = session.run(input_ids=ids)["logits"]
                assert np.abs(got - want).max() <= 1e-4
                apart.append(np.abs(session_alone(artifact, ids) - want).max())
        assert max(apart) > 1e-3  # a call by itself finds its own blocks


def session_alone(artifact: Artifact, ids: torch.Tensor) -> Any:
    return EncoderSession(artifact.path, threads=1).run(input_ids=ids)["logits"]


def test_a_text_in_passes_keeps_its_length_and_has_no_padding(texts: Any) -> None:
    session = EncoderSession(texts[1].path, threads=1)
    ids = np.full((2, 12), 9)
    mask = np.ones_like(ids)
    mask[0, -2:] = 0
    with pytest.raises(ArgumentError, match="given padding"):
        session.run(input_ids=ids, attention_mask=mask)
    with session.denoising(3, 4):
        session.run(input_ids=ids)
        with pytest.raises(ArgumentError, match="changed its length"):
            session.run(input_ids=ids[:, 1:])


def test_an_image_is_filled_in_too(tmp_path: Path) -> None:
    """Its passes are told by an input that is no text."""
    plan = {"rules": [{"sites": "*", "to": "sparse", "pattern": {"select": SEES_LATER}}]}
    model = convert(vit(1), plan=plan, inputs={"pixel_values": image(2)}).model
    artifact = export_onnx(model, tmp_path / "out")
    assert [c.steps for c in artifact.manifest.checks] == [0, 5]
    session = EncoderSession(artifact.path, threads=1)
    with denoising(model, 3), session.denoising(3):
        for pixels in image(6).split(2):
            with torch.no_grad():
                want = model(pixel_values=pixels).logits.numpy()
            assert np.abs(session.run(pixel_values=pixels)["logits"] - want).max() <= 1e-4


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_padded_texts_in_both_dtypes(dtype: str, tmp_path: Path) -> None:
    rules = [{"layers": [0], "to": "sparse", "pattern": {"sinks": 1, "window": 3}}]
    rules.append({"sites": "*", "to": "dense"})
    model = convert(zoo_models.build("bert", None), plan={"rules": rules}).model
    artifact = export_onnx(model, tmp_path / "out", dtype=dtype)
    ids, mask = torch.randint(8, 97, (2, 21)), torch.ones(2, 21, dtype=torch.long)
    mask[0, -4:], mask[1, :3] = 0, 0
    with torch.no_grad():
        want = model(input_ids=ids, attention_mask=mask).logits.numpy()
    got = EncoderSession(artifact.path, threads=1).run(input_ids=ids, attention_mask=mask)
    limit = {"float32": 1e-4, "float16": 0.1}[dtype]
    assert np.abs(got["logits"].astype(np.float32) - want)[mask.bool().numpy()].max() <= limit


def test_what_no_file_without_states_holds_is_refused(tmp_path: Path) -> None:
    plan = {"rules": [{"sites": "*", "to": "sparse", "pattern": {"select": {**SEES_LATER}}}]}
    plan["rules"][0]["pattern"]["window"] = 2
    with pytest.raises(RefusedError, match="observed beside other terms"):
        convert(
            zoo_models.build("bert", None), plan={**plan, "targets": ["onnx"]}, out=tmp_path / "out"
        )
    assert not list(tmp_path.glob("*/model*"))
