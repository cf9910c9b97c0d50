"""Messages between ranks: what is encoded is decoded again, and all else is refused."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from megastruct.launch.watchdog.messages import Answer, End, Heartbeat, Hello, MalformedError, Message, decode, encode

counts, codes = st.integers(0, 2**63), st.integers(0, 255)
messages: st.SearchStrategy[Message] = st.one_of(
    st.builds(Hello, word=st.text(), rank=counts, name=st.text()),
    st.builds(
        Heartbeat,
        step=counts,
        arrivals=counts,
        doing=st.text(),
        failed=st.booleans(),
        goodbye=st.none() | codes,
    ),
    st.builds(Answer),
    st.builds(End, code=codes, message=st.text()),
)


@settings(deadline=None)
@given(messages)
@example(Hello("word", 1, "process 7 on großer Rechner 3"))
@example(Heartbeat(doing="数据 읽기.py:3 lire les données\n"))
@example(End(1, '\r\n\x00\u2028 \\ "'))
def test_a_message_is_one_line_and_comes_back(message: Message) -> None:
    line = encode(message)
    assert line.endswith(b"\n") and line.count(b"\n") == 1
    assert decode(line) == message and decode(line[:-1]) == message


def test_text_travels_as_utf_8() -> None:
    assert "großer Rechner".encode() in encode(Hello("word", 1, "großer Rechner"))


@settings(deadline=None)
@given(st.binary() | st.text().map(str.encode))
def test_garbage_is_refused(line: bytes) -> None:
    with pytest.raises(MalformedError):
        decode(line)


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
)


@settings(deadline=None)
@given(messages, st.data())
def test_a_message_with_another_value_is_refused_or_is_that_message(message: Message, data: st.DataObject) -> None:
    """Nothing is converted: neither 1 to true, nor "1" to 1."""
    fields = json.loads(encode(message))
    key, value = data.draw(st.sampled_from(sorted(fields))), data.draw(json_values)
    line = json.dumps({**fields, key: value}).encode()
    try:
        found = decode(line)
    except MalformedError:
        return
    assert type(getattr(found, key)) is type(value) and getattr(found, key) == value


@settings(deadline=None)
@given(messages, st.integers(1, 20))
def test_a_line_that_is_cut_is_refused(message: Message, bytes_missing: int) -> None:
    with pytest.raises(MalformedError):
        decode(encode(message)[:-1][:-bytes_missing])


END = {"kind": "end", "code": 1, "message": "why"}


@pytest.mark.parametrize(
    "fields",
    [
        {**END, "code": -1},
        {**END, "code": 256},
        {**END, "code": "1"},
        {**END, "code": True},
        {**END, "code": 1.0},
        {**END, "code": None},
        {**END, "message": None},
        {**END, "message": "\ud800"},
        {**END, "more": 1},
        {**END, "kind": "beginning"},
        {**END, "kind": ["end"]},
        {"code": 1, "message": "why"},
        {"kind": "hello", "word": "word", "rank": -1, "name": "me"},
        {"kind": "hello", "word": "word", "rank": 1},
        [END],
        "end",
        None,
    ],
    ids=lambda fields: str(fields)[:60],
)
def test_what_is_nearly_a_message_is_refused(fields: Any) -> None:
    assert decode(json.dumps(END).encode()) == End(1, "why")
    with pytest.raises(MalformedError):
        decode(json.dumps(fields).encode())


def test_lines_that_exhaust_a_parser_are_refused() -> None:
    for line in (b"[" * 60_000, b'{"kind":' * 7_000, b'{"kind":"end","code":' + b"9" * 60_000 + b"}"):
        with pytest.raises(MalformedError):
            decode(line)
