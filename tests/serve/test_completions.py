"""`/v1/completions` and the adapters of a server, by OpenAI's client."""

import httpx
import numpy as np
import pytest
from openai import BadRequestError, NotFoundError, OpenAI

from moresjax.core.row import Row
from moresjax.generation import prompt_scores
from moresjax.testing import talking_model
from moresjax.weights.adapter import save_adapter


@pytest.fixture(scope="module")
def client(url):
    return OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0)


def test_texts_and_ids_are_continued_as_rows_are(client, model):
    ids = model.prompts.tokenizer("how many ?")["input_ids"]
    for prompt in ("how many ?", ids, ["how many ?"], [ids]):
        done = client.completions.create(model="talker", prompt=prompt, max_tokens=5)
        (expected,) = model.service.complete([Row.text(ids)], 5)
        assert done.choices[0].text == model.prompts.spell(expected.tokens)
    streamed = client.completions.create(model="talker", prompt=ids, max_tokens=5, stream=True)
    assert "".join(c.choices[0].text for c in streamed) == done.choices[0].text


@pytest.mark.parametrize("more", [{"max_tokens": 0}, {"max_tokens": 1}, {"max_tokens": 4}])
def test_echo_has_the_scores_of_the_prompt(client, model, more):
    texts = ["how many ?", "is there a two ?"]
    done = client.completions.create(model="talker", prompt=texts, echo=True, logprobs=2, **more)
    for text, choice in zip(texts, done.choices, strict=True):
        ids = model.prompts.tokenizer(text)["input_ids"]
        pairs = [(Row.text(ids[:1]), ids[1:])]
        (score,) = model.service.score_rows(pairs)
        listed = choice.logprobs
        assert choice.text.startswith(model.prompts.spell(ids))
        assert listed.token_logprobs[0] is None
        assert len(listed.tokens) == len(ids) + more["max_tokens"]
        found = sum(listed.token_logprobs[1 : len(ids)])
        np.testing.assert_allclose(found, score.logprob, rtol=1e-4)
        for token, best in zip(listed.tokens[1:], listed.top_logprobs[1:], strict=True):
            assert token in best
        (new,) = model.service.complete([Row.text(ids)], 4)
        spelt = [model.prompts.tokenizer.decode([i]) for i in new.tokens[: more["max_tokens"]]]
        assert listed.tokens[len(ids) :] == spelt


def test_what_is_listed_compiles_nothing(client):
    texts = ["how many ?", "is there a two ?"]
    programs = set()
    for listed in (1, 3, 0):
        ask = {"model": "talker", "prompt": texts, "echo": True, "max_tokens": 0}
        done = client.completions.create(**ask, logprobs=listed)
        assert len(done.choices) == 2
        programs.add(prompt_scores._scores._cache_size())
    assert len(programs) == 1


@pytest.mark.parametrize("more", [{}, {"echo": True, "max_tokens": 0, "logprobs": 1}])
@pytest.mark.parametrize("prompt", [[], "", [[]], [5, "a"], 7, [10**6], [1 << 31], [True]])
def test_bad_prompts_are_told(client, prompt, more):
    ask = {"model": "talker", "prompt": prompt, "max_tokens": 1, **more}
    if prompt == "":  # begins like all texts
        assert client.completions.create(**ask).choices
        return
    with pytest.raises(BadRequestError, match=r"prompt must be|none of the model's"):
        client.completions.create(**ask)


def test_adapters_come_and_go(client, url, tmp_path):
    tuned = talking_model("lora:rank=2")
    folder = save_adapter(tuned.mllm, tmp_path / "lora")
    load = {"lora_name": "counts", "lora_path": str(folder)}
    assert httpx.post(f"{url}/v1/load_lora_adapter", json=load).status_code == 200
    listed = {one.id: one.parent for one in client.models.list().data}
    assert listed == {"talker": None, "counts": "talker"}
    said = [{"role": "user", "content": "how many ?"}]
    base = talking_model().generate("how many ?", max_new_tokens=6)
    own = tuned.generate("how many ?", max_new_tokens=6)
    assert own != base
    for name, more, text in (
        ("talker", {}, base),
        ("counts", {}, own),
        ("talker", {"adapter": "counts"}, own),
        ("talker", {"adapter": "base"}, base),
    ):
        done = client.chat.completions.create(
            model=name, messages=said, max_tokens=6, extra_body=more
        )
        assert done.choices[0].message.content == text, (name, more)
    again = httpx.post(f"{url}/v1/load_lora_adapter", json=load)
    assert again.status_code == 400
    assert "already" in again.json()["error"]["message"]
    wrong = {"lora_name": "no", "lora_path": str(tmp_path / "no")}
    assert httpx.post(f"{url}/v1/load_lora_adapter", json=wrong).status_code == 400
    gone = {"lora_name": "counts"}
    assert httpx.post(f"{url}/v1/unload_lora_adapter", json=gone).status_code == 200
    assert httpx.post(f"{url}/v1/unload_lora_adapter", json=gone).status_code == 404
    with pytest.raises(NotFoundError):
        client.chat.completions.create(model="counts", messages=said)
    done = client.chat.completions.create(model="talker", messages=said, max_tokens=6)
    assert done.choices[0].message.content == base


def test_samples(url):
    samples = httpx.get(f"{url}/v1/samples").json()["data"]
    assert all(one["image"].startswith("data:image/png;base64,") for one in samples)
