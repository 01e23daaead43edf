"""The contract of both stores, directory and S3; then the directory store, which stays inside its root."""

from __future__ import annotations

import hashlib
import resource
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from cluster.objects.directory import DirectoryStore
from cluster.objects.opening import open_store
from cluster.objects.store import ObjectStore, StoreError, content_key

KEY = "0d4c/1/0-Zm9v_-.png"

NOT_KEYS = [
    "",
    "/",
    "/etc/passwd",
    "../secret",
    "a/../../secret",
    "a/..",
    "a//b",
    "a/",
    "./a",
    ".hidden",
    "a/.hidden",
    "a\0b",
    "a\nb",
    "a\n",
    "a b",
    "a\\b",
    "a%2e%2e",
    "a:b",
    "ä",
    "-a",
    "a" * 201,
]


@pytest.fixture
def root(tmp_path: Path) -> Path:
    return tmp_path / "outputs"


@pytest.fixture
def store(root: Path) -> DirectoryStore:
    return DirectoryStore(root)


@pytest.fixture(params=["directory", "s3"])
def any_store(request: pytest.FixtureRequest, root: Path) -> ObjectStore:
    if request.param == "directory":
        return open_store(f"file://{root}")
    return open_store(request.getfixturevalue("s3_url"))


def files_below(root: Path) -> list[str]:
    return sorted(str(path.relative_to(root)) for path in root.rglob("*") if path.is_file())


def test_what_is_put_can_be_fetched(any_store: ObjectStore) -> None:
    assert not any_store.exists(KEY)
    any_store.put(KEY, b"picture", "image/png")
    assert any_store.exists(KEY)
    assert any_store.get(KEY) == b"picture"
    any_store.put(KEY, b"another", "image/png")
    assert any_store.get(KEY) == b"another"
    any_store.put("empty", b"", "image/png")
    assert any_store.get("empty") == b""


def test_a_file_is_stored_and_stays(any_store: ObjectStore, tmp_path: Path) -> None:
    file = tmp_path / "video.mp4"
    file.write_bytes(bytes(range(256)) * 1000)
    any_store.put_file("job/0.mp4", file, "video/mp4")
    assert any_store.get("job/0.mp4") == file.read_bytes()
    with pytest.raises(StoreError, match=r"job/1.mp4 cannot be stored: .*No such file"):
        any_store.put_file("job/1.mp4", tmp_path / "none.mp4", "video/mp4")
    assert not any_store.exists("job/1.mp4")


def test_what_is_not_there(any_store: ObjectStore) -> None:
    assert any_store.local_path(KEY) is None
    any_store.delete("0d4c")
    with pytest.raises(StoreError, match=f"{KEY} cannot be read"):
        any_store.get(KEY)


def test_where_an_object_is(store: DirectoryStore, root: Path) -> None:
    store.put(KEY, b"picture", "image/png")
    assert store.location(KEY) == str(root / KEY)
    assert store.url(KEY, "http://host:8000") == f"http://host:8000/outputs/{KEY}"
    assert store.local_path(KEY) == root / KEY
    assert files_below(root) == [KEY]


def test_other_names_are_no_keys(any_store: ObjectStore, root: Path) -> None:
    secret = root.parent / "secret"
    secret.write_text("secret")
    uses = (
        any_store.get,
        any_store.exists,
        any_store.location,
        any_store.delete,
        lambda key: any_store.url(key, "http://h"),
        lambda key: any_store.put(key, b"", "text/plain"),
        lambda key: any_store.put_file(key, secret, "text/plain"),
    )
    for key in NOT_KEYS:
        assert any_store.local_path(key) is None
        for use in uses:
            with pytest.raises(ValueError, match="not a key"):
                use(key)
    assert [path.name for path in root.parent.iterdir()] == ["secret"]


def test_only_files_of_the_store_are_served(store: DirectoryStore, root: Path, tmp_path: Path) -> None:
    image = b"a control image"
    store.put(content_key(image), image, "image/png")
    assert store.get(content_key(image)) == image
    assert store.local_path(content_key(image)) is None, "control images of clients"
    store.put("job/0.png", b"", "image/png")
    assert store.local_path("job") is None, "a folder"
    (tmp_path / "secret").write_text("secret")
    (root / "job" / "out").symlink_to(tmp_path / "secret")
    assert store.local_path("job/out") is None, "a link that leaves the store"
    (root / "job" / "in").symlink_to(root / "inputs")
    assert store.local_path(f"job/in{content_key(image).removeprefix('inputs')}") is None


