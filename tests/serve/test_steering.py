"""Steering of single requests equals the method `steer` on a model of its own."""

import asyncio
import json
import threading

import httpx
import numpy as np
import pytest
from serve_helpers import until

from moresjax.analysis.vectors import save_vectors
from moresjax.core.errors import UserError
from moresjax.generation.engine import Engine
from moresjax.serve.errors import ApiError
from moresjax.serve.run import running
from moresjax.serve.server import Server, ServerConfig
from moresjax.serve.steering import HELD, NoRoom, SteeredAdapters, Steering, read_shelf
from moresjax.testing import talking_model
from moresjax.weights.adapter import save_adapter

SAID = [{"role": "user", "content": "how many ?"}]
VECTOR = np.float32(2e5) * np.random.default_rng(3).standard_normal(16).astype(np.float32)


@pytest.fixture(scope="module")
def shelf(tmp_path_factory):
    folder = tmp_path_factory.mktemp("vectors")
    file = save_vectors(folder, {"up": VECTOR, "late": -VECTOR}, {"late": {"layer": 1}})
    return read_shelf([str(file)], 16, 2)


@pytest.fixture(scope="module")
def steered(shelf, tmp_path_factory):
    """A server with an adapter and a shelf."""
    folder = save_adapter(talking_model("lora:rank=2").mllm, tmp_path_factory.mktemp("lora"))
    model = talking_model()
    model.load_adapters({"counts": folder})
    server = Server(model, "talker", ServerConfig(rows=3, max_new_tokens=32), shelf)
    with running(server) as address:
        yield address


def ask(url, model="talker", tokens=8, **more):
    body = {"model": model, "messages": SAID, "max_tokens": tokens, **more}
    done = httpx.post(f"{url}/v1/chat/completions", json=body, timeout=120)
    return done.json()["choices"][0]["message"]["content"] if done.status_code == 200 else done


def expected(spec, vector, alpha):
    model = talking_model(spec)
    model.set(vector=vector, alpha=alpha)
    return model.generate("how many ?", max_new_tokens=8)


def test_a_steered_answer_is_that_of_the_method(steered):
    positions = "steer:positions=last_prompt|generated"
    base, own = ask(steered), ask(steered, "counts")
    for alpha in (3.0, -2.0):
        steer = [{"vector": "up", "alpha": alpha}]
        text = expected(positions, VECTOR, alpha)
        assert text != base
        assert ask(steered, steer=steer) == text
        on_adapter = expected(f"lora:rank=2/{positions}", VECTOR, alpha)
        assert ask(steered, "counts", steer=steer) == on_adapter
    late = [{"vector": "late", "alpha": 2.0}]
    assert ask(steered, steer=late) == expected(f"{positions},layers=1", -VECTOR, 2.0)
    given = [{"vector": VECTOR.tolist(), "alpha": 1.0, "layers": [0], "positions": "all"}]
    assert ask(steered, steer=given) == expected("steer:positions=all,layers=0", VECTOR, 1.0)
    for nothing in ([{"vector": "up", "alpha": 0}], [], None):
        assert ask(steered, steer=nothing) == base
        assert ask(steered, "counts", steer=nothing) == own


def test_columns_of_a_question_are_in_one_batch(shelf, tmp_path, monkeypatch):
    """However they arrive: what one, two and three models answer is read and decoded together."""
    model, specs = talking_model(), {"counts": "lora:rank=2", "turns": "lora:rank=1"}
    model.load_adapters(
        {name: save_adapter(talking_model(x).mllm, tmp_path / name) for name, x in specs.items()}
    )
    server = Server(model, "talker", ServerConfig(rows=12, max_new_tokens=32))
    read, prefill = [], Engine.prefill

    def counted(engine, batch, *args, **options):
        read.append(batch)
        return prefill(engine, batch, *args, **options)

    monkeypatch.setattr(Engine, "prefill", counted)
    with running(server) as url:
        names = ["talker", *specs]
        together = {"id": "one question", "count": len(names)}
        asking = [Background(lambda n=name: ask(url, n, together=together)) for name in names]
        found = [one.result() for one in asking]
        (batch,) = read
        assert len({*np.asarray(batch.adapter).tolist()}) == len(names)
        assert found == [ask(url, name) for name in names]
        assert ask(url, together={"id": "", "count": 2}).status_code == 400
        assert ask(url, together={"id": "x", "count": 99}).status_code == 400


