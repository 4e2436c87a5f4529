"""Grammars of code: their files, and the automaton against Python's `re`."""

import itertools
import os
import random
import re
from collections import Counter
from pathlib import Path

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer

from pipeline.grammar import BARRED, Grammar, TokenGrammar
from shards import synth, tokens
from shards.format import EOS
from shards.storage import UserError

PROGRAMS = Path(__file__).parents[2].parent / "shared" / "data" / "pix2code-web" / "train"

CARD = r"small-title, text, btn-(?:green|orange|red)\n\}\n"
SCREEN = re.compile(
    r"header \{\n(?:btn-inactive, )*btn-active(?:, btn-inactive)*\n\}\n"
    rf"(?:row \{{\n(?:single \{{\n{CARD}|(?:double \{{\n{CARD}){{2}}|"
    rf"(?:quadruple \{{\n{CARD}){{4}})\}}\n)+"
)


def trained(kind: str, texts: list[str]) -> Tokenizer:
    """A tokenizer that has seen `texts`; byte pairs are few enough to be ambiguous."""
    if kind == "word":
        made = tokens.train_word_tokenizer(Counter(w for t in texts for w in tokens.words(t)), 1)
    elif kind == "char":
        made = tokens.train_char_tokenizer(Counter(char for text in texts for char in text))
    else:
        made = tokens.train_bpe_tokenizer(texts, 1, 300)
    return tokens.load_tokenizer(made, kind)


def ids_of(tokenizer: Tokenizer, text: str) -> list[int]:
    return tokens.encode(tokenizer, text)[1:-1]


@pytest.fixture(scope="module")
def made_up(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """Programs of the built-in data set."""
    rng = random.Random(3)
    return [synth.draw_program(rng).to_gui() for _ in range(40)]


# --- files ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "g.ebnf: no rule in it"),
        ("# nothing\n\n", "g.ebnf: no rule in it"),
        (
            'a = "x"',
            "g.ebnf, line 1: ; is missing at the end of rule a, before the end of the file",
        ),
        ('a = "x" ;\nb "y" ;', 'g.ebnf, line 2: = is missing after b, before "y"'),
        ('a = "x ;\n', "g.ebnf, line 1: a literal without its closing quote"),
        ('\na = "x" $ ;', "g.ebnf, line 2: cannot read '$ ;'"),
        *(
            (f'a = {char}"x" ;\n', "g.ebnf, line 1: cannot read " + repr(f'{char}"x" ;'))
            for char in "\x0b\x0c\x1c\x1e\x85\u2028\u2029"
        ),
        ('a = "\\q" ;', "g.ebnf, line 1: \\q in"),
        ("a = ;", "g.ebnf, line 1: nothing before ;"),
        ('a = "x" | ;', "g.ebnf, line 1: nothing before ;"),
        ('a = ("x" ;', "g.ebnf, line 1: ) is missing for the ( of line 1, before ;"),
        ('a = "x"{3,2} ;', "g.ebnf, line 1: {3,2} allows no repetition"),
        ('a = "x"{0} ;', "g.ebnf, line 1: {0} allows no repetition"),
        ('a = "x" ;\na = "y" ;', "g.ebnf, line 2: a second rule a"),
        ('a =\n buton ;\nbutton = "x" ;', "g.ebnf, line 2: no rule is called buton; did you mean"),
        ('a = "x" a ;', "g.ebnf, line 1: rule a contains itself (a -> a), which is not regular"),
        ('a = b ;\nb = "(" c? ")" ;\nc = b ;', "line 3: rule b contains itself (b -> c -> b)"),
        ('@skelton a = "x" ;', "g.ebnf, line 1: unknown mark @skelton; there is @skeleton"),
        ('@skeleton\na = "x" "y" ;', "g.ebnf, line 2: @skeleton rule a must be a choice"),
        ('@skeleton\na = "x y" | "z" ;', "g.ebnf, line 2: @skeleton rule a must be a choice"),
        ('c = a b;@skeleton\na = "x";@skeleton b="x";', '"x" is in two @skeleton rules'),
        ('a = "x"{9999}{9999} ;', "g.ebnf: needs more than 50000 states"),
    ],
)
def test_an_error_in_a_file_names_its_line(text: str, message: str, tmp_path: Path) -> None:
    with pytest.raises(UserError) as error:
        TokenGrammar(Grammar.parse(text, "g.ebnf"), trained("char", ["x"]), 100_000)
    assert message in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("kind", ["parentheses", "repetitions", "rules"])
