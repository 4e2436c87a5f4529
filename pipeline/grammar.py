"""Grammars of code, and what they let a decoder write: a finite automaton over token ids.

A grammar file holds rules, the first of which is the whole code:

    # a comment
    list = "[" (item ("," item)*)? "]" ;     literals, rules, grouping, ? * + (any order of lines)
    item = "a" | "b"{2,4} | "c"{3} | "d"{2,} ;                    alternatives, counted repetition
    @skeleton
    colour = "red" | "green" ;     literals that count as one word where skeletons are compared

Literals know \\n \\t \\" and \\\\. They are the code's exact text, white space included; only for a
tokenizer of whole words, which drops it, white space merely parts words. A rule may not contain
itself: the language is regular, so that it becomes one table, read once a token.

Tensor names carry their shape: S states, V vocabulary, A symbols of an alphabet, R rows.
"""

import difflib
import functools
import importlib.resources
import json
import re
from collections.abc import Callable, Hashable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple, TypeAlias, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from tokenizers import Tokenizer
from torch import Tensor

from shards import tokens
from shards.format import EOS, SPECIAL_TOKENS
from shards.storage import UserError

BUILT_IN = ("web",)
"""The grammars that come with this package; any other name is a file."""

BARRED = 2**15 - 1
"""In `Mask.least_SV`: more tokens than any code has."""

_MAX_STATES = 50_000
_NEVER = 2**31

_Item = TypeVar("_Item", bound=Hashable)


class Mask(NamedTuple):
    """What a grammar lets a decoder write. State 0 is that of an empty code."""

    least_SV: Tensor
    """int16: the fewest tokens that must still follow token v before `<eos>`; -1 for `<eos>` where
    the code may end; `BARRED` for what the grammar does not take"""
    next_SV: Tensor
    """int32: the state after token v; 0 after `<eos>` and what is barred"""

    def to(self, device: torch.device) -> "Mask":
        """The same on another device."""
        return Mask(self.least_SV.to(device), self.next_SV.to(device))

    def barred(self, state_R: Tensor, num_left: int) -> Tensor:
        """RxV, True for what may not be written next, if `num_left` tokens at most may follow."""
        # Below `BARRED`, which stays barred; anything above it would wrap around in int16.
        return self.least_SV[state_R] > min(num_left, BARRED - 1)


@dataclass(frozen=True)
class Literal:
    text: str
    line: int


@dataclass(frozen=True)
class Name:
    """A rule, by its name."""

    text: str
    line: int


@dataclass(frozen=True)
class Series:
    parts: tuple["Expression", ...]


@dataclass(frozen=True)
class Choice:
    parts: tuple["Expression", ...]


@dataclass(frozen=True)
class Repeat:
    part: "Expression"
    least: int
    most: int | None


Expression: TypeAlias = Literal | Name | Series | Choice | Repeat


@dataclass(frozen=True)
class Grammar:
    """A parsed grammar: checked, and without recursion."""

    where: str
    """the file, for messages"""
    rules: dict[str, Expression]
    """the first is the whole code"""
    classes: dict[str, str]
    """of every literal in a rule marked `@skeleton`, the rule's name"""
    text: str
    """the file's"""

    @classmethod
    def open(cls, name: str) -> "Grammar":
        """A grammar that comes with the package, or that of a file.

        Raises:
            UserError: no such file, or an error in it, with its line.
        """
        if name in BUILT_IN:
            folder = importlib.resources.files("pipeline") / "grammars"
            return cls.parse((folder / f"{name}.ebnf").read_text(encoding="utf-8"), name)
        try:
            text = Path(name).read_text(encoding="utf-8-sig")  # Windows begins files with a mark
        except OSError as error:
            raise UserError(
                f"{name}: cannot read the grammar ({error.strerror}); name a file, or one of "
                f"{', '.join(BUILT_IN)}"
            ) from error
        except UnicodeDecodeError as error:
            raise UserError(f"{name}: not a grammar: no UTF-8") from error
        return cls.parse(text, name)

    @classmethod
    def parse(cls, text: str, where: str) -> "Grammar":
        """The grammar of a file's text. Raises `UserError` naming `where` and the line."""
        try:
            return _Parser(text, where).grammar()
        except RecursionError as error:
            raise _too_deep(where) from error

    def skeleton(self, code: str) -> list[str]:
        """The words of `code`, those of a `@skeleton` rule as its name."""
        return [self.classes.get(word, word) for word in tokens.words(code)]

    def check_size(self, num_states: int) -> None:
        """Raises `UserError` when it takes too many states."""
        if num_states > _MAX_STATES:
            raise UserError(
                f"{self.where}: needs more than {_MAX_STATES} states; count less in {{m,n}}"
            )

    def literals(self) -> Iterator[Literal]:
        """All of them, in the file's order."""
        for expression in self.rules.values():
            yield from (part for part in _walk(expression) if isinstance(part, Literal))


