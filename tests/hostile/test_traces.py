"""Input 60: tokens, keys, queries and prompts in logs, table, files and error bodies. Runs after the rest."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path

import pytest
from sqlalchemy import MetaData, create_engine, select

from cluster.jobs.model import JobState
from tests.cluster.databases.postgres import PostgresServer
from tests.hostile.conftest import API_KEY, LORA, PROMPT, QUERY, SECRET, SECRET_KEY, TOKEN, Stage, request
from tests.serve_app.conftest import serving


def test_60_nothing_of_it_is_left(stage: Stage) -> None:
    """The requests of all other tests in this folder are checked here as well."""
    lora, page = stage.site.file("/lora", LORA.read_bytes()), stage.site.file("/page", b"<html>")
    assert stage.outcome(request(lora + QUERY)) is None
    assert stage.outcome(request(page + QUERY)) == "LORA_URL_IS_HTML"
    assert stage.outcome(request(prompt={"ctrl_img": page + QUERY})) == "CONTROL_IMAGE_INVALID"
    # The warning about a truncated prompt quotes the prompt.
    assert stage.outcome(request(prompt={"prompt": f"{PROMPT} " * 800})) is None
    stage.refused(request(hf_token=[TOKEN]))
    stage.refused(request(prompts=[PROMPT]))
    wrong = {"Authorization": f"Bearer {SECRET}wrong"}
    assert SECRET not in stage.service.client.get("/v1/requests", headers=wrong).text
    assert any(target.endswith(QUERY) for _, target, _ in stage.site.requests), "the secrets were sent"

    files = [file for file in stage.folder.rglob("*") if file.is_file()]
    assert {"jobs.db", "log"} < {file.name for file in files}
    assert [file for file in files if SECRET.encode() in file.read_bytes()] == []
    assert stage.log.stat().st_size and PROMPT not in stage.log.read_text()
    assert columns_with(PROMPT, stage.service.settings.jobs) == {"jobs.spec"}


@contextmanager
def sqlite(folder: Path) -> Iterator[tuple[str, Path]]:
    yield f"sqlite:///{folder}/jobs.db", folder


@contextmanager
def postgres(_: Path) -> Iterator[tuple[str, Path]]:
    server = PostgresServer(flush=True)
    try:
        yield server.create(), server.folder
    finally:
        server.close()


@pytest.mark.parametrize("database", [sqlite, postgres])
def test_60_jobs_in_every_state(
    database: Callable[[Path], AbstractContextManager[tuple[str, Path]]],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("API_KEYS", API_KEY)
    monkeypatch.setenv("SECRET_KEY", SECRET_KEY)
    with database(tmp_path) as (url, folder):
        with serving(tmp_path, jobs=url) as service:
            service.client.headers["Authorization"] = f"Bearer {API_KEY}"
            paths = [
                f"https://{name}.example/a{QUERY}" for name in ("failed", "canceled", "running", "queued")
            ]
            ids = [service.submit(request(path), key=path[:20]) for path in paths]
            failed = service.claim(ids[0])
            service.queue.finish(failed, JobState.FAILED, error=f"no {paths[0]}", error_code="E")
            service.client.delete(f"/v1/requests/{ids[1]}")
            service.claim(ids[2])
            assert columns_with(PROMPT, url) == {"jobs.spec"}
            assert columns_with(SECRET, url) == set()
            assert len(columns_with("gAAAA", url)) == 1, "sealed by Fernet"
        files = {file: file.read_bytes() for file in folder.rglob("*") if file.is_file()}
    assert any(PROMPT.encode() in data for data in files.values()), "the files must contain the jobs"
    assert [file for file, data in files.items() if SECRET.encode() in data] == []


def columns_with(text: str, url: str) -> set[str]:
    """Return the columns of a database, as `table.column`, that contain `text`."""
    engine = create_engine(url.replace("postgresql://", "postgresql+psycopg://"))
    schema = MetaData()
    schema.reflect(engine)
    found = set()
    with engine.connect() as connection:
        for table in schema.tables.values():
            for row in connection.execute(select(table)).mappings():
                found |= {f"{table.name}.{name}" for name, value in row.items() if text in str(value)}
    engine.dispose()
    return found
