"""Every shipped kernel compiles for every target within its limits, without a GPU."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pytest

from reattend.kernels.aot_forms import Form, forms
from reattend.kernels.configs import KernelConfig, find_config
from reattend.kernels.spills import ALL_REGISTERS, FREE, SPILLS
from reattend.kernels.targets import TARGETS, Target, target_of_device

ROOT = Path(__file__).parents[1]
COMMITTED = ROOT / "kernels" / "bench" / "results" / "aot.json"


AOT = str(ROOT / "kernels" / "bench" / "aot.py")


def identity(entry: dict[str, Any]) -> str:
    keys = ("target", "kernel", "width", "width_class", "element_bytes", "variant", "block")
    return json.dumps([*(entry[key] for key in keys), entry["config"]])


def expected(targets: tuple[Target, ...] = TARGETS, usual: bool = False) -> set[str]:
    return {
        json.dumps([target.name, f.kernel, f.wide, f.width_class, f.size, f.variant, f.block,
                    f.config.told])
        for target in targets
        for f in forms(target.name)
        if f.is_usual or not usual
    }  # fmt: skip


def compiling(*asked: str) -> subprocess.CompletedProcess[str]:
    """In a process of its own: the interpreter's variable must not be set there."""
    env = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    command = [sys.executable, AOT, *asked]
    return subprocess.run(command, env=env, capture_output=True, text=True, check=False)


def test_committed_report_is_about_the_shipped_table() -> None:
    report = json.loads(COMMITTED.read_text())
    assert {identity(entry) for entry in report["kernels"]} == expected()
    assert [target["name"] for target in report["targets"]] == [t.name for t in TARGETS]
    assert [t["shared_limit"] for t in report["targets"]] == [t.shared_limit for t in TARGETS]
    assert all(entry["problems"] == [] for entry in report["kernels"])


def test_committed_report_is_of_these_sources(tmp_path: Path) -> None:
    """The same sources, constants and compiler give the same code: what changed is compiled."""
    if json.loads(COMMITTED.read_text())["triton"] != version("triton"):
        pytest.skip("the report is of another Triton")
    run = compiling("--check")
    assert run.returncode == 0, (
        f"run kernels/bench/aot.py\n{run.stdout[-2000:]}{run.stderr[-2000:]}"
    )
    report = json.loads(COMMITTED.read_text())
    report["kernels"][7]["source"] = "0123456789abcdef"
    report["kernels"][9]["config"]["rows"] *= 2
    del report["kernels"][11]
    out = tmp_path / "aot.json"
    out.write_text(json.dumps(report))
    run = compiling("--check", "--out", str(out))
    assert run.returncode == 1 and len(run.stdout.splitlines()) == 3, run.stdout + run.stderr


def test_forms_hold_what_launches_differ_in() -> None:
    found = list(forms("sm_90"))
    assert len(found) == len(set(found))
    prefill = [f for f in found if f.kernel == "sparse_prefill" and f.size == 2]
    assert {f.block for f in prefill} == {16, 32, 64}
    assert {f.wide for f in prefill} == {64, 96, 128, 192, 256}
    assert all(
        f.config.keys <= f.block and f.config.rows <= f.block for f in prefill if f.block < 64
    )
    assert {f.variant for f in found if f.kernel == "latent_dkv"} == {"plain", "full"}
    assert {f.wide for f in found if f.kernel == "latent_decode"} == {96, 128, 192, 256, 384, 512}


def test_what_spills_on_nvidia_is_named_with_its_bytes() -> None:
    report = json.loads(COMMITTED.read_text())
    found: dict[str, dict[tuple[str, int, int], int]] = {name: {} for name in SPILLS}
    for entry in report["kernels"]:
        key = (entry["kernel"], entry["element_bytes"], entry["width_class"])
        if entry["spill"] and entry["target"] in found:
            told = found[entry["target"]]
            told[key] = max(told.get(key, 0), entry["spill"])
    assert found == SPILLS


