"""The house: packages, wheel, pins and import hygiene."""

import email
import fnmatch
import re
import shutil
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).resolve().parent.parent
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
SETUPTOOLS = PROJECT["tool"]["setuptools"]
MAKEFILE = (ROOT / "Makefile").read_text()


def in_fresh_python(code):
    """The words printed by `code`, run from the root as a user would."""
    out = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert out.returncode == 0, out.stderr
    return out.stdout.split()


def sources():
    """Every file of the package: (path from the root, path in the wheel)."""
    for package, folder in SETUPTOOLS["package-dir"].items():
        for path in sorted((ROOT / folder).rglob("*")):
            if path.is_file() and "__pycache__" not in path.parts:
                inside = path.relative_to(ROOT / folder).as_posix()
                yield path, f"{package.replace('.', '/')}/{inside}"


def test_the_package_list_is_the_tree():
    found = {
        str(Path(name).parent).replace("/", ".") for path, name in sources() if path.suffix == ".py"
    }
    assert sorted(found) == sorted(SETUPTOOLS["packages"])
    for path, _ in sources():
        if path.suffix == ".py":
            assert (path.parent / "__init__.py").is_file(), f"{path.parent} has no __init__.py"


def test_every_data_file_is_package_data():
    for path, name in sources():
        if path.suffix == ".py":
            continue
        package, file = str(Path(name).parent).replace("/", "."), Path(name).name
        globs = SETUPTOOLS["package-data"].get(package, [])
        assert any(fnmatch.fnmatch(file, glob) for glob in globs), f"{name} would not be installed"


def test_nothing_shadows_the_package_called_kernels():
    inits = [p.relative_to(ROOT).as_posix() for p in (ROOT / "kernels").rglob("__init__.py")]
    assert all(p.startswith("kernels/ops/") for p in inits)
    assert not list((ROOT / "tests").rglob("__init__.py"))
    folders = in_fresh_python(
        "import sys, transformers, reattend.kernels, reattend.passes, reattend.targets\n"
        "print([n for n in ('converter', 'passes', 'targets') if n in sys.modules])\n"
        "print(getattr(sys.modules.get('kernels'), '__file__', None))\n"
    )
    assert folders[0] == "[]"
    assert folders[1] == "None" or not folders[1].startswith(str(ROOT))


@pytest.mark.smoke
@pytest.mark.parametrize("module", ["reattend", "reattend.plan", "reattend.errors"])
def test_importing_is_light(module):
    heavy = ["torch", "transformers", "triton", "onnx", "onnxruntime", "matplotlib"]
    code = f"import sys, {module}; print(*[m for m in {heavy} if m in sys.modules])"
    assert in_fresh_python(code) == []


def test_extras_named_in_messages_exist_and_no_extra_has_two_runtimes():
    extras = PROJECT["project"]["optional-dependencies"]
    named = set()
    for folder in ("converter", "passes", "kernels", "targets"):
        for file in (ROOT / folder).rglob("*.py"):
            named |= set(re.findall(r"reattend\[(\w+)\]", file.read_text("utf-8")))
    assert {"onnx", "gpu", "eval"} <= named <= set(extras)
    assert {"onnx", "gpu", "eval", "plots", "dev", "all"} <= set(extras)
    for name in extras:
        assert not {"onnxruntime", "onnxruntime-gpu"} <= whole_extra(extras, name), name
    assert "onnxruntime-gpu" in whole_extra(extras, "gpu")


def whole_extra(extras, name):
    """Package names of an extra, those of the extras it names included."""
    found = set()
    for need in map(Requirement, extras[name]):
        found |= {canonicalize_name(need.name)} - {"reattend"}
        for inner in need.extras if need.name == "reattend" else ():
            found |= whole_extra(extras, inner)
    return found


