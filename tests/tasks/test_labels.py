"""Which output of a model a class of a data set is."""

from importlib.resources import files

import pytest
import torch
from timm.data import ImageNetInfo
from torch import nn

from linvision.data import Preprocess
from linvision.errors import UsageError
from linvision.tasks.classify import Classification, classify
from linvision.tasks.labels import imagenet_part, match_labels, unique
from linvision.training.opened import Opened


def opened(labels: tuple[str, ...], data: str = "", titles: tuple[str, ...] = ()) -> Opened:
    how = Preprocess((8, 8), (0.5,) * 3, (0.5,) * 3)
    return Opened(nn.Identity(), "model", "classify", how, labels, titles or labels, data)


class Thousand(nn.Module):
    num_classes = 1000


@pytest.fixture(scope="module")
def imagenet() -> Opened:
    labels, titles = Classification().names_of(Thousand())
    return opened(labels, titles=titles)


def test_equal_and_like_names():
    assert match_labels(("b", "a"), opened(("a", "b", "c")), "x").tolist() == [1, 0]
    assert match_labels(("Big Cat",), opened(("dog", "big_cat"), data="photos"), "x").tolist() == [1]
    with pytest.raises(UsageError, match="has 2 classes but model tells 3 others apart: it does not know x"):
        match_labels(("a", "x"), opened(("a", "b", "c")), "photos")
    with pytest.raises(UsageError, match="does not know x, y"):
        match_labels(("x", "y"), opened(("a", "b"), data="digits"), "photos")


@pytest.mark.parametrize("first", [0, 1])
@pytest.mark.parametrize("digits", [1, 4])
def test_as_many_numbers_as_there_are_outputs(imagenet, first, digits):
    numbers = tuple(sorted(f"{number:0{digits}}" for number in range(first, first + 1000)))
    assert match_labels(numbers, imagenet, "x").tolist() == [int(number) - first for number in numbers]


def test_numbers_that_may_mean_anything_are_refused(imagenet):
    for numbers in (range(10), range(2, 1002), range(500, 600)):
        with pytest.raises(UsageError, match="does not know"):
            match_labels(tuple(map(str, numbers)), imagenet, "x")


def test_nothing_is_matched_by_the_alphabet_where_outputs_have_names(imagenet):
    with pytest.raises(UsageError, match=r"it does not know thing 0, .*its first is n01440764 \(tench"):
        match_labels(tuple(f"thing {index}" for index in range(1000)), imagenet, "x")
    assert match_labels(("x", "y"), opened(("class 0", "class 1")), "x").tolist() == [0, 1]


def test_titles_identifiers_and_their_mixture(imagenet):
    assert match_labels(imagenet.titles[::-1], imagenet, "x").tolist() == list(range(999, -1, -1))
    names = ("n01440764-tench", "Goldfish", "great_white_shark", "maillot", "maillot, tank suit", "n02123045")
    assert match_labels(names, imagenet, "x").tolist() == [0, 1, 2, 638, 639, 281]


def test_a_name_of_several_outputs_is_refused_with_their_labels(imagenet):
    with pytest.raises(UsageError, match="crane may be n02012849 or n03126707"):
        match_labels(("crane",), imagenet, "x")
    assert imagenet.titles[134] == "crane (n02012849)"
    assert len(set(imagenet.titles)) == 1000


def test_unique_titles():
    assert unique(["a", "b", "a"], ["1", "2", "3"]) == ("a (1)", "b", "a (3)")


@pytest.mark.parametrize("name", ["a", "r"])
def test_imagenet_a_and_r_rank_their_200_classes(imagenet, name):
    synsets = tuple((files("timm.data") / "_info" / f"imagenet_{name}_synsets.txt").read_text().split())
    places = match_labels(synsets, imagenet, "x")
    assert len(synsets) == 200
    assert imagenet_part(places, imagenet) == f"ImageNet-{name.upper()}"
    assert imagenet_part(places[:100], imagenet) == ""
    assert imagenet_part(torch.arange(1000), imagenet) == ""


def test_only_ranked_outputs_are_predicted():
    logits = torch.tensor([[5.0, 1.0, 0.0, 2.0], [0.0, 3.0, 9.0, 1.0]])
    batches = [(logits, torch.tensor([1, 0]))]  # outputs 3 and 1
    outputs = torch.tensor([1, 3])
    plain = classify(nn.Identity(), batches, device=torch.device("cpu"), label_map=outputs)
    ranked = classify(nn.Identity(), batches, device=torch.device("cpu"), label_map=outputs, ranked=outputs)
    assert plain.figures["top1"] == 0
    assert ranked.predictions.tolist() == [3, 1]
    assert (ranked.figures["top1"], ranked.figures["ranked_classes"]) == (1, 2)
    expected = nn.functional.cross_entropy(logits[:, outputs], torch.tensor([1, 0]))
    assert ranked.figures["loss"] == pytest.approx(expected.item())
    assert "ranked_classes" not in plain.figures


def test_the_result_says_what_is_ranked(imagenet):
    synsets = ImageNetInfo().label_names()
    part = tuple((files("timm.data") / "_info" / "imagenet_a_synsets.txt").read_text().split())

    class Data:
        classes, name = part, "imagenet-a"

    batches = [(torch.eye(1000)[[synsets.index(part[7])]], torch.tensor([7]))]
    task = Classification()
    measured = task.measure(imagenet, batches, data=Data(), device=torch.device("cpu"), precision="32")
    assert task.eval_line(measured).endswith("among the 200 classes of ImageNet-A")
    assert measured.figures["top1"] == 1
