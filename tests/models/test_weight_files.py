"""Files of weights: every layout, and damaged, foreign and hostile ones answered with one clear error."""

import argparse
import os
import pickle
import re
import zipfile
from pathlib import Path

import pytest
import safetensors.torch
import timm
import torch
from torch import nn

import linvision
from linvision.errors import CheckpointError
from linvision.models import load_checkpoint, load_state_dict, save_pretrained


@pytest.fixture
def weights() -> dict[str, torch.Tensor]:
    torch.manual_seed(0)
    return {"head.weight": torch.randn(2, 3), "head.bias": torch.randn(2)}


def test_every_layout_gives_the_same_weights(weights, tmp_path):
    trained = {"optimizer": {"lr": 0.1}, "args": argparse.Namespace(model="x"), "epoch": 3}
    layouts = {
        "bare": weights,
        "state_dict": {"state_dict": weights, "ctor_kwargs": {"kind": "models.single.vislstm"}},
        "model": {"model": weights, "model_ema": {k: -x for k, x in weights.items()}, **trained},
        "module": {"model": {f"module.{k}": x for k, x in weights.items()}},
        "compiled": {f"_orig_mod.{k}": x for k, x in weights.items()},
        "compiled within": {f"module._orig_mod.{k}": x for k, x in weights.items()},
        "lightning": {"state_dict": {f"model.{k}": x for k, x in weights.items()}, "epoch": 1},
        "lightning of a compiled one": {"state_dict": {f"model._orig_mod.{k}": x for k, x in weights.items()}},
        "tutorial": {"model_state_dict": weights, "loss": 0.1},
        "averaged": {"n_averaged": torch.tensor(3), **{f"module.{k}": x for k, x in weights.items()}},
    }
    for name, content in layouts.items():
        torch.save(content, tmp_path / f"{name}.pth")
        loaded = load_state_dict(tmp_path / f"{name}.pth")
        assert loaded.keys() == weights.keys()
        assert all(torch.equal(loaded[k], weights[k]) for k in weights)
    safetensors.torch.save_file(weights, tmp_path / "weights.safetensors")
    assert load_state_dict(tmp_path / "weights.safetensors").keys() == weights.keys()
    averaged = load_state_dict(tmp_path / "model.pth", ema=True)
    assert torch.equal(averaged["head.bias"], -weights["head.bias"])
    torch.save({"state_dict_ema": weights}, tmp_path / "ema.pth")
    assert load_state_dict(tmp_path / "ema.pth", ema=True).keys() == weights.keys()
    with pytest.raises(CheckpointError, match="EMA weights alone"):
        load_state_dict(tmp_path / "ema.pth")
    with pytest.raises(CheckpointError, match="no EMA weights"):
        load_state_dict(tmp_path / "bare.pth", ema=True)


class Payload:
    def __init__(self, target: Path) -> None:
        self.target = target

    def __reduce__(self):
        return os.mkdir, (str(self.target),)


@pytest.fixture
def hostile(tmp_path) -> Path:
    """A shared model whose weights would make a folder named "ran"."""
    model = linvision.create_model("test_vil2")
    save_pretrained(model, tmp_path)
    (tmp_path / "model.safetensors").unlink()
    torch.save({**model.state_dict(), "extra": Payload(tmp_path / "ran")}, tmp_path / "pytorch_model.bin")
    return tmp_path


def of_timm(folder: Path) -> str:
    """Let the shared model be one of timm's."""
    config = folder / "config.json"
    config.write_text(config.read_text().replace("test_vil2", "test_vit").replace("bilateral_flatten", "avg"))
    return f"local-dir:{folder}"


WAYS = {
    "a folder": lambda path: linvision.create_model(f"local-dir:{path.parent}"),
    "a folder, by timm": lambda path: timm.create_model(f"local-dir:{path.parent}", pretrained=True),
    "a folder, other classes": lambda path: linvision.create_model(f"local-dir:{path.parent}", num_classes=3),
    "a folder, for features": lambda path: linvision.create_model(f"local-dir:{path.parent}", features_only=True),
    "a folder of timm's": lambda path: linvision.create_model(of_timm(path.parent)),
    "a file": lambda path: linvision.create_model("test_vil2", checkpoint_path=path),
    "a file, by timm": lambda path: timm.create_model("test_vil2", checkpoint_path=str(path)),
    "a file for timm's": lambda path: linvision.create_model("test_vit", checkpoint_path=path),
    "an overlay": lambda path: timm.create_model(
        "test_vil2", pretrained=True, pretrained_cfg_overlay={"file": str(path)}
    ),
    "an overlay of timm's": lambda path: linvision.create_model(
        "test_vit", pretrained=True, pretrained_cfg_overlay={"file": str(path), "hf_hub_id": None}
    ),
    "a made model": lambda path: load_checkpoint(linvision.create_model("test_vil2"), path),
}


@pytest.mark.parametrize("way", WAYS)
def test_no_way_runs_code(way, hostile):
    with pytest.raises(CheckpointError, match=r"pytorch_model\.bin is refused.*mkdir.*could run code"):
        WAYS[way](hostile / "pytorch_model.bin")
    assert not (hostile / "ran").exists()