def test_what_lies_too_deep_in_each_other_is_refused(kind: str) -> None:
    tokenizer = trained("char", ["x"])

    def known(depth: int) -> TokenGrammar:
        rules = "".join(f"r{number} ;\nr{number} = " for number in range(depth))
        text = {
            "parentheses": f'a = {"(" * depth} "x" {")" * depth} ;',
            "repetitions": f'a = "x" {"? " * depth} ;',
            "rules": f'a = {rules} "x" ;',
        }[kind]
        return TokenGrammar(Grammar.parse(text, "g.ebnf"), tokenizer, 100)

    assert known(50).accepts(ids_of(tokenizer, "x"))
    with pytest.raises(UserError, match=r"^g\.ebnf: parentheses, repetitions or rules lie"):
        known(2000)


def test_a_file_that_is_not_there_is_one_line(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"nowhere\.ebnf: cannot read the grammar .*one of web"):
        Grammar.open("nowhere.ebnf")
    (tmp_path / "g.ebnf").write_bytes(b"\xff")
    with pytest.raises(UserError, match="not a grammar"):
        Grammar.open(str(tmp_path / "g.ebnf"))


def test_a_file_may_begin_with_a_byte_order_mark(tmp_path: Path) -> None:
    (tmp_path / "g.ebnf").write_text('a = "x" ;', encoding="utf-8-sig")
    assert list(Grammar.open(str(tmp_path / "g.ebnf")).rules) == ["a"]


# --- the automaton --------------------------------------------------------------------------------


def quoted(text: str) -> str:
    return '"' + text.replace("\n", "\\n") + '"'


def expressions(alphabet: str) -> st.SearchStrategy[tuple[str, str]]:
    """(grammar, regular expression) of the same language."""
    signs = ["?", "{1,2}", "{2}", "*", "+", "{1,}", "{0,2}"]

    def larger(inner: st.SearchStrategy[tuple[str, str]]) -> st.SearchStrategy[tuple[str, str]]:
        several = st.lists(inner, min_size=2, max_size=3)
        series = several.map(
            lambda some: (f"({' '.join(a for a, _ in some)})", f"(?:{''.join(b for _, b in some)})")
        )
        choices = several.map(
            lambda some: (
                f"({'|'.join(a for a, _ in some)})",
                f"(?:{'|'.join(b for _, b in some)})",
            )
        )
        repeats = st.tuples(inner, st.sampled_from(signs)).map(
            lambda pair: (f"({pair[0][0]}){pair[1]}", f"(?:{pair[0][1]}){pair[1]}")
        )
        return series | choices | repeats

    literals = st.text(alphabet, max_size=2)
    leaves = literals.map(lambda text: (quoted(text), f"(?:{re.escape(text)})"))
    return st.recursive(leaves, larger, max_leaves=6)


Texts = frozenset[str]


def finite_expressions(alphabet: str) -> st.SearchStrategy[tuple[str, Texts]]:
    """(grammar, all its texts)."""

    def twice(texts: Texts) -> Texts:
        return frozenset(a + b for a in texts for b in texts)

    def larger(inner: st.SearchStrategy[tuple[str, Texts]]) -> st.SearchStrategy[tuple[str, Texts]]:
        pairs = st.tuples(inner, inner)
        return (
            pairs.map(
                lambda p: (
                    f"{p[0][0]} {p[1][0]}",
                    frozenset(a + b for a in p[0][1] for b in p[1][1]),
                )
            )
            | pairs.map(lambda p: (f"({p[0][0]} | {p[1][0]})", p[0][1] | p[1][1]))
            | inner.map(lambda one: (f"({one[0]})?", one[1] | {""}))
            | inner.map(lambda one: (f"({one[0]}){{2}}", twice(one[1])))
            | inner.map(lambda one: (f"({one[0]}){{1,2}}", one[1] | twice(one[1])))
        )

    leaves = st.text(alphabet, max_size=2).map(lambda text: (quoted(text), frozenset({text})))
    return st.recursive(leaves, larger, max_leaves=4).filter(lambda pair: len(pair[1]) < 200)


