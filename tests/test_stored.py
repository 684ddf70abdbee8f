"""Checkpoints that earlier code wrote keep loading; `stored_samples.py` says how they were made."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import around_models
import pytest
import stored_samples
from stored_samples import CHECKPOINTS, DATA, IDS, INPUTS

from reattend import load
from reattend.errors import EXIT_BAD_INPUT, ModelError, OutputError
from reattend.install.stored import FORMAT, check_format
from reattend.outdir import VERSION, state_of_out

Change = Callable[[dict[str, Any]], Any]
STORED = [
    pytest.param(name, number, id=f"{name}-{number}")
    for name in CHECKPOINTS
    for number in range(1, FORMAT + 1)
]


def loaded(name: str, folder: Path) -> Any:
    if name == "graph":
        return load(folder, model=stored_samples.inline(), inputs={"ids": IDS})
    return load(folder)


@pytest.mark.smoke
@pytest.mark.parametrize(("name", "number"), STORED)
def test_a_stored_checkpoint_computes_what_it_did(name: str, number: int) -> None:
    expected = stored_samples.stored_logits(DATA / f"logits-{number}", name)
    model = loaded(name, DATA / f"{name}-{number}")
    assert expected.abs().max() > 1
    assert (stored_samples.logits(model, name) - expected).abs().max() <= 1e-4


def test_the_samples_hold_what_their_names_say() -> None:
    sites = json.loads((DATA / "checkpoint-1" / "config.json").read_text())["reattend"]["sites"]
    assert [site["kind"] for site in sites] == ["mixed", "latent"]
    assert all("around" not in site["binding"] for site in sites)
    around = json.loads((DATA / "around-1" / "config.json").read_text())["reattend"]["sites"]
    assert all(site["binding"]["around"]["before"] for site in around)
    assert all(site["binding"]["around"]["after"] for site in around)
    graph = json.loads((DATA / "graph-1" / "reattend.json").read_text())
    assert [site["binding"] for site in graph["sites"]] == [None]


@pytest.mark.parametrize("number", ["1", 0, -1, True, 1.5, None, [1]])
def test_a_format_that_is_no_number_is_named(number: Any) -> None:
    with pytest.raises(ModelError, match="no format number") as caught:
        check_format({"format": number, "sites": []}, "config.json")
    assert caught.value.next_step
    with pytest.raises(ModelError, match="got None"):
        check_format({"sites": []}, "config.json")


def without(part: str) -> Change:
    return lambda site: site.pop(part)


@pytest.mark.parametrize(
    ("change", "part"),
    [
        *((without(part), part) for part in ("path", "kind", "config", "binding")),
        (lambda site: site["config"]["core"].update(heads="many"), "core.heads"),
        (lambda site: site["binding"].update(cache=3), "cache"),
    ],
    ids=lambda given: given if isinstance(given, str) else "without",
)
def test_a_site_that_cannot_be_read_is_named(change: Change, part: str, tmp_path: Path) -> None:
    folder = tmp_path / "changed"
    shutil.copytree(DATA / f"checkpoint-{FORMAT}", folder)
    content = json.loads((folder / "config.json").read_text())
    change(content["reattend"]["sites"][1])
    (folder / "config.json").write_text(json.dumps(content))
    with pytest.raises(ModelError, match="converted blocks cannot be read") as caught:
        load(folder)
    assert part in caught.value.why
    assert caught.value.next_step


def versioned(folder: Path, version: Any) -> Path:
    shutil.copytree(DATA / f"out-{VERSION}", folder)
    file = folder / "fingerprint.json"
    content = json.loads(file.read_text())
    assert content.pop("version") == VERSION
    file.write_text(json.dumps(content if version is None else {**content, "version": version}))
    return folder


@pytest.mark.parametrize("version", [None, *range(1, VERSION + 1)])
def test_a_stored_fingerprint_is_recognised(version: int | None, tmp_path: Path) -> None:
    """None: as written before fingerprints had a number."""
    out = versioned(tmp_path / "out", version)
    assert state_of_out(out, INPUTS, overwrite=False) == "complete"
    with pytest.raises(OutputError, match="made with another seed"):
        state_of_out(out, {**INPUTS, "seed": "1"}, overwrite=False)
    (out / "plan.json").write_text("[]")
    with pytest.raises(OutputError, match=r"damaged: plan.json"):
        state_of_out(out, INPUTS, overwrite=False)


@pytest.mark.parametrize("version", [VERSION + 1, "1", 0])
@pytest.mark.parametrize("overwrite", [False, True])
def test_a_fingerprint_of_another_version_is_refused(
    version: Any, overwrite: bool, tmp_path: Path
) -> None:
    out = versioned(tmp_path / "out", version)
    with pytest.raises(OutputError, match="not known here") as caught:
        state_of_out(out, INPUTS, overwrite)
    assert caught.value.next_step


@pytest.mark.parametrize("name", CHECKPOINTS)
def test_a_stored_checkpoint_with_a_newer_format_is_refused(name: str, tmp_path: Path) -> None:
    folder = tmp_path / "newer"
    shutil.copytree(DATA / f"{name}-{FORMAT}", folder)
    file = folder / ("reattend.json" if name == "graph" else "config.json")
    content = json.loads(file.read_text())
    section = content if name == "graph" else content["reattend"]
    assert section["format"] == FORMAT
    section["format"] = FORMAT + 1
    file.write_text(json.dumps(content))
    with pytest.raises(ModelError, match=f"format {FORMAT + 1}.*reads up to {FORMAT}") as caught:
        loaded(name, folder)
    assert caught.value.exit_code == EXIT_BAD_INPUT


def test_a_sample_is_small_and_names_no_machine() -> None:
    files = [file for file in DATA.rglob("*") if file.is_file()]
    for sample in DATA.iterdir():  # a format more is a sample more
        inside = [file for file in files if file.is_relative_to(sample)]
        assert 0 < sum(file.stat().st_size for file in inside) < 80_000, sample
    for file in files:
        assert str(Path(around_models.__file__).parent).encode() not in file.read_bytes(), file