def test_a_pickle_that_carries_code_is_refused_and_not_run(tmp_path):
    ran = tmp_path / "ran"
    torch.save({"state_dict": {"head.weight": torch.zeros(1)}, "extra": Payload(ran)}, tmp_path / "hostile.pth")
    (tmp_path / "plain.pth").write_bytes(pickle.dumps(Payload(ran), protocol=2))
    with pytest.raises(CheckpointError, match=r"hostile\.pth is refused.*mkdir.*could run code"):
        load_state_dict(tmp_path / "hostile.pth")
    with pytest.raises(CheckpointError, match=r"plain\.pth is refused"):
        load_state_dict(tmp_path / "plain.pth")
    assert not ran.exists()


@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
@pytest.mark.parametrize("keep", [0.0, 0.02, 0.5, 0.99])
def test_truncated_files(weights, tmp_path, suffix, keep):
    path = tmp_path / f"whole{suffix}"
    weights = weights | {"more": torch.randn(100, 100)}
    safetensors.torch.save_file(weights, path) if suffix == ".safetensors" else torch.save(weights, path)
    whole = path.read_bytes()
    path.write_bytes(whole[: int(len(whole) * keep)])
    with pytest.raises(CheckpointError, match=f"whole{suffix} is refused: it is truncated"):
        load_state_dict(path)


@pytest.mark.parametrize("content", [[1, 2], {"epoch": 3}, {}, "text", {"head.weight": [1.0]}])
def test_files_without_weights(tmp_path, content):
    torch.save(content, tmp_path / "other.pth")
    with pytest.raises(CheckpointError, match=r"other\.pth"):
        load_state_dict(tmp_path / "other.pth")


def test_a_missing_file():
    with pytest.raises(FileNotFoundError, match=r"no checkpoint file nowhere\.pth"):
        load_state_dict("nowhere.pth")


@pytest.mark.parametrize("compression", [zipfile.ZIP_DEFLATED, zipfile.ZIP_BZIP2])
def test_compressed_records_are_refused_before_they_are_unpacked(tmp_path, compression):
    torch.save({"head.weight": torch.zeros(1000)}, tmp_path / "plain.pth")
    with zipfile.ZipFile(tmp_path / "plain.pth") as plain, zipfile.ZipFile(tmp_path / "bomb.pth", "w") as bomb:
        for record in plain.infolist():
            bomb.writestr(record.filename, plain.read(record), compress_type=compression)
    with pytest.raises(CheckpointError, match=r"bomb\.pth is refused: its records are compressed"):
        load_state_dict(tmp_path / "bomb.pth")


def test_records_that_overlap_are_refused(tmp_path):
    torch.save({"head.weight": torch.zeros(1000)}, tmp_path / "plain.pth")
    with zipfile.ZipFile(tmp_path / "plain.pth", "a") as archive:
        largest = max(archive.filelist, key=lambda record: record.file_size)
        for _ in range(20):  # all of them point at the bytes of one
            archive.filelist.append(largest)
        archive._didModify = True
    with pytest.raises(CheckpointError, match=r"plain\.pth is refused: its records overlap"):
        load_state_dict(tmp_path / "plain.pth")


ODD = {
    "meta": (lambda: torch.empty(2, device="meta"), "without values"),
    "sparse": (lambda: torch.eye(3).to_sparse(), "sparse or nested"),
    "quantised": (lambda: torch.quantize_per_tensor(torch.ones(3), 0.1, 0, torch.qint8), r"of type torch\.qint8"),
    "complex": (lambda: torch.ones(2, dtype=torch.complex64), r"of type torch\.complex64"),
    "NaN": (lambda: torch.tensor([1.0, torch.nan]), "not finite"),
    "infinite": (lambda: torch.tensor([1.0, -torch.inf], dtype=torch.float16), "not finite"),
    "expanded": (lambda: torch.ones(1).expand(10**6), "larger than what is stored"),
}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("kind", ODD)
def test_odd_tensors_are_named(kind, tmp_path):
    make, fault = ODD[kind]
    torch.save({"head.weight": torch.ones(2), "odd.weight": make()}, tmp_path / "odd.pth")
    with pytest.raises(CheckpointError, match=rf"odd\.pth is refused: .*{fault}.*odd\.weight") as error:
        load_state_dict(tmp_path / "odd.pth")
    assert "\n" not in str(error.value)


def test_parameters_are_plain_tensors_afterwards(tmp_path):
    torch.save({"a": nn.Parameter(torch.ones(2)), "b": torch.ones(2, dtype=torch.bfloat16)}, tmp_path / "a.pth")
    assert not load_state_dict(tmp_path / "a.pth")["a"].requires_grad


@pytest.mark.parametrize("keys", [{1: torch.ones(1)}, {("a", 1): torch.ones(1)}, {None: 3}])
def test_keys_that_are_no_names(keys, tmp_path):
    torch.save({"state_dict": keys}, tmp_path / "numbers.pth")
    with pytest.raises(CheckpointError, match=r"numbers\.pth is no state dict: its keys are to be names"):
        load_state_dict(tmp_path / "numbers.pth")