class TokenGrammar:
    """A grammar in the ids of one tokenizer."""

    def __init__(self, grammar: Grammar, tokenizer: Tokenizer, max_tokens: int) -> None:
        """
        Raises:
            UserError: the tokenizer cannot write one of the grammar's literals; or no code of the
                grammar fits into `max_tokens` tokens.
        """
        self.grammar = grammar
        self.tokenizer = tokenizer
        try:
            next_SV, accepting_S = _minimise(*_over_tokens(grammar, tokenizer))
        except RecursionError as error:
            raise _too_deep(grammar.where) from error
        distance_S = _distances(next_SV, accepting_S)
        if distance_S[0] > max_tokens:
            raise UserError(
                f"{grammar.where}: its shortest code has {distance_S[0]} tokens, and "
                f"model.max_tokens = {max_tokens} would cut it short; raise it"
            )
        least_SV = np.where(next_SV >= 0, np.minimum(distance_S, BARRED)[next_SV], BARRED)
        least_SV[:, EOS] = np.where(accepting_S, -1, BARRED)
        self.mask = Mask(
            torch.from_numpy(least_SV.astype(np.int16)),
            torch.from_numpy(next_SV.clip(0).astype(np.int32)),
        )
        self._next_SV, self._accepting_S = next_SV, accepting_S

    def accepts(self, ids: Iterable[int]) -> bool:
        """Whether a code, without `<bos>` and `<eos>`, is one of the grammar's."""
        state = 0
        for token in ids:
            state = int(self._next_SV[state, token])
            if state < 0:
                return False
        return bool(self._accepting_S[state])

    def skeleton(self, ids: Sequence[int]) -> list[str]:
        """`Grammar.skeleton` of the ids' text."""
        return self.grammar.skeleton(tokens.decode(self.tokenizer, ids))


# --- from text to rules ---------------------------------------------------------------------------

_LEXEME = re.compile(
    r"""(?P<blank>[ \t\r\n]+|\#[^\n]*)
      | (?P<name>[A-Za-z_][\w-]*)
      | (?P<literal>"(?:[^"\\\n]|\\.)*")
      | (?P<count>\{\s*\d{1,6}\s*(?:,\s*\d{0,6}\s*)?\})
      | (?P<mark>@\w+)
      | (?P<sign>[=|;()?*+])""",
    re.VERBOSE,
)
_ESCAPES = {r"\n": "\n", r"\t": "\t", r"\"": '"', r"\\": "\\"}


class _Lexeme(NamedTuple):
    kind: str
    text: str
    line: int


def _too_deep(where: str) -> UserError:
    return UserError(f"{where}: parentheses, repetitions or rules lie too deep in each other")


