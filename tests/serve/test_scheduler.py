"""The queue of a server, without a model: who is answered, told and counted."""

import threading
from types import SimpleNamespace

import pytest
from serve_helpers import until

from moresjax.core.errors import UserError
from moresjax.core.row import Row
from moresjax.generation.row_pool import PoolRequest
from moresjax.serve import scheduler as scheduler_module
from moresjax.serve.errors import ApiError
from moresjax.serve.metrics import Metrics
from moresjax.serve.scheduler import QueueFull, Scheduler, Together

ASK = PoolRequest(Row.text([1, 2]), 4)


class Pool:
    """Rows whose answers never end."""

    most_at_once = 2

    def __init__(self, rows):
        self.free = list(range(rows))
        self.admitted = []

    @property
    def num_free(self):
        return len(self.free)

    def admit(self, requests):
        self.admitted += [one.adapter for one in requests]
        return [self.free.pop(0) for _ in requests]

    def step(self, few=None):
        threading.Event().wait(0.002)
        return []

    def release(self, slots):
        self.free += slots


@pytest.fixture
def make(monkeypatch):
    """Makes schedulers of two rows, which end with the test."""
    made = []

    def scheduler(pool=None, **options):
        pool = pool or Pool(2)
        monkeypatch.setattr(Scheduler, "_make_pool", lambda _: pool)
        service = SimpleNamespace(max_length=64, check_context=lambda *_: None)
        made.append(Scheduler(SimpleNamespace(service=service), rows=2, max_waiting=3, **options))
        return made[-1]

    yield scheduler
    for one in made:
        one.close()


class Told:
    """What a request is told."""

    def __init__(self):
        self.events, self.any = [], threading.Event()

    def __call__(self, event):
        self.events.append(event)
        self.any.set()

    def first(self):
        assert self.any.wait(10)
        return self.events[0]


def submit(scheduler):
    return scheduler.submit(ASK, Told())


def blocked(scheduler):
    """Stops the scheduler's thread until the event is set."""
    held, entered = threading.Event(), threading.Event()
    scheduler.call(lambda: (entered.set(), held.wait(10)))
    assert entered.wait(10)
    return held


def test_requests_enter_the_queue_together_or_not_at_all(make):
    scheduler = make()
    held = blocked(scheduler)
    with pytest.raises(UserError, match="4 answers are wanted at once"):
        scheduler.submit_all([(ASK, Told())] * 4)
    scheduler.submit_all([(ASK, Told())] * 2)
    with pytest.raises(QueueFull):
        scheduler.submit_all([(ASK, Told())] * 2)
    assert scheduler.counts["waiting"] == 2
    held.set()


def test_only_requests_whose_adapter_has_gone_are_told(make):
    def named(adapter):
        if adapter == "gone":
            raise ApiError("it has gone", 404)
        return f"now {adapter}"

    pool = Pool(2)
    scheduler = make(pool, named=named)
    held, gone = blocked(scheduler), Told()
    for adapter, told in (("gone", gone), ("counts", Told())):
        scheduler.submit(PoolRequest(ASK.row, 4, adapter), told)
    held.set()
    assert isinstance(gone.first(), ApiError)
    until(lambda: pool.admitted)
    assert pool.admitted == ["now counts"]


def test_without_rows_all_who_wait_are_told(make, monkeypatch):
    scheduler = make()
    monkeypatch.setattr(Scheduler, "_make_pool", lambda _: 1 / 0)
    told = [Told(), Told(), Told()]
    scheduler.submit_all([(ASK, one) for one in told])
    assert all(isinstance(one.first(), ZeroDivisionError) for one in told)
    assert scheduler.counts["waiting"] == 0


def test_a_job_that_nobody_waits_for_holds_nobody(make):
    scheduler = make()
    scheduler.submit(ASK, Told())
    until(lambda: scheduler.counts["running"] == 1)
    held = blocked(scheduler)
    assert scheduler.call(lambda: None, alone=True).cancel()
    scheduler.submit(ASK, Told())
    held.set()
    until(lambda: scheduler.counts["running"] == 2)


def test_the_end_reaches_jobs_that_wait_behind_one_that_was_given_up(make):
    scheduler = make()
    scheduler.submit(ASK, Told())
    until(lambda: scheduler.counts["running"] == 1)
    held = blocked(scheduler)
    first, given_up, last = [scheduler.call(lambda: None, alone=True) for _ in range(3)]
    given_up.cancel()
    end = threading.Thread(target=scheduler.close)
    end.start()
    until(lambda: scheduler._closed)
    held.set()
    for future in (first, last):
        with pytest.raises(ApiError, match="the server stops"):
            future.result(10)
    end.join()
    for late in (lambda: scheduler.call(lambda: None).result(10), lambda: submit(scheduler)):
        with pytest.raises(ApiError, match="the server stops") as told:
            late()
        assert told.value.status == 503


def test_an_answer_that_a_stop_string_ends_is_answered(make):
    metrics = Metrics()
    scheduler = make(metrics=metrics)
    tickets = scheduler.submit_all([(ASK, Told())] * 3)
    until(lambda: scheduler.counts["running"] == 2)
    scheduler.cancel(tickets[0], answered=True)
    scheduler.cancel(tickets[0])
    scheduler.cancel(tickets[1])
    scheduler.cancel(tickets[2])
    until(lambda: not scheduler.counts["running"])
    assert "requests_answered_total 1\n" in metrics.text({})
    assert "requests_cancelled_total 2\n" in metrics.text({})


def test_requests_of_one_question_wait_for_each_other_and_nobody_for_them(make):
    pool = Pool(4)
    pool.groups, admit = [], pool.admit
    pool.admit = lambda requests: pool.groups.append(len(requests)) or admit(requests)
    scheduler, two = make(pool), Together("columns", 2)
    scheduler.submit_all([(PoolRequest(ASK.row, 4, "left"), Told())], two)
    scheduler.submit(PoolRequest(ASK.row, 4, "other"), Told())
    until(lambda: pool.admitted)
    assert (pool.admitted, scheduler.counts["waiting"]) == (["other"], 1)
    scheduler.submit_all([(PoolRequest(ASK.row, 4, "right"), Told())], two)
    until(lambda: len(pool.admitted) == 3)
    assert (pool.admitted, pool.groups) == (["other", "left", "right"], [1, 2])


def test_a_request_waits_for_one_that_never_comes_no_longer_than_that(make, monkeypatch):
    """Also where nothing else is answered; one that was given up is not counted."""
    monkeypatch.setattr(scheduler_module, "GATHERING", 0.05)
    pool, two = Pool(2), Together("columns", 2)
    scheduler = make(pool)
    (gone,) = scheduler.submit_all([(PoolRequest(ASK.row, 4, "gone"), Told())], two)
    scheduler.cancel(gone)
    scheduler.submit_all([(PoolRequest(ASK.row, 4, "alone"), Told())], two)
    until(lambda: pool.admitted)
    assert pool.admitted == ["alone"]
