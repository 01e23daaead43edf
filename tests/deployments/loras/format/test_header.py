from __future__ import annotations

import io
import json
import pickle
import zipfile
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import save

from cluster.failures import FailureCode, JobFailure
from deployments.loras.format.header import MAX_HEADER_BYTES, MAX_TENSORS, TensorInfo, read_header
from tests.parity.cases import FOLDER

SOUND = save({"a": torch.zeros(2, 3), "b": torch.zeros(4, dtype=torch.bfloat16)}, {"format": "pt"})


def file(header: Any, data: bytes = b"", length: int | None = None) -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return (len(text) if length is None else length).to_bytes(8, "little") + text + data


def entry(begin: int = 0, end: int = 4, shape: Any = (1,), dtype: Any = "F32") -> dict[str, Any]:
    return {"dtype": dtype, "shape": shape, "data_offsets": [begin, end]}


def zipped() -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        archive.writestr("data.pkl", b"x" * 100)
    return buffer.getvalue()


def test_a_sound_file(tmp_path: Path) -> None:
    path = tmp_path / "a"
    path.write_bytes(SOUND)
    header = read_header(path)
    begin = len(SOUND) - 24 - 8
    expected = {"a": TensorInfo("F32", (2, 3), begin), "b": TensorInfo("BF16", (4,), begin + 24)}
    assert header.tensors == expected
    assert header.metadata == {"format": "pt"}


@pytest.mark.parametrize(
    "path", sorted(FOLDER.glob("*/lora/*.safetensors")), ids=lambda path: path.parent.parent.name
)
def test_files_of_the_trainer(path: Path) -> None:
    assert read_header(path).tensors


BROKEN = {
    "empty": (b"", "is empty"),
    "short": (b"abc", "is not safetensors"),
    "pickle": (pickle.dumps({"a": list(range(99))}), "a pickle"),
    "zip": (zipped(), "a zip archive"),
    "html": (b"<!DOCTYPE html><html></html>", "a web page"),
    "header beyond the bound": (file({}, length=MAX_HEADER_BYTES + 1), "is not safetensors"),
    "header cut": (SOUND[:40], "ends within its header"),
    "tensors cut": (SOUND[:-1], "ends within its tensors"),
    "bytes after": (SOUND + b"x", "bytes after"),
    "no JSON": (file(b"{nope}"), "not valid JSON"),
    "no UTF-8": (file(b'{"\xff": 1}'), "not valid JSON"),
    "UTF-16": (file('{"a": 1}'.encode("utf-16")), "not valid JSON"),
    "nested": (file(b"[" * 100_000), "not valid JSON"),
    "long number": (file(b'{"a":' + b"9" * 5000 + b"}"), "not valid JSON"),
    "list": (file([1]), "not a JSON object"),
    "duplicate": (
        file(b'{"a":{"dtype":"F32","shape":[1],"data_offsets":[0,4]},"a":{}}', b"x" * 4),
        "not valid JSON",
    ),
    "metadata": (file({"__metadata__": {"a": 1}}), "metadata"),
    "entry": (file({"a": 1}), "invalid entry"),
    "dtype": (file({"a": entry(dtype="F31")}, b"x" * 4), "invalid entry"),
    "negative": (file({"a": entry(shape=[-1])}, b"x" * 4), "invalid entry"),
    "boolean": (file({"a": entry(shape=[True])}, b"x" * 4), "invalid entry"),
    "float": (file({"a": entry(shape=[1.0])}, b"x" * 4), "invalid entry"),
    "NaN": (file(b'{"a":{"dtype":"F32","shape":[NaN],"data_offsets":[0,4]}}', b"x" * 4), "invalid entry"),
    "size": (file({"a": entry(shape=[2])}, b"x" * 4), "invalid entry"),
    "huge": (file({"a": entry(shape=[2**40, 2**40])}, b"x" * 4), "invalid entry"),
    "overlap": (file({"a": entry(), "b": entry()}, b"x" * 4), "overlap"),
    "gap": (file({"a": entry(4, 8)}, b"x" * 8), "gaps"),
    "many": (file({str(n): entry(0, 0, [0]) for n in range(MAX_TENSORS + 1)}), "at most"),
}


@pytest.mark.parametrize("kind", BROKEN)
def test_broken_files(tmp_path: Path, kind: str) -> None:
    data, words = BROKEN[kind]
    path = tmp_path / "a"
    path.write_bytes(data)
    with pytest.raises(JobFailure) as caught:
        read_header(path)
    assert caught.value.code is FailureCode.LORA_FORMAT_NOT_SUPPORTED
    assert words in caught.value.message


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=300)
@given(position=st.integers(0, len(SOUND) - 1), value=st.integers(0, 255), cut=st.integers(0, len(SOUND)))
def test_damaged_files_never_raise_anything_else(tmp_path: Path, position: int, value: int, cut: int) -> None:
    data = bytearray(SOUND)
    data[position] = value
    path = tmp_path / "a"
    path.write_bytes(data[:cut] if cut % 2 else data)
    try:
        read_header(path)
    except JobFailure as failure:
        assert failure.code is FailureCode.LORA_FORMAT_NOT_SUPPORTED