class _Parser:
    """Recursive descent, one lexeme ahead."""

    def __init__(self, text: str, where: str) -> None:
        self.where = where
        self.text = text
        self.lexemes = list(self._lex(text))
        self.at = 0

    def grammar(self) -> Grammar:
        rules: dict[str, Expression] = {}
        marked: list[_Lexeme] = []
        while self._next().kind != "end":
            if self._next().kind == "mark":
                mark = self._take()
                if mark.text != "@skeleton":
                    raise self._error(mark, f"unknown mark {mark.text}; there is @skeleton")
                marked.append(self._next())
            name = self._take()
            if name.kind != "name":
                raise self._error(name, f"a rule's name is missing before {name.text}")
            if name.text in rules:
                raise self._error(name, f"a second rule {name.text}; join the two with |")
            self._expect("=", f"after {name.text}")
            rules[name.text] = self._choice()
            self._expect(";", f"at the end of rule {name.text}")
        if not rules:
            raise UserError(f"{self.where}: no rule in it")
        self._check_names(rules)
        self._check_recursion(rules)
        return Grammar(self.where, rules, self._classes(rules, marked), self.text)

    def _lex(self, text: str) -> Iterator[_Lexeme]:
        at, line = 0, 1
        while at < len(text):
            found = _LEXEME.match(text, at)
            if found is None:
                rest = text[at : at + 40].partition("\n")[0]
                unended = "a literal without its closing quote: " if rest[0] == '"' else ""
                raise UserError(f"{self.where}, line {line}: {unended}cannot read {rest!r}")
            if found.lastgroup != "blank":
                yield _Lexeme(str(found.lastgroup), found[0], line)
            line += found[0].count("\n")
            at = found.end()
        yield _Lexeme("end", "the end of the file", line)

    def _next(self) -> _Lexeme:
        return self.lexemes[self.at]

    def _take(self) -> _Lexeme:
        self.at += 1
        return self.lexemes[self.at - 1]

    def _expect(self, sign: str, place: str) -> None:
        found = self._next()
        if found.text != sign or found.kind != "sign":
            raise self._error(found, f"{sign} is missing {place}, before {found.text}")
        self._take()

    def _choice(self) -> Expression:
        parts = [self._series()]
        while self._next().text == "|":
            self._take()
            parts.append(self._series())
        return parts[0] if len(parts) == 1 else Choice(tuple(parts))

    def _series(self) -> Expression:
        parts = []
        while self._next().kind in ("name", "literal") or self._next().text == "(":
            parts.append(self._repeat())
        if not parts:
            found = self._next()
            raise self._error(found, f'nothing before {found.text}; write "" for nothing')
        return parts[0] if len(parts) == 1 else Series(tuple(parts))

    def _repeat(self) -> Expression:
        found = self._take()
        part: Expression
        if found.kind == "name":
            part = Name(found.text, found.line)
        elif found.kind == "literal":
            part = Literal(self._unescaped(found), found.line)
        else:
            part = self._choice()
            self._expect(")", f"for the ( of line {found.line}")
        while self._next().text in ("?", "*", "+") or self._next().kind == "count":
            sign = self._take()
            if sign.kind == "count":
                least, comma, most = sign.text.strip("{} ").partition(",")
                bounds = int(least), (int(most) if most.strip() else None) if comma else int(least)
                if bounds[1] is not None and bounds[1] < max(bounds[0], 1):
                    raise self._error(sign, f"{sign.text} allows no repetition")
            else:
                bounds = {"?": (0, 1), "*": (0, None), "+": (1, None)}[sign.text]
            part = Repeat(part, *bounds)
        return part

    def _unescaped(self, literal: _Lexeme) -> str:
        def meant(found: re.Match[str]) -> str:
            if found[0] not in _ESCAPES:
                raise self._error(literal, rf"{found[0]} in {literal.text}: write \n \t \" or \\")
            return _ESCAPES[found[0]]

        return re.sub(r"\\.", meant, literal.text[1:-1])

    def _error(self, lexeme: _Lexeme | Literal | Name, message: str) -> UserError:
        return UserError(f"{self.where}, line {lexeme.line}: {message}")

    def _check_names(self, rules: dict[str, Expression]) -> None:
        for name in _names(*rules.values()):
            if name.text not in rules:
                close = difflib.get_close_matches(name.text, rules, n=1)
                hint = f"; did you mean {close[0]}?" if close else ""
                raise self._error(name, f"no rule is called {name.text}{hint}")

    def _check_recursion(self, rules: dict[str, Expression]) -> None:
        finished: set[str] = set()

        def visit(rule: str, above: tuple[str, ...]) -> None:
            for name in _names(rules[rule]):
                if name.text in (*above, rule):
                    chain = (*above, rule, name.text)
                    circle = " -> ".join(chain[chain.index(name.text) :])
                    raise self._error(
                        name,
                        f"rule {name.text} contains itself ({circle}), which is not regular; "
                        "write repetition as (...)*",
                    )
                if name.text not in finished:
                    visit(name.text, (*above, rule))
            finished.add(rule)

        for rule in rules:
            visit(rule, ())

    def _classes(self, rules: dict[str, Expression], marked: list[_Lexeme]) -> dict[str, str]:
        classes: dict[str, str] = {}
        for name in marked:
            rule = rules[name.text]
            for part in rule.parts if isinstance(rule, Choice) else (rule,):
                if not isinstance(part, Literal) or tokens.words(part.text) != [part.text]:
                    raise self._error(
                        name, f"@skeleton rule {name.text} must be a choice of one-word literals"
                    )
                if part.text in classes:
                    raise self._error(part, f'"{part.text}" is in two @skeleton rules')
                classes[part.text] = name.text
        return classes


