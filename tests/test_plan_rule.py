"""Rule: how layers of a stack are counted, and what match() answers."""

import pytest

from reattend.plan_rule import Rule, layer_of


@pytest.mark.parametrize(
    ("paths", "layers"),
    [
        (["model.layers.0.self_attn", "model.layers.3.self_attn"], [(0, 4), (3, 4)]),
        (["transformer.h.1.attn"], [(1, 2)]),
        (["0.attn", "1.attn"], [(0, 2), (1, 2)]),
        (["vision.layers.0.attn", "text.layers.4.attn"], [(0, 1), (4, 5)]),
        (["block.2.layer.1.EncDecAttention"], [(2, 3)]),
        (["attn", "attn2"], [(0, 2), (1, 2)]),
        (["head", "h.0.a"], [(0, 1), (0, 1)]),
        (["h.10.a", "h.2.a"], [(10, 11), (2, 11)]),
    ],
)
def test_layer_of(paths, layers):
    assert [layer_of(paths)[p] for p in paths] == layers


def test_match_wants_both_sites_and_layers():
    rule = Rule(sites="*.self_attn", layers=[-1], to="keep")
    assert rule.match("model.layers.5.self_attn", 5, 6)
    assert not rule.match("model.layers.5.cross_attn", 5, 6)
    assert not rule.match("model.layers.4.self_attn", 4, 6)
    assert not rule.match("model.layers.5.self_attn", None, 6)


def test_globs_are_case_sensitive_and_cover_the_whole_path():
    assert Rule(sites="*SelfAttention", to="keep").match("a.SelfAttention", 0, 1)
    assert not Rule(sites="*selfattention", to="keep").match("a.SelfAttention", 0, 1)
    assert not Rule(sites="layers.0", to="keep").match("model.layers.0.attn", 0, 1)
    assert not Rule(sites="re:layers", to="keep").match("layers.0", 0, 1)


def test_slices_follow_python_and_clip():
    assert Rule(layers=["4:100"], to="keep").layer_set(6) == {4, 5}
    assert Rule(layers=["::-2"], to="keep").layer_set(6) == {1, 3, 5}
    assert Rule(sites="*", to="keep").layer_set(3) == {0, 1, 2}
    assert Rule(layers=[7, -7], to="keep").layer_set(6) == set()
