"""Data sets in memory."""

import gzip

import numpy as np
import pytest
import torch
import torchvision.datasets

from linvision.data import Preprocess, arrays, open_data
from linvision.data.arrays import read_idx
from linvision.errors import RunError, UsageError
from linvision.recipes import load_recipe

HOW = Preprocess((32, 32), (0.3,) * 3, (0.4,) * 3, grey=True)


def idx(values: np.ndarray) -> bytes:
    header = b"\0\0\x08" + bytes([values.ndim]) + b"".join(side.to_bytes(4, "big") for side in values.shape)
    return header + values.astype(np.uint8).tobytes()


def test_digits_split_is_fixed_stratified_and_disjoint():
    first, second = open_data("digits"), open_data("digits")
    assert len(first.train[1]) == 1437
    assert len(first.test[1]) == 360
    assert torch.equal(first.test[0], second.test[0])
    assert torch.bincount(first.test[1]).tolist() == [36, 36, 35, 37, 36, 37, 36, 36, 35, 36]
    assert first.train[0].shape[1:] == (1, 8, 8)
    assert first.train[0].max() == 255


def test_digits_are_not_mirrored():
    assert load_recipe("digits").settings.flip == 0


def test_mean_and_deviation_are_those_of_the_digits():
    data = open_data("digits")
    images = HOW.resize(data.train[0])
    assert images.mean().item() == pytest.approx(data.mean[0], abs=0.01)
    assert images.std().item() == pytest.approx(data.std[0], abs=0.02)


def test_training_batches_are_shuffled_and_follow_the_epoch():
    batches = open_data("digits").train_batches(HOW, load_recipe("digits").settings, batch_size=100, seed=3)
    assert (len(batches), batches.num_images) == (15, 1437)

    def labels(epoch: int) -> torch.Tensor:
        batches.epoch = epoch
        return torch.cat([labels for _, labels in batches])

    inputs, _ = next(iter(batches))
    assert inputs.shape == (100, 3, 32, 32)
    assert torch.equal(labels(0), labels(0))
    assert not torch.equal(labels(0), labels(1))


@pytest.mark.parametrize(("batch_size", "sizes"), [(359, [359] * 4), (1000, [1000, 437]), (1437, [1437])])
def test_a_last_batch_of_one_image_is_left_out_in_training(batch_size, sizes):
    batches = open_data("digits").train_batches(HOW, load_recipe("digits").settings, batch_size=batch_size, seed=3)
    assert [len(labels) for _, labels in batches] == sizes
    assert (len(batches), batches.num_images) == (len(sizes), 1437)


def test_test_batches_hold_every_image_in_order():
    data = open_data("digits")
    batches = list(data.test_batches(HOW, batch_size=100))
    assert [len(labels) for _, labels in batches] == [100, 100, 100, 60]
    assert torch.equal(torch.cat([labels for _, labels in batches]), data.test[1])
    assert torch.equal(batches[0][0], HOW.normalise(HOW.resize(data.test[0][:100])))


@pytest.mark.parametrize("compressed", [False, True])
def test_fashion_mnist_of_debian(tmp_path, monkeypatch, compressed):
    rng = np.random.default_rng(0)
    for prefix, count in (("train", 6), ("t10k", 3)):
        for kind, shape in (("images-idx3", (count, 28, 28)), ("labels-idx1", (count,))):
            content = idx(rng.integers(0, 10, shape))
            path = tmp_path / f"{prefix}-{kind}-ubyte{'.gz' if compressed else ''}"
            path.write_bytes(gzip.compress(content) if compressed else content)
    monkeypatch.setattr(arrays, "DEBIAN_FASHION_MNIST", tmp_path)
    data = open_data("fashion-mnist")
    assert data.train[0].shape == (6, 1, 28, 28)
    assert data.test[1].shape == (3,)
    assert data.test[1].dtype == torch.long
    assert data.classes[9] == "Ankle boot"


@pytest.mark.parametrize(
    "content",
    [idx(np.zeros((2, 3)))[:-1], b"\0\0\x08", b"", b"\0\0\x0d\x01\0\0\0\0", idx(np.zeros(3)) + b"x"],
    ids=["short", "no shape", "empty", "floats", "long"],
)
def test_damaged_idx_file(tmp_path, content):
    (tmp_path / "a-ubyte").write_bytes(content)
    with pytest.raises(RunError, match="a-ubyte"):
        read_idx(tmp_path / "a-ubyte")


def test_truncated_and_missing_idx_file(tmp_path):
    (tmp_path / "a.gz").write_bytes(gzip.compress(idx(np.zeros(1000)))[:-5])
    for name in ("a.gz", "b.gz"):
        with pytest.raises(RunError, match=name):
            read_idx(tmp_path / name)


def test_colour_sets_are_laid_out_channels_first(tmp_path, monkeypatch):
    class FakeCIFAR:
        def __init__(self, root, train, download):
            self.data = np.arange(2 * 32 * 32 * 3, dtype=np.int64).reshape(2, 32, 32, 3).astype(np.uint8)
            self.targets = [1, 0]

    monkeypatch.setattr(torchvision.datasets, "CIFAR10", FakeCIFAR)
    data = open_data("cifar10", root=tmp_path)
    assert data.train[0].shape == (2, 3, 32, 32)
    assert data.train[0][0, 1, 0, 0] == 1
    assert not data.grey


def test_download_without_a_network_names_the_folder(tmp_path, monkeypatch):
    def fail(self):
        raise RuntimeError("Error downloading train-images-idx3-ubyte.gz:\nTried https://example.org")

    monkeypatch.setattr(torchvision.datasets.MNIST, "download", fail)
    with pytest.raises(RunError, match=f"cannot get MNIST.*put torchvision's files for it into {tmp_path}") as error:
        open_data("mnist", root=tmp_path)
    assert "\n" not in str(error.value)


def test_data_root_comes_from_the_environment(tmp_path, monkeypatch):
    seen = []
    monkeypatch.setitem(open_data.__globals__["DATASETS"], "digits", seen.append)
    monkeypatch.setenv("LINVISION_DATA", str(tmp_path))
    open_data("digits")
    open_data("digits", root=tmp_path / "own")
    assert seen == [tmp_path, tmp_path / "own"]


def test_unknown_name_shows_the_nearest(tmp_path):
    with pytest.raises(UsageError, match=r"called fashion_mnits: did you mean fashion-mnist"):
        open_data("fashion_mnits")
    with pytest.raises(UsageError, match="known are digits, fashion-mnist"):
        open_data("qqqq")
    (tmp_path / "file").touch()
    with pytest.raises(UsageError, match="is a file"):
        open_data(str(tmp_path / "file"))
