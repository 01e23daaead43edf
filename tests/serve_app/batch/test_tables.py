"""All kinds of tables give the same requests."""

from __future__ import annotations

import json
from pathlib import Path

import pandas
import pyarrow
import pytest
from PIL import Image

from serve_app.batch.tables import read_rows, requests_of
from serve_app.wire.requests import InferenceRequest

ROWS = [{"prompt": "a fox", "width": 64, "lora": "a.safetensors"}, {"prompt": "a ß", "seed": 7, "note": "x"}]


def test_every_kind_of_table_has_the_same_rows(tmp_path: Path) -> None:
    frame = pandas.DataFrame(ROWS)
    frame.to_csv(tmp_path / "rows.csv", index=False)
    lines = "\n\n".join(json.dumps(row, ensure_ascii=False) for row in ROWS)
    (tmp_path / "rows.jsonl").write_text(f"\ufeff{lines}\n", encoding="utf-8")
    for table in (ROWS, iter(ROWS), frame, pyarrow.Table.from_pylist(ROWS), tmp_path / "rows.jsonl"):
        if table is not frame and not isinstance(table, Path) and hasattr(table, "to_pylist"):
            # Arrow takes its columns from the first row.
            assert [row["prompt"] for row in read_rows(table)] == ["a fox", "a ß"]
            continue
        rows = read_rows(table)
        assert rows == ROWS
        json.dumps(rows)
    # CSV values are strings; the service accepts them. pandas writes a column with gaps as floats.
    texts = read_rows(str(tmp_path / "rows.csv"))
    assert texts[1] == {"prompt": "a ß", "seed": "7.0", "note": "x"}
    for row in texts:
        (request,) = requests_of([row], model="flux")
        InferenceRequest.model_validate(request)


def test_gaps_are_left_out() -> None:
    frame = pandas.DataFrame(
        {"prompt": ["a", "b"], "seed": pandas.array([1, None], "Int64"), "neg": ["", None]}
    )
    assert read_rows(frame) == [{"prompt": "a", "seed": 1, "neg": ""}, {"prompt": "b"}]
    assert read_rows([{"prompt": "a", "width": float("nan"), "seed": None}]) == [{"prompt": "a"}]


@pytest.mark.parametrize(
    ("name", "text", "said"),
    [
        ("rows.txt", "a fox", "a .csv or a .jsonl"),
        ("rows.jsonl", '{"prompt": "a"}\n{"prompt"', "rows.jsonl, line 2"),
        ("rows.jsonl", "[1]", "line 1: not an object"),
    ],
)
def test_a_file_that_is_no_table(tmp_path: Path, name: str, text: str, said: str) -> None:
    (tmp_path / name).write_text(text)
    with pytest.raises(ValueError, match=said):
        read_rows(tmp_path / name)


@pytest.mark.parametrize("table", [7, ["a fox"], [("prompt", "a fox")]])
def test_what_is_no_table(table: object) -> None:
    with pytest.raises(ValueError, match="a table must be"):
        read_rows(table)


def test_a_grid_is_every_combination_the_last_axis_fastest() -> None:
    grid = requests_of(
        [{"prompt": "a"}, {"prompt": "b", "seed": 9, "lora": "own"}],
        loras=["x", {"path": "y", "sha256": "0" * 64}],
        multipliers=[0.5, 1.0],
        seeds=[1, 2],
        model="flux",
        width=64,
    )
    assert len(grid) == 16
    first = {"model": "flux", "loras": [{"path": "x", "network_multiplier": 0.5}]}
    assert grid[0] == first | {"prompts": [{"prompt": "a", "width": 64, "seed": 1}]}
    jobs = [
        (each["prompts"][0]["prompt"], each["loras"][0]["path"], each["prompts"][0]["seed"]) for each in grid
    ]
    assert jobs[:4] == [("a", "x", 1), ("a", "x", 2)] * 2
    assert [prompt for prompt, _, _ in jobs] == ["a"] * 8 + ["b"] * 8
    assert grid[4]["loras"] == [{"path": "y", "sha256": "0" * 64, "network_multiplier": 0.5}]


def test_an_empty_axis_leaves_the_rows_own() -> None:
    rows = [{"prompt": "a", "lora": "own", "multiplier": 0.3, "seed": 9, "model": "sd15"}, {"prompt": "b"}]
    one, two = requests_of(rows, model="flux", multiplier=0.7, lora="x", output_format="png", neg=None)
    lora = {"path": "own", "network_multiplier": 0.3}
    assert one == {
        "model": "sd15",
        "output_format": "png",
        "loras": [lora],
        "prompts": [{"prompt": "a", "seed": 9}],
    }
    assert two["loras"] == [{"path": "x", "network_multiplier": 0.7}]
    assert requests_of([{"prompt": "a"}])[0]["loras"] == []


def test_a_pair_of_loras_is_one_lora_of_the_grid() -> None:
    pair = [{"path": "low", "transformer": "low"}, {"path": "high", "transformer": "high"}]
    (request,) = requests_of([{"prompt": "a"}], loras=[pair], multipliers=[0.5])
    assert request["loras"] == [{**item, "network_multiplier": 0.5} for item in pair]


def test_what_no_request_has() -> None:
    picture = Image.new("RGB", (8, 8))
    (request,) = requests_of([{"prompt": "a", "note": "x", "ctrl_img": picture}])
    assert request["prompts"] == [{"prompt": "a", "ctrl_img": picture}]
    with pytest.raises(ValueError, match="unknown columns: hight"):
        requests_of([{"prompt": "a"}], hight=64)
