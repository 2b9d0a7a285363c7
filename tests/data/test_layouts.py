"""Image folders: which images are for training, which for measuring, and of what class."""

import os
import shutil
from pathlib import Path

import pytest

from linvision.data import FolderData, Preprocess, open_data, open_test_data
from linvision.data.splits import split_by_hash
from linvision.errors import UsageError
from linvision.recipes import load_recipe
from tests.data.samples import write_folder, write_image

HOW = Preprocess((16, 16), (0.5,) * 3, (0.5,) * 3)


def test_empty_folder(tmp_path):
    with pytest.raises(UsageError, match="has no train/ and no val/ folder"):
        open_data(str(tmp_path))
    (tmp_path / "train").mkdir()
    with pytest.raises(UsageError, match="has no val/ folder"):
        open_data(str(tmp_path))
    (tmp_path / "val").mkdir()
    with pytest.raises(UsageError, match="train is empty: it needs a sub-folder"):
        open_data(str(tmp_path))


def test_class_without_images(tmp_path):
    write_folder(tmp_path)
    (tmp_path / "train/blue").mkdir()
    with pytest.raises(UsageError, match="no images for 1 of its 3 classes: blue"):
        open_data(str(tmp_path))


def test_different_class_folders(tmp_path):
    write_folder(tmp_path, classes=("cat", "dog", "emu"))
    shutil.rmtree(tmp_path / "val/emu")
    (tmp_path / "val/dog").rename(tmp_path / "val/dogs")
    with pytest.raises(UsageError, match=r"only in train/: dog, emu \(like dogs\); only in val/: dogs"):
        open_data(str(tmp_path))


def test_folders_to_measure_on_need_no_training_images(tmp_path):
    for name in ("cat", "dog"):
        write_image(tmp_path / "flat" / name / "a.png")
    flat = open_test_data(str(tmp_path / "flat"))
    assert (flat.classes, len(flat.test)) == (("cat", "dog"), 2)
    with pytest.raises(UsageError, match="no train/ folder"):
        flat.train_batches(HOW, load_recipe("imagefolder").settings, batch_size=1, seed=0)
    split = open_test_data(str(write_folder(tmp_path / "split")))
    assert split.classes == ("green", "red")
    assert len(split.test) == 6


def files(root: Path, *names: str) -> Path:
    """Make empty files, which is all that opening a data set looks at."""
    for name in names:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).touch()
    return root


def shown(data: FolderData, part: str) -> list[tuple[str, str]]:
    return [(path.name, data.classes[label]) for path, label in getattr(data, part)]


@pytest.mark.parametrize("val", ["val", "valid", "validation"])
@pytest.mark.parametrize("train", ["train", "training"])
def test_folders_of_splits_by_their_usual_names(tmp_path, train, val):
    files(
        tmp_path, f"{train}/cat/1.jpg", f"{train}/dog/2.jpg", f"{val}/cat/3.jpg", f"{val}/dog/4.jpg", "test/dog/5.jpg"
    )
    data = open_data(str(tmp_path))
    assert shown(data, "train") == [("1.jpg", "cat"), ("2.jpg", "dog")]
    assert shown(data, "test") == [("3.jpg", "cat"), ("4.jpg", "dog")]
    assert shown(data, "held_out") == [("5.jpg", "dog")]
    assert shown(open_test_data(str(tmp_path)), "test") == shown(data, "test")


def test_a_test_folder_is_measured_apart(tmp_path):
    write_folder(tmp_path)
    assert open_data(str(tmp_path)).held_out_batches(HOW, batch_size=2) is None
    write_image(tmp_path / "test/red/a.png", color=(200, 0, 60))
    batches = open_data(str(tmp_path)).held_out_batches(HOW, batch_size=2)
    assert [labels.tolist() for _, labels in batches] == [[1]]


def test_a_test_folder_without_labels_is_left_alone_and_one_of_other_classes_refused(tmp_path):
    files(tmp_path, "train/cat/1.jpg", "val/cat/2.jpg", "test/3.jpg")
    assert open_data(str(tmp_path)).held_out == ()
    files(tmp_path, "test/images/4.jpg")
    assert open_data(str(tmp_path)).held_out == ()
    files(tmp_path, "test/cat/4.jpg")
    with pytest.raises(UsageError, match="test has class folders that train/ lacks: images"):
        open_data(str(tmp_path))


def test_classes_as_people_write_them(tmp_path):
    files(tmp_path, "train/golden_retriever/1.jpg", "train/Cat/1.jpg", "val/Golden Retriever/2.jpg", "val/cat/3.jpg")
    data = open_data(str(tmp_path))
    assert data.classes == ("Cat", "golden_retriever")
    assert shown(data, "test") == [("2.jpg", "golden_retriever"), ("3.jpg", "Cat")]


