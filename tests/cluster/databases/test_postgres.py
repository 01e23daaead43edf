"""The job table in PostgreSQL: a server that is down, hung or unreachable, and our use of connections."""

from __future__ import annotations

import socket
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager

import psutil
import pytest

from cluster.databases import postgres
from cluster.databases.database import open_database
from cluster.databases.postgres import PostgresDatabase
from cluster.failures import StoreUnavailable
from cluster.jobs.model import JobState
from cluster.jobs.queue import JobQueue
from tests.cluster.databases.postgres import PostgresServer
from tests.cluster.jobs.tables import MODEL, STEP, claim, new_job, state_of, submit


@pytest.fixture
def url(postgres_url: str) -> str:
    return postgres_url


@pytest.fixture
def short(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(postgres, "ANSWER_S", 0.5)


@contextmanager
def frozen(server: PostgresServer) -> Iterator[None]:
    """Stop all processes of the server: the kernel still accepts connections, but nothing answers."""
    parent = psutil.Process(server.pid)
    processes = [parent, *parent.children()]
    for process in processes:
        process.suspend()
    try:
        yield
    finally:
        for process in processes:
            process.resume()


def recovered(queue: JobQueue) -> None:
    """Wait until the table can be read again."""
    for _ in range(100):
        try:
            queue.depths()
            return
        except StoreUnavailable:
            time.sleep(0.1)
    raise AssertionError("the table did not come back")


def test_everything_recovers_when_the_server_was_away(
    queue: JobQueue, url: str, postgres: PostgresServer
) -> None:
    running, waiting, _ = submit(queue, "a", "b", "c")
    held, watch = claim(queue), queue.watch()
    postgres.stop()
    try:
        for _ in range(2):
            for use in (
                lambda: queue.heartbeat(held, STEP, renew=True),
                lambda: queue.claim(MODEL, "replica"),
                lambda: submit(queue, "d"),
                lambda: queue.get(running.id),
            ):
                begun = time.monotonic()
                with pytest.raises(StoreUnavailable):
                    use()
                assert time.monotonic() - begun < 1
        assert watch.wait(5), "without notifications a watch must assume changes"
        with pytest.raises(StoreUnavailable):
            JobQueue(url)
    finally:
        postgres.start()
    recovered(queue)
    queue.heartbeat(held, STEP, renew=True)
    queue.finish(held, JobState.SUCCEEDED, result={})
    assert claim(queue).job.id == waiting.id
    assert state_of(queue, running.id) is JobState.SUCCEEDED
    while watch.wait(1.5):
        pass
    submit(queue, "e")
    assert watch.wait(0.9), "woken by a notification, not by polling"
    watch.close()


def test_a_hung_server_holds_nobody_up(queue: JobQueue, postgres: PostgresServer, short: None) -> None:
    submit(queue, "a", "b")
    held = claim(queue)
    with frozen(postgres):
        for _ in range(3):
            begun = time.monotonic()
            with pytest.raises(StoreUnavailable):
                queue.heartbeat(held, STEP, renew=True)
            assert time.monotonic() - begun < 3.5
    recovered(queue)
    queue.heartbeat(held, STEP, renew=True)


def test_a_heartbeat_waits_at_most_a_third_of_a_lease() -> None:
    assert postgres.POOL_WAIT_S + postgres.CONNECT_S + postgres.ANSWER_S <= 30 / 3


def test_a_host_that_does_not_answer_and_the_secrets_of_its_url() -> None:
    with socket.create_server(("127.0.0.1", 0)) as silent:
        port = silent.getsockname()[1]
        begun = time.monotonic()
        with pytest.raises(StoreUnavailable) as refusal:
            JobQueue(f"postgresql://user:s3cret@127.0.0.1:{port}/db?sslpassword=s3cret")
        assert time.monotonic() - begun < 4
    assert "s3cret" not in str(refusal.value)
    assert "s3cret" not in str(refusal.value.__cause__)
    with pytest.raises(StoreUnavailable) as refusal:
        JobQueue(f"postgresql://user:s3cret@127.0.0.1:{port}/db")
    assert "s3cret" not in str(refusal.value)


def test_prompts_are_not_in_the_texts_of_errors(queue: JobQueue) -> None:
    job = new_job("a prompt")
    queue.submit([job])
    with pytest.raises(Exception, match="jobs_id_key") as error:
        queue.submit([job])
    assert "a prompt" not in str(error.value)


def test_a_process_that_stops_in_a_transaction_keeps_no_lock(queue: JobQueue, url: str, short: None) -> None:
    (job,) = submit(queue, "a")
    database = open_database(url)
    with pytest.raises(StoreUnavailable), database.write() as connection:
        connection.exec_driver_sql("SELECT * FROM jobs FOR UPDATE")
        time.sleep(1.0)
        assert queue.cancel(job.id) is not None
        connection.exec_driver_sql("SELECT 1")
    database.close()


def test_nothing_stays_with_the_server_but_tables(queue: JobQueue, url: str) -> None:
    """No session state, which a pooler in transaction mode would lose or pass to another client."""
    for _ in range(8):
        submit(queue, "a")
        queue.finish(claim(queue), JobState.SUCCEEDED)
    assert isinstance(queue._database, PostgresDatabase)
    engine = queue._database._engine
    with engine.connect() as connection:
        state = {
            "prepared": "SELECT name FROM pg_prepared_statements",
            "settings": "SELECT name FROM pg_settings WHERE source = 'session'",
            "locks": "SELECT objid FROM pg_locks WHERE locktype = 'advisory' AND pid = pg_backend_pid()",
            "channels": "SELECT pg_listening_channels()",
        }
        assert {name: list(connection.exec_driver_sql(query).scalars()) for name, query in state.items()} == {
            "prepared": [],
            "settings": [],
            "locks": [],
            "channels": [],
        }


def test_a_process_keeps_to_its_connections(queue: JobQueue, url: str) -> None:
    watches = [queue.watch() for _ in range(3)]
    start = threading.Barrier(24)

    def use() -> None:
        start.wait()
        for _ in range(5):
            queue.depths()

    threads = [threading.Thread(target=use) for _ in range(24)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    database = open_database(url)
    with database.read() as connection:
        count = "SELECT count(*) FROM pg_stat_activity WHERE application_name = 'lora-serve'"
        here = f"{count} AND datname = current_database() AND pid <> pg_backend_pid()"
        assert 1 < connection.exec_driver_sql(here).scalar_one() <= postgres.CONNECTIONS + 1
    database.close()
    for watch in watches:
        watch.close()


def test_the_change_feed_has_a_way_of_its_own(url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.create_server(("127.0.0.1", 0)) as closed:
        nobody = f"postgresql://user@127.0.0.1:{closed.getsockname()[1]}/db"
    monkeypatch.setenv("JOBS_LISTEN_URL", nobody)
    deaf = JobQueue(url)
    monkeypatch.setenv("JOBS_LISTEN_URL", url)
    listening = JobQueue(url)
    watch, guess = listening.watch(), deaf.watch()
    assert not watch.wait(0)
    begun = time.monotonic()
    assert guess.wait(10) and guess.wait(10)
    assert 0.5 < time.monotonic() - begun < 5, "a poll about once a second"
    submit(deaf, "a")
    assert watch.wait(10)
    for queue in (deaf, listening):
        queue.close()
