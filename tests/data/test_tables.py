"""Data sets in CSV files."""

import pytest

from linvision.data import FolderData, open_data, open_test_data
from linvision.errors import RunError, UsageError


def table(tmp_path, text: str):
    path = tmp_path / "photos.csv"
    path.write_bytes(text.encode() if isinstance(text, str) else text)
    return str(path)


def shown(data: FolderData, part: str) -> list[tuple[str, str]]:
    return [(path.name, data.classes[label]) for path, label in getattr(data, part)]


SPLIT = "image,label,split\na/1.jpg,dog,train\n2.jpg,Big Cat,training\n3.jpg,big_cat,val\n4.jpg,dog,test\n"


def test_splits_of_a_column(tmp_path):
    data = open_data(table(tmp_path, SPLIT))
    assert (data.name, data.classes) == ("photos", ("Big Cat", "dog"))
    assert data.train[0] == (tmp_path / "a/1.jpg", 1)
    assert shown(data, "train") == [("1.jpg", "dog"), ("2.jpg", "Big Cat")]
    assert shown(data, "test") == [("3.jpg", "Big Cat")]
    assert shown(data, "held_out") == [("4.jpg", "dog")]
    assert shown(open_test_data(table(tmp_path, SPLIT)), "test") == [("3.jpg", "big_cat")]


def test_a_share_for_validation(tmp_path):
    lines = "".join(f"\n{index}.jpg,{'cat' if index % 2 else 'dog'}" for index in range(100))
    path = table(tmp_path, "\ufeffPath, Label" + lines)
    data = open_data(path, val_split=0.3)
    assert len(data.train) + len(data.test) == 100
    assert 20 <= len(data.test) <= 40
    assert open_test_data(path, val_split=0.3).test == data.test
    assert len(open_test_data(path).test) == 100


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("file;class\n1.jpg;cat", r"starts with file;class: it needs a header path,label"),
        ("", "starts with nothing"),
        ("path,label\n", "is empty: it has no line after its header"),
        (
            "path,label\n1.jpg,cat",
            r"no images for validation: mark them by val in a column split, or .*--val-split 0.2",
        ),
        ("path,label\n1.jpg", "line 2 of .* is incomplete"),
        ("path,label,split\n\n1.jpg,cat,train\n2.jpg,,val", "line 4 of .* is incomplete"),
        ("path,label,split\n1.jpg,cat,dev", "has the split dev: it must be train, val or test"),
        ("path,label,split\n1.jpg,cat,val", "has no images to train on"),
        ("path,label,split\n1.jpg,cat,train\n2.jpg,cow,val", "has labels outside of its training images: cow"),
    ],
)
def test_mistakes(tmp_path, text, message):
    with pytest.raises(UsageError, match=message):
        open_data(table(tmp_path, text))


def test_splits_of_its_own_and_a_share(tmp_path):
    with pytest.raises(UsageError, match=r"says which images are for validation: leave out --val-split 0.5"):
        open_data(table(tmp_path, SPLIT), val_split=0.5)
    with pytest.raises(UsageError, match="no images to measure on"):
        open_test_data(table(tmp_path, "path,label,split\n1.jpg,cat,train"))


def test_bytes_that_are_no_text(tmp_path):
    (tmp_path / "photos.csv").write_bytes(b"path,label\ncaf\xe9.jpg,caf\xe9\n")
    data = open_test_data(str(tmp_path / "photos.csv"))
    assert data.classes == (r"caf\xe9",)
    assert bytes(data.test[0][0]).endswith(b"/caf\xe9.jpg")
    (tmp_path / "photos.csv").write_text("path,label\n" + '"' + "x" * 200_000)
    with pytest.raises(RunError, match=r"cannot read .*photos.csv: field larger"):
        open_test_data(str(tmp_path / "photos.csv"))
