"""Counters of a server, in the text format that Prometheus reads."""

import threading
from collections import Counter
from collections.abc import Mapping

COUNTERS = {
    "requests_answered": "Answers that were read to their end.",
    "requests_cancelled": "Answers that nobody waited for any more.",
    "requests_refused": "Requests that found the queue full.",
    "prompt_tokens": "Tokens of prompts that were read, visual ones included.",
    "generation_tokens": "New tokens.",
}
GAUGES = {
    "running": "Requests that are being answered.",
    "waiting": "Requests that wait for a free row.",
    "rows": "Requests that can be answered at a time.",
}


class Metrics:
    """Counters that several threads add to.

    >>> metrics = Metrics()
    >>> metrics.add("prompt_tokens", 7)
    >>> metrics.text({}).splitlines()[-2:]
    ['# TYPE moresjax_generation_tokens_total counter', 'moresjax_generation_tokens_total 0']
    """

    def __init__(self) -> None:
        self._lock, self._counts = threading.Lock(), Counter()

    def add(self, name: str, count: int = 1) -> None:
        """Adds to one of `COUNTERS`."""
        with self._lock:
            self._counts[name] += count

    def text(self, gauges: Mapping[str, int]) -> str:
        """All counters and gauges.

        Args:
          gauges: Values of `GAUGES`.
        """
        lines = []
        for name, value in gauges.items():
            lines += [f"# HELP moresjax_{name} {GAUGES[name]}", f"# TYPE moresjax_{name} gauge"]
            lines.append(f"moresjax_{name} {value}")
        for name, help in COUNTERS.items():
            full = f"moresjax_{name}_total"
            lines += [f"# HELP {full} {help}", f"# TYPE {full} counter"]
            lines.append(f"{full} {self._counts[name]}")
        return "\n".join(lines) + "\n"