@settings(max_examples=60, deadline=None)
@given(both=expressions("ab"), kind=st.sampled_from(["char", "bpe"]))
def test_an_automaton_accepts_what_a_regular_expression_does(
    both: tuple[str, str], kind: str
) -> None:
    tokenizer = trained(kind, ["ab", "ab", "aab"])
    known = TokenGrammar(Grammar.parse(f"a = {both[0]} ;", "g"), tokenizer, 10_000)
    for length in range(6):
        for letters in itertools.product("ab", repeat=length):
            text = "".join(letters)
            expected = re.fullmatch(both[1], text) is not None
            assert known.accepts(ids_of(tokenizer, text)) == expected, text


# To Python, a superscript belongs to a word, this sign of Devanagari to none, and the last
# character is white space; to the tokenizer, none of it is so.
@example(both=('"a\u00b2"', frozenset({"a\u00b2"})))
@example(both=('"a\u094da"', frozenset({"a\u094da"})))
@example(both=('"a\x1ca"', frozenset({"a\x1ca"})))
@settings(max_examples=100, deadline=None)
@given(both=finite_expressions("a- {\\\u00b2\u094d\x1c"))
def test_words_are_those_of_the_texts(both: tuple[str, Texts]) -> None:
    """White space parts words and is dropped: `a-a` is one word, `a -a` are three."""
    grammar, texts = both
    grammar = grammar.replace("\\", "\\\\")
    sequences = {tuple(tokens.words(text)) for text in texts}
    tokenizer = trained("word", [*texts, "a", "-", "{"])
    known = TokenGrammar(Grammar.parse(f"a = {grammar} ;", "g"), tokenizer, 1000)
    for sequence in sequences:
        assert known.accepts([tokenizer.token_to_id(word) for word in sequence])
    words = sorted(tokenizer.get_vocab(), key=tokenizer.token_to_id)[4:]
    for length in range(4):
        for sequence in itertools.islice(itertools.product(words, repeat=length), 300):
            ids = [tokenizer.token_to_id(word) for word in sequence]
            assert known.accepts(ids) == (sequence in sequences)


def test_an_automaton_has_no_state_too_many_and_knows_the_way_out() -> None:
    grammar = Grammar.parse('a = "x" ("a" "bb" | "c" "bb" | "d" "b")* ("" | "y") ;', "g")
    tokenizer = trained("char", ["xabcdy"])
    mask = TokenGrammar(grammar, tokenizer, 10).mask
    # Before x; before a, c, d, y or the end; before bb; before b; at the end.
    assert mask.least_SV.shape == (5, 4 + 6)
    start = int(mask.next_SV[0, tokenizer.token_to_id("x")])
    by_char = {char: int(mask.least_SV[start, tokenizer.token_to_id(char)]) for char in "xabcdy"}
    assert by_char == {"x": BARRED, "a": 2, "b": BARRED, "c": 2, "d": 1, "y": 0}
    assert mask.least_SV[start, :4].tolist() == [BARRED, BARRED, -1, BARRED]
    assert mask.least_SV[0, :4].tolist() == [BARRED, BARRED, BARRED, BARRED]


@pytest.mark.parametrize("num_left", [5, 2**15 - 1, 2**15, 2**16 + 5])
def test_what_is_barred_stays_so_however_many_tokens_may_follow(num_left: int) -> None:
    tokenizer = trained("char", ["xy"])
    mask = TokenGrammar(Grammar.parse('a = "x"* ;', "g"), tokenizer, 100_000).mask
    [barred_V] = mask.barred(torch.tensor([0]), num_left).tolist()
    free = {EOS, tokenizer.token_to_id("x")}
    assert [at for at, barred in enumerate(barred_V) if not barred] == sorted(free)


