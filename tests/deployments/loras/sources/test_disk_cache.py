"""The LoRA store of a node: visibility, eviction, and use by several processes."""

from __future__ import annotations

import hashlib
import os
import signal
import subprocess
import sys
import textwrap
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from deployments.loras.sources.disk_cache import Lease, LoraStore


def nothing() -> None:
    """A callback for waits that does nothing."""


def add(store: LoraStore, data: bytes, reference: str = "r") -> Lease:
    sha256 = hashlib.sha256(data).hexdigest()
    with store.flight(reference, nothing), store.incoming() as file:
        file.write(data)
        lease = store.keep(file, sha256)
        store.remember(reference, sha256, "v1")
    return lease


def visible(root: Path) -> list[str]:
    return sorted(path.name for folder in ("files", "incoming") for path in (root / folder).glob("*"))


def test_a_file_is_found_by_its_content(tmp_path: Path) -> None:
    store = LoraStore(tmp_path, 1000)
    assert store.find("0" * 64) is None and store.recall("r") is None
    lease = add(store, b"first")
    assert (lease.lora.path.read_bytes(), lease.lora.bytes) == (b"first", 5)
    again = LoraStore(tmp_path, 1000).find(lease.lora.sha256)
    assert again is not None and again.lora == lease.lora
    assert store.recall("r") == (lease.lora.sha256, "v1")
    assert add(store, b"first", "other").lora == lease.lora
    assert visible(tmp_path) == [f"{lease.lora.sha256}.safetensors"]


def test_a_use_does_not_make_a_file_look_changed(tmp_path: Path) -> None:
    store = LoraStore(tmp_path, 1000)
    lease = add(store, b"first")
    before = lease.lora.path.stat()
    time.sleep(0.01)
    assert store.find(lease.lora.sha256) is not None
    after = lease.lora.path.stat()
    assert after.st_mtime_ns == before.st_mtime_ns and after.st_atime_ns > before.st_atime_ns


def test_the_least_recently_used_goes_first_and_never_what_is_in_use(tmp_path: Path) -> None:
    store = LoraStore(tmp_path, 25)
    leases = {name: add(store, name.encode() * 10, name) for name in "ab"}
    hashes = {name: lease.lora.sha256 for name, lease in leases.items()}
    for lease in leases.values():
        lease.close()
    found = store.find(hashes["a"])  # Now b is the least recently used.
    assert found is not None
    found.close()
    c = add(store, b"c" * 10, "c")
    assert [store.find(hashes[name]) is not None for name in "ab"] == [True, False]
    assert store.recall("b") is None and store.recall("a") is not None
    held = store.find(hashes["a"])
    d = add(store, b"d" * 10, "d")
    assert held is not None and held.lora.path.exists() and c.lora.path.exists(), "evicted while in use"
    for lease in (held, c, d):
        lease.close()
    add(store, b"e" * 20, "e")
    assert len(visible(tmp_path)) == 1


def test_a_file_larger_than_the_budget_is_served_too(tmp_path: Path) -> None:
    store = LoraStore(tmp_path, 5)
    first = add(store, b"x" * 10)
    assert first.lora.path.exists()
    first.close()
    second = add(store, b"y" * 10, "s")
    assert visible(tmp_path) == [second.lora.path.name]


def test_what_was_not_kept_is_gone(tmp_path: Path) -> None:
    store = LoraStore(tmp_path, 1000)
    with pytest.raises(KeyError), store.flight("r", nothing), store.incoming() as file:
        file.write(b"part")
        assert len(visible(tmp_path)) == 1
        raise KeyError
    assert visible(tmp_path) == []


def test_who_waits_for_another_can_stop(tmp_path: Path) -> None:
    class Canceled(Exception):
        pass

    def cancel() -> None:
        raise Canceled

    store = LoraStore(tmp_path, 1000)
    with store.flight("r", cancel):
        with pytest.raises(Canceled), store.flight("r", cancel):
            pass
        with store.flight("another", cancel):
            pass


def test_the_index_holds_no_reference_and_survives_damage(tmp_path: Path) -> None:
    store = LoraStore(tmp_path, 1000)
    add(store, b"first", "https://host.example/a?sig=Sg7secret")
    (entry,) = (tmp_path / "index").iterdir()
    assert "secret" not in entry.name + entry.read_text()
    entry.write_bytes(b"")
    assert store.recall("https://host.example/a?sig=Sg7secret") is None


def process(code: str, *arguments: object) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-c", textwrap.dedent(code), *map(str, arguments)],
        env={**os.environ, "PYTHONPATH": str(Path(__file__).parents[4])},
        stdout=subprocess.PIPE,
        text=True,
    )


@pytest.fixture
def started() -> Callable[..., subprocess.Popen[str]]:
    """Start a process and wait for its first line."""

    def start(code: str, *arguments: object) -> subprocess.Popen[str]:
        child = process(code, *arguments)
        assert child.stdout is not None and child.stdout.readline()
        return child

    return start


_HOLD = """
import sys, time
from pathlib import Path
from deployments.loras.sources.disk_cache import LoraStore
store = LoraStore(Path(sys.argv[1]), 10)
lease = store.find(sys.argv[2])
print(lease is not None, flush=True)
time.sleep(60)
"""


def test_a_file_in_use_by_another_process_stays(
    tmp_path: Path, started: Callable[..., subprocess.Popen[str]]
) -> None:
    store = LoraStore(tmp_path, 10)
    first = add(store, b"x" * 10)
    first.close()
    child = started(_HOLD, tmp_path, first.lora.sha256)
    add(store, b"y" * 10, "s").close()
    assert first.lora.path.exists()
    child.send_signal(signal.SIGKILL)
    child.wait()
    add(store, b"z" * 10, "t")
    assert not first.lora.path.exists()


_DOWNLOAD = """
import sys, time
from pathlib import Path
from deployments.loras.sources.disk_cache import LoraStore
store = LoraStore(Path(sys.argv[1]), 1000)
with store.flight("r", lambda: None), store.incoming() as file:
    file.write(b"part")
    file.flush()
    print("writing", flush=True)
    time.sleep(60)
"""


def test_a_killed_download_leaves_nothing(
    tmp_path: Path, started: Callable[..., subprocess.Popen[str]]
) -> None:
    child = started(_DOWNLOAD, tmp_path)
    store = LoraStore(tmp_path, 1000)
    add(store, b"other", "s")
    assert len(list((tmp_path / "incoming").iterdir())) == 1, "the download of a live process was removed"
    child.send_signal(signal.SIGKILL)
    child.wait()
    assert store.recall("r") is None
    lease = add(store, b"whole", "r")  # The dead process's lock is free, too.
    assert lease.lora.path.read_bytes() == b"whole"
    assert list((tmp_path / "incoming").iterdir()) == []
