"""What answers look at: the stream has what `mj.analyze` has of the same answer."""

import base64
import dataclasses
import itertools
import json
import threading

import httpx
import numpy as np
import pytest

from moresjax.analysis.attention import AttentionProbe
from moresjax.data.region_providers import region_provider
from moresjax.inference.analyze import attention_map
from moresjax.inference.prompt_inputs import asked_sample
from moresjax.serve.server import Server, ServerConfig
from moresjax.testing import talking_model


def body(picture, count=1, **more):
    url = f"data:image/png;base64,{base64.b64encode(picture).decode()}"
    part = {"type": "image_url", "image_url": {"url": url}}
    content = [{"type": "text", "text": "how many ?"}, *[part] * count]
    said = [{"role": "user", "content": content}]
    return {"model": "talker", "messages": said, "max_tokens": 5, "attention": True, **more}


def array(told):
    return np.frombuffer(base64.b64decode(told["data"]), told["dtype"]).reshape(told["shape"])


@pytest.mark.parametrize("count", [1, 2])
def test_maps_and_statistics_are_those_of_analyze(url, model, picture, count):
    asked = body(picture, count)
    done = httpx.post(f"{url}/v1/chat/completions", json=asked, timeout=60).json()
    found = done["choices"][0]["attention"]
    expected = attention_map(model, "how many ?", [picture] * count, max_new_tokens=5)
    maps = array(found["maps"])
    np.testing.assert_allclose(maps, expected.grids, atol=1e-5)
    assert found["tokens"] == expected.tokens
    row, probe = model.prompt("how many ?", [picture] * count), AttentionProbe()
    (one,) = model.service.generate_many([row], 1, batch_size=1, probes=(probe,))
    stats = one.stats["attention"]  # of the first token, by head
    np.testing.assert_allclose(found["share"][0], stats["mass"].mean(1)[:, 1], atol=1e-5)
    image, text = stats["score"].mean(1)[:, :2].T
    expected = [i / t if t > 0 else np.nan for i, t in zip(image, text, strict=True)]
    np.testing.assert_allclose(np.array(found["lmar"][0], float), expected, rtol=1e-3)
    assert np.isfinite(expected).any()

    heads = {name: asked[name] for name in ("model", "messages")}
    for answer in (
        {"answer": done["choices"][0]["message"]["content"]},
        {"answer_ids": found["ids"]},
    ):
        told = httpx.post(f"{url}/v1/attention", json=heads | answer | {"token": 2}, timeout=60)
        np.testing.assert_allclose(array(told.json()).mean(2), maps[:, :, 2], atol=1e-5)


def test_every_chunk_of_a_stream_has_them_of_its_tokens(url, picture):
    asked = body(picture, stream=True, max_tokens=20)
    lines = httpx.post(f"{url}/v1/chat/completions", json=asked, timeout=60).text.splitlines()
    events = [line.removeprefix("data: ") for line in lines if line.startswith("data: ")]
    assert events[-1] == "[DONE]"
    choices = [json.loads(event)["choices"][0] for event in events[:-1]]
    told = [one["attention"] for one in choices if "attention" in one]
    assert len(told) == sum(bool(one["delta"].get("content")) for one in choices) >= 3
    asked = body(picture, max_tokens=20)
    done = httpx.post(f"{url}/v1/chat/completions", json=asked, timeout=60).json()
    whole, starts = done["choices"][0]["attention"], np.cumsum([len(one["ids"]) for one in told])
    assert [one["first"] for one in told] == [0, *starts[:-1]]
    for name in ("tokens", "ids"):
        assert [*itertools.chain(*(one[name] for one in told))] == whole[name]
    for name in ("share", "lmar"):
        found = np.concatenate([np.array(one[name], float) for one in told])
        np.testing.assert_allclose(found, np.array(whole[name], float), atol=1e-5, rtol=1e-4)
    maps = np.concatenate([array(one["maps"]) for one in told], axis=2)
    np.testing.assert_allclose(maps, array(whole["maps"]), atol=1e-5)
    assert [one.get("pictures") for one in told] == [whole["pictures"], *[None] * (len(told) - 1)]


def test_what_has_no_image_or_answer_is_told(url, picture):
    plain = body(picture) | {"messages": [{"role": "user", "content": "two ?"}]}
    done = httpx.post(f"{url}/v1/chat/completions", json=plain, timeout=60).json()
    assert done["choices"][0]["attention"] is None
    for asked, word in (
        (plain | {"answer": "two"}, "image"),
        (body(picture), "answer_ids"),
        (body(picture, answer=" "), "answer"),
    ):
        told = httpx.post(f"{url}/v1/attention", json=asked, timeout=60)
        assert told.status_code == 400
        assert word in told.json()["error"]["message"]


def test_regions_that_the_model_is_asked_for_are_read_on_the_thread_that_owns_it(picture):
    model = talking_model("mores:rank=1,positions=roi")
    processor = model.prompts.processor
    processor = dataclasses.replace(processor, regions=region_provider("attention(1;34%)"))
    model.prompts.saved_processor = processor
    own, threads = model.prompts.attend, []

    def attend(*given):
        threads.append(threading.current_thread().name)
        return own(*given)

    expected = model.prompts.row("how many ?", [picture])
    model.prompts.attend = attend
    server = Server(model, "talker", ServerConfig(rows=1))
    try:
        row = server.prepare(asked_sample("one", "how many ?", (picture,)))
    finally:
        server.close()
    assert threads == ["scheduler"]
    np.testing.assert_array_equal(row.roi, expected.roi)
    assert 0 < row.roi.sum() < row.roi.size
