"""The host tier and transfers to the device: budgets, adapters in use, threads and counters."""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import save_file

from cluster.failures import JobFailure
from deployments.loras.adapters.active_adapters import Adapters
from deployments.loras.adapters.conversion import Converter, layers_of
from deployments.loras.adapters.host_tier import HostTier
from deployments.loras.adapters.packed_adapter import Packed
from deployments.loras.sources.lora_file import LoraFile
from deployments.loras.sources.lora_root import open_lora

SIZE = 8
BYTES = 2 * 4 * 2 * SIZE
"""Bytes of one adapter of rank 2 for one layer, in float32."""


@pytest.fixture
def pipeline() -> SimpleNamespace:
    transformer = torch.nn.Sequential(torch.nn.Linear(SIZE, SIZE), torch.nn.Linear(SIZE, SIZE))
    return SimpleNamespace(components={"transformer": transformer})


@pytest.fixture
def files(tmp_path: Path) -> list[LoraFile]:
    return [made(tmp_path, f"{value}.safetensors", value) for value in (1.0, 2.0, 3.0)]


def made(folder: Path, name: str, value: float) -> LoraFile:
    down, up = torch.full((2, SIZE), value), torch.ones(SIZE, 2)
    save_file({"transformer.0.lora_A.weight": down, "transformer.0.lora_B.weight": up}, folder / name)
    return open_lora(folder, name)


class Counted:
    """A converter that records its runs and waits until `go` is set."""

    def __init__(self, convert: Callable[[LoraFile], Packed]) -> None:
        self.convert = convert
        self.runs: list[LoraFile] = []
        self.go = threading.Event()
        self.go.set()

    def __call__(self, file: LoraFile) -> Packed:
        self.runs.append(file)
        assert self.go.wait(10)
        return self.convert(file)


@pytest.fixture
def convert(pipeline: SimpleNamespace) -> Counted:
    return Counted(Converter(layers_of(pipeline), pinned=False))


def test_the_device_is_filled_from_the_host_and_that_from_the_disk(
    pipeline: SimpleNamespace, files: list[LoraFile], convert: Counted
) -> None:
    host = HostTier(convert, 3 * BYTES)
    adapters = Adapters(layers_of(pipeline), host, torch.device("cpu"), BYTES)
    x = torch.ones(1, SIZE)
    results = []
    for file in (*files, *files):
        adapters.activate([(file, 0.5)])
        assert adapters.resident == {file.sha256}
        with adapters.rendering():
            results.append(pipeline.components["transformer"](x))
    assert convert.runs == files
    assert host.hashes == {file.sha256 for file in files}
    assert (host.meter.hits, host.meter.misses, host.meter.read_bytes) == (3, 3, 6 * BYTES)
    adapters.activate([(files[2], 1.0)])
    assert (adapters.meter.hits, adapters.meter.misses) == (1, 6)
    assert all(torch.equal(one, two) for one, two in zip(results[:3], results[3:], strict=True))


def test_the_least_recently_used_goes_and_none_in_use(files: list[LoraFile], convert: Counted) -> None:
    a, b, c = files
    host = HostTier(convert, 2 * BYTES)
    for file in (a, b, a, c):
        with host.use(file):
            pass
    assert host.hashes == {a.sha256, c.sha256}
    with ExitStack() as uses:
        for file in files:
            uses.enter_context(host.use(file))
        assert host.hashes == {a.sha256, b.sha256, c.sha256}
    assert len(host.hashes) == 2


def test_of_several_threads_one_converts(files: list[LoraFile], convert: Counted) -> None:
    a, b, _ = files
    host = HostTier(convert, 3 * BYTES)
    convert.go.clear()

    def use(file: LoraFile) -> int:
        with host.use(file) as packed:
            return id(packed)

    with ThreadPoolExecutor(6) as threads:
        used = [threads.submit(use, file) for file in (a, a, a, b, b)]
        while len(convert.runs) < 2:  # Both run at once: one adapter does not wait for another.
            threading.Event().wait(0.01)
        convert.go.set()
        assert len({each.result() for each in used}) == 2
    assert {file.sha256 for file in convert.runs} == {a.sha256, b.sha256} and len(convert.runs) == 2
    assert (host.meter.hits, host.meter.misses) == (3, 2)


def test_a_file_that_cannot_be_read_leaves_nothing(files: list[LoraFile], convert: Counted) -> None:
    host = HostTier(convert, BYTES)
    files[0].path.write_bytes(b"")
    for _ in range(2):
        with pytest.raises(JobFailure), host.use(files[0]):
            pass
    with host.use(files[1]):
        pass
    assert host.hashes == {files[1].sha256}
