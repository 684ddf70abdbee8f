"""Which rules take which sites: first match wins, layers count in each stack."""

import pytest

from reattend.errors import NothingFoundError
from reattend.plan import Plan

LLAMA = [f"model.layers.{i}.self_attn" for i in range(6)]
T5 = [
    "encoder.block.0.layer.0.SelfAttention",
    "encoder.block.1.layer.0.SelfAttention",
    "decoder.block.0.layer.0.SelfAttention",
    "decoder.block.0.layer.1.EncDecAttention",
    "decoder.block.1.layer.0.SelfAttention",
    "decoder.block.1.layer.1.EncDecAttention",
    "decoder.block.2.layer.0.SelfAttention",
    "decoder.block.2.layer.1.EncDecAttention",
]


def taken(plan, paths):
    """For each path the index of its only rule, or None."""
    assigned = plan.assign(paths).values()
    assert all(len(rules) < 2 for rules in assigned)
    return [plan.rules.index(rules[0]) if rules else None for rules in assigned]


def test_first_match_wins_and_other_sites_stay():
    plan = Plan.load(
        {
            "rules": [
                {"sites": "*.0.*", "to": "keep"},
                {"layers": ["0:2"], "to": "mla", "kv_keep": 0.5},
            ]
        }
    )
    assert taken(plan, LLAMA) == [0, 1, None, None, None, None]


@pytest.mark.parametrize(
    ("rule", "layers"),
    [
        ({"layers": [0, 2, -1]}, [0, 2, 5]),
        ({"layers": "2:4"}, [2, 3]),
        ({"layers": "::2"}, [0, 2, 4]),
        ({"layers": ["-2:"]}, [4, 5]),
        ({"layers": 3}, [3]),
        ({"layers": "1:", "sites": "*.[13].*"}, [1, 3]),
        ({"sites": ["*.1.self_attn", "re:.*\\.5\\..*"]}, [1, 5]),
        ({"sites": "re:model.layers.[^4].self_attn"}, [0, 1, 2, 3, 5]),
    ],
)
def test_sites_and_layers_choose(rule, layers):
    plan = Plan.load({"rules": [{**rule, "to": "keep"}]})
    got = plan.assign(LLAMA)
    assert [i for i, p in enumerate(LLAMA) if got[p]] == layers


def test_layers_count_in_each_stack():
    plan = Plan.load({"rules": [{"layers": [-1], "to": "keep"}]})
    last = [p for p, rules in plan.assign(T5).items() if rules]
    assert last == [T5[1], T5[6], T5[7]]


def test_paths_without_a_number_count_in_order():
    plan = Plan.load({"rules": [{"layers": [1], "to": "keep"}]})
    assert taken(plan, ["first.attn", "second.attn", "third.attn"]) == [None, 0, None]


def test_a_rule_with_heads_leaves_the_rest_to_later_rules():
    rules = [
        {"layers": [0], "heads": [1], "to": "keep"},
        {"layers": [0, 1], "heads": [0], "to": "mla"},
        {"layers": ["::2"], "to": "keep"},
        {"sites": "*", "heads": [1], "to": "mla"},
    ]
    plan = Plan.load({"rules": rules})
    assigned = [[plan.rules.index(r) for r in taken] for taken in plan.assign(LLAMA).values()]
    assert assigned == [[0, 1, 2], [1, 3], [2], [3], [2], [3]]


def test_a_rule_that_matches_nothing_names_its_glob_and_near_sites():
    plan = Plan.load({"rules": [{"sites": "model.layer.3.self_attn", "to": "mla"}]})
    with pytest.raises(NothingFoundError) as caught:
        plan.assign(LLAMA)
    assert "model.layer.3.self_attn" in str(caught.value)
    assert "model.layers.3.self_attn" in str(caught.value)
    assert "rules.0" in str(caught.value)


def test_a_layer_that_does_not_exist_is_named():
    plan = Plan.load({"rules": [{"layers": [0, 12], "to": "mla"}]})
    with pytest.raises(NothingFoundError, match=r"layer 12 does not exist[\s\S]*6 layers"):
        plan.assign(LLAMA)


def test_rules_after_a_catch_all_may_match_nothing():
    rules = [{"sites": "*", "to": "mla"}, {"sites": "nothing", "to": "keep"}]
    assert taken(Plan.load({"rules": rules}), LLAMA) == [0] * 6
    with pytest.raises(NothingFoundError, match="nothing"):
        Plan.load({"rules": rules[::-1]}).assign(LLAMA)
