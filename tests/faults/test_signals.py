"""Signals before a run's own handling of them has begun."""

import signal

import pytest

from moresjax.cli import app


@pytest.mark.parametrize(
    ("number", "code", "said"),
    [(signal.SIGTERM, 143, "told to end (SIGTERM)"), (signal.SIGINT, 130, "interrupted")],
)
def test_a_command_that_is_told_to_end_says_so(number, code, said, monkeypatch, capsys):
    inherited = signal.getsignal(number)
    if number == signal.SIGINT:  # which a shell lets its background jobs ignore
        signal.signal(number, signal.default_int_handler)
    before = signal.getsignal(number)
    monkeypatch.setattr(app, "_run", lambda _: signal.raise_signal(number))
    try:
        assert app.main([]) == code
        assert capsys.readouterr().err == f"moresjax: {said}\n"
        assert signal.getsignal(number) is before
    finally:
        signal.signal(number, inherited)
