"""Names of classes as people write them."""

from linvision.data.labels import match_names


def test_equal_names_go_before_like_ones():
    assert match_names(["cat", "Dog"], ["Dog", "dog", "cat", "Cat"]) == {"cat": 2, "Dog": 0}


def test_case_spaces_underscores_dashes_and_unicode_make_no_difference():
    names = ["Golden Retriever", "great-white__shark", "cafe\N{COMBINING ACUTE ACCENT}"]
    known = ["caf\N{LATIN SMALL LETTER E WITH ACUTE}", "golden_retriever", "great white shark"]
    assert match_names(names, known) == dict(zip(names, [1, 2, 0], strict=True))


def test_what_may_be_several_is_none():
    assert match_names(["CAT"], ["cat", "Cat"]) == {}
    assert match_names(["Cat", "CAT"], ["cat"]) == {}
    assert match_names(["cat", "CAT"], ["cat"]) == {"cat": 0}
    assert match_names(["cow"], ["cat"]) == {}
