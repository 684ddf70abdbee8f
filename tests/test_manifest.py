"""An export that earlier code wrote keeps running; `stored_samples.py` says how it was made."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from stored_samples import DATA, IDS, stored_logits

from reattend.errors import EXIT_BAD_INPUT, ModelError
from reattend.targets.onnx.manifest import SCHEMA, read_manifest

EXPORTS = [DATA / f"onnx-{number}" for number in range(1, SCHEMA + 1)]


@pytest.mark.parametrize("folder", EXPORTS, ids=lambda folder: folder.name)
def test_a_stored_manifest_reads_as_it_was(folder: Path) -> None:
    manifest = read_manifest(folder)
    written = json.loads((folder / "manifest.json").read_text())
    assert manifest.model_dump(mode="json", exclude_unset=True) == written
    assert [(entry.layer, entry.op) for entry in manifest.layers] == [
        (0, "Attention"), (0, "LatentAttention"), (1, "LatentAttention"),
    ]  # fmt: skip
    assert manifest.domains == {"": 24, "ai.reattend": 1}
    assert manifest.cache_bytes_per_token == 4 * ((8 + 8 + 6 + 2) + (10 + 4))


@pytest.mark.parametrize("folder", EXPORTS, ids=lambda folder: folder.name)
def test_a_stored_export_runs_in_todays_session(folder: Path) -> None:
    """It is the Llama of checkpoint-1, whose logits are stored too: prefill, then steps."""
    pytest.importorskip("onnxruntime")
    from reattend.targets.onnx import Session

    expected = stored_logits(DATA / "logits-1", "checkpoint").numpy()
    session = Session(folder, threads=1)
    ids = IDS.numpy()
    got = [session.prefill(ids[:, :4]), *(session.step(ids[:, i : i + 1]) for i in (4, 5, 6))]
    assert np.abs(np.concatenate(got, 1) - expected).max() <= 1e-4


def test_a_stored_manifest_with_a_newer_schema_is_refused(tmp_path: Path) -> None:
    shutil.copytree(EXPORTS[-1], tmp_path / "newer")
    file = tmp_path / "newer" / "manifest.json"
    content = json.loads(file.read_text())
    assert content["schema_version"] == SCHEMA
    file.write_text(json.dumps(content | {"schema_version": SCHEMA + 1}))
    with pytest.raises(ModelError, match=f"version {SCHEMA + 1}.*reads up to {SCHEMA}") as caught:
        read_manifest(tmp_path / "newer")
    assert caught.value.exit_code == EXIT_BAD_INPUT
