"""Which job a replica gets: age bound, warm here, warm nowhere, warm elsewhere after some patience."""

from __future__ import annotations

import re
import threading

import pytest
from sqlalchemy import Dialect, select
from sqlalchemy.dialects import postgresql, sqlite

from cluster.claims import next_job
from cluster.database import open_database
from cluster.jobs import JobState
from cluster.queue import JobQueue
from tests.cluster.tables import MODEL, claim, let_pass, new_job, submit


def adapter(queue: JobQueue, owner: str, *warm: str, patience_s: float = 1.0) -> str | None:
    """Claim for `owner`; return the adapter of the job it got."""
    claimed = queue.claim(MODEL, owner, warm=warm, patience_s=patience_s)
    return claimed and claimed.job.adapter


def test_the_oldest_comes_first(queue: JobQueue) -> None:
    jobs = submit(queue, "a", "a", "a") + queue.submit([new_job("a"), new_job("a")])
    assert [claim(queue).job.id for _ in jobs] == [job.id for job in jobs]
    assert queue.claim(MODEL, "replica") is None


def test_a_replica_gets_jobs_of_its_model_only(queue: JobQueue) -> None:
    queue.submit([new_job("a", model="sd15")])
    assert queue.claim(MODEL, "replica") is None
    assert queue.claim("sd15", "replica") is not None


def test_warm_here_goes_before_older_jobs(queue: JobQueue) -> None:
    submit(queue, "cold", "late", "warm", "late", "warm")
    assert [adapter(queue, "replica", "warm", "late", "unused") for _ in range(5)] == [
        "late",
        "warm",
        "late",
        "warm",
        "cold",
    ]


def test_warm_nowhere_goes_before_warm_elsewhere(queue: JobQueue) -> None:
    queue.announce("other", MODEL, ["theirs"])
    submit(queue, "theirs", "new")
    assert adapter(queue, "replica") == "new"


def test_warm_elsewhere_waits_for_patience(queue: JobQueue, url: str) -> None:
    queue.announce("other", MODEL, ["theirs"])
    submit(queue, "theirs")
    assert adapter(queue, "replica", patience_s=5) is None
    let_pass(url, 6)
    assert adapter(queue, "replica", patience_s=5) == "theirs"


def test_a_lora_is_warm_where_its_job_was_just_claimed(queue: JobQueue) -> None:
    """Before the first replica has loaded it: else every idle replica would load the same LoRA."""
    submit(queue, "new", "new")
    assert adapter(queue, "first", patience_s=60) == "new"
    assert adapter(queue, "second", patience_s=60) is None
    queue.announce("first", MODEL, [])
    assert adapter(queue, "second", patience_s=60) is None
    assert adapter(queue, "first", patience_s=60) == "new"


def test_what_a_replica_dropped_is_warm_nowhere(queue: JobQueue) -> None:
    queue.announce("other", MODEL, ["a", "b"])
    submit(queue, "a", "b")
    queue.announce("other", MODEL, ["b"])
    assert adapter(queue, "replica", patience_s=60) == "a"
    assert adapter(queue, "replica", patience_s=60) is None
    queue.withdraw("other")
    assert adapter(queue, "replica", patience_s=60) == "b"


def test_a_lora_of_the_same_name_on_another_model_is_not_warm(queue: JobQueue) -> None:
    queue.announce("other", "sd15", ["a"])
    submit(queue, "a")
    assert adapter(queue, "replica", patience_s=60) == "a"


def test_the_age_bound_comes_before_all(queue: JobQueue, url: str) -> None:
    queue.announce("other", MODEL, ["theirs"])
    submit(queue, "theirs", "cold")
    let_pass(url, 61)
    submit(queue, "warm")
    assert [adapter(queue, "replica", "warm", patience_s=90) for _ in range(3)] == ["theirs", "cold", "warm"]


def test_back_off_is_respected_in_every_class(queue: JobQueue, url: str) -> None:
    queue.announce("other", MODEL, ["theirs"])
    for name in ("warm", "cold", "theirs"):
        submit(queue, name)
        held = claim(queue, "failing", warm=["warm"], patience_s=0)
        queue.retry(held, error="e", error_code="E", delay_s=200)
    queue.withdraw("failing")
    let_pass(url, 100)
    assert adapter(queue, "replica", "warm", patience_s=0) is None
    (fresh,) = submit(queue, "fresh")
    assert claim(queue, "replica", warm=["warm"]).job.id == fresh.id
    let_pass(url, 101)
    assert [adapter(queue, "replica") for _ in range(3)] == ["warm", "cold", "theirs"]