def _walk(expression: Expression) -> Iterator[Expression]:
    yield expression
    if isinstance(expression, Series | Choice):
        for part in expression.parts:
            yield from _walk(part)
    elif isinstance(expression, Repeat):
        yield from _walk(expression.part)


def _names(*expressions: Expression) -> Iterator[Name]:
    for expression in expressions:
        yield from (part for part in _walk(expression) if isinstance(part, Name))


# --- from rules to an automaton -------------------------------------------------------------------


class _Automaton(NamedTuple):
    """Deterministic; state 0 begins, -1 is no state."""

    next_SA: NDArray[np.int64]
    accepting_S: NDArray[np.bool_]


class _Compiler:
    """Thompson's construction: states with free moves and with moves on a symbol."""

    def __init__(self, grammar: Grammar, symbols_of: Callable[[str], Sequence[int]]) -> None:
        self.grammar = grammar
        self.symbols_of = symbols_of
        self.free: list[list[int]] = []
        self.moves: list[tuple[int, int] | None] = []

    def automaton(self) -> tuple[_Automaton, list[int]]:
        """The smallest one over symbols, and which symbol each column is."""
        begin, end = self._state(), self._state()
        self._build(next(iter(self.grammar.rules.values())), begin, end)
        columns = sorted({move[0] for move in self.moves if move is not None})
        column_of = {symbol: column for column, symbol in enumerate(columns)}

        def moves(states: frozenset[int]) -> dict[int, frozenset[int]]:
            after: dict[int, set[int]] = {}
            for state in states:
                move = self.moves[state]
                if move is not None:
                    after.setdefault(column_of[move[0]], set()).add(move[1])
            return {column: self._closed(targets) for column, targets in after.items()}

        found = _determinise(
            self._closed({begin}),
            moves,
            lambda states: end in states,
            len(columns),
            self.grammar.check_size,
        )
        return _minimise(*found), columns

    def _state(self) -> int:
        self.grammar.check_size(len(self.free))
        self.free.append([])
        self.moves.append(None)
        return len(self.free) - 1

    def _build(self, expression: Expression, begin: int, end: int) -> None:
        match expression:
            case Literal(text):
                for symbol in self.symbols_of(text):
                    after = self._state()
                    here = self._state()
                    self.free[begin].append(here)
                    self.moves[here] = (symbol, after)
                    begin = after
                self.free[begin].append(end)
            case Name(text):
                self._build(self.grammar.rules[text], begin, end)
            case Series(parts):
                for part in parts:
                    after = self._state()
                    self._build(part, begin, after)
                    begin = after
                self.free[begin].append(end)
            case Choice(parts):
                for part in parts:
                    here, after = self._state(), self._state()
                    self.free[begin].append(here)
                    self._build(part, here, after)
                    self.free[after].append(end)
            case Repeat(part, least, most):
                for _ in range(least):
                    after = self._state()
                    self._build(part, begin, after)
                    begin = after
                if most is None:
                    here, after = self._state(), self._state()
                    self.free[begin].append(here)
                    self._build(part, here, after)
                    self.free[after].append(here)
                    self.free[here].append(end)
                for _ in range(0 if most is None else most - least):
                    self.free[begin].append(end)
                    after = self._state()
                    self._build(part, begin, after)
                    begin = after
                self.free[begin].append(end)

    def _closed(self, states: Iterable[int]) -> frozenset[int]:
        closed, waiting = set(states), list(states)
        while waiting:
            for state in self.free[waiting.pop()]:
                if state not in closed:
                    closed.add(state)
                    waiting.append(state)
        return frozenset(closed)


