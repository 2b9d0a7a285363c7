"""Sharing through the Hugging Face hub, tried on a local folder; published files chosen from a repository."""

from pathlib import Path

import huggingface_hub
import pytest
import torch
from huggingface_hub.errors import LocalEntryNotFoundError

import linvision
from linvision.errors import DownloadError
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
