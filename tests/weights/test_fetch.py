"""Fetching a file, from a server of the test: verified before it gets its name; what fails says what to do."""

from __future__ import annotations

import functools
import hashlib
import http.server
import threading

import pytest

from diffdistill.weights import WeightsError, fetch

CONTENT = bytes(range(256)) * 9000


@pytest.fixture
def server(tmp_path):
    """Serves a folder; yields (folder, address)."""
    folder = tmp_path / "served"
    folder.mkdir()

    class Quiet(http.server.SimpleHTTPRequestHandler):
        def log_message(self, *_):
            """Nothing."""

    handler = functools.partial(Quiet, directory=str(folder))
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as running:
        threading.Thread(target=running.serve_forever, daemon=True).start()
        yield folder, f"http://127.0.0.1:{running.server_port}"
        running.shutdown()


def published(address: str, content: bytes = CONTENT) -> fetch.Published:
    return fetch.Published("weights.pth", hashlib.sha256(content).hexdigest(), len(content), f"{address}/weights.pth")


def test_a_file_is_fetched_once(server, tmp_path, monkeypatch):
    folder, address = server
    (folder / "weights.pth").write_bytes(CONTENT)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    path = fetch.fetch(published(address))
    assert path == tmp_path / "cache" / "diffdistill" / "weights.pth"
    assert path.read_bytes() == CONTENT
    (folder / "weights.pth").unlink()  # the second time the network is not needed
    assert fetch.fetch(published(address)) == path
    assert fetch.fetch(published(address), tmp_path / "cache" / "diffdistill" / "weights.pth") == path


@pytest.mark.parametrize("served", [CONTENT[:-1], CONTENT[:-1] + b"x"])
def test_what_is_not_the_file_is_not_kept(server, tmp_path, served):
    folder, address = server
    (folder / "weights.pth").write_bytes(served)
    short = "It ended after" if len(served) < len(CONTENT) else "Nothing was kept"
    with pytest.raises(WeightsError, match=f"gave a file with sha256 {hashlib.sha256(served).hexdigest()}.*{short}"):
        fetch.fetch(published(address), tmp_path / "new" / "weights.pth")
    assert list((tmp_path / "new").iterdir()) == []


def test_another_file_in_its_place_is_left_alone(server, tmp_path):
    path = tmp_path / "weights.pth"
    path.write_bytes(b"mine")
    with pytest.raises(WeightsError, match=r"is there, but is not weights\.pth.*Remove it, or give another path"):
        fetch.fetch(published(server[1]), path)
    assert path.read_bytes() == b"mine"


@pytest.mark.parametrize("address", ["http://127.0.0.1:9", "missing"])
def test_offline_the_error_says_what_to_do(server, tmp_path, address):
    address = server[1] if address == "missing" else address
    with pytest.raises(WeightsError, match=r"cannot be fetched.*on another machine.*--inception_weights=PATH"):
        fetch.fetch(published(address), tmp_path / "weights.pth")
    assert not (tmp_path / "weights.pth").exists()


def test_the_published_network_is_the_one_of_the_specification():
    assert fetch.INCEPTION.size == 95_628_359
    assert fetch.INCEPTION.sha256.startswith("6726825d0af5f729cebd5821db510b11")
    assert fetch.INCEPTION.sha256[:8] in fetch.INCEPTION.url