def _determinise(
    start: frozenset[_Item],
    moves: Callable[[frozenset[_Item]], dict[int, frozenset[_Item]]],
    ends: Callable[[frozenset[_Item]], bool],
    num_columns: int,
    check: Callable[[int], None],
) -> _Automaton:
    """The subset construction: a state for every set of states that symbols lead to."""
    number = {start: 0}
    waiting = [start]
    rows: list[dict[int, int]] = []
    for states in waiting:  # grows while it is gone through
        row = {}
        for column, after in moves(states).items():
            if after not in number:
                number[after] = len(number)
                waiting.append(after)
                check(len(number))
            row[column] = number[after]
        rows.append(row)
    next_SA = np.full((len(rows), num_columns), -1)
    for state, row in enumerate(rows):
        next_SA[state, list(row)] = list(row.values())
    return _Automaton(next_SA, np.array([ends(states) for states in waiting]))


def _minimise(next_SA: NDArray[np.int64], accepting_S: NDArray[np.bool_]) -> _Automaton:
    """The smallest automaton of the same language: Moore's refinement; nothing in it is useless."""
    distance_S = _distances(next_SA, accepting_S)
    next_SA = np.where((next_SA >= 0) & (distance_S[next_SA] < _NEVER), next_SA, -1)
    # States of one class are equally far from the end: this splits long chains at once.
    class_S = np.unique(distance_S, return_inverse=True)[1].ravel()
    num_classes = 0
    while num_classes < class_S.max() + 1:
        num_classes = int(class_S.max()) + 1
        after_SA = np.where(next_SA >= 0, class_S[next_SA], -1)
        row_SA = np.column_stack([class_S, after_SA])
        class_S = np.unique(row_SA, axis=0, return_inverse=True)[1].ravel()
    _, member_C = np.unique(class_S, return_index=True)
    after_CA = np.where(next_SA >= 0, class_S[next_SA], -1)[member_C]
    # Numbered as they are met from the start, which leaves out what cannot be reached.
    met = {int(class_S[0]): 0}
    waiting = list(met)
    for state in waiting:
        for after in after_CA[state].tolist():
            if after >= 0 and after not in met:
                met[after] = len(met)
                waiting.append(after)
    number_C = np.full(len(member_C) + 1, -1)  # the last is for -1
    number_C[waiting] = np.arange(len(waiting))
    return _Automaton(number_C[after_CA[waiting]], accepting_S[member_C][waiting])


def _distances(next_SA: NDArray[np.int64], accepting_S: NDArray[np.bool_]) -> NDArray[np.int64]:
    """The fewest moves from every state to one where the code may end, or `_NEVER`."""
    state, column = (next_SA >= 0).nonzero()
    edge_E2 = np.unique(np.column_stack([state, next_SA[state, column]]), axis=0)
    before: dict[int, list[int]] = {}
    for source, target in edge_E2.tolist():
        before.setdefault(target, []).append(source)
    distance_S = np.where(accepting_S, 0, _NEVER)
    front = accepting_S.nonzero()[0].tolist()
    for target in front:
        for source in before.get(target, ()):
            if distance_S[source] == _NEVER:
                distance_S[source] = distance_S[target] + 1
                front.append(source)
    return distance_S


# --- from symbols to tokens -----------------------------------------------------------------------


