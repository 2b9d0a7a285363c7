"""Downloads, from a server in this process: resumed, checked, fetched again, never waited for without end."""

import hashlib
import http.server
import io
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

import linvision
from linvision.errors import DownloadError
from linvision.models import downloads, load_state_dict
from linvision.models.downloads import fetch


class Server(http.server.ThreadingHTTPServer):
    """Serves one content under every name; says what was asked for."""

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        buffer = io.BytesIO()
        torch.save({"head.weight": torch.randn(300, 300), "head.bias": torch.ones(300)}, buffer)
        self.content = buffer.getvalue()
        self.ranges: list[str | None] = []
        self.breaks_after: int | None = None  # bytes of the first answer
        self.silent = 0.0  # seconds before an answer
        self.takes_ranges = True

    def url(self, name: str) -> str:
        return f"http://127.0.0.1:{self.server_port}/{name}?download=true"


class Handler(http.server.BaseHTTPRequestHandler):
    server: Server

    def log_message(self, *arguments) -> None:
        pass

    def do_GET(self) -> None:
        server, wanted = self.server, self.headers.get("Range")
        server.ranges.append(wanted)
        time.sleep(server.silent)
        start = int(wanted.removeprefix("bytes=").rstrip("-")) if wanted and server.takes_ranges else 0
        if start >= len(server.content):
            self.send_error(416)
            return
        self.send_response(206 if start else 200)
        self.send_header("Content-Length", str(len(server.content) - start))
        self.end_headers()
        end = None if server.breaks_after is None else start + server.breaks_after
        server.breaks_after = None
        self.wfile.write(server.content[start:end])


@pytest.fixture
def server() -> Iterator[Server]:
    with Server() as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        yield server
        server.shutdown()
        thread.join()


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch) -> Path:
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))
    return tmp_path / "checkpoints"


def test_a_download_is_kept(server, cache):
    assert fetch(server.url("w.pth")) == cache / "w.pth"
    assert load_state_dict(fetch(server.url("w.pth")))["head.bias"].sum() == 300
    assert server.ranges == [None]
    assert sorted(path.name for path in cache.iterdir() if not path.name.startswith(".")) == ["w.pth"]


def test_an_interrupted_download_is_resumed(server, cache):
    server.breaks_after = 1000
    fetch(server.url("w.pth"))
    assert server.ranges == [None, "bytes=1000-"]
    assert (cache / "w.pth").read_bytes() == server.content


@pytest.mark.parametrize("takes_ranges", [True, False])
def test_the_next_call_resumes_as_well(server, cache, takes_ranges):
    server.takes_ranges = takes_ranges
    cache.mkdir()
    (cache / "w.pth.part").write_bytes(server.content[:500])
    fetch(server.url("w.pth"))
    assert server.ranges == ["bytes=500-"]
    assert (cache / "w.pth").read_bytes() == server.content


@pytest.mark.parametrize("beginning", [b"another version", bytes(10**6)])
def test_a_beginning_of_something_else_is_thrown_away(server, cache, beginning):
    cache.mkdir()
    (cache / "w.pth.part").write_bytes(beginning)
    fetch(server.url("w.pth"))
    assert (cache / "w.pth").read_bytes() == server.content


def flipped(content: bytes) -> bytes:
    at = content.index(torch.ones(300).numpy().tobytes()) + 100
    return content[:at] + bytes([content[at] ^ 1]) + content[at + 1 :]


@pytest.mark.parametrize("damage", [flipped, lambda content: content[: len(content) // 2], lambda content: b""])
def test_a_damaged_file_in_the_cache_is_fetched_again(server, cache, damage):
    cache.mkdir()
    (cache / "w.pth").write_bytes(damage(server.content))
    assert (fetch(server.url("w.pth"))).read_bytes() == server.content


def test_without_a_network_a_damaged_file_is_named(server, cache):
    cache.mkdir()
    (cache / "w.pth").write_bytes(server.content[:500])
    with pytest.raises(DownloadError, match=rf"127.0.0.1:9/w.pth .*{cache}/w.pth, which is damaged"):
        fetch("http://127.0.0.1:9/w.pth")


def test_a_published_hash_is_held_against_the_file(server, cache):
    name = f"w-{hashlib.sha256(server.content).hexdigest()[:8]}.pth"
    fetch(server.url(name))
    server.content = flipped(server.content)
    fetch(server.url(name))
    assert len(server.ranges) == 1
    (cache / name).write_bytes(server.content)
    with pytest.raises(DownloadError, match="what came is damaged: its SHA-256 begins with"):
        fetch(server.url(name))


def test_a_damaged_download_leaves_nothing_behind(server, cache):
    server.content = b"<html>please log in</html>"
    with pytest.raises(DownloadError, match="what came is damaged"):
        fetch(server.url("w.pth"))
    assert [path.name for path in cache.iterdir() if not path.name.startswith(".")] == []


def test_a_silent_server_is_not_waited_for(server, monkeypatch):
    monkeypatch.setattr(downloads, "TIMEOUT", 0.05)
    server.silent = 0.3
    with pytest.raises(DownloadError, match="timed out"):
        fetch(server.url("w.pth"))


def test_several_at_once_download_once(server, cache):
    server.silent = 0.1
    threads = [threading.Thread(target=fetch, args=(server.url("w.pth"),)) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert server.ranges == [None]
    assert (cache / "w.pth").read_bytes() == server.content


def test_no_network_names_the_url_and_the_manual_way(cache, monkeypatch):
    def no_network(*arguments, **options):
        raise OSError("no route to host")

    monkeypatch.setattr(downloads.urllib.request, "urlopen", no_network)
    with pytest.raises(DownloadError) as error:
        linvision.create_model("vil2-tiny", pretrained=True)
    assert "https://ml.jku.at/research/vision_lstm/download/vil2_tiny16_e800_in1k.th" in str(error.value)
    assert str(cache / "vil2_tiny16_e800_in1k.th") in str(error.value)
