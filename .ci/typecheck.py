"""Run mypy on the package under its import names, and on the scripts beside it.

The folders of this repository are not named as they are imported (`converter/` is `reattend`),
and mypy cannot follow the hook that an editable install uses for that. So this makes a tree of
links with the import names, from the `package-dir` table of pyproject.toml, and runs
`mypy -p reattend` on it; messages are printed with the repository's own paths. Scripts import the
files beside them, so each folder of scripts is a run of its own.

    python .ci/typecheck.py [mypy arguments]
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
SCRIPTS = ("examples", "examples/conversion_package/reattend_gqa", "kernels/bench")


def link_tree(root: Path, tree: Path) -> dict[str, str]:
    """Build `tree` anew as links to the sources; return {import folder: source folder}."""
    setuptools = tomllib.loads((root / "pyproject.toml").read_text())["tool"]["setuptools"]
    dirs = setuptools["package-dir"]
    shutil.rmtree(tree, ignore_errors=True)
    folders = {}
    for package in setuptools["packages"]:
        head = max((h for h in dirs if f"{package}.".startswith(f"{h}.")), key=len)
        source = Path(dirs[head], *package.removeprefix(head).strip(".").split("."))
        target = tree.joinpath(*package.split("."))
        target.mkdir(parents=True, exist_ok=True)
        folders[str(target.relative_to(root))] = str(source)
        for file in sorted((root / source).glob("*")):
            if file.is_file():
                (target / file.name).symlink_to(file)
    return folders


def main() -> int:
    """Link, run mypy, print its messages with paths of the repository."""
    tree = ROOT / "build" / "typecheck"
    folders = link_tree(ROOT, tree)
    failed = mypy(["-p", "reattend"], [tree], folders)
    for folder in SCRIPTS:
        files = [str(f.relative_to(ROOT)) for f in sorted((ROOT / folder).glob("*.py"))]
        beside = ROOT / folder
        if (beside / "__init__.py").is_file():
            beside = beside.parent
        failed |= mypy(files, [tree, beside], folders)
    return failed


def mypy(what: list[str], path: list[Path], folders: dict[str, str]) -> int:
    """Run mypy on `what` with `path` to import from; returns its exit status."""
    run = subprocess.run(
        [sys.executable, "-m", "mypy", *what, *sys.argv[1:]],
        cwd=ROOT,
        env={**os.environ, "MYPYPATH": os.pathsep.join(map(str, path))},
        text=True,
        capture_output=True,
    )
    text = run.stdout
    for link in sorted(folders, key=len, reverse=True):
        text = text.replace(f"{link}/", f"{folders[link]}/")
    sys.stdout.write(text)
    sys.stderr.write(run.stderr)
    return run.returncode


if __name__ == "__main__":
    raise SystemExit(main())
