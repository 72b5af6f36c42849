"""Filters: columns against a reading of the JSON row by row, texts against what they parse to, and every refusal."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

import service.filter
import service.payload
from service.errors import InvalidArgumentError
from service.filter import Attributes, Filter
from service.payload import MAX_FIELDS, Fields, columns_of, merged

NAMES = ["color", "a", "b", "my field", "a.b", "ü", "", "AND", "key", "payload", "x*", '"\\', "5", "true"]
WORDS = [
    "red",
    "reddish",
    "a red",
    "",
    "*",
    "a*b",
    "\\",
    "\"'",
    "ü",
    "😀",
    "￿",
    "5",
    "true",
    "null",
    "color",
    "b",
    "AND",
]
NUMBERS = [0.0, -0.0, 1.0, 5.0, -2.5, 1e300, 2.0**53]


@dataclass
class Item:
    key: str
    source_uri: str
    sequence: int
    payload: dict[str, Any]


def attributes(items: list[Item], columns: pa.Table | None = None) -> Attributes:
    payloads = [json.dumps(item.payload) for item in items]
    return Attributes(
        pa.array([item.key for item in items], pa.string()),
        pa.array([item.source_uri for item in items], pa.string()),
        pa.array([item.sequence for item in items], pa.int64()),
        pa.array(payloads, pa.string()),
        columns_of(payloads) if columns is None else columns,
    )


def passing(text: str, *payloads: dict[str, Any]) -> list[bool]:
    rows = [Item(f"k{i}", "", i + 1, payload) for i, payload in enumerate(payloads)]
    return Filter.parse(text).mask(attributes(rows)).tolist()


# --- an independent reading -------------------------------------------------------------------------------------
# A filter is ("and" | "or", [filters]), ("not", filter) or (member, comparator, values). A value is a float, a bool, a
# string, or ("wild", text, start, end); None is null, and "there" stands for the * after a colon.


def look_up(item: Item, member: tuple[str, ...]) -> Any:
    value: Any = {"key": item.key, "source_uri": item.source_uri, "sequence": item.sequence, "payload": item.payload}
    for name in member:
        value = value.get(name) if isinstance(value, dict) else None
    return value


def same(found: Any, wanted: Any) -> bool:
    if isinstance(wanted, tuple):
        _, text, start, end = wanted
        if not isinstance(found, str):
            return False
        if start and end:
            return text in found
        return found.endswith(text) if start else found.startswith(text)
    if isinstance(found, bool) or isinstance(wanted, bool):
        return found is wanted
    return (
        isinstance(found, str | int | float) and isinstance(wanted, str) == isinstance(found, str) and found == wanted
    )


def has(found: Any, wanted: Any) -> bool:
    if isinstance(found, dict):
        return isinstance(wanted, str) and found.get(wanted) is not None
    return any(same(each, wanted) for each in found) if isinstance(found, list) else same(found, wanted)


def holds(node: Any, item: Item) -> bool:
    if node[0] == "and":
        return all(holds(each, item) for each in node[1])
    if node[0] == "or":
        return any(holds(each, item) for each in node[1])
    if node[0] == "not":
        return not holds(node[1], item)
    member, comparator, values = node
    found = look_up(item, member)
    if values in ([None], "there"):
        there = found is not None and (member != ("source_uri",) or found != "")
        return not there if comparator == "=" else there
    if comparator == "=":
        return any(same(found, value) for value in values)
    if comparator == "!=":
        return found is not None and not any(same(found, value) for value in values)
    if comparator == ":":
        return any(has(found, value) for value in values)
    (wanted,) = values
    if isinstance(found, bool | dict | list | None) or isinstance(found, str) != isinstance(wanted, str):
        return False
    return {"<": found < wanted, "<=": found <= wanted, ">": found > wanted, ">=": found >= wanted}[comparator]


# --- what is drawn ----------------------------------------------------------------------------------------------

words = st.sampled_from(WORDS) | st.text(max_size=3)
names = st.sampled_from(NAMES)
scalars = st.none() | st.booleans() | st.sampled_from(NUMBERS) | words
contents = st.recursive(
    scalars,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(names, inner, max_size=3),
    max_leaves=5,
)
payloads = st.dictionaries(names, contents, max_size=4)
items = st.builds(
    Item, words.filter(bool), st.just("") | words, st.integers(1, 9), payloads.map(lambda p: json.loads(json.dumps(p)))
)
members = st.one_of(
    st.lists(names, min_size=1, max_size=3).map(lambda path: ("payload", *path)),
    st.sampled_from([("key",), ("source_uri",), ("sequence",), ("payload",)]),
)
wilds = st.builds(
    lambda text, start, end: ("wild", text, start or not (text and end), end or not text),
    words, st.booleans(), st.booleans(),
)  # fmt: skip


@st.composite
def restrictions(draw: st.DrawFn) -> Any:
    member = draw(members)
    values = st.sampled_from(NUMBERS)
    if member != ("sequence",):
        values = words if member in (("key",), ("source_uri",)) else values | words | st.booleans()
    comparator = draw(st.sampled_from(["=", "!=", "<", "<=", ">", ">=", ":"]))
    if comparator in ("=", "!="):
        if draw(st.integers(0, 9)) == 0:
            return member, comparator, [None]
        if member != ("sequence",):
            values = values | wilds
    elif comparator == ":":
        if draw(st.booleans()):
            return member, comparator, "there"
    else:
        return member, comparator, [draw(values.filter(lambda value: not isinstance(value, bool)))]
    return member, comparator, draw(st.lists(values, min_size=1, max_size=3))


filters = st.recursive(
    restrictions(),
    lambda inner: st.one_of(
        st.tuples(st.sampled_from(["and", "or"]), st.lists(inner, min_size=2, max_size=3)),
        st.tuples(st.just("not"), inner),
    ),
    max_leaves=6,
)


@st.composite
def written(draw: st.DrawFn, node: Any) -> str:
    """One of the ways to write a filter."""

    def space(least: int = 0) -> str:
        return draw(st.sampled_from(["", " ", " \n\t"][least:]))

    def string(text: str, start: bool = False, end: bool = False) -> str:
        mark = draw(st.sampled_from("\"'"))
        for each in ("\\", mark, "*"):
            text = text.replace(each, f"\\{each}")
        return f"{mark}{'*' * start}{text}{'*' * end}{mark}"

    def name(text: str) -> str:
        return text if text in ("color", "a", "b", "ü", "payload") and draw(st.booleans()) else string(text)

    def value(value: Any) -> str:
        if value is None:
            return "null"
        if isinstance(value, bool):
            return str(value).lower()
        if isinstance(value, float):
            return draw(st.sampled_from([repr(value), f"{value:.17e}", f"{value:.6f}"]))
        if isinstance(value, tuple):
            return string(*value[1:])
        return value if value in ("red", "reddish", "ü", "b") and draw(st.booleans()) else string(value)

    def restriction(member: tuple[str, ...], comparator: str, values: Any) -> str:
        path = [name(each) for each in member]
        if len(member) > 1 and member[1] not in ("key", "payload") and draw(st.booleans()):
            del path[0]
        if values == "there":
            shown = draw(st.sampled_from(["*", '"*"', "'**'"]))
        else:
            shown = f" OR{space(1)}".join(map(value, values))
            if len(values) > 1 or (comparator in ("=", "!=") and None not in values and draw(st.booleans())):
                shown = f"({space()}{shown}{space()})"
        return f"{'.'.join(path)}{space()}{comparator}{space()}{shown}"

    def anything(node: Any, rank: int) -> str:
        """`rank` 0: an AND may stand here, 1: an OR, 2: a NOT, 3: a restriction or parentheses."""
        if node[0] == "and":
            own, text = 0, f" AND{space(1)}".join(anything(each, 1) for each in node[1])
        elif node[0] == "or":
            own, text = 1, f" OR{space(1)}".join(anything(each, 2) for each in node[1])
        elif node[0] == "not":
            own, text = 2, draw(st.sampled_from(["NOT ", "-", "- "])) + anything(node[1], 3)
        else:
            own, text = 3, restriction(*node)
        return f"({space()}{text}{space()})" if own < rank or draw(st.integers(0, 5)) == 0 else text

    return space() + anything(node, 0) + space()


# --- properties -------------------------------------------------------------------------------------------------


@settings(max_examples=150, deadline=None)
@given(st.lists(items, min_size=1, max_size=6), filters, st.data())
def test_columns_say_what_the_json_says(rows: list[Item], node: Any, data: st.DataObject) -> None:
    parsed = Filter.parse(data.draw(written(node)))
    expected = [holds(node, row) for row in rows]
    mask = parsed.mask(attributes(rows))
    assert mask.dtype == np.bool_ and mask.tolist() == expected, parsed.text
    again = Filter.parse(parsed.text)
    assert again.text == parsed.text and again == parsed and again.root == parsed.root

    cut = data.draw(st.integers(0, len(rows)))
    texts = [json.dumps(row.payload) for row in rows]
    parts = merged([columns_of(texts[:cut]), columns_of(texts[cut:])])
    assert parts.equals(columns_of(texts), check_metadata=True)
    assert parsed.mask(attributes(rows, parts)).tolist() == expected
    chunked = pa.concat_tables([columns_of(texts[:cut]), columns_of(texts[cut:])], promote_options="default")
    assert parsed.mask(attributes(rows, chunked)).tolist() == expected
    live = [i for i in range(len(rows)) if data.draw(st.booleans())]
    taken = merged([columns_of(texts).take(pa.array(live, pa.int64()))])
    kept = [rows[i] for i in live]
    assert parsed.mask(attributes(kept, taken)).tolist() == [expected[i] for i in live]


@settings(max_examples=100, deadline=None)
@given(st.lists(items, min_size=1, max_size=6), filters, st.integers(0, 4), st.integers(1, 6), st.data())
def test_filters_are_right_where_fields_were_left_out(
    rows: list[Item], node: Any, most: int, tracked: int, data: st.DataObject
) -> None:
    parsed = Filter.parse(data.draw(written(node)))
    expected = [holds(node, row) for row in rows]
    texts = [json.dumps(row.payload) for row in rows]
    cut = data.draw(st.integers(0, len(rows)))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(service.payload, "MAX_FIELDS", most)
        patch.setattr(service.payload, "_MAX_TRACKED", tracked)
        patch.setattr(service.filter, "_BATCH", 4)
        columns = columns_of(texts)
        parts = merged([columns_of(texts[:cut]), columns_of(texts[cut:])])
        assert columns.num_columns <= most + 1 and parts.num_columns <= most + 1
        assert parsed.mask(attributes(rows, columns)).tolist() == expected
        assert parsed.mask(attributes(rows, parts)).tolist() == expected


tokens = ["AND", "OR", "NOT", "-", "(", ")", "=", "!=", "<", "!", ":", "*", ".", ",", '"', "'", "\\", " ", "null", "true",
          "color", "key", "sequence", "payload", "5", "-1e9", "1e999", '"a"', "'*x'", "a*b", "\ud800", "\0"]  # fmt: skip


@settings(max_examples=300, deadline=None)
@given(st.one_of(st.text(), st.lists(st.sampled_from(tokens), max_size=12).map(" ".join), st.lists(
    st.sampled_from(tokens), max_size=12).map("".join)))  # fmt: skip
@example("(" * 30_000)
@example("NOT (" * 10_000)
@example("-" * 60_000)
def test_any_text_is_a_filter_or_is_refused(text: str) -> None:
    try:
        parsed = Filter.parse(text)
    except InvalidArgumentError as e:
        assert e.reason == "BAD_FILTER" and e.field == "filter"
        return
    assert Filter.parse(parsed.text) == parsed
    parsed.mask(attributes([Item("k", "", 1, {"color": "a"})]))


# --- what the language says -------------------------------------------------------------------------------------

REFUSED = {
    "color": "filter, character 6: found the end, expected = != < <= > >= or : after a field (words are not searched for "
    "by themselves)",
    "red blue": "filter, character 5: found 'blue', expected = != < <= > >= or : after a field (words are not searched "
    "for by themselves)",
    "color = ": "filter, character 9: found the end, expected a value",
    "color = AND": "filter, character 9: found 'AND', expected a value",
    "color = dark red": "filter, character 14: found 'red', expected AND, OR or the end (a value with spaces is quoted)",
    "a = 1 ADN b = 2": "filter, character 7: found 'ADN', expected AND, OR or the end (a value with spaces is quoted)",
    "a = 1 b = 2": "filter, character 7: found 'b', expected AND, OR or the end (a value with spaces is quoted)",
    "a = 1 and b = 2": "filter, character 7: found 'and', expected AND, OR or the end (a value with spaces is quoted)",
    "a = 1 AND": "filter, character 10: found the end, expected a field or (",
    "AND a = 1": "filter, character 1: found 'AND', expected a field or (",
    "NOT NOT a = 1": "filter, character 5: found 'NOT', expected a field or (",
    "42 = a": "filter, character 1: found '42', expected a field or (",
    "(a = 1": "filter, character 7: found the end, expected AND, OR or ) (a value with spaces is quoted)",
    "a = 1)": "filter, character 6: found ')', expected AND, OR or the end (a value with spaces is quoted)",
    "a. = 1": "filter, character 3: found ' ', expected a field inside 'a'",
    "a == 1": "filter, character 4: found '=', expected a value",
    'a = "x': 'filter, character 5: found a " that nothing closes, expected another "',
    'a "b c" = 1': "filter, character 3: found '\"b c\"', expected = != < <= > >= or : after a field (words are not "
    "searched for by themselves)",
    "a = (1 2)": "filter, character 8: found '2', expected OR or ) after a value (one with spaces is quoted)",
    "a = (1 AND 2)": "filter, character 8: found 'AND', expected OR or ) after a value (one with spaces is quoted)",
    "a = ()": "filter, character 6: found ')', expected a value",
    "a < (1 OR 2)": "filter, character 5: < takes one value: only = != and : take several",
    "a = x*y": "filter, character 5: * stands for any text at a value's start or end only: within write \\* in quotes",
    "a < x*": "filter, character 5: * stands for any text after = and != only: after < write \\* in quotes",
    "a:x*": "filter, character 3: * stands for any text after = and != only: after : write \\* in quotes",
    "a:(* OR x)": "filter, character 4: * stands for any text after = and != only: after : write \\* in quotes",
    r'a = "\n"': "filter, character 6: a backslash stands before \" ' * or \\ only: write \\\\ for itself",
    "a < true": "filter, character 5: true has no order: compare it with = or !=",
    "a < null": "filter, character 5: null stands alone after = or !=",
    "a = (null OR 1)": "filter, character 6: null stands alone after = or !=",
    "a = 1e999": "filter, character 5: the number 1e999 is beyond 1.8e308: send a smaller one",
    'sequence > "5"': "filter, character 12: sequence is a number: compare it with one",
    "key.x = 1": "filter, character 1: key has no fields inside: of the payload's field write payload.key",
    "a = \ud800": "filter, character 5: this character is half of a surrogate pair: send UTF-8",
}


@pytest.mark.parametrize("text", REFUSED)
def test_a_refusal_says_where_and_what(text: str) -> None:
    with pytest.raises(InvalidArgumentError) as e:
        Filter.parse(text)
    assert str(e.value) == REFUSED[text]
    assert (e.value.reason, e.value.field) == ("BAD_FILTER", "filter")


def test_limits() -> None:
    deepest = "(a = 1 AND (b = 2 OR NOT " * 32 + "(c = 3)" + "))" * 32
    deepest = deepest.replace("(c = 3)", "c = 3")
    assert Filter.parse(Filter.parse(deepest).text).text == Filter.parse(deepest).text
    Filter.parse(deepest).mask(attributes([Item("k", "", 1, {})]))
    with pytest.raises(
        InvalidArgumentError, match="character 65: more than 64 parentheses are open here: write the fil"
    ):
        Filter.parse("(" * 65 + "a = 1" + ")" * 65)
    for parts in (["a = 1"] * 1000, ["a = 1 AND b = 2"] * 500, [f"a = ({' OR '.join(map(str, range(1000)))})"]):
        Filter.parse(" AND ".join(parts)).mask(attributes([Item("k", "", 1, {})]))
    with pytest.raises(InvalidArgumentError, match="the filter has more than 1000 values: split the query"):
        Filter.parse(f"a = ({' OR '.join(map(str, range(1001)))})")
    with pytest.raises(
        InvalidArgumentError, match="the filter has 70004 bytes of UTF-8, up to 65536 are allowed: shorten"
    ):
        Filter.parse(f"a = {'ü' * 35_000}")


@pytest.mark.parametrize(
    ("text", "normalised"),
    [
        ("", ""),
        (" \n", ""),
        ("color=red", 'payload.color = "red"'),
        ("a = 1 AND b = 2 OR c = 3", "payload.a = 1 AND payload.b = 2 OR payload.c = 3"),
        ("(a = 1 AND b = 2) OR c = 3", "(payload.a = 1 AND payload.b = 2) OR payload.c = 3"),
        ("a=1 AND (b=2 AND (c=3))", "payload.a = 1 AND payload.b = 2 AND payload.c = 3"),
        ("-(NOT a = -1.50)", "payload.a = -1.5"),
        ("a != null", "payload.a:*"),
        ("NOT a = null", "payload.a:*"),
        ("a = null", "NOT payload.a:*"),
        ("payload.key = key AND key = 007", 'payload.key = "key" AND key = "007"'),
        ("a = (1 OR 1.0 OR 1e0 OR true OR x)", 'payload.a = (1 OR true OR "x")'),
        ('\'my field\'."a.b".AND = "*x\\*"', 'payload."my field"."a.b"."AND" = "*x\\*"'),
        ("file = com.example*", 'payload.file = "com.example*"'),
    ],
)
def test_texts_are_normalised(text: str, normalised: str) -> None:
    assert Filter.parse(text).text == normalised
    assert hash(Filter.parse(text)) == hash(Filter.parse(normalised))


def test_what_filters_mean() -> None:
    kinds: list[dict[str, Any]] = [{"a": 5}, {"a": "5"}, {"a": True}, {"a": [5, "x"]}, {"a": {"x": 1}}, {"a": None}, {}]
    for text, expected in {
        "a = 5": "1000000",
        'a = "5"': "0100000",
        "a != 5": "0111100",
        "NOT a = 5": "0111111",
        "a = true": "0010000",
        "a = (5 OR true)": "1010000",
        "a != (5 OR true)": "0101100",
        "a < 6": "1000000",
        'a < "6"': "0100000",
        "a:5": "1001000",
        "a:x": "0001100",
        "a:*": "1111100",
        "a = null": "0000011",
        "a.x:*": "0000100",
        "payload:a": "1111100",
        "payload:*": "1111111",
        "payload = 5": "0000000",
        "key = k1": "0100000",
        "source_uri:*": "0000000",
        'source_uri = ""': "1111111",
        "sequence >= 2 AND sequence < 4": "0110000",
        "": "1111111",
        # OR binds tighter than AND.
        "sequence = 1 AND sequence = 2 OR sequence = 1": "1000000",
    }.items():
        assert "".join(str(int(passes)) for passes in passing(text, *kinds)) == expected, text
    dates = [{"taken": "2023-12-31T23:59:59Z"}, {"taken": "2024-01-01T00:00:00Z"}]
    assert passing('taken >= "2024-01-01T00:00:00Z"', *dates) == [False, True]
    assert passing("a = -0", {"a": 0.0}, {"a": -0.0}) == [True, True]
    assert passing("a = (0 OR 7)", {"a": 0.0}, {"a": -0.0}) == [True, True]


# --- columns ----------------------------------------------------------------------------------------------------


def test_rows_without_fields_are_still_rows() -> None:
    assert len(columns_of([])) == len(merged([])) == 0
    assert len(columns_of(["{}"] * 3)) == 3
    assert len(merged([columns_of(["{}"] * 3), columns_of([]), columns_of(['{"a": null}'])])) == 4
    assert Filter.parse("a = 1").mask(attributes([])).shape == (0,)
    full = columns_of([json.dumps({f"f{i}": i for i in range(600)})])
    assert Filter.parse("z = 1").mask(attributes([], full.slice(0, 0))).shape == (0,)


def test_beyond_the_most_fields_the_json_is_read() -> None:
    rows = [
        Item(f"k{i}", "", i + 1, {"color": "red" if i % 2 else "blue", **{f"f{j}": j for j in range(i, 590 + i)}})
        for i in range(40)
    ]
    columns = columns_of([json.dumps(row.payload) for row in rows])
    assert columns.num_columns == MAX_FIELDS + 1 and Fields(columns).left_out
    assert Fields(columns).known(("color",)) and Fields(columns).known(("color", "inside"))
    assert not Fields(columns).known(("f0",)) and not Fields(columns).known(("f629",))
    halves = merged([columns.slice(0, 20), columns.slice(20)])
    other = merged([columns.slice(0, 20), columns_of([json.dumps(row.payload) for row in rows[20:]])])
    assert Fields(halves).left_out and Fields(other).left_out
    for table in (columns, halves, other):
        rows_of = attributes(rows, table)
        assert Filter.parse("f0 = 0").mask(rows_of).tolist() == [i == 0 for i in range(40)]
        assert Filter.parse("color = red AND NOT f10:*").mask(rows_of).tolist() == [
            i % 2 == 1 and i > 10 for i in range(40)
        ]
        unread = rows_of._replace(payload=pa.array(["never read"] * 40))
        assert Filter.parse("color:red AND f100 = 100").mask(unread).sum() == 20


def test_too_many_fields_in_few_tables() -> None:
    tables = [columns_of([json.dumps({f"f{j}": 1 for j in range(i, i + 400)})]) for i in (0, 400)]
    both = merged(tables)
    assert both.num_columns == MAX_FIELDS + 1 and Fields(both).left_out
    assert not Fields(tables[0]).left_out


def test_dictionaries_hold_what_rows_have() -> None:
    table = columns_of([json.dumps({"name": f"n{i}"}) for i in range(1000)])
    few = merged([table.take([1, 5]), table.take([5, 900])])
    column = few['["string","name"]']
    assert column.num_chunks == 1 and column.chunk(0).dictionary.to_pylist() == ["n1", "n5", "n900"]


@pytest.mark.parametrize("fields", [3, 600])
def test_columns_survive_a_file(fields: int, tmp_path: Path) -> None:
    rows = [
        Item(
            f"k{i}",
            "",
            i + 1,
            {"tags": ["a", i, True], "in": {"x": {}}, "none": [], **{f"f{j}": f"{i}" for j in range(fields)}},
        )
        for i in range(10)
    ]
    columns = columns_of([json.dumps(row.payload) for row in rows])
    with pa.OSFile(str(tmp_path / "columns.arrow"), "wb") as sink, pa.ipc.new_file(sink, columns.schema) as writer:
        writer.write_table(columns)
    with pa.memory_map(str(tmp_path / "columns.arrow")) as source:
        table = pa.ipc.open_file(source).read_all()
    assert table.equals(columns, check_metadata=True)
    assert Fields(table).left_out == (fields == 600)
    for text, count in {
        "tags:(a OR 20)": 10,
        "tags:3": 1,
        "in.x:*": 10,
        "none:*": 10,
        "f1 = 4": 0,
        "f2 = '4'": 1,
    }.items():
        assert Filter.parse(text).mask(attributes(rows, table)).sum() == count, text
    assert merged([table, table]).num_rows == 20
