"""Sharing through the Hugging Face hub, tried on a local folder; published files chosen from a repository."""

import hashlib
import json
from pathlib import Path

import huggingface_hub
import pytest
import safetensors.torch
import timm
import torch
from huggingface_hub.errors import LocalEntryNotFoundError

import linvision
from linvision.errors import CheckpointError, DownloadError
from linvision.models import save_pretrained
from linvision.models.hub import fetch_from_hub


def test_a_saved_model_is_created_again_by_its_folder(tmp_path):
    torch.manual_seed(0)
    model = linvision.create_model("vil2_mini_patch4_32", num_classes=3, img_size=48, depth=1).eval()
    torch.nn.init.normal_(model.head.weight)
    save_pretrained(model, tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["config.json", "model.safetensors"]
    again = linvision.create_model(f"local-dir:{tmp_path}").eval()
    images = torch.randn(1, 3, 48, 48)
    torch.testing.assert_close(again(images), model(images))


def test_push_to_hub_uploads_the_folder_that_create_model_reads(tmp_path, monkeypatch):
    model = linvision.create_model("vil2_mini_patch4_32", num_classes=3).eval()
    uploaded = {}

    def upload_folder(self, *, repo_id, folder_path, **options):
        uploaded.update({path.name: path.read_bytes() for path in Path(folder_path).iterdir()}, repo=repo_id)

    monkeypatch.setattr(huggingface_hub.HfApi, "upload_folder", upload_folder)
    monkeypatch.setattr(huggingface_hub.HfApi, "file_exists", lambda self, **_: False)
    url = huggingface_hub.RepoUrl("https://huggingface.co/someone/vil")
    monkeypatch.setattr(huggingface_hub.HfApi, "create_repo", lambda self, repo_id, **_: url)
    linvision.push_to_hub(model, "someone/vil")
    assert uploaded.pop("repo") == "someone/vil"
    assert set(uploaded) == {"config.json", "model.safetensors", "README.md"}
    for name, content in uploaded.items():
        (tmp_path / name).write_bytes(content)
    again = linvision.create_model(f"local-dir:{tmp_path}").eval()
    images = torch.randn(1, 3, 32, 32)
    torch.testing.assert_close(again(images), model(images))


def test_labels_and_arguments_are_written_as_transformers_reads_them(tmp_path):
    model = linvision.create_model("test_vil2", num_classes=3, depth=1)
    save_pretrained(model, tmp_path, labels=["ant", "bee", "cat"])
    config = json.loads((tmp_path / "config.json").read_text())
    assert config["architecture"] == "test_vil2"
    assert config["num_classes"] == 3
    assert config["label_names"] == ["ant", "bee", "cat"]
    assert config["model_args"]["depth"] == 1
    # transformers passes the number of classes beside the arguments.
    again = timm.create_model("test_vil2", num_classes=config["num_classes"], **config["model_args"])
    assert again.state_dict().keys() == model.state_dict().keys()
    shared = linvision.create_model(f"local-dir:{tmp_path}")
    assert list(shared.pretrained_cfg["label_names"]) == ["ant", "bee", "cat"]
    save_pretrained(shared, tmp_path / "again")
    assert json.loads((tmp_path / "again/config.json").read_text())["label_names"] == ["ant", "bee", "cat"]
    for labels in (["ant"], ["ant", "ant", "bee"]):
        with pytest.raises(ValueError, match="labels for 3 classes: give one name of its own to each"):
            save_pretrained(model, tmp_path, labels=labels)


def test_what_was_asked_of_weights_is_not_shared(tmp_path):
    torch.save(linvision.create_model("test_vil2").state_dict(), tmp_path / "weights.pth")
    model = linvision.create_model("test_vil2", checkpoint_path=tmp_path / "weights.pth", drop_head=True)
    save_pretrained(model, tmp_path / "shared")
    config = json.loads((tmp_path / "shared/config.json").read_text())
    assert not {"weights", "drop_head", "ema", "num_classes"} & set(config.get("model_args", {}))


@pytest.mark.parametrize("arch", ["test_vil2", "test_vit"])
@pytest.mark.parametrize("options", [{}, {"num_classes": 3}, {"features_only": True}])
def test_shared_weights_that_lack_a_key_are_refused(arch, options, tmp_path):
    model = linvision.create_model(arch)
    save_pretrained(model, tmp_path)
    state = model.state_dict()
    lacking = next(key for key in state if key.startswith("blocks.1") and key.endswith("weight"))
    del state[lacking]
    safetensors.torch.save_file(state, tmp_path / "model.safetensors")
    with pytest.raises(CheckpointError, match=lacking):
        linvision.create_model(f"local-dir:{tmp_path}", **options)


def test_shared_models_of_timm_take_other_heads(tmp_path):
    model = linvision.create_model("test_vit", num_classes=5)
    save_pretrained(model, tmp_path)
    again = linvision.create_model(f"local-dir:{tmp_path}")
    assert all(torch.equal(x, again.state_dict()[key]) for key, x in model.state_dict().items())
    assert not again.pretrained_cfg.get("state_dict")
    other = linvision.create_model(f"local-dir:{tmp_path}", num_classes=3, in_chans=1)
    assert torch.equal(other.norm.weight, model.norm.weight)
    assert other(torch.randn(1, 1, 160, 160)).shape == (1, 3)
    assert linvision.create_model(f"local-dir:{tmp_path}", drop_head=True).num_classes == 5


@pytest.mark.parametrize(
    "config",
    ["", "{", "[]", "{}", '{"architecture": "unheard_of"}', '{"architecture": "test_vil2", "num_classes": "x"}',
     '{"architecture": "test_vil2", "pretrained_cfg": [1]}', '{"architecture": "test_vil2", "unknown": 1}',
     '{"architecture": "test_vil2", "pretrained_cfg": {"input_size": 3}}',
     '{"architecture": "test_vil2", "pretrained_cfg": {}, "model_args": [1]}'],
)  # fmt: skip
def test_damaged_descriptions(config, tmp_path):
    save_pretrained(linvision.create_model("test_vil2"), tmp_path)
    (tmp_path / "config.json").write_text(config)
    with pytest.raises(CheckpointError, match=r"config\.json"):
        linvision.create_model(f"local-dir:{tmp_path}")


def test_a_damaged_file_in_the_cache_is_fetched_again(tmp_path, monkeypatch):
    content = b"what was published"
    blob = tmp_path / "blobs" / hashlib.sha256(content).hexdigest()
    blob.parent.mkdir()
    (tmp_path / "model.safetensors").symlink_to(blob)
    sources = iter([b"damaged", content, b"damaged", b"damaged"])
    forced = []

    def snapshot_download(repo_id, revision, allow_patterns, force_download=False):
        forced.append(force_download)
        blob.write_bytes(next(sources))
        return str(tmp_path)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    assert fetch_from_hub("owner/net").read_bytes() == content
    assert forced == [False, True]
    with pytest.raises(DownloadError, match=f"{blob} of owner/net is damaged again"):
        fetch_from_hub("owner/net")


@pytest.fixture
def repository(tmp_path, monkeypatch) -> Path:
    """A hub repository as a folder: only files that the asked patterns match are in it."""
    source, downloaded = tmp_path / "source", tmp_path / "downloaded"
    source.mkdir()

    def snapshot_download(repo_id, revision, allow_patterns):
        downloaded.mkdir(exist_ok=True)
        for path in (path for pattern in allow_patterns for path in source.glob(pattern)):
            (downloaded / path.name).write_bytes(path.read_bytes())
        return str(downloaded)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    return source


def test_of_several_files_the_one_named_by_its_accuracy_is_taken(repository):
    for name in ("net_76p1acc.pth", "net_ft_78p3acc.pth", "README.md"):
        (repository / name).touch()
    assert fetch_from_hub("owner/net", accuracy=78.3).name == "net_ft_78p3acc.pth"


def test_a_single_file_is_taken_and_several_are_named(repository):
    (repository / "weights.pth").touch()
    assert fetch_from_hub("owner/net", accuracy=78.3).name == "weights.pth"
    (repository / "other.safetensors").touch()
    with pytest.raises(DownloadError, match=r"other\.safetensors, weights\.pth: download the right one"):
        fetch_from_hub("owner/net", accuracy=78.3)


def test_no_network_names_the_page_and_the_manual_way(monkeypatch):
    def no_network(*args, **options):
        raise LocalEntryNotFoundError("cannot reach the hub")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", no_network)
    with pytest.raises(DownloadError, match=r"https://huggingface\.co/owner/net .*checkpoint_path"):
        fetch_from_hub("owner/net")
