"""Problems of several checks in one message."""

from __future__ import annotations

import pickle

import pytest

from megastruct.errors import Problem, Problems, UserError

CHANGED = UserError([Problem("a.b", "3, not 2"), Problem("", "one run", "c=d")], headline="of another config")


def refuse(error: UserError) -> None:
    raise error


def test_all_problems_are_shown_below_their_headlines() -> None:
    problems = Problems([Problem("first", "wrong", "right")])
    assert problems.collect(lambda: 5) == 5
    assert problems.collect(lambda: refuse(CHANGED)) is None
    assert problems.collect(lambda: refuse(UserError(Problem("last", "missing")))) is None
    with pytest.raises(UserError) as caught:
        problems.raise_if_any()
    expected = [
        "first: wrong",
        "    try: right",
        "of another config",
        "  a.b: 3, not 2",
        "  one run",
        "    try: c=d",
        "last: missing",
    ]
    assert str(caught.value).splitlines() == expected
    assert str(pickle.loads(pickle.dumps(caught.value))) == str(caught.value)  # noqa: S301 - our own
    below = str(UserError(problems, headline="3 problems")).splitlines()
    assert below[:4] == ["3 problems", "  first: wrong", "    try: right", "  of another config"]
    assert below[4:] == ["    a.b: 3, not 2", "    one run", "      try: c=d", "  last: missing"]


def test_an_error_alone_looks_as_if_it_was_not_collected() -> None:
    problems = Problems()
    problems.raise_if_any()
    problems.take(CHANGED)
    with pytest.raises(UserError) as caught:
        problems.raise_if_any()
    assert str(caught.value) == str(CHANGED)


def test_what_several_say_is_said_once() -> None:
    problems = Problems()
    for _ in range(3):
        problems.take(UserError([Problem("x", "missing"), Problem("y", "missing")]))
    assert [problem.where for problem in problems] == ["x", "y"]