def _over_tokens(grammar: Grammar, tokenizer: Tokenizer) -> _Automaton:
    """The grammar's automaton over token ids. Special tokens are in no code."""
    body = json.loads(tokenizer.to_str())
    vocab_size = tokenizer.get_vocab_size()
    ids = range(len(SPECIAL_TOKENS), vocab_size)
    text_of = {at: tokenizer.id_to_token(at) or "" for at in ids}
    decoder = (body["decoder"] or {}).get("type")
    splits = json.dumps(body["pre_tokenizer"], sort_keys=True)
    if decoder == "ByteLevel":
        symbols_of = {at: [_BYTES[char] for char in text] for at, text in text_of.items()}
        return _over_pieces(grammar, lambda text: list(text.encode()), symbols_of, vocab_size)
    if body["model"]["type"] == "WordLevel" and decoder == "Fuse":
        symbols_of = {at: _code_points(text) for at, text in text_of.items()}
        return _over_pieces(grammar, _code_points, symbols_of, vocab_size)
    if body["model"]["type"] == "WordLevel" and json.dumps(tokens.WORD_PATTERN) in splits:
        return _Words(grammar, text_of, vocab_size).automaton()
    raise UserError(
        f"{grammar.where}: a grammar needs a tokenizer as `pack --tokenizer word|char|bpe` trains"
    )


def _code_points(text: str) -> list[int]:
    return [ord(char) for char in text]


def _byte_letters() -> dict[str, int]:
    """What byte-level tokenizers write for each byte: itself, if it can be seen, else a letter
    from 256 on."""
    seen = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    unseen = [byte for byte in range(256) if byte not in seen]
    return {chr(byte): byte for byte in seen} | {chr(256 + at): b for at, b in enumerate(unseen)}


_BYTES = _byte_letters()


def _walk_all(
    next_SA: NDArray[np.int64], columns: list[int], symbols: Sequence[int]
) -> NDArray[np.int64]:
    """Where `symbols` lead from every state; -1 is nowhere."""
    column_of = {symbol: column for column, symbol in enumerate(columns)}
    place_S = np.arange(len(next_SA))
    for symbol in symbols:
        if symbol not in column_of:
            return np.full(len(next_SA), -1)
        place_S = np.where(place_S >= 0, next_SA[place_S, column_of[symbol]], -1)
    return place_S


def _over_pieces(
    grammar: Grammar,
    spell: Callable[[str], list[int]],
    symbols_of: dict[int, list[int]],
    vocab_size: int,
) -> _Automaton:
    """For tokens that, put together, are the text."""
    single = {symbols[0] for symbols in symbols_of.values() if len(symbols) == 1}
    for literal in grammar.literals():
        for char in literal.text:
            if not single.issuperset(spell(char)):
                raise _unwritable(grammar, literal, f"the tokenizer has no token for {char!r}")
    (next_SA, accepting_S), columns = _Compiler(grammar, spell).automaton()
    next_SV = np.full((len(next_SA), vocab_size), -1)
    for at, symbols in symbols_of.items():
        if symbols:
            next_SV[:, at] = _walk_all(next_SA, columns, symbols)
    return _Automaton(next_SV, accepting_S)


def _unwritable(grammar: Grammar, literal: Literal, why: str) -> UserError:
    return UserError(
        f"{grammar.where}, line {literal.line}: {json.dumps(literal.text)} cannot be written: "
        f"{why}; pack with a vocabulary that has it, or take it out of the grammar"
    )