def test_a_lost_job_keeps_its_place(queue: JobQueue, url: str) -> None:
    lost, _ = submit(queue, "a", "a")
    claim(queue)
    let_pass(url, 31)
    queue.sweep()
    assert claim(queue).job.id == lost.id


def test_a_claim_in_vain_changes_nothing(queue: JobQueue) -> None:
    """Idle replicas that wake each other by looking would never sleep."""
    queue.announce("other", MODEL, ["theirs"])
    submit(queue, "theirs")
    watch = queue.watch()
    assert adapter(queue, "replica", patience_s=60) is None
    assert adapter(queue, "replica", "b", "c", patience_s=60) is None
    assert not watch.wait(0.05)
    watch.close()
    assert queue.depths()[MODEL].workers == 1


def the_order(dialect: Dialect) -> str:
    order = select(next_job(MODEL, "replica", age_bound_s=60, patience_s=1))
    return str(order.compile(dialect=dialect, compile_kwargs={"literal_binds": True}))


def test_every_class_walks_an_index_of_sqlite(sqlite_url: str) -> None:
    JobQueue(sqlite_url).close()
    database = open_database(sqlite_url)
    with database.read() as connection:
        statement = f"EXPLAIN QUERY PLAN {the_order(sqlite.dialect())}"
        plan = [row[3] for row in connection.exec_driver_sql(statement)]
    database.close()
    walks = [step for step in plan if "queued" in step or "head" in step]
    assert len(walks) == 5
    assert all("INDEX jobs_by_" in step and "(state=? AND model=?" in step for step in walks)
    assert sum("TEMP B-TREE" in step for step in plan) == 1, "the replica's own few adapters"


@pytest.mark.parametrize("statistics", ["none", "of an empty table", "of an empty queue", "true"])
def test_every_class_walks_an_index_of_postgresql(postgres_url: str, statistics: str) -> None:
    """Whatever the planner believes: a queue is often empty when statistics are taken."""
    queue, database = JobQueue(postgres_url), open_database(postgres_url)
    with database.write() as connection:
        if statistics == "of an empty table":
            connection.exec_driver_sql("ANALYZE")
    # Names as long as hashes make this index larger than the other, and the other the planner's choice.
    queue.submit([new_job(f"{'lora' * 25}-{n % 50}") for n in range(2000)])
    queue.announce("replica", MODEL, [f"{'lora' * 25}-{n}" for n in (48, 49)])
    with database.write() as connection:
        if statistics == "of an empty queue":
            connection.exec_driver_sql("UPDATE jobs SET state = 'succeeded'")
        if statistics in ("of an empty queue", "true"):
            connection.exec_driver_sql("ANALYZE")
        connection.exec_driver_sql("UPDATE jobs SET state = 'in_queue'")
        statement = f"EXPLAIN (COSTS OFF) {the_order(postgresql.dialect())}"
        plan = "\n".join(connection.exec_driver_sql(statement).scalars())
    queue.close()
    database.close()
    walks = re.findall(r"(\w[\w ]+) on jobs (\w+)\n\s+Index Cond: \((.*)\)", plan)
    assert [(how, what) for how, what, _ in walks] == [
        ("Index Scan using jobs_by_adapter", "head"),
        ("Index Scan using jobs_by_age", "queued"),
        ("Index Scan using jobs_by_adapter", "queued_1"),
        ("Index Scan using jobs_by_age", "queued_2"),
        ("Index Scan using jobs_by_age", "queued_3"),
    ]
    assert all("state =" in condition and "model =" in condition for _, _, condition in walks)
    assert plan.count("Sort Key") == 1, "the replica's own few adapters"


def test_threads_of_a_replica_may_announce_it_at_once(queue: JobQueue) -> None:
    failures: list[Exception] = []

    def announce(n: int) -> None:
        try:
            for turn in range(10):
                queue.announce("replica", MODEL, [f"lora-{(n + turn) % 3}"])
        except Exception as error:
            failures.append(error)

    threads = [threading.Thread(target=announce, args=(n,)) for n in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert failures == []
    assert queue.depths()[MODEL].workers == 1


def test_a_claim_announces_its_replica(queue: JobQueue) -> None:
    submit(queue, "a")
    held = claim(queue, "replica", warm=["b"])
    assert queue.depths()[MODEL].workers == 1
    submit(queue, "b")
    assert adapter(queue, "another", patience_s=60) is None
    assert held.job.state is JobState.IN_PROGRESS
