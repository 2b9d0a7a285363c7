"""ImageNet's validation images in one folder, with a list of their classes."""

import numpy as np
import pytest
from scipy.io import savemat

from linvision.data import open_test_data
from linvision.errors import RunError, UsageError
from tests.data.test_layouts import files, shown

NAMES = [f"ILSVRC2012_val_0000000{index}.JPEG" for index in (1, 2, 3)]
TRUTH = "ILSVRC2012_validation_ground_truth.txt"


@pytest.fixture
def val(tmp_path):
    return files(tmp_path / "images", *NAMES)


@pytest.mark.parametrize("place", ["images", "."])
def test_names_with_numbers_or_identifiers(tmp_path, val, place):
    for label in ("281", "n02123045"):
        lines = [f"{NAMES[1]} {label}", f"val/{NAMES[0]} 0", f"{NAMES[2]} 0", ""]
        (tmp_path / place / "val.txt").write_text("\n".join(lines))
        data = open_test_data(str(val))
        assert data.classes == ("n01440764", "n02123045")
        assert [label for _, label in shown(data, "test")] == ["n01440764", "n02123045", "n01440764"]


def test_ground_truth_of_the_development_kit(tmp_path, val):
    kit = files(tmp_path / "ILSVRC2012_devkit_t12/data", TRUTH)
    (kit / TRUTH).write_text("2\n1\n2\n")
    with pytest.raises(UsageError, match=r"needs meta.mat of the development kit beside it, or give a val.txt"):
        open_test_data(str(val))
    synsets = np.array([(1, "n02119789"), (2, "n01440764")], dtype=[("ILSVRC2012_ID", "i4"), ("WNID", "O")])
    savemat(kit / "meta.mat", {"synsets": synsets})
    data = open_test_data(str(val))
    assert [label for _, label in shown(data, "test")] == ["n01440764", "n02119789", "n01440764"]
    (kit / TRUTH).write_text("2\n1\n")
    with pytest.raises(UsageError, match="has 2 labels for the 3 images"):
        open_test_data(str(val))
    (kit / TRUTH).write_text("2\n1\n1001\n")
    with pytest.raises(RunError, match=r"is damaged: not all of its lines are numbers of meta.mat"):
        open_test_data(str(val))
    (kit / "meta.mat").write_bytes(b"MATLAB 5.0 but nothing more" + bytes(200))
    with pytest.raises(RunError, match=r"cannot read .*meta.mat"):
        open_test_data(str(val))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (f"{NAMES[0]} 0", r"no label for 2 of 3 images: ILSVRC2012_val_00000002.JPEG, ILSVRC2012_val_00000003.JPEG"),
        ("".join(f"{name} 1000\n" for name in NAMES), "has the class 1000: it must be a number from 0 to 999 or"),
        ("one", "does not list images: its lines must be a file's name and its class"),
    ],
)
def test_lists_of_something_else(val, text, message):
    (val / "val.txt").write_text(text)
    with pytest.raises(UsageError, match=message):
        open_test_data(str(val))