class _Words:
    """For tokens that are whole words: `tokens.words` of a code is what it is written as.

    A state of the automaton is a set of (state over characters, what may not follow at once): a
    word ends only where the next character could not belong to it.
    """

    def __init__(self, grammar: Grammar, text_of: dict[int, str], vocab_size: int) -> None:
        self.grammar = grammar
        self.vocab_size = vocab_size
        (self.next_SA, self.accepting_S), columns = _Compiler(grammar, _code_points).automaton()
        self.chars = [chr(symbol) for symbol in columns]
        self.blanks = [at for at, char in enumerate(self.chars) if not tokens.words(char)]
        self.id_of = {text: at for at, text in text_of.items()}
        self.prefixes = {text[:end] for text in self.id_of for end in range(1, len(text) + 1)}
        self.distance_S = _distances(self.next_SA, self.accepting_S)
        self.known: dict[tuple[int, str], list[tuple[int, tuple[int, str]]]] = {}

    def automaton(self) -> _Automaton:
        """Raises `UserError` when a word of the grammar is not in the vocabulary."""

        def moves(places: frozenset[tuple[int, str]]) -> dict[int, frozenset[tuple[int, str]]]:
            after: dict[int, set[tuple[int, str]]] = {}
            for place in places:
                for token, target in self._words_at(*place):
                    after.setdefault(token, set()).add(target)
            return {token: frozenset(targets) for token, targets in after.items()}

        def ends(places: frozenset[tuple[int, str]]) -> bool:
            return any(
                self.accepting_S[end]
                for state, _ in places
                for end in (state, *self._after_blanks(state))
            )

        start = frozenset({(0, "")})
        return _determinise(start, moves, ends, self.vocab_size, self.grammar.check_size)

    def _words_at(self, state: int, before: str) -> list[tuple[int, tuple[int, str]]]:
        """Tokens that may come next, after a word of kind `before`, and where each leads."""
        if (state, before) in self.known:
            return self.known[state, before]
        found = []
        starts = [(state, before), *((after, "") for after in self._after_blanks(state))]
        spelled = [
            (int(self.next_SA[at, column]), self.chars[column])
            for at, kind in starts
            for column in self._columns(at)
            if column not in self.blanks and not _continues(kind, self.chars[column])
        ]
        seen = set(spelled)
        for place, text in spelled:  # grows while it is gone through
            kind = _kind_of(text)
            if self._may_end(place, kind):
                if text not in self.id_of:
                    raise self._missing(text)
                found.append((self.id_of[text], (place, kind)))
            elif text not in self.prefixes:
                raise self._missing(self._completed(place, text))
            for column in self._columns(place):
                one = int(self.next_SA[place, column]), text + self.chars[column]
                if _continues(kind, self.chars[column]) and one not in seen:
                    seen.add(one)
                    spelled.append(one)
        self.known[state, before] = found
        return found

    def _columns(self, state: int) -> list[int]:
        columns: list[int] = (self.next_SA[state] >= 0).nonzero()[0].tolist()
        return columns

    def _after_blanks(self, state: int) -> list[int]:
        """The states that white space leads to, one character or more."""
        after: list[int] = []
        waiting = [state]
        for place in waiting:  # grows while it is gone through
            for column in self.blanks:
                target = int(self.next_SA[place, column])
                if target >= 0 and target not in after:
                    after.append(target)
                    waiting.append(target)
        return after

    def _may_end(self, state: int, kind: str) -> bool:
        columns = self._columns(state)
        return bool(self.accepting_S[state]) or any(
            not _continues(kind, self.chars[column]) for column in columns
        )

    def _completed(self, state: int, text: str) -> str:
        """The shortest word that begins like this, as far as it can be told."""
        while not self._may_end(state, _kind_of(text)):
            column = min(
                self._columns(state), key=lambda c: self.distance_S[self.next_SA[state, c]]
            )
            state, text = int(self.next_SA[state, column]), text + self.chars[column]
        return text

    def _missing(self, word: str) -> UserError:
        why = f"the tokenizer has no word {json.dumps(word)}"
        literals = list(self.grammar.literals())
        whole = [one for one in literals if word in tokens.words(one.text)]
        part = [one for one in literals if set(tokens.words(one.text)) & {*_parts(word)}]
        return _unwritable(self.grammar, (whole or part or literals)[0], why)


def _kind_of(word: str) -> str:
    """Of the beginning of a word, see `tokens.WORD_PATTERN`: what it may go on with."""
    if word[0] == "\\":
        return "command"
    return "word" if _is_one_word(word[0] + "a") else ""


def _continues(kind: str, char: str) -> bool:
    """Whether the character would be taken into a word of this kind that it follows."""
    return kind != "" and _is_one_word({"command": "\\", "word": "a"}[kind] + char)


@functools.cache
def _is_one_word(text: str) -> bool:
    """By the tokenizer itself: Python's letters, digits and white space are not quite its own."""
    return tokens.words(text) == [text]


def _parts(word: str) -> Iterator[str]:
    for begin in range(len(word)):
        for end in range(begin + 1, len(word) + 1):
            yield word[begin:end]
