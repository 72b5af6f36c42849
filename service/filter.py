"""The filter language of searches and lists: a subset of AIP-160 (google.aip.dev/160), evaluated column by column.

    filter       [expression]                                       an empty filter holds for every item
    expression   factor {AND factor}
    factor       term {OR term}                                     OR binds tighter than AND, as AIP-160 has it
    term         [NOT | -] simple
    simple       restriction | ( expression )
    restriction  member comparator arg
    member       value {. field}                                    each is a word or quoted: payload."my field".x
    comparator   = | != | < | <= | > | >= | :
    arg          value | ( value {OR value} )                       the second after =, != and :

Members are the fields of an Item: `key`, `source_uri`, `sequence` and `payload.color`, for which `color` is short. Values
are quoted strings ("…" or '…'; a backslash stands before a quote, a backslash or a *), words, which are strings too,
numbers, true, false, and null. What a restriction says of an item:

    field = value     its value is of that kind, and equal. In a string, * at the start or the end stands for any text
    field != value    it has the field, and `=` does not hold; so with a value of another kind too
    field < value     its value is of that kind, a string or a number, and lower. Strings go by code points, so that dates
                      as of RFC 3339 in one time zone go by time
    field = (a OR b)  one of these equals; `!=`: it has the field, and none equals
    field:value       `=` holds, or a list has the element, or an object has the key with a value other than null
    field:*           it has the field, with a value other than null; `field != null` says the same, and `field = null` the
                      opposite

NOT is the plain complement: `NOT color = red` holds for items without a color, `color != red` does not. A list equals
nothing and has no order; what is in its objects is not searched. `key`, `source_uri` and `sequence` are there in every
item, but `source_uri:*` holds only where it is not empty; after the first two every value is a string, after `sequence` a
number.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple, NoReturn

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from service.errors import InvalidArgumentError
from service.payload import Fields, Path, columns_of

MAX_BYTES = 64 * 1024
MAX_TERMS = 1000
MAX_DEPTH = 64
MAX_NAMES = 32
# Rows whose payloads are parsed at a time, where a field has no columns.
_BATCH = 65_536

Mask = npt.NDArray[np.bool_]


class Attributes(NamedTuple):
    """What filters read of N rows; columns may be chunked."""

    key: pa.Array | pa.ChunkedArray
    """Strings."""
    source_uri: pa.Array | pa.ChunkedArray
    """Strings."""
    sequence: pa.Array | pa.ChunkedArray
    """int64."""
    payload: pa.Array | pa.ChunkedArray
    """JSON objects; read only where `columns` left a field out."""
    columns: pa.Table
    """What `columns_of` made of them."""


class Wild(NamedTuple):
    """A string with * at its start, its end or both."""

    text: str
    start: bool
    end: bool


Value = float | bool | str | Wild


@dataclass(frozen=True)
class Restriction:
    """A field compared with values."""

    member: Path
    """`key`, `source_uri` or `sequence`, or `payload` and the path inside."""
    comparator: str
    values: tuple[Value, ...]
    """None: the field is there."""


@dataclass(frozen=True)
class Not:
    """The complement."""

    node: Node


@dataclass(frozen=True)
class And:
    """All hold."""

    nodes: tuple[Node, ...]


@dataclass(frozen=True)
class Or:
    """Any holds."""

    nodes: tuple[Node, ...]


Node = Restriction | Not | And | Or


@dataclass(frozen=True)
class Filter:
    """A parsed filter. Two are equal when their texts are."""

    text: str
    """Normalised: spaces, quotes, parentheses and short names are the same in every filter that says the same so."""
    root: Node | None = field(compare=False, repr=False)

    @classmethod
    def parse(cls, text: str) -> Filter:
        """Raises `InvalidArgumentError` (BAD_FILTER) that says where, what was found, and what was expected."""
        root = _Parser(text).parse()
        return cls("" if root is None else _text(root), root)

    def mask(self, rows: Attributes) -> Mask:
        """bool [N]: which rows it holds for."""
        count = rows.columns.num_rows
        if self.root is None:
            return np.ones(count, np.bool_)
        paths = set(_paths(self.root))
        fields = Fields(rows.columns)
        if all(map(fields.known, paths)):
            return _Evaluation(rows, fields).mask(self.root)
        masks = []
        for start in range(0, max(count, 1), _BATCH):
            batch = Attributes(*(column.slice(start, _BATCH) for column in rows))
            table = columns_of(batch.payload.to_pylist(), paths)
            masks.append(_Evaluation(batch._replace(columns=table), Fields(table)).mask(self.root))
        return np.concatenate(masks)


# --- parsing ----------------------------------------------------------------------------------------------------

_ATTRIBUTES = ("key", "source_uri", "sequence")
_KEYWORDS = ("AND", "OR", "NOT")
_SPACE = re.compile(r"\s*")
_NAME = re.compile(r"""[^\s()"'=<>!:,.\\*-][^\s()"'=<>!:,.\\*]*""")
_WORD = re.compile(r"""[^\s()"'=<>!:,\\]+""")
_QUOTED = re.compile(r""""((?:[^"\\]|\\.)*)"|'((?:[^'\\]|\\.)*)'""", re.DOTALL)
_PIECE = re.compile(r"\\(.)|(\*)|[^\\*]+", re.DOTALL)
_NUMBER = re.compile(r"[+-]?(?:[0-9]+\.?[0-9]*|\.[0-9]+)(?:[eE][+-]?[0-9]+)?")
_COMPARATOR = re.compile(r"<=|>=|!=|[=<>:]")
_FOUND = re.compile(r"""[^\s()"'=<>!:,]{1,40}|.""", re.DOTALL)


class _Parser:
    """Recursive descent, one method per rule of the grammar."""

    def __init__(self, text: str) -> None:
        self._text = text
        self._at = 0
        self._terms = 0
        self._depth = 0

    def parse(self) -> Node | None:
        """The whole filter."""
        try:
            size = len(self._text.encode())
        except UnicodeEncodeError as e:
            self._refuse("this character is half of a surrogate pair: send UTF-8", e.start)
        if size > MAX_BYTES:
            raise InvalidArgumentError(
                f"the filter has {size} bytes of UTF-8, up to {MAX_BYTES} are allowed: shorten it",
                "BAD_FILTER",
                "filter",
            )
        self._skip()
        if self._at == len(self._text):
            return None
        node = self._expression()
        if self._at < len(self._text):
            self._expected("AND, OR or the end (a value with spaces is quoted)")
        return node

    def _expression(self) -> Node:
        nodes = [self._factor()]
        while self._took("AND"):
            nodes.append(self._factor())
        return _joined(And, nodes)

    def _factor(self) -> Node:
        nodes = [self._term()]
        while self._took("OR"):
            nodes.append(self._term())
        return _joined(Or, nodes)

    def _term(self) -> Node:
        negated = self._took("NOT") or self._took("-")
        if self._text.startswith("(", self._at):
            if self._depth == MAX_DEPTH:
                self._refuse(f"more than {MAX_DEPTH} parentheses are open here: write the filter flatter")
            self._depth += 1
            self._advance(1)
            node = self._expression()
            if not self._took(")"):
                self._expected("AND, OR or ) (a value with spaces is quoted)")
            self._depth -= 1
        else:
            node = self._restriction()
        return _complement(node) if negated else node

    def _restriction(self) -> Node:
        member = self._member()
        match = _COMPARATOR.match(self._text, self._at)
        if match is None:
            self._expected("= != < <= > >= or : after a field (words are not searched for by themselves)")
        comparator = match[0]
        self._advance(len(comparator))
        start = self._at
        listed = self._took("(")
        if listed and comparator not in ("=", "!=", ":"):
            self._refuse(f"{comparator} takes one value: only = != and : take several", start)
        values = [self._value(member, comparator, listed)]
        while listed and self._took("OR"):
            values.append(self._value(member, comparator, listed))
        if listed and not self._took(")"):
            self._expected("OR or ) after a value (one with spaces is quoted)")
        if values == [None]:
            there = Restriction(member, ":", ())
            return Not(there) if comparator == "=" else there
        # 1.0 == True, so the kind is part of what must differ.
        distinct = {(type(value), value): value for value in values if value is not None}
        return Restriction(member, comparator, tuple(distinct.values()))

    def _member(self) -> Path:
        start = self._at
        path = [self._name()]
        while self._text.startswith(".", self._at):
            self._at += 1
            path.append(self._name(path[-1]))
        self._skip()
        if len(path) > MAX_NAMES:
            self._refuse(f"the field has {len(path)} names, at most {MAX_NAMES} are allowed", start)
        if path[0] not in _ATTRIBUTES:
            return tuple(path) if path[0] == "payload" else ("payload", *path)
        if len(path) > 1:
            self._refuse(f"{path[0]} has no fields inside: of the payload's field write payload.{path[0]}", start)
        return (path[0],)

    def _name(self, outer: str | None = None) -> str:
        """One name of a member, the first or one inside `outer`."""
        if match := _QUOTED.match(self._text, self._at):
            name = "".join("*" if piece is None else piece for piece in self._pieces(match))
        else:
            match = _NAME.match(self._text, self._at)
            if match is None or (outer is None and (match[0] in _KEYWORDS or _NUMBER.fullmatch(match[0]))):
                self._expected("a field or (" if outer is None else f"a field inside {outer!r}")
            name = match[0]
        self._at = match.end()
        return name

    def _value(self, member: Path, comparator: str, listed: bool) -> Value | None:
        """A value that fits its member and comparator; None for null, and for the * after a colon."""
        self._count()
        start = self._at
        value: Value | None
        if match := _QUOTED.match(self._text, start):
            value = self._string(self._pieces(match), start)
        else:
            match = _WORD.match(self._text, start)
            if match is None or match[0] in _KEYWORDS:
                self._expected("a value")
            value = self._bare(match[0], member[0], start)
        self._at = match.end()
        self._skip()
        if value is None and (listed or comparator not in ("=", "!=")):
            self._refuse("null stands alone after = or !=", start)
        if comparator == ":" and value == Wild("", True, True) and not listed:
            return None
        if isinstance(value, Wild) and comparator not in ("=", "!="):
            self._refuse(f"* stands for any text after = and != only: after {comparator} write \\* in quotes", start)
        if isinstance(value, bool) and comparator not in ("=", "!=", ":"):
            self._refuse(f"{str(value).lower()} has no order: compare it with = or !=", start)
        if member[0] == "sequence" and value is not None and not isinstance(value, float):
            self._refuse("sequence is a number: compare it with one", start)
        return value

    def _bare(self, word: str, member: str, start: int) -> Value | None:
        """An unquoted value; null is None."""
        if word == "null":
            return None
        if member not in ("key", "source_uri"):
            if word in ("true", "false"):
                return word == "true"
            if _NUMBER.fullmatch(word):
                number = float(word) + 0.0
                if math.isinf(number):
                    self._refuse(f"the number {word[:40]} is beyond 1.8e308: send a smaller one", start)
                return number
        return self._string([None if piece == "*" else piece for piece in re.findall(r"\*|[^*]+", word)], start)

    def _string(self, pieces: list[str | None], start: int) -> str | Wild:
        """A string of pieces, None for each *."""
        starts = len(pieces) > 0 and pieces[0] is None
        ends = len(pieces) > 0 and pieces[-1] is None
        inside = pieces[starts : len(pieces) - ends]
        text = "".join(piece for piece in inside if piece is not None)
        if None in inside:
            self._refuse("* stands for any text at a value's start or end only: within write \\* in quotes", start)
        if starts or ends:
            return Wild(text, starts or not text, ends or not text)
        return text

    def _pieces(self, match: re.Match[str]) -> list[str | None]:
        """What a quoted string holds: texts, and None for each * without a backslash."""
        place = 1 if match[1] is not None else 2
        pieces: list[str | None] = []
        for piece in _PIECE.finditer(match[place]):
            if piece[1] is not None and piece[1] not in "\\\"'*":
                self._refuse(
                    "a backslash stands before \" ' * or \\ only: write \\\\ for itself",
                    match.start(place) + piece.start(),
                )
            pieces.append(None if piece[2] else piece[1] or piece[0])
        return pieces

    def _count(self) -> None:
        self._terms += 1
        if self._terms > MAX_TERMS:
            self._refuse(f"the filter has more than {MAX_TERMS} values: split the query")

    def _took(self, token: str) -> bool:
        """Step over a keyword or sign, if it is next."""
        if token in _KEYWORDS:
            match = _NAME.match(self._text, self._at)
            found = match is not None and match[0] == token
        else:
            found = self._text.startswith(token, self._at)
        if found:
            self._advance(len(token))
        return found

    def _advance(self, count: int) -> None:
        self._at += count
        self._skip()

    def _skip(self) -> None:
        match = _SPACE.match(self._text, self._at)
        assert match is not None
        self._at = match.end()

    def _expected(self, expected: str) -> NoReturn:
        match = _FOUND.match(self._text, self._at)
        if match is None:
            self._refuse(f"found the end, expected {expected}")
        if match[0] in "\"'":
            quoted = _QUOTED.match(self._text, self._at)
            if quoted is None:
                self._refuse(f"found a {match[0]} that nothing closes, expected another {match[0]}")
            match = quoted
        self._refuse(f"found {match[0][:40]!r}, expected {expected}")

    def _refuse(self, what: str, at: int | None = None) -> NoReturn:
        character = (self._at if at is None else at) + 1
        raise InvalidArgumentError(
            f"filter, character {character}: {what}", "BAD_FILTER", "filter", character=character
        )


def _joined(kind: type[And] | type[Or], nodes: list[Node]) -> Node:
    """One node of several; nodes of its own kind are taken apart."""
    if len(nodes) == 1:
        return nodes[0]
    flat: list[Node] = []
    for node in nodes:
        flat += node.nodes if isinstance(node, kind) else [node]
    return kind(tuple(flat))


def _complement(node: Node) -> Node:
    return node.node if isinstance(node, Not) else Not(node)


# --- printing ---------------------------------------------------------------------------------------------------

_PLAIN = re.compile(r"[A-Za-z_][A-Za-z0-9_]*")


def _text(node: Node) -> str:
    """The node as a filter that parses to itself."""
    if isinstance(node, Restriction):
        names = [name if _PLAIN.fullmatch(name) and name not in _KEYWORDS else _quoted(name) for name in node.member]
        values = [_value_text(value) for value in node.values] or ["*"]
        shown = values[0] if len(values) == 1 else f"({' OR '.join(values)})"
        space = "" if node.comparator == ":" else " "
        return f"{'.'.join(names)}{space}{node.comparator}{space}{shown}"
    if isinstance(node, Not):
        return f"NOT {_enclosed(node.node, And, Or)}"
    if isinstance(node, And):
        return " AND ".join([_text(each) for each in node.nodes])
    return " OR ".join([_enclosed(each, And) for each in node.nodes])


def _enclosed(node: Node, *kinds: type[And] | type[Or]) -> str:
    return f"({_text(node)})" if isinstance(node, kinds) else _text(node)


def _value_text(value: Value) -> str:
    if isinstance(value, Wild):
        if not value.text:
            return '"*"'
        return f'"{"*" * value.start}{_escaped(value.text)}{"*" * value.end}"'
    if isinstance(value, str):
        return f'"{_escaped(value)}"'
    if isinstance(value, bool):
        return str(value).lower()
    return repr(value).removesuffix(".0")


def _escaped(text: str) -> str:
    return re.sub(r'["\\*]', r"\\\g<0>", text)


def _quoted(name: str) -> str:
    return f'"{_escaped(name)}"'


# --- evaluation -------------------------------------------------------------------------------------------------

_KINDS: dict[type, str] = {float: "number", bool: "bool", str: "string", Wild: "string"}
_LISTS = ("numbers", "strings", "bools")
_ORDERS: dict[str, Callable[..., Any]] = {
    "<": pc.less,
    "<=": pc.less_equal,
    ">": pc.greater,
    ">=": pc.greater_equal,
}


def _paths(node: Node) -> Iterator[Path]:
    """Paths inside the payload that the filter reads."""
    if isinstance(node, Restriction):
        if node.member[0] == "payload":
            yield node.member[1:]
            yield from (path[1:] for path in _keys(node))
    else:
        for each in (node.node,) if isinstance(node, Not) else node.nodes:
            yield from _paths(each)


def _keys(restriction: Restriction) -> list[Path]:
    """The members that `field:key` asks for, should the field be an object."""
    if restriction.comparator != ":" or restriction.member[0] != "payload":
        return []
    return [(*restriction.member, value) for value in restriction.values if isinstance(value, str)]


class _Evaluation:
    """A filter's nodes on the columns of rows, all of which are known."""

    def __init__(self, rows: Attributes, fields: Fields) -> None:
        self._rows = rows
        self._fields = fields
        self._count = rows.columns.num_rows

    def mask(self, node: Node) -> Mask:
        """bool [N]: the rows that the node holds for."""
        if isinstance(node, Restriction):
            return self._restriction(node)
        if isinstance(node, Not):
            return ~self.mask(node.node)
        combine = np.logical_and if isinstance(node, And) else np.logical_or
        mask = self.mask(node.nodes[0])
        for each in node.nodes[1:]:
            mask = combine(mask, self.mask(each))
        return mask

    def _restriction(self, restriction: Restriction) -> Mask:
        member, comparator, values = restriction.member, restriction.comparator, restriction.values
        columns = self._columns(member)
        if not values:
            if member == ("source_uri",):
                return _bools(pc.not_equal(self._rows.source_uri, ""))
            return self._there(columns)
        mask = np.zeros(self._count, np.bool_)
        for kind, column in columns.items():
            if kind in _LISTS and comparator != ":":
                continue
            wanted = [value for value in values if _KINDS[type(value)] == kind.removesuffix("s")]
            if wanted:
                mask |= _matches(column, comparator, wanted)
        for key in _keys(restriction):
            mask |= self._there(self._columns(key))
        return self._there(columns) & ~mask if comparator == "!=" else mask

    def _columns(self, member: Path) -> dict[str, Any]:
        """Kind → column."""
        if member[0] == "payload":
            return self._fields.columns(member[1:])
        column = getattr(self._rows, member[0])
        return {"number": column.cast(pa.float64(), safe=False)} if member[0] == "sequence" else {"string": column}

    def _there(self, columns: dict[str, Any]) -> Mask:
        """Where any of the columns has a value."""
        if "rows" in columns:
            return np.ones(self._count, np.bool_)
        mask = np.zeros(self._count, np.bool_)
        for column in columns.values():
            mask |= _bools(column.is_valid())
        return mask


def _matches(column: Any, comparator: str, values: Sequence[Value]) -> Mask:
    """bool [N]: where a column has one of the values, or an element that is; all are of its kind."""
    if pa.types.is_list(column.type):
        lists = _one_chunk(column)
        mask = np.zeros(len(lists), np.bool_)
        mask[pc.list_parent_indices(lists).to_numpy()[_matches(lists.flatten(), comparator, values)]] = True
        return mask
    if pa.types.is_dictionary(column.type):
        coded = _one_chunk(column)
        found = np.append(_matches(coded.dictionary, comparator, values), False)
        mapped: Mask = np.take(found, coded.indices.fill_null(len(coded.dictionary)).to_numpy())
        return mapped
    if comparator in _ORDERS:
        return _bools(_ORDERS[comparator](column, pa.scalar(values[0], column.type)))
    plain = [value for value in values if not isinstance(value, Wild)]
    masks = [_wild(column, value) for value in values if isinstance(value, Wild)]
    if len(plain) == 1:
        masks.append(_bools(pc.equal(column, pa.scalar(plain[0], column.type))))
    elif plain:
        masks.append(_bools(pc.is_in(column, value_set=pa.array(plain, column.type))))
    mask = masks[0]
    for each in masks[1:]:
        mask |= each
    return mask


def _wild(column: Any, value: Wild) -> Mask:
    if value.start and value.end:
        return _bools(pc.match_substring(column, value.text))
    return _bools((pc.ends_with if value.start else pc.starts_with)(column, value.text))


def _bools(result: Any) -> Mask:
    """Null is false."""
    mask: Mask = result.fill_null(False).to_numpy(zero_copy_only=False)
    return mask


def _one_chunk(column: Any) -> Any:
    if isinstance(column, pa.ChunkedArray):
        return column.chunk(0) if column.num_chunks == 1 else column.unify_dictionaries().combine_chunks()
    return column


def payload_path(field: str) -> tuple[str, ...] | None:
    """A payload field, named as in filters, as a path; None where it is none."""
    try:
        root = Filter.parse(f"{field}:*").root
    except InvalidArgumentError:
        return None
    if not isinstance(root, Restriction) or root.values or root.member[0] != "payload" or len(root.member) < 2:
        return None
    return root.member[1:]