def test_a_limit_of_registers_reaches_the_launch() -> None:
    free = [(t, *entry) for t, entries in FREE.items() for entry in entries]
    for target, kernel, size, width in free:
        config = find_config(target, kernel, width, size)
        assert config is not None
        assert config.launch["maxnreg"] == ALL_REGISTERS
        assert config.told["registers"] == ALL_REGISTERS
    plain = KernelConfig(16, 32, 4, 1)
    assert plain.launch == {"num_warps": 4, "num_stages": 1}
    assert "registers" not in plain.told


def test_every_width_and_dtype_has_a_kernel_and_wider_ones_have_none() -> None:
    for target in TARGETS:
        for size in (2, 4):
            for phase in ("prefill", "decode"):
                for width in (1, 64, 65, 256):
                    assert find_config(target.name, f"attention_{phase}", width, size), target
                assert find_config(target.name, f"latent_{phase}", 512, size), target
                assert find_config(target.name, f"attention_{phase}", 257, size) is None
                assert find_config(target.name, f"latent_{phase}", 513, size) is None
            for kernel in ("latent_dq", "latent_dkv"):
                assert find_config(target.name, kernel, 512, size), target
                assert find_config(target.name, kernel, 513, size) is None
            gradients = ("sparse_dq", "sparse_dkv", "attention_dq", "attention_dkv")
            for kernel in ("sparse_prefill", "sparse_decode", *gradients):
                assert find_config(target.name, kernel, 256, size), target
                assert find_config(target.name, kernel, 257, size) is None
            chunked = ("state", "read", "state_back", "read_back")
            found = [find_config(target.name, f"linear_{name}", 1, size) for name in chunked]
            assert len({c.rows for c in found if c}) == 1 and None not in found  # one chunk
            assert find_config(target.name, "linear_channels", 128, size), target
            assert find_config(target.name, "linear_channels", 129, size) is None
        assert find_config(target.name, "attention_prefill", 64, 8) is None
    assert find_config("sm_75", "attention_prefill", 64, 2) is None


@pytest.mark.parametrize(
    ("backend", "arch", "name"),
    [("cuda", 80, "sm_80"), ("cuda", 89, "sm_80"), ("cuda", 90, "sm_90"), ("cuda", 100, "sm_100")]
    + [("cuda", 120, "sm_80"), ("cuda", 75, None), ("hip", "gfx942", "gfx942")]
    + [("hip", "gfx1100", None)],
)
def test_devices_map_to_targets(backend: str, arch: int | str, name: str | None) -> None:
    target = target_of_device(backend, arch)
    assert (target.name if target else None) == name


@pytest.mark.slow
@pytest.mark.early
@pytest.mark.parametrize("target", TARGETS, ids=lambda target: target.name)
def test_every_shipped_kernel_compiles_within_limits(target: Target, tmp_path: Path) -> None:
    out = tmp_path / "aot.json"
    run = compiling("--out", str(out), "--target", target.name, "--usual")
    assert run.returncode == 0, run.stdout + run.stderr[-2000:]
    report = json.loads(out.read_text())
    assert {identity(entry) for entry in report["kernels"]} == expected((target,), usual=True)
    for entry in report["kernels"]:
        assert entry["problems"] == [], entry
        assert entry["shared"] > 0
        assert entry["registers"] > 0
        if entry["element_bytes"] == 2 and entry["kernel"] != "linear_step":
            assert entry["matrix_ops"] > 0, entry


@pytest.mark.slow
def test_limits_are_noticed() -> None:
    """A tile that cannot be launched compiles without complaint: our check must object."""
    if os.environ.get("TRITON_INTERPRET") == "1":
        pytest.skip("the interpreter replaces the compiler in this process")
    from reattend.kernels.aot import compile_form

    too_big = KernelConfig(rows=64, keys=64, warps=4, stages=3)
    result = compile_form(TARGETS[0], Form("latent_prefill", 512, 2, too_big, "plain"))
    assert any("shared memory" in problem for problem in result.problems)
    assert any("spills" in problem for problem in result.problems)


def test_refuses_to_run_in_the_interpreter(tmp_path: Path) -> None:
    run = subprocess.run(
        [sys.executable, AOT, "--out", str(tmp_path / "x.json")],
        env=os.environ | {"TRITON_INTERPRET": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert run.returncode == 2
    assert "unset TRITON_INTERPRET" in run.stderr
    assert not (tmp_path / "x.json").exists()
