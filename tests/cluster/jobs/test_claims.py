"""Which job a replica gets: over the age bound, warm here, warm nowhere, then warm elsewhere after a wait."""

from __future__ import annotations

import re
import threading

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from sqlalchemy import Dialect, select
from sqlalchemy.dialects import postgresql, sqlite

from cluster.databases.database import open_database
from cluster.jobs.claims import Answer, Offer, next_job
from cluster.jobs.model import Job, JobState
from cluster.jobs.queue import JobQueue
from tests.cluster.jobs.tables import MODEL, claim, empty, let_pass, new_job, submit


def adapter(queue: JobQueue, owner: str, *warm: str, patience_s: float = 1.0) -> str | None:
    """Claim for `owner`; return the adapter of the job it got."""
    claimed = queue.claim(MODEL, owner, warm=warm, patience_s=patience_s)
    return claimed and claimed.job.adapter


def saying(answer: Answer, *adapters: str) -> Offer:
    """Make an offer function that gives `answer` for these adapters and takes all others."""
    return lambda job, _secret: answer if job.adapter in adapters else Answer.TAKE


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
    """A claimed LoRA counts as warm before it is loaded, else every idle replica would load it too."""
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


def test_a_hot_lora_spreads_to_replicas_that_have_nothing_better(queue: JobQueue, url: str) -> None:
    submit(queue, "hot", "hot", "hot", "hot", "theirs")
    assert adapter(queue, "first") == "hot"
    assert adapter(queue, "second", "theirs") == "theirs"
    assert adapter(queue, "third", patience_s=5) is None
    let_pass(url, 6)
    assert [adapter(queue, name, patience_s=5) for name in ("third", "fourth", "first")] == ["hot"] * 3


def test_a_job_on_its_way_holds_up_no_other(queue: JobQueue) -> None:
    slow, ready, again = submit(queue, "slow", "ready", "slow")
    claimed = claim(queue, "replica", offer=saying(Answer.BRING, "slow"))
    assert claimed.job.id == ready.id
    assert queue.claim(MODEL, "another", patience_s=60) is None, "it is left to the replica that downloads it"
    warm = ["ready", "slow"]
    assert queue.claim(MODEL, "replica", warm=warm, offer=saying(Answer.BRING, "slow")) is None
    assert [claim(queue, "replica", warm=warm).job.id for _ in range(2)] == [slow.id, again.id]


def test_a_job_that_is_left_is_anybody_s(queue: JobQueue) -> None:
    submit(queue, "later")
    assert queue.claim(MODEL, "replica", offer=saying(Answer.LEAVE, "later")) is None
    assert adapter(queue, "another", patience_s=60) == "later"


def test_offers_are_bounded_and_one_for_each_lora(queue: JobQueue, url: str) -> None:
    queue.submit([new_job(f"lora-{n % 60}") for n in range(120)])
    let_pass(url, 61)
    watch, offered = queue.watch(), list[str]()

    def leave(job: Job, _secret: str | None) -> Answer:
        offered.append(job.adapter)
        return Answer.LEAVE

    assert queue.claim(MODEL, "replica", offer=leave) is None
    assert offered == [f"lora-{n}" for n in range(len(offered))]
    assert len(offered) < 20
    assert not watch.wait(0.05), "nothing was changed"
    watch.close()


def test_what_a_replica_holds_waits_for_no_other_s_origin(queue: JobQueue, url: str) -> None:
    slow = [f"slow-{n}" for n in range(60)]
    queue.submit([new_job(adapter) for adapter in slow])
    (mine,) = queue.submit([new_job("mine")])
    let_pass(url, 61)  # All are over the age bound; the unavailable ones come first.
    for _ in range(2):
        claimed = queue.claim(MODEL, "replica", warm=["mine"], offer=saying(Answer.LEAVE, *slow))
        assert claimed is not None and claimed.job.id == mine.id
        queue.release(claimed)


def test_what_a_busy_replica_foresees_stays_in_the_queue(queue: JobQueue, url: str) -> None:
    (job,) = queue.submit([new_job("next", secret="ciphertext")])
    peek_next = lambda *without: queue.peek_next(  # noqa: E731
        MODEL, "busy", warm=["mine"], patience_s=5, without=frozenset(without)
    )
    assert peek_next() is None, "idle replicas have priority"
    let_pass(url, 6)
    assert peek_next("next") is None
    upcoming = peek_next()
    assert upcoming is not None
    assert (upcoming[0].id, upcoming[0].state, upcoming[1]) == (job.id, JobState.IN_QUEUE, "ciphertext")
    submit(queue, "next")
    assert adapter(queue, "idle", patience_s=60) is None, "two replicas do not download the same LoRA"
    assert claim(queue, "idle", patience_s=5).job.id == job.id, "the wait is bounded by the patience"
    assert peek_next() is None


def test_a_wait_ends_when_its_watch_is_woken(queue: JobQueue) -> None:
    watch = queue.watch()
    watch.wait(0.05)
    threading.Timer(0.1, watch.wake).start()
    assert watch.wait(30)
    assert not watch.wait(0.05)
    watch.wake()
    assert watch.wait(0), "a wake-up before the wait counts, too"
    watch.close()


PATIENCE_S, AGE_BOUND_S = 50.0, 600.0

ADAPTERS = st.sampled_from("abcd")

OWNERS = ("replica-1", "replica-2", "replica-3")

