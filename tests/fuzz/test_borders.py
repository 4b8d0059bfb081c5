"""Whatever comes over a border is read, or refused in one short sentence, at a bounded cost.

`pytest tests/fuzz --fuzz 1000000` tries a million cases; the default run tries 5,000.
"""

import contextlib
import logging
import resource
import signal
import tempfile
from pathlib import Path

import pytest
from fuzz_borders import BORDERS
from hypothesis import HealthCheck, Phase, given, settings

from moresjax.core.errors import LONGEST, UserError

CPU_SECONDS = 20.0  # of one case: what takes longer does not end, or costs far too much
MEMORY = 1 << 31  # bytes of address space that a case may take beyond what the process has


@contextlib.contextmanager
def bounded():
    """Inside, memory and CPU time have an end, which is an error."""

    def stop(*_):
        raise AssertionError(f"a case took {CPU_SECONDS} s of CPU time")

    used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    soft, hard = resource.getrlimit(resource.RLIMIT_AS)
    before = signal.signal(signal.SIGVTALRM, stop)
    resource.setrlimit(resource.RLIMIT_AS, (used + MEMORY, hard))
    signal.setitimer(signal.ITIMER_VIRTUAL, CPU_SECONDS)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_VIRTUAL, 0)
        resource.setrlimit(resource.RLIMIT_AS, (soft, hard))
        signal.signal(signal.SIGVTALRM, before)


@pytest.mark.parametrize("name", BORDERS)
def test_every_case_is_read_or_refused(name, request):
    border = BORDERS[name]
    share = border.share / sum(each.share for each in BORDERS.values())
    cases = max(round(request.config.getoption("--fuzz") * share), 1)

    @settings(
        max_examples=cases,
        deadline=None,
        database=None,
        derandomize=request.config.getoption("--fuzz") <= 5000,
        phases=(Phase.generate, Phase.shrink),
        suppress_health_check=[*HealthCheck],
    )
    @given(border.cases)
    def holds(case):
        with tempfile.TemporaryDirectory(dir=folder) as own, bounded():
            try:
                border.read(case, Path(own))
            except UserError as error:
                said = str(error)
                assert 0 < len(said) <= LONGEST
                assert said.isprintable()

    logging.disable(logging.WARNING)  # thousands of files that are begun anew
    try:
        with tempfile.TemporaryDirectory() as folder:
            holds()
    finally:
        logging.disable(logging.NOTSET)