def test_equal_images_have_one_key() -> None:
    digest = hashlib.sha256(b"image").hexdigest()
    assert content_key(b"image") == f"inputs/sha256/{digest[:2]}/{digest}"
    assert content_key(b"image") != content_key(b"other")


def test_a_store_may_lie_behind_a_link(tmp_path: Path) -> None:
    (tmp_path / "disk").mkdir()
    (tmp_path / "outputs").symlink_to(tmp_path / "disk")
    store = DirectoryStore(tmp_path / "outputs")
    store.put(KEY, b"", "image/png")
    assert store.local_path(KEY) == tmp_path / "disk" / KEY


def test_delete_takes_what_lies_below_and_no_more(any_store: ObjectStore) -> None:
    keys = ("job/1/0.png", "job/1/1.png", "job/2/0.png", "job2/1/0.png", "single.png")
    for key in keys:
        any_store.put(key, b"", "image/png")
    any_store.delete("job/1")
    any_store.delete("single.png")
    assert [key for key in keys if any_store.exists(key)] == ["job/2/0.png", "job2/1/0.png"]
    any_store.delete("job")
    assert [key for key in keys if any_store.exists(key)] == ["job2/1/0.png"]


def test_those_who_delete_the_same_do_not_disturb_one_another(store: DirectoryStore, root: Path) -> None:
    for index in range(400):
        folder = root / "job" / f"{index % 4}"
        folder.mkdir(parents=True, exist_ok=True)
        (folder / f"{index}").touch()
    with ThreadPoolExecutor(4) as threads:
        list(threads.map(store.delete, ["job"] * 4))
    assert not (root / "job").exists()


def test_a_write_that_fails_leaves_nothing_behind(store: DirectoryStore, root: Path) -> None:
    """A limit on file size stands for a full disk: the kernel writes the first part and no more."""
    store.put(KEY, b"before", "image/png")
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, limits[1]))
    try:
        for key in (KEY, "new/0.png"):
            with pytest.raises(StoreError, match="File too large"):
                store.put(key, bytes(200_000), "image/png")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert store.get(KEY) == b"before"
    assert files_below(root) == [KEY]


def test_a_folder_is_not_replaced_by_an_object(store: DirectoryStore, root: Path) -> None:
    store.put(KEY, b"before", "image/png")
    with pytest.raises(StoreError):
        store.put("0d4c/1", b"after", "image/png")
    assert files_below(root) == [KEY]


def test_a_store_that_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    store = DirectoryStore(tmp_path / "file")
    with pytest.raises(StoreError):
        store.put(KEY, b"", "image/png")
    with pytest.raises(StoreError):
        store.get(KEY)
    assert not store.exists(KEY)
    assert store.local_path(KEY) is None


def test_readers_see_an_object_whole(any_store: ObjectStore) -> None:
    """While one thread replaces an object again and again, another never reads half of it."""
    bodies = [bytes([n]) * 200_000 for n in range(2)]
    any_store.put(KEY, bodies[0], "image/png")

    def write() -> None:
        for n in range(30):
            any_store.put(KEY, bodies[n % 2], "image/png")

    thread = threading.Thread(target=write)
    thread.start()
    while thread.is_alive():
        assert any_store.get(KEY) in bodies
    assert any_store.get(KEY) == bodies[1], "the object that was written last"


def test_where_a_store_may_be(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for url, root in [
        ("file://var/outputs", tmp_path / "var/outputs"),
        ("var/outputs", tmp_path / "var/outputs"),
        (f"file://{tmp_path}/abs", tmp_path / "abs"),
        (f"{tmp_path}/abs", tmp_path / "abs"),
    ]:
        assert open_store(url).location("a.png") == str(root / "a.png")


@pytest.mark.parametrize("url", ["gs://bucket/prefix", "https://user:s3cret@host/a", "", "file://"])
def test_other_stores_are_refused(url: str) -> None:
    with pytest.raises(ValueError, match="file://PATH") as refusal:
        open_store(url)
    assert "s3cret" not in str(refusal.value)