STEPS = st.one_of(
    st.tuples(st.just("submit"), ADAPTERS),
    st.tuples(st.just("pass"), st.sampled_from([20, 60, 700])),
    st.tuples(st.just("claim"), st.sampled_from(OWNERS), st.frozensets(ADAPTERS), st.frozensets(ADAPTERS)),
)


class Expected:
    """A simple model of the order of claims, over lists."""

    def __init__(self) -> None:
        self.queued: list[tuple[str, str, float]] = []
        self.held: dict[str, set[str]] = {}
        self.passed = 0.0

    def claim(self, owner: str, warm: frozenset[str], coming: frozenset[str]) -> str | None:
        before, self.held[owner] = self.held.get(owner, set()), set(warm)
        refused: set[str] = set()
        while found := self.next(owner, refused):
            job_id, adapter, _ = found
            if adapter not in coming:
                self.queued.remove(found)
                self.held[owner] |= {adapter} | refused
                return job_id
            refused.add(adapter)
        # No job was claimed: the table stays unchanged.
        self.held[owner] = before if refused <= warm else refused | warm
        return None

    def next(self, owner: str, refused: set[str]) -> tuple[str, str, float] | None:
        waited = lambda job: self.passed - job[2]  # noqa: E731
        left = [job for job in self.queued if job[1] not in refused]
        anywhere = set().union(*self.held.values())
        classes = (
            [job for job in left if waited(job) >= AGE_BOUND_S],
            [job for job in left if job[1] in self.held[owner]],
            [job for job in left if job[1] not in anywhere],
            [job for job in left if waited(job) >= PATIENCE_S],
        )
        return next((jobs[0] for jobs in classes if jobs), None)


def test_claims_follow_the_order_whatever_happened(url: str) -> None:
    queue = JobQueue(url, age_bound_s=AGE_BOUND_S)

    @settings(max_examples=30, derandomize=True, deadline=None, suppress_health_check=[HealthCheck.too_slow])
    @given(st.lists(STEPS, max_size=20))
    def check(steps: list[tuple]) -> None:
        empty(url)
        expected = Expected()
        for kind, *values in steps:
            if kind == "submit":
                (job,) = submit(queue, *values)
                expected.queued.append((job.id, job.adapter, expected.passed))
            elif kind == "pass":
                let_pass(url, *values)
                expected.passed += values[0]
            else:
                owner, warm, coming = values
                offer = saying(Answer.BRING, *coming)
                found = queue.claim(MODEL, owner, warm=warm, patience_s=PATIENCE_S, offer=offer)
                assert (found and found.job.id) == expected.claim(owner, warm, coming)

    check()
    queue.close()


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
    """If a failed claim woke other replicas, idle replicas would never sleep."""
    queue.announce("other", MODEL, ["theirs"])
    submit(queue, "theirs")
    watch = queue.watch()
    assert adapter(queue, "replica", patience_s=60) is None
    assert adapter(queue, "replica", "b", "c", patience_s=60) is None
    assert not watch.wait(0.05)
    watch.close()
    assert queue.depths()[MODEL].workers == 1


def the_order(dialect: Dialect, without: frozenset[str] = frozenset()) -> str:
    order = select(next_job(MODEL, "replica", age_bound_s=60, patience_s=1, without=without))
    return str(order.compile(dialect=dialect, compile_kwargs={"literal_binds": True}))


@pytest.mark.parametrize("without", [(), ("a", "b")])
def test_every_class_walks_an_index_of_sqlite(sqlite_url: str, without: tuple[str, ...]) -> None:
    JobQueue(sqlite_url).close()
    database = open_database(sqlite_url)
    with database.read() as connection:
        statement = f"EXPLAIN QUERY PLAN {the_order(sqlite.dialect(), frozenset(without))}"
        plan = [row[3] for row in connection.exec_driver_sql(statement)]
    database.close()
    walks = [step for step in plan if "queued" in step or "head" in step]
    assert len(walks) == 5
    assert all("INDEX jobs_by_" in step and "(state=? AND model=?" in step for step in walks)
    assert sum("TEMP B-TREE" in step for step in plan) == 1, "the replica's own few adapters"


@pytest.mark.parametrize("without", [(), ("a", "b")])
@pytest.mark.parametrize("statistics", ["none", "of an empty table", "of an empty queue", "true"])
def test_every_class_walks_an_index_of_postgresql(
    postgres_url: str, statistics: str, without: tuple[str, ...]
) -> None:
    """The plan must not depend on statistics, which are often taken while the queue is empty."""
    queue, database = JobQueue(postgres_url), open_database(postgres_url)
    with database.write() as connection:
        if statistics == "of an empty table":
            connection.exec_driver_sql("ANALYZE")
    # Names as long as hashes make this index larger, so the planner would choose the other one.
    queue.submit([new_job(f"{'lora' * 25}-{n % 50}") for n in range(2000)])
    queue.announce("replica", MODEL, [f"{'lora' * 25}-{n}" for n in (48, 49)])
    with database.write() as connection:
        if statistics == "of an empty queue":
            connection.exec_driver_sql("UPDATE jobs SET state = 'succeeded'")
        if statistics in ("of an empty queue", "true"):
            connection.exec_driver_sql("ANALYZE")
        connection.exec_driver_sql("UPDATE jobs SET state = 'in_queue'")
        statement = f"EXPLAIN (COSTS OFF) {the_order(postgresql.dialect(), frozenset(without))}"
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