def test_many_steerings_come_and_go(steered):
    texts = {a: ask(steered, steer=[{"vector": "up", "alpha": a}]) for a in range(-6, 7)}
    assert texts[0] == ask(steered)
    assert texts[-6] == ask(steered, steer=[{"vector": "up", "alpha": -6}])


def test_the_shelf_and_what_is_not_on_it(steered):
    listed = httpx.get(f"{steered}/v1/steering_vectors").json()["data"]
    assert [(one["name"], one["layers"]) for one in listed] == [("up", None), ("late", [1])]
    assert ask(steered, steer=[{"vector": "down"}]).status_code == 404
    for wrong in (
        {"vector": [1.0]},
        {"vector": "up", "alpha": "x"},
        {"vector": "up", "layers": [2]},
        {"vector": "up", "positions": "nowhere"},
        {"vector": "up", "positions": "roi"},
        {"vector": [10**400] * 16},
        {"vector": [1e38] * 16, "alpha": 1e6},
        "up",
    ):
        done = ask(steered, steer=[wrong])
        assert done.status_code == 400, wrong
        assert done.json()["error"]["message"]


@pytest.mark.parametrize("has_shelf", [True, False])
def test_a_tuned_model_is_steered_with_its_tuning(shelf, has_shelf):
    given = (shelf,) if has_shelf else ()
    server = Server(talking_model("lora:rank=2"), "talker", ServerConfig(rows=1), *given)
    spec = "lora:rank=2/steer:positions=last_prompt|generated"
    vector = "up" if has_shelf else VECTOR.tolist()
    with running(server) as url:
        own = talking_model("lora:rank=2").generate("how many ?", max_new_tokens=8)
        assert ask(url) == own
        assert ask(url, steer=[{"vector": vector, "alpha": 3}]) == expected(spec, VECTOR, 3.0)
        assert ask(url) == own
        models = httpx.get(f"{url}/v1/models").json()["data"]
        assert [(one["id"], one["tuning"]) for one in models] == [("talker", "lora:rank=2")]


class Background:
    """Something on a thread, whose result is waited for."""

    def __init__(self, call):
        self._thread = threading.Thread(target=lambda: setattr(self, "found", call()))
        self._thread.start()

    def result(self):
        self._thread.join()
        return self.found


def while_they_wait(server, change, *asks):
    """What requests are answered that come while an adapter's coming or going waits."""
    held, scheduler = threading.Event(), server.scheduler
    scheduler.call(lambda: held.wait(20))
    until(lambda: not scheduler._jobs)
    changing = Background(change)
    until(lambda: scheduler._jobs)
    asking = [Background(one) for one in asks]
    until(lambda: scheduler.counts["waiting"] == len(asks))
    held.set()
    assert changing.result().status_code == 200
    return [one.result() for one in asking]