def test_keys_that_become_one(tmp_path):
    torch.save({"a": torch.ones(1), "module.a": torch.zeros(1)}, tmp_path / "twice.pth")
    with pytest.raises(CheckpointError, match="keys that differ by module"):
        load_state_dict(tmp_path / "twice.pth")


def header(text: bytes, length: int | None = None) -> bytes:
    return (len(text) if length is None else length).to_bytes(8, "little") + text


@pytest.mark.parametrize(
    "content",
    [
        header(b"{}", 2**62),
        header(b"[]"),
        header(b'{"a": 1}'),
        header(b'{"a": {"dtype": "F32", "shape": [4611686018427387904], "data_offsets": [0, 4]}}') + bytes(4),
        header(b'{"a": {"dtype": "F99", "shape": [1], "data_offsets": [0, 4]}}') + bytes(4),
        header(b'{"a": {"dtype": "F32", "shape": [1], "data_offsets": [4, 0]}}') + bytes(4),
        header(b'{"a": {"dtype": "F32", "shape": [-1], "data_offsets": [0, 4]}}') + bytes(4),
        header(b"{" * 1000),
    ],
)
def test_odd_headers_of_safetensors(content, tmp_path):
    (tmp_path / "odd.safetensors").write_bytes(content)
    with pytest.raises(CheckpointError, match=r"odd\.safetensors is refused"):
        load_state_dict(tmp_path / "odd.safetensors")


def test_safetensors_are_known_by_their_content(weights, tmp_path):
    safetensors.torch.save_file(weights, tmp_path / "weights.bin")
    assert load_state_dict(tmp_path / "weights.bin").keys() == weights.keys()


def test_only_regular_files_are_read(weights, tmp_path):
    os.mkfifo(tmp_path / "pipe.pth")
    for path in (tmp_path / "pipe.pth", tmp_path, Path("/dev/null")):
        with pytest.raises(CheckpointError, match="is no regular file"):
            load_state_dict(path)
    torch.save(weights, tmp_path / "weights.pth")
    (tmp_path / "link.pth").symlink_to("weights.pth")
    assert load_state_dict(tmp_path / "link.pth").keys() == weights.keys()
    (tmp_path / "dangling.pth").symlink_to("nothing.pth")
    with pytest.raises(FileNotFoundError, match=r"no checkpoint file .*dangling\.pth"):
        load_state_dict(tmp_path / "dangling.pth")


@pytest.mark.parametrize("kind", [torch.bool, torch.int8])
def test_numbers_of_another_kind_are_named(kind, tmp_path):
    state = linvision.create_model("test_vil2").state_dict()
    torch.save({**state, "head.bias": state["head.bias"].to(kind)}, tmp_path / "kinds.pth")
    with pytest.raises(
        CheckpointError, match=rf"1 keys differ in their kind of numbers: head\.bias {kind} in the file"
    ):
        linvision.create_model("test_vil2", checkpoint_path=tmp_path / "kinds.pth")


def test_whole_numbers_may_be_stored_as_floats(tmp_path):
    state = linvision.create_model("test_l2vit").state_dict()
    state = {key: x.float() if key.endswith("num_batches_tracked") else x.half() for key, x in state.items()}
    torch.save(state, tmp_path / "floats.pth")
    assert linvision.create_model("test_l2vit", checkpoint_path=tmp_path / "floats.pth").num_classes == 10


def test_block_numbers_may_be_anything(tmp_path):
    torch.save(
        {"xlstm.blocks.99999999999.xlstm.a": torch.ones(1), "xlstm.blocks.x.a": torch.ones(1)}, tmp_path / "b.pth"
    )
    with pytest.raises(CheckpointError, match="keys are missing"):
        linvision.create_model("test_vil2", checkpoint_path=tmp_path / "b.pth")


@pytest.mark.parametrize("shape", [(), (0,), (1, 4, 0), (0, 4, 4, 32), (1, 0, 0, 32), (2, 9, 32), (1, 10**4, 32)])
@pytest.mark.parametrize("name", ["test_vil2", "test_vim", "test_deit3"])
def test_position_tables_of_any_shape(name, shape, tmp_path):
    state = linvision.create_model(name).state_dict()
    key = next(key for key in state if key.startswith("pos_embed"))
    torch.save({**state, key: torch.ones(shape)}, tmp_path / "positions.pth")
    if name != "test_vil2" and shape == (1, 10**4, 32):
        return  # a square grid
    with pytest.raises(CheckpointError, match=f"{key} .* in the file"):
        linvision.create_model(name, checkpoint_path=tmp_path / "positions.pth")


def test_nothing_suggests_to_run_code():
    sources = [*Path(linvision.__file__).parent.rglob("*.py"), *Path(__file__).parents[2].glob("*.md")]
    assert [path for path in sources if re.search(r"weights_only\s*=\s*False", path.read_text(encoding="utf-8"))] == []
