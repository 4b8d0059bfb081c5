"""`moresjax serve` under load, beside `transformers serve` on the same weights.

    python benchmarks/serving.py [--clients 32] [--requests 8] [--tokens 48] [--no-transformers]
    python benchmarks/serving.py --soak 2000

A LLaMA-type decoder of 4 layers of 256 features with random weights answers questions of equal
length, each client one after the other. The first table has requests per second and the quantiles
of their seconds, after a round that warms the server up; every answer of many clients at once is
compared to the one that its question has alone. The soak asks many questions of which a third is
given up in the midst of a stream and a third before the answer, and reads from /proc what the
server holds: rows, threads and memory. `transformers serve` needs its extra `serving`.
"""

import argparse
import asyncio
import json
import random
import re
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import httpx
import numpy as np

CHAT = "{% for m in messages %}{{ m['content'] }}{% endfor %}"
WORDS = ("one", "two", "six", "nine", "is", "the", "largest", "how", "many", "there")


def make_folder(folder: Path) -> None:
    """A tiny LLaMA in the format of `transformers`, with a tokenizer and a chat template."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    from moresjax.data.digits import build_tokenizer

    tokenizer = build_tokenizer()
    tokenizer.chat_template = CHAT
    tokenizer.save_pretrained(folder)
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=256,
        intermediate_size=688,
        num_hidden_layers=4,
        num_attention_heads=8,
        num_key_value_heads=8,
        max_position_embeddings=2048,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=None,  # answers are of equal lengths
        pad_token_id=tokenizer.pad_token_id,
    )
    model = LlamaForCausalLM(config)
    model.generation_config.eos_token_id = None
    model.save_pretrained(folder)


def question(number: int) -> str:
    """Eight words that differ from those of other numbers."""
    return " ".join(random.Random(number).choices(WORDS, k=8))


async def ask(client: httpx.AsyncClient, model: str, number: int, tokens: int, url: str) -> str:
    said = [{"role": "user", "content": question(number)}]
    body = {"model": model, "messages": said, "max_tokens": tokens, "temperature": 0}
    done = await client.post(f"{url}/v1/chat/completions", json=body)
    done.raise_for_status()
    return done.json()["choices"][0]["message"]["content"]


async def load(url: str, model: str, clients: int, requests: int, tokens: int, warm: int) -> dict:
    """Requests per second, quantiles of seconds, and the answers by number."""
    seconds, answers = [], {}
    limits = httpx.Limits(max_connections=clients)
    async with httpx.AsyncClient(timeout=600, limits=limits) as http:

        async def run(first: int, count: int, into: list | None) -> None:
            for number in range(first, first + count):
                start = time.perf_counter()
                answers[number] = await ask(http, model, number, tokens, url)
                if into is not None:
                    into.append(time.perf_counter() - start)

        await asyncio.gather(*(run(1000 * c, warm, None) for c in range(clients)))
        start = time.perf_counter()
        await asyncio.gather(*(run(1000 * c, requests, seconds) for c in range(clients)))
        whole = time.perf_counter() - start
        some = list(answers)[:: max(len(answers) // 8, 1)]
        alone = {n: await ask(http, model, n, tokens, url) for n in some}
    p50, p95 = np.quantile(seconds, [0.5, 0.95])
    return {
        "requests_per_second": len(seconds) / whole,
        "p50": p50,
        "p95": p95,
        "ratio": p95 / p50,
        "differ": sum(answers[n] != text for n, text in alone.items()),
        "compared": len(alone),
    }


class Process:
    """A server in a process of its own."""

    def __init__(self, words: list[str], url: str = "") -> None:
        self.process = subprocess.Popen(
            words, stdout=subprocess.PIPE if not url else None, text=True
        )
        self.url = url
        if not url:
            assert self.process.stdout is not None
            self.url = json.loads(self.process.stdout.readline())["url"]
        self._wait()

    def _wait(self) -> None:
        for _ in range(600):
            try:
                httpx.get(f"{self.url}/health")
                return
            except httpx.TransportError:
                if self.process.poll() is not None:
                    raise SystemExit("the server has ended") from None
                time.sleep(0.2)

    def __enter__(self) -> "Process":
        return self

    def __exit__(self, *_: object) -> None:
        self.process.terminate()
        self.process.wait()

    def held(self) -> tuple[float, int]:
        """MiB of memory and the number of threads."""
        text = Path(f"/proc/{self.process.pid}/status").read_text()
        found = {k: int(re.search(rf"{k}:\s+(\d+)", text)[1]) for k in ("VmRSS", "Threads")}
        return found["VmRSS"] / 1024, found["Threads"]


def moresjax(folder: Path) -> Process:
    words = [sys.executable, "-m", "moresjax", "serve", str(folder), "--template", "tokenizer"]
    return Process([*words, "--name", "tiny", "--port", "0", "--json"])


async def soak(server: Process, count: int, clients: int, tokens: int) -> None:
    """Many requests, two thirds of which are given up; prints what the server holds meanwhile."""
    rng, left = random.Random(0), list(range(count))
    rows = []

    async def vanish(http: httpx.AsyncClient, number: int) -> None:
        said = [{"role": "user", "content": question(number)}]
        body = {"model": "tiny", "messages": said, "max_tokens": tokens, "temperature": 0}
        way, wait = rng.choice(("whole", "stream", "closed")), rng.random() * 0.3
        if way == "whole":
            await ask(http, "tiny", number, tokens, server.url)
        elif way == "stream":
            async with http.stream(
                "POST", f"{server.url}/v1/chat/completions", json=body | {"stream": True}
            ) as answer:
                async for _ in answer.aiter_lines():
                    break
        else:
            task = asyncio.create_task(ask(http, "tiny", number, tokens, server.url))
            await asyncio.sleep(wait)
            task.cancel()
            await asyncio.gather(task, return_exceptions=True)

    async def client(http: httpx.AsyncClient) -> None:
        while left:
            number = left.pop()
            await vanish(http, number)
            if number % (count // 8) == 0:
                rows.append((count - len(left), *server.held()))

    async with httpx.AsyncClient(timeout=600) as http:
        await asyncio.gather(*(client(http) for _ in range(clients)))
        await asyncio.sleep(1)
        metrics = (await http.get(f"{server.url}/metrics")).text
    rows.append((count, *server.held()))
    print("requests      MiB  threads")
    for asked, memory, threads in rows:
        print(f"{asked:8d} {memory:8.1f} {threads:8d}")
    print("\n".join(x for x in metrics.splitlines() if not x.startswith("#")))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--clients", type=int, default=32)
    parser.add_argument("--requests", type=int, default=8, help="of every client")
    parser.add_argument("--warm", type=int, default=8, help="requests before time counts")
    parser.add_argument("--tokens", type=int, default=48)
    parser.add_argument("--soak", type=int, default=0, metavar="N")
    parser.add_argument("--no-transformers", action="store_true")
    parser.add_argument("--continuous", action="store_true", help="its continuous batching too")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name) / "tiny"
        make_folder(folder)
        if args.soak:
            with moresjax(folder) as server:
                asyncio.run(soak(server, args.soak, args.clients, args.tokens))
            return
        sizes = args.clients, args.requests, args.tokens, args.warm
        print("server                          requests/s      p50      p95   p95/p50  differ")

        def show(title: str, found: dict) -> None:
            print(
                f"{title:30s} {found['requests_per_second']:11.2f} {found['p50']:8.2f} "
                f"{found['p95']:8.2f} {found['ratio']:9.2f}  {found['differ']}/{found['compared']}",
                flush=True,
            )

        with moresjax(folder) as server:
            show("moresjax serve", asyncio.run(load(server.url, "tiny", *sizes)))
        if args.no_transformers:
            return
        for more in ([], ["--continuous-batching"])[: 1 + args.continuous]:
            words = [str(Path(sys.executable).parent / "transformers"), "serve", *more]
            words += ["--port", "8765", "--device", "cpu"]
            with Process(words, "http://127.0.0.1:8765") as server:
                found = asyncio.run(load(server.url, str(folder), *sizes))
            show(" ".join(["transformers serve", *more]), found)


if __name__ == "__main__":
    main()
