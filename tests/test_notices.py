"""What the library tells its user: each thing once, from one rank of a host, and without touching the application's
logging.
"""

import logging

import pytest

from pipemoe import notices


@pytest.fixture(autouse=True)
def nothing_told(monkeypatch):
    monkeypatch.setattr(notices, "_told", set())
    for name in notices._PLACE_VARIABLES:
        monkeypatch.delenv(name, raising=False)


def test_a_thing_is_told_once(caplog):
    assert notices.tell("one thing") and notices.tell("a second", once="key")
    assert not notices.tell("one thing") and not notices.tell("a third", once="key")
    assert [record.getMessage() for record in caplog.records] == ["pipemoe: one thing", "pipemoe: a second"]
    assert {(record.name, record.levelno) for record in caplog.records} == {("pipemoe", logging.WARNING)}


@pytest.mark.parametrize("variable", notices._PLACE_VARIABLES)
def test_one_rank_of_a_host_speaks(variable, monkeypatch, caplog):
    monkeypatch.setenv(variable, "1")
    assert not notices.tell("something")
    monkeypatch.setenv(variable, "0")
    assert notices.tell("something")
    assert len(caplog.records) == 1


def test_the_logger_has_no_handler():
    """Not even a NullHandler: that would keep warnings from standard error where nobody has set up logging."""
    assert not logging.getLogger("pipemoe").handlers and logging.getLogger("pipemoe").propagate
