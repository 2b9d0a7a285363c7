"""Names: registered ones, published aliases, unknown ones, and what is known about each."""

import pytest
import timm

import linvision
from linvision.errors import UnknownNameError, UnknownOptionError, nearest
from linvision.models import describe, list_models, resolve_name
from linvision.models.counts import _table, count, counts
from linvision.models.registry import FAMILIES
from tests.models.sizes import LISTED


def test_every_alias_leads_to_a_registered_name():
    for family in FAMILIES:
        for alias, name in family.aliases.items():
            assert resolve_name(alias) == name
            assert name in list_models()
        assert set(family.published) <= set(list_models())


def test_lists_are_filtered_by_pattern():
    assert linvision.list_models("vil2_tiny*") == [
        "vil2_tiny_patch16_224.e800_in1k",
        "vil2_tiny_patch16_224.e400_in1k",
    ]
    assert linvision.list_models("nothing*") == []


def test_every_name_is_known_to_timm():
    for name in list_models():
        assert timm.models.is_model(timm.models.get_arch_name(name))


@pytest.mark.parametrize(
    ("name", "near"),
    [("vil2-tyni", "vil2-tiny"), ("vil_smalplus_patch16_224", "vil_smallplus_patch16_224"), ("resnet5O", "resnet50")],
)
def test_unknown_names_are_answered_with_the_nearest(name, near):
    with pytest.raises(UnknownNameError, match=f"unknown model '{name}'; did you mean .*{near}"):
        linvision.create_model(name)


@pytest.mark.parametrize(
    ("spelled", "name"),
    [
        ("vil2_tiny", "vil2_tiny_patch16_224.e800_in1k"),
        ("VIL2-Tiny", "vil2_tiny_patch16_224.e800_in1k"),
        ("deit3_tiny_e400", "deit3_tiny_patch16_224.e400_in1k"),
        ("vil2-mini-patch4-32", "vil2_mini_patch4_32"),
        ("l2vit-tiny", "l2vit_tiny"),
    ],
)
def test_names_may_be_spelled_otherwise(spelled, name):
    assert resolve_name(spelled) == name


def test_guesses_are_near():
    with pytest.raises(UnknownNameError, match=r"^unknown model 'banana'$"):
        resolve_name("banana")
    with pytest.raises(UnknownNameError, match=r"did you mean vim_tiny_patch16_224, "):
        resolve_name("vim-tiny")


def test_unknown_tags_and_options():
    with pytest.raises(UnknownNameError, match=r"has no checkpoint 'e300_in1k'; it has .*e800_in1k"):
        linvision.create_model("vil2_tiny_patch16_224.e300_in1k")
    with pytest.raises(UnknownOptionError, match=r"no option 'drop_path'; did you mean .*drop_path_rate"):
        linvision.create_model("vil2_mini_patch4_32", drop_path=0.1)
    with pytest.raises(ValueError, match="not both"):
        linvision.create_model("vil2-tiny", pretrained=True, checkpoint_path="x.pth")


def test_models_without_published_weights_say_so():
    with pytest.raises(ValueError, match="vil2_mini_patch4_32 has no published weights"):
        linvision.create_model("vil2_mini_patch4_32", pretrained=True)


def test_description():
    known = describe("vil2-tiny")
    assert known.name == "vil2_tiny_patch16_224.e800_in1k"
    assert known.family == "ViL"
    assert known.top1 == 78.3
    assert known.source.endswith("vil2_tiny16_e800_in1k.th")
    # 12 pairs of layers: projections and mLSTM, about 1.3 times DeiT-T's 1.26 G
    assert 1.5e9 < known.macs < 1.8e9
    assert describe("deit_tiny_patch16_224").macs == pytest.approx(1.26e9, rel=0.02)
    assert "stride-16 file" in describe("vil-tinyplus-stride8").note


def test_nearest_is_ordered_by_similarity_and_ignores_case():
    assert nearest("DIGIT", ["digits", "cifar10", "mnist"]) == ["digits"]


def test_the_table_of_counts_is_that_of_the_models():
    assert set(_table()) == set(LISTED)
    for name in ("vil2_mini_patch4_32", "vim_mini_patch4_32"):
        assert counts(name) == count(name)


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_the_whole_table_of_counts_is_that_of_the_models():
    assert {name: counts(name) for name in LISTED} == {name: count(name) for name in LISTED}