def test_pins_cover_the_requirements():
    lines = (ROOT / "constraints.txt").read_text().splitlines()
    pins = [Requirement(line) for line in lines if line and not line.startswith("#")]
    assert pins[0].name == "torch"
    assert all(re.fullmatch(r"==[0-9.]+", str(pin.specifier)) for pin in pins)
    versions = {canonicalize_name(p.name): str(p.specifier).removeprefix("==") for p in pins}
    extras = PROJECT["project"]["optional-dependencies"]
    wanted = [
        *PROJECT["project"]["dependencies"],
        *extras["dev"],
        *extras["onnx"],
        *extras["plots"],
    ]
    for text in wanted:
        need = Requirement(text)
        if need.name != "reattend":
            name = canonicalize_name(need.name)
            assert name in versions, f"{name} has no pin in constraints.txt"
            assert versions[name] in need.specifier, text
    assert f"torch=={versions['torch']} " in MAKEFILE


@pytest.mark.parametrize("name", ["torch", "transformers"])
def test_the_oldest_versions_are_the_ones_that_are_tested(name):
    tested = re.search(rf"^MIN_{name.upper()} := (\S+)\.0$", MAKEFILE, re.MULTILINE)
    assert f"{name}>={tested[1]}" in PROJECT["project"]["dependencies"]


def test_no_path_of_a_machine_is_written_down():
    listed = subprocess.run(
        ["git", "ls-files", "--cached", "--others", "--exclude-standard"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
    )
    kinds = {".py", ".md", ".toml", ".yaml", ".yml", ".txt", ".json", ".j2", ""}
    machine = re.compile(r"(?<![\w./~-])/(?:work|opt|root|tmp|home/\w+)/")
    found = [
        f"{name}:{number}"
        for name in listed.stdout.splitlines()
        if Path(name).suffix in kinds and not name.startswith("examples/models/")
        for number, line in enumerate(_lines(ROOT / name), 1)
        if machine.search(line) and name != "tests/test_packaging.py"
    ]
    assert found == []


def _lines(path):
    return path.read_text(encoding="utf-8").splitlines() if path.is_file() else []


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    copy = tmp_path_factory.mktemp("wheel")
    for folder in SETUPTOOLS["package-dir"].values():
        ignore = shutil.ignore_patterns("__pycache__")
        shutil.copytree(ROOT / folder, copy / folder, ignore=ignore)
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, copy / name)
    subprocess.run(
        [
            *(sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps"),
            *("--no-build-isolation", "--wheel-dir", "out", "."),
        ],
        cwd=copy,
        check=True,
    )
    (file,) = (copy / "out").glob("*.whl")
    return zipfile.ZipFile(file)


@pytest.mark.slow
def test_the_wheel_holds_the_package_and_nothing_else(wheel):
    names = {n for n in wheel.namelist() if ".dist-info/" not in n}
    assert names == {name for _, name in sources()}
    assert all(n.startswith("reattend/") for n in names)


@pytest.mark.slow
def test_the_wheel_says_who_it_is(wheel):
    (name,) = (n for n in wheel.namelist() if n.endswith(".dist-info/METADATA"))
    metadata = email.message_from_bytes(wheel.read(name))
    assert metadata["Name"] == "reattend"
    assert metadata["License-Expression"] == "Apache-2.0"
    assert metadata["Requires-Python"] == ">=3.11"
    (entry,) = (n for n in wheel.namelist() if n.endswith(".dist-info/entry_points.txt"))
    assert "reattend = reattend.cli:main" in wheel.read(entry).decode()


@pytest.mark.slow
def test_the_wheel_works_without_the_checkout(wheel, tmp_path):
    wheel.extractall(tmp_path)
    code = (
        "import sys; sys.path.insert(0, sys.argv[1])\n"
        "import reattend.plans as p; print(p.__file__, *p.preset_names())"
    )
    out = subprocess.run(
        [sys.executable, "-S", "-c", code, str(tmp_path)],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=True,
    ).stdout.split()
    assert out[0].startswith(str(tmp_path))
    assert {"identity", "transmla"} <= set(out[1:])