def test_classes_that_differ_in_case_alone_stay_apart(tmp_path):
    files(tmp_path, "train/Polish/1.jpg", "train/polish/2.jpg", "val/Polish/3.jpg", "val/polish/4.jpg")
    assert shown(open_data(str(tmp_path)), "test") == [("3.jpg", "Polish"), ("4.jpg", "polish")]


def test_linked_class_folders_and_cycles(tmp_path):
    files(tmp_path, "store/1.jpg", "data/train/dog/2.jpg", "data/val/dog/3.jpg", "data/val/cat/4.jpg")
    (tmp_path / "data/train/cat").symlink_to(tmp_path / "store")
    (tmp_path / "data/train/all").symlink_to(tmp_path / "data")
    assert shown(open_data(str(tmp_path / "data")), "train") == [("1.jpg", "cat"), ("2.jpg", "dog")]


def test_names_that_are_no_utf8_become_printable_classes(tmp_path):
    odd = os.fsdecode(b"caf\xe9")
    files(tmp_path, f"train/{odd}/1.jpg", f"val/{odd}/2.jpg")
    assert open_data(str(tmp_path)).classes == (r"caf\xe9",)


def test_images_without_class_folders_are_counted(tmp_path):
    files(tmp_path, *(f"{index}.jpg" for index in range(50)))
    for opened in (open_data, open_test_data):
        with pytest.raises(UsageError, match=r"50 images but no class folders: .* a CSV file with the columns path"):
            opened(str(tmp_path))


def test_class_folders_alone_need_a_share_for_validation(tmp_path):
    files(tmp_path, "cat/1.jpg", "dog/2.jpg")
    with pytest.raises(
        UsageError, match=r"if its 2 folders \(cat, dog\) are the classes, hold a fifth .*--val-split 0.2"
    ):
        open_data(str(tmp_path))
    files(tmp_path / "other", "train/cat/1.jpg")
    for opened in (open_data, open_test_data):
        with pytest.raises(UsageError, match="has no val/ folder"):
            opened(str(tmp_path / "other"))


@pytest.mark.parametrize("inside", ["", "train/"])
def test_a_share_of_each_class_is_held_back_for_validation(tmp_path, inside):
    files(tmp_path, *(f"{inside}{name}/{index}.jpg" for name in ("cat", "dog") for index in range(200)))
    data = open_data(str(tmp_path), val_split=0.2)
    assert set(data.train) | set(data.test) == {(path, label) for path, label in data.train + data.test}
    assert len(data.train) + len(data.test) == 400
    for label in (0, 1):
        assert 25 <= sum(of == label for _, of in data.test) <= 55
    measured = open_test_data(str(tmp_path), val_split=0.2)
    assert (measured.test, measured.train) == (data.test, ())


def test_the_split_is_the_rule_that_is_written_down(tmp_path):
    names = [f"cat/{index}.jpg" for index in range(6)]
    items = tuple((tmp_path / name, 0) for name in names)
    train, validation = split_by_hash(items, 0.4, folder=tmp_path)
    # printf cat/0.jpg | sha256sum, and so on: the first byte over 256
    assert [path.name for path, _ in validation] == ["0.jpg", "1.jpg", "3.jpg"]
    assert train == tuple(item for item in items if item not in validation)


def test_the_split_stays_when_images_are_added_or_the_folder_moves():
    def validation(root: str, count: int) -> set[str]:
        items = tuple((Path(root, "cat", f"{index}.jpg"), 0) for index in range(count))
        return {path.name for path, _ in split_by_hash(items, 0.2, folder=Path(root))[1]}

    few, many = validation("a", 50), validation("b", 100)
    assert few == {name for name in many if int(name.removesuffix(".jpg")) < 50}


def test_each_side_has_images_of_each_class_that_has_two(tmp_path):
    items = tuple((tmp_path / f"{label}/{index}.jpg", label) for label in range(40) for index in range(2))
    for share in (0.01, 0.5, 0.99):
        train, validation = split_by_hash(items, share, folder=tmp_path)
        assert [label for _, label in train] == [label for _, label in validation] == list(range(40))
    assert split_by_hash(items[:1], 0.9, folder=tmp_path) == (items[:1], ())


def test_shares_that_are_none_and_splits_that_are_there(tmp_path):
    files(tmp_path, "train/cat/1.jpg", "train/cat/2.jpg")
    for share in (0.0, 1.0, -1.0, float("nan")):
        with pytest.raises(UsageError, match=r"--val-split .* is out of range: it must be above 0 and below 1"):
            open_data(str(tmp_path), val_split=share)
    files(tmp_path, "valid/cat/3.jpg")
    with pytest.raises(UsageError, match=r"valid holds the validation images: leave out --val-split 0.2"):
        open_data(str(tmp_path), val_split=0.2)
    with pytest.raises(UsageError, match=r"--val-split 0.2 is for folders of images and CSV files: digits"):
        open_data("digits", val_split=0.2)
