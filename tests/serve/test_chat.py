"""`/v1/chat/completions` by OpenAI's own client: answers are those of `Model.generate`."""

import asyncio
import base64
import io
import threading

import httpx
import numpy as np
import pytest
from openai import BadRequestError, NotFoundError, OpenAI
from PIL import Image

from moresjax.generation.sampling import Sampling
from moresjax.serve.chat_answers import ChatAnswer
from moresjax.serve.chat_request import read_chat
from moresjax.serve.errors import ApiError
from moresjax.serve.images import ImageLimits


@pytest.fixture(scope="module")
def client(url):
    return OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0)


def uri(data):
    return {"type": "image_url", "image_url": {"url": f"data:image/png;base64,{data}"}}


def user(text, *images):
    parts = [uri(base64.b64encode(one).decode()) for one in images]
    return {"role": "user", "content": [{"type": "text", "text": text}, *parts]}


def ask(client, *messages, **options):
    return client.chat.completions.create(model="talker", messages=messages, **options)


def test_the_models_are_listed(client):
    (listed,) = client.models.list().data
    assert (listed.id, listed.parent) == ("talker", None)
    assert client.models.retrieve("talker").id == "talker"


def test_answers_are_those_of_generate(client, model, picture):
    for images in ((), (picture,), (picture, picture)):
        done = ask(client, user("how many ?", *images), max_tokens=6)
        expected = model.generate("how many ?", list(images), max_new_tokens=6, details=True)
        (choice,) = done.choices
        assert choice.message.content == expected.text
        assert choice.finish_reason == ("length" if expected.stop_reason == "length" else "stop")
        assert done.usage.completion_tokens == len(expected.tokens)
        assert done.usage.prompt_tokens == len(model.prompt("how many ?", list(images)))
        assert done.system_fingerprint == f"fp_{model.fingerprint}"


def test_a_stream_has_the_pieces_of_the_answer_and_its_usage(client, model, picture):
    options = {"max_completion_tokens": 40, "stream": True}
    chunks = list(
        ask(client, user("two ?", picture), stream_options={"include_usage": True}, **options)
    )
    text = "".join(c.choices[0].delta.content or "" for c in chunks if c.choices)
    expected = model.generate("two ?", picture, max_new_tokens=40, details=True)
    assert text == expected.text
    assert sum(bool(c.choices and c.choices[0].delta.content) for c in chunks) > 3
    assert chunks[-1].usage.completion_tokens == len(expected.tokens)
    assert [c.choices[0].finish_reason for c in chunks if c.choices][-1] == "length"


def test_turns_of_a_conversation_and_stop_strings(client, model):
    from moresjax.inference.chat import Chat

    chat = Chat(model, max_new_tokens=6)
    first = "".join(chat.ask("how many ?"))
    second = "".join(chat.ask("the same ?"))
    said = [user("how many ?"), {"role": "assistant", "content": first}, user("the same ?")]
    done = ask(client, *said, max_tokens=6)
    assert done.choices[0].message.content == second
    stop = second.split()[-1]
    short = ask(client, *said, max_tokens=6, stop=[stop]).choices[0]
    assert short.message.content == second[: second.index(stop)].strip()
    assert short.finish_reason == "stop"


def test_draws_have_seeds_and_several_answers_several(client, model):
    sampling = {"temperature": 0.9, "top_p": 0.8, "seed": 3}
    done = ask(client, user("two ?"), n=2, max_tokens=12, **sampling)
    texts = [choice.message.content for choice in done.choices]
    for number, text in enumerate(texts):
        how = Sampling(temperature=0.9, top_p=0.8, seed=3 + number)
        assert text == model.generate("two ?", max_new_tokens=12, sampling=how)
    assert done.usage.completion_tokens == 24


def test_logprobs(client, model):
    done = ask(client, user("two ?"), max_tokens=5, logprobs=True, top_logprobs=3)
    expected = model.generate("two ?", max_new_tokens=5, details=True, logprobs=True)
    listed = done.choices[0].logprobs.content
    found = [token.logprob for token in listed]
    np.testing.assert_allclose(found, expected.logprobs, atol=2e-4)
    for token in listed:
        assert len(token.top_logprobs) == 3
        assert token.top_logprobs[0].token == token.token  # the answer is greedy
        assert bytes(token.bytes).decode() == token.token


