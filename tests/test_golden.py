"""The normal form of a dozen architectures, line by line, as it was when somebody last read it.

`python tests/test_golden.py` writes the files of `tests/golden/` anew; read the difference.
"""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import transformers
import zoo_models

from reattend.dump import dump
from reattend.passes.find.sites import find
from reattend.search import Search

GOLDEN = Path(__file__).parent / "golden"
FAST = ("llama", "gpt2", "bert")
NAMES = [
    *FAST, "qwen3", "gemma3", "phi3", "gptj", "t5", "falcon_alibi", "gpt_oss", "bitnet",
    "diffllama", "qwen3_next", "bloom",
]  # fmt: skip
#: spellings change between versions of these
VERSIONS = f"torch {torch.__version__.split('+')[0]}, transformers {transformers.__version__}"


def written(name: str) -> str:
    """The dump of one model of the zoo, under the versions it was made with."""
    search = Search(zoo_models.build(name, None), None)
    seen = find(search.gm, search.captured.placeholders(), search.inputs_at)
    return f"{name} ({VERSIONS})\n\n{dump(search.captured, seen)}"


@pytest.mark.parametrize(
    "name", [n if n in FAST else pytest.param(n, marks=pytest.mark.slow) for n in NAMES]
)
def test_the_normal_form_is_the_one_that_was_read(name: str) -> None:
    expected = (GOLDEN / f"{name}.txt").read_text("utf-8")
    if VERSIONS not in expected.partition("\n")[0]:
        pytest.skip(f"the file is of other versions: {expected.partition(chr(10))[0]}")
    assert written(name) == expected


if __name__ == "__main__":
    for each in NAMES:
        (GOLDEN / f"{each}.txt").write_text(written(each), "utf-8")
