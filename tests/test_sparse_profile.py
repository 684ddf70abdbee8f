"""What finders cannot do is told, and what they were asked is not lost on the way."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from decoder_models import decoder

from reattend import convert
from reattend.errors import PlanError


def found_by(finder: str, **more: Any) -> Any:
    rule = {"sites": "*", "to": "sparse", "finder": finder, "density_at": 80, **more}
    plan = {"rules": [rule], "calibrate": {"seq_len": 192, "statistics_tokens": 768}}
    data = torch.randint(3, 97, (8, 192), generator=torch.Generator().manual_seed(0))
    return convert(decoder("llama", layers=1, groups=2), plan=plan, data=data)


def test_a_density_that_no_plan_reaches_is_told() -> None:
    pytest.importorskip("scipy")
    profile = {"sinks": 8, "samples": 1, "lengths": [64]}
    with pytest.raises(PlanError, match=r"no plan reaches kv_density 0\.01") as caught:
        found_by("profile", kv_density=0.01, profile=profile)
    said = "the smallest rules hold 25.0% of 64, 16.7% of 192 tokens"
    assert said in str(caught.value), caught.value


@pytest.mark.parametrize("finder", ["instant", "search"])
def test_densities_are_counted_where_the_plan_says(finder: str) -> None:
    made = found_by(finder, pattern={"sinks": 2, "window": 6}, keep_full=0.5)
    said = made.report.sites[0].options
    assert (said["density_at"], said["attention_density"]) == (80, "0.550")