def test_many_at_once_are_each_answered_as_alone(client, model):
    texts = ["how many ?", "two ?", "the same ?", "is there a two ?", "what is the largest ?"] * 2
    found = {}

    def run(number, text):
        found[number] = ask(client, user(text), max_tokens=4 + number).choices[0].message.content

    threads = [threading.Thread(target=run, args=pair) for pair in enumerate(texts)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for number, text in enumerate(texts):
        assert found[number] == model.generate(text, max_new_tokens=4 + number)


def test_a_closed_stream_frees_its_row(client, server):
    with ask(client, user("two ?"), max_tokens=250, stream=True) as stream:
        next(iter(stream))
    done = ask(client, user("how many ?"), max_tokens=1)  # a later request is answered
    assert done.choices[0].finish_reason == "length"
    for _ in range(200):
        if not server.scheduler.counts["running"]:
            break
        threading.Event().wait(0.02)
    assert server.scheduler.counts == {"running": 0, "waiting": 0}


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"messages": []}, "at least one message"),
        ({"messages": [{"role": "tool", "content": "x"}]}, "role must be"),
        ({"messages": [{"role": "assistant", "content": "x"}]}, "begins with an answer"),
        ({"max_tokens": 0}, "max_tokens must be"),
        ({"max_tokens": 300}, "256 tokens at most"),
        ({"temperature": -1}, "temperature must be"),
        ({"top_logprobs": 21, "logprobs": True}, "from 0 to 20"),
        ({"top_logprobs": 2}, "needs logprobs"),
        ({"stop": 3}, "stop must be"),
        ({"n": 0}, "n must be"),
        ({"messages": [{"role": "system", "content": "Be kind."}, user("a")]}, "system prompt"),
        ({"messages": [user("a", b"no image")]}, "no known format"),
        ({"messages": [user("a", *[b"no image"] * 17)]}, "at most 16 images"),
        ({"messages": [user("a", b"x") | {"role": "system"}]}, "only a user's message"),
        ({"max_tokens": 300, "stream": True}, "256 tokens at most"),
    ],
)
def test_bad_requests_are_told_in_one_sentence(client, change, words):
    with pytest.raises(BadRequestError, match=words):
        client.chat.completions.create(**({"model": "talker", "messages": [user("a")]} | change))


def test_images_are_bounded_together_and_not_kept(server, picture):
    body = {"model": "talker", "messages": [user("two ?", *[picture] * 4)]}
    asked = read_chat(body, ImageLimits(max_pixels=144))
    answer = asyncio.run(ChatAnswer.of(server, asked))
    assert answer._asked.sample.images == ()
    assert answer._row.num_images == 4
    body["messages"].append(user("?", picture))
    with pytest.raises(ApiError, match="576 pixels together"):
        read_chat(body, ImageLimits(max_pixels=144))


def test_files_that_start_programs_are_no_images(client):
    file = io.BytesIO()
    Image.new("RGB", (2, 2)).save(file, "eps")
    with pytest.raises(BadRequestError, match="no known format"):
        ask(client, user("a", file.getvalue()))


@pytest.mark.parametrize("half", [b"\\ud83d", b"\xed\xa0\xbd"])
def test_texts_that_are_no_unicode_are_told(url, half):
    for path in ("completions", "chat/completions"):
        body = b'{"model": "talker", "prompt": "%s", "messages": "%s"}' % (half, half)
        done = httpx.post(f"{url}/v1/{path}", content=body)
        assert done.status_code == 400
        assert "Unicode" in done.json()["error"]["message"]
    whole = b'{"model": "talker", "prompt": "\\ud83d\\ude00", "max_tokens": 1}'
    assert httpx.post(f"{url}/v1/completions", content=whole).status_code == 200


def test_addresses_of_images_are_not_fetched(client):
    part = {"type": "image_url", "image_url": {"url": "http://127.0.0.1:1/a.png"}}
    with pytest.raises(BadRequestError, match="fetches no addresses"):
        ask(client, {"role": "user", "content": [part]})


def test_an_unknown_model_is_not_found_and_unknown_fields_are_ignored(client):
    with pytest.raises(NotFoundError, match="there are talker"):
        client.chat.completions.create(model="other", messages=[user("two ?")])
    assert ask(client, user("two ?"), max_tokens=1, extra_body={"colour": "blue"}).choices


def test_names_of_models_and_adapters(server):
    assert server.adapter("talker", "talker") is server.adapter("talker", "base") is None
    for model, adapter in (("no", "talker"), ("no", "base"), ("base", None), ("talker", "no")):
        with pytest.raises(ApiError, match="does not exist; there are talker") as told:
            server.adapter(model, adapter)
        assert told.value.status == 404
