"""The presets: one YAML file per named plan, read by `Plan.load("<name>")`.

A preset is an ordinary plan file whose leading comment says what it does and whose method it
is, so `reattend plans show NAME` is a starting point to copy and edit. The name of a preset is
the file's name without `.yaml`; adding a file adds a preset.
"""

from __future__ import annotations

from importlib.resources import files


def preset_names() -> list[str]:
    """The presets that are shipped, in alphabetical order."""
    here = files(__name__)
    return sorted(f.name.removesuffix(".yaml") for f in here.iterdir() if f.name.endswith(".yaml"))


def preset_of(to: str) -> str:
    """A preset that converts to this: one that works, for people whose own plan does not."""
    names = ["transmla", *preset_names()]
    return next((n for n in names if f"to: {to}\n" in preset_text(n)), names[0])


def preset_text(name: str) -> str:
    """The YAML of one preset, comments included.

    Raises:
        FileNotFoundError: there is no preset of this name; `Plan.load` turns it into a
            `PlanError` that names the nearest one.
    """
    return files(__name__).joinpath(f"{name}.yaml").read_text(encoding="utf-8")


def preset_summary(name: str) -> str:
    """The first line of a preset's leading comment, for listings."""
    first = preset_text(name).splitlines()[0]
    return first.removeprefix("#").strip()
