"""The `custom` flavour: one file, run by reattend's kernels or by its function bodies."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from onnx_library import built
from onnx_tiny import MLA, converted, sequences, torch_logits

from reattend.errors import ArgumentError, MissingExtraError

pytest.importorskip("onnx")
pytest.importorskip("onnxruntime")

from reattend.targets.onnx import Artifact, Session, export_onnx, library  # noqa: E402

MIXED = {"rules": [{"layers": [0], **MLA}, {"sites": "*", "to": "dense"}]}


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, Artifact]:
    """A model with both nodes, exported with the library of this test run."""
    torch.set_num_threads(1)
    model = converted(MIXED)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(library, "BUILT", built())
        return model, export_onnx(model, tmp_path_factory.mktemp("onnx") / "out", flavour="custom")


@pytest.mark.slow
@pytest.mark.parametrize("kernels", [True, False])
def test_prefill_single_steps_and_a_chunk_equal_torch(made: Any, kernels: bool) -> None:
    model, artifact = made
    ids, mask = sequences(2, 7 + 32 + 5, padding=3)
    expected = torch_logits(model, ids, mask)
    session = Session(artifact.path, threads=1, library=built() if kernels else False)
    got = [session.prefill(ids[:, :7].numpy(), mask[:, :7].numpy())]
    got += [session.step(ids[:, i : i + 1].numpy()) for i in range(7, 39)]
    got.append(session.step(ids[:, 39:].numpy()))
    assert np.abs(np.concatenate(got, 1) - expected)[mask.bool().numpy()].max() <= 1e-4


def test_the_manifest_says_who_checked_it(made: Any) -> None:
    manifest = made[1].manifest
    assert manifest.flavour == "custom"
    assert {c.runtime for c in manifest.checks} == {
        "onnxruntime", "onnxruntime with ai.reattend kernels",
    }  # fmt: skip
    assert [entry.form for entry in manifest.layers] == [
        "ai.reattend::LatentAttention", "ai.reattend::Attention",
    ]  # fmt: skip


def test_without_the_library_the_message_says_how_to_build_it(
    made: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, artifact = made
    monkeypatch.setattr(library, "BUILT", tmp_path / "nowhere.so")
    calls = [
        lambda: Session(artifact.path),
        lambda: Session(artifact.path, library=tmp_path / "other.so"),
        lambda: export_onnx(model, tmp_path / "out", flavour="custom"),
    ]
    for call in calls:
        with pytest.raises(MissingExtraError, match=r"kernels/csrc/build\.py") as caught:
            call()
        assert caught.value.exit_code == 5
    assert not list(tmp_path.iterdir())
    ids = np.array([[5, 6, 7]])
    assert np.isfinite(Session(artifact.path, library=False).logits(ids)).all()


def test_a_file_that_is_no_library_is_an_error(made: Any, tmp_path: Path) -> None:
    (tmp_path / "broken.so").write_bytes(b"nothing")
    with pytest.raises(MissingExtraError, match="cannot be loaded") as caught:
        Session(made[1].path, library=tmp_path / "broken.so")
    assert caught.value.exit_code == 5


def test_the_library_is_for_the_cpu(made: Any) -> None:
    with pytest.raises(ArgumentError, match="CPU only"):
        Session(made[1].path, ["CUDAExecutionProvider"], library=built())