def test_adapters_come_and_go_beside_a_tuning_while_requests_wait(tmp_path):
    folder = save_adapter(talking_model("mores:rank=2").mllm, tmp_path / "mores")
    server = Server(talking_model("lora:rank=2"), "talker", ServerConfig(rows=2))
    tuned = talking_model("lora:rank=2").generate("how many ?", max_new_tokens=8)
    assert tuned != talking_model().generate("how many ?", max_new_tokens=8)
    with running(server) as url:

        def post(what, **fields):
            return httpx.post(f"{url}/v1/{what}_lora_adapter", json=fields, timeout=120)

        load = {"lora_name": "new", "lora_path": str(folder)}
        assert while_they_wait(server, lambda: post("load", **load), lambda: ask(url)) == [tuned]
        listed = httpx.get(f"{url}/v1/models").json()["data"]
        assert [(one["id"], one["tuning"]) for one in listed] == [
            ("talker", "lora:rank=2"),
            ("new", "mores:rank=2"),
        ]
        own = talking_model("mores:rank=2").generate("how many ?", max_new_tokens=8)
        assert [ask(url, name) for name in ("new", "talker")] == [own, tuned]
        other, mine = while_they_wait(
            server,
            lambda: post("unload", lora_name="new"),
            lambda: ask(url, "new"),
            lambda: ask(url),
        )
        assert (other.status_code, mine) == (404, tuned)
        bad = post("load", lora_name="\0own", lora_path=str(folder))
        assert (bad.status_code, server.adapters) == (400, ())


def test_a_tuning_that_rows_cannot_choose_is_not_steered():
    model, steering = talking_model("mixlora"), Steering({"all": np.ones((2, 16), np.float32)})
    steered = SteeredAdapters(model, steers=False)
    with pytest.raises(NoRoom):  # not while others are answered
        steered.hold(None, steering, may_compile=False)
    with pytest.raises(ApiError, match="cannot be chosen per row"):
        steered.hold(None, steering, may_compile=True)
    assert (model.tuning, model.adapters, steered.base) == ("mixlora", (), None)


def test_a_job_for_an_adapter_that_has_gone_is_told(server):
    with pytest.raises(ApiError, match="has been unloaded") as told:
        asyncio.run(server.call(lambda name: name, "gone"))
    assert told.value.status == 404
    assert asyncio.run(server.call(lambda name: name, None)) is None


@pytest.fixture
def held(tmp_path):
    """Steered adapters of a model that nothing is asked."""
    model = talking_model()
    model.load_adapters({"counts": save_adapter(talking_model("lora:rank=1").mllm, tmp_path)})
    return model, SteeredAdapters(model, steers=True)


def test_steerings_under_way_outlive_their_adapter_and_no_longer(held):
    model, steered = held
    steering = Steering({"all": np.ones((2, 16), np.float32)})
    kept, idle = [steered.hold(name, steering, may_compile=True) for name in ("counts", None)]
    steered.release(idle)
    model.unload_adapter("counts")
    steered.forget("counts")
    assert {*model.adapters} == {kept, idle}
    steered.release(kept)
    assert model.adapters == (idle,)
    assert not steered._used
    with pytest.raises(ApiError, match="has been unloaded"):
        steered.hold("counts", steering, may_compile=True)


def test_selectors_that_nobody_uses_any_more_are_dropped(held):
    model, steered = held
    for number in range(HELD + 3):
        one = Steering({f"prompt:f{number + 1}": np.ones((2, 16), np.float32)})
        steered.release(steered.hold(None, one, may_compile=True))
    assert len(model.mllm.tuning.methods) <= HELD + 2
    assert model.adapters[0] == "counts"


def test_files_that_are_no_shelf(tmp_path):
    with pytest.raises(UserError, match="not a readable"):
        read_shelf([str(tmp_path / "no.npz")], 16, 2)
    np.savez(tmp_path / "a.npz", x=np.ones(3))
    with pytest.raises(UserError, match="16 finite numbers"):
        read_shelf([f"mine={tmp_path}/a.npz"], 16, 2)
    np.savez(tmp_path / "b.npz", x=np.ones(16))
    (tmp_path / "vectors.json").write_text(json.dumps({"x": {"layer": 0}}))
    with pytest.raises(UserError, match="two steering vectors"):
        read_shelf([f"{tmp_path}/b.npz", f"x={tmp_path}/b.npz:x"], 16, 2)
