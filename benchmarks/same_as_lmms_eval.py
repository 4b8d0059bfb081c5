"""Whether lmms-eval's OpenAI model is answered by `moresjax serve` as the model itself answers.

    pip install --no-deps lmms-eval && pip install loguru python-dotenv accelerate openai
    python benchmarks/same_as_lmms_eval.py

lmms-eval wants dozens of packages, hence this is no test of the suite. Its model `openai` asks a
server of a tiny random model about scenes of the digits world, several at a time and as it is.
"""

import numpy as np
from lmms_eval.api.instance import Instance
from lmms_eval.models.chat.openai import OpenAICompatible
from PIL import Image

from moresjax.data.digits import FAMILIES, ask, make_scene
from moresjax.serve.run import running
from moresjax.serve.server import Server, ServerConfig
from moresjax.testing import talking_model

QUESTIONS, NEW = 12, 6


def main() -> None:
    rng = np.random.default_rng(0)
    scenes = [make_scene(rng, "test") for _ in range(QUESTIONS)]
    docs = [
        {"image": scene.image, "text": ask(FAMILIES[n % len(FAMILIES)], scene.digits, rng).question}
        for n, scene in enumerate(scenes)
    ]

    def messages(doc: dict) -> list[dict]:
        content = [
            {"type": "image", "url": Image.fromarray(doc["image"])},
            {"type": "text", "text": doc["text"]},
        ]
        return [{"role": "user", "content": content}]

    settings = {"max_new_tokens": NEW, "temperature": 0}
    requests = [
        Instance(
            "generate_until",
            (doc["text"], messages, settings, number, "digits", "test"),
            number,
            {"task": "digits", "doc_id": number, "repeats": 1},
        )
        for number, doc in enumerate(docs)
    ]
    model = talking_model()
    expected = model.generate(
        [doc["text"] for doc in docs], [doc["image"] for doc in docs], max_new_tokens=NEW
    )
    with running(Server(talking_model(), "talker", ServerConfig(rows=8))) as url:
        lm = OpenAICompatible(
            model="talker", base_url=f"{url}/v1", api_key="none", num_concurrent=4, timeout=300
        )
        lm.task_dict = {"digits": {"test": docs}}
        found = [getattr(one, "text", one) for one in lm.generate_until(requests)]
    for text, own in zip(found, expected, strict=True):
        print(f"{text == own}: {text!r}" + ("" if text == own else f", the model says {own!r}"))
    assert found == expected
    print(f"{QUESTIONS} answers through lmms-eval's OpenAI model are those of the model")


if __name__ == "__main__":
    main()