@pytest.mark.parametrize(
    ("kind", "texts", "message"),
    [
        ("word", ["a b"], 'g, line 2: "c-d" cannot be written: the tokenizer has no word "c-d"'),
        ("word", ["a c-d"], 'g, line 3: "b" cannot be written: the tokenizer has no word "b'),
        (
            "char",
            ["a b-d "],
            "g, line 2: \"c-d\" cannot be written: the tokenizer has no token for 'c'",
        ),
    ],
)
def test_a_literal_that_the_tokenizer_cannot_write_is_named(
    kind: str, texts: list[str], message: str
) -> None:
    grammar = Grammar.parse('a = "a" (" " c)*\n| "c-d"; c =\n"b" ;', "g")
    with pytest.raises(UserError) as error:
        TokenGrammar(grammar, trained(kind, texts), 100)
    assert message in str(error.value)


def test_codes_that_would_be_cut_short_are_refused(made_up: list[str]) -> None:
    with pytest.raises(
        UserError, match=r"its shortest code has 15 tokens, and model.max_tokens = 14"
    ):
        TokenGrammar(Grammar.open("web"), trained("word", made_up), 14)


def test_a_foreign_tokenizer_is_refused() -> None:
    made = tokens.train_char_tokenizer(Counter("ab")).replace('"Fuse"', '"WordPiece"')
    made = re.sub(r'("type": "WordPiece")', r'\1, "prefix": "#", "cleanup": false', made)
    with pytest.raises(UserError, match="a grammar needs a tokenizer as"):
        TokenGrammar(Grammar.open("web"), tokens.load_tokenizer(made, "it"), 1000)


# --- pix2code's screens ---------------------------------------------------------------------------


def check_programs(programs: list[str], changes: int) -> None:
    """All are accepted; of changed ones, those that a pattern written by hand accepts."""
    assert all(map(SCREEN.fullmatch, programs))
    grammar = Grammar.open("web")
    known = {
        kind: TokenGrammar(grammar, trained(kind, programs), 2000)
        for kind in ("word", "char", "bpe")
    }
    for program in programs:
        for one in known.values():
            assert one.accepts(ids_of(one.tokenizer, program))
    rng, rejected = random.Random(0), 0
    for program in rng.choices(programs, k=changes):
        parts = re.findall(r"\s|[\w-]+|\S", program)
        at, other = rng.randrange(len(parts)), rng.randrange(len(parts))
        change = rng.choice(["drop", "double", "swap", "replace"])
        if change == "drop":
            del parts[at]
        elif change == "double":
            parts.insert(at, parts[at])
        elif change == "swap":
            parts[at], parts[other] = parts[other], parts[at]
        else:
            parts[at] = parts[other]
        text = "".join(parts)
        expected = SCREEN.fullmatch(text) is not None
        rejected += not expected
        for kind in ("char", "bpe"):
            assert known[kind].accepts(ids_of(known[kind].tokenizer, text)) == expected
        # With words alone white space is free, but for what it parts.
        written = [part for part in parts if not part.isspace()]
        ids = [known["word"].tokenizer.token_to_id(part) for part in written]
        spaced = re.sub(r" ?([{,]) ?|[ \n]", lambda m: m[1] or " ", " ".join(written))
        pattern = re.compile(
            SCREEN.pattern.replace(r" \{\n", r"\{").replace(", ", ",").replace(r"\n", " ")
        )
        assert known["word"].accepts(ids) == (pattern.fullmatch(spaced + " ") is not None)
    assert rejected > changes / 2


def test_the_built_in_programs_are_web_screens(made_up: list[str]) -> None:
    check_programs(made_up, changes=300)


def test_real_programs_are_web_screens() -> None:
    if not PROGRAMS.is_dir():
        assert not os.environ.get("CI"), f"{PROGRAMS} is missing, and CI must not pass without it"
        pytest.skip(f"the real data {PROGRAMS} is not here")
    programs = [path.read_text() for path in sorted(PROGRAMS.glob("*.gui"))]
    assert len(programs) == 1500
    check_programs(programs, changes=600)


def test_skeletons_forget_the_colours_of_buttons_alone() -> None:
    grammar = Grammar.open("web")
    assert set(grammar.classes) == {"btn-green", "btn-orange", "btn-red"}
    one = "row {\nsingle {\nsmall-title, text, btn-green\n}\n}\n"
    assert grammar.skeleton(one) == grammar.skeleton(one.replace("green", "red"))
    assert grammar.skeleton(one) != grammar.skeleton(one.replace("green", "active"))
    assert grammar.skeleton(one) != grammar.skeleton(one.replace("single", "double"))
