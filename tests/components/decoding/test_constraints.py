"""Answers held to a pattern or a choice, against Python's `re`, token-by-token walks and hand-computed distributions."""

from __future__ import annotations

import random
import re
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer as Backend
from tokenizers import decoders, models, pre_tokenizers

from components.contracts import Constraint, SamplingParams, UserError
from components.data.tokenizers import EOT, Tokenizer, bytes_tokenizer
from components.decoding import constraints as module
from components.decoding.automata import DEAD, START, of_regex, of_texts, utf8_ranges
from components.decoding.constraints import BEGIN, Constraints, Machine, Vocabulary, blocked_rows
from components.decoding.sampling import sample_token, uniforms
from tests.components.decoding.test_stops import TOKENIZERS, pieces_tokenizer

ATOMS = [
    "a",
    "b",
    "é",
    "☃",
    "𝄞",
    " ",
    ".",
    r"\d",
    r"\w",
    r"\s",
    r"\D",
    r"\W",
    r"\S",
    "[ab]",
    "[^a]",
    "[a-c☃]",
    r"[\d.-]",
    r"\.",
    r"\n",
    "7",
    "-",
    "{",
]


def random_pattern(draws: random.Random, depth: int = 3) -> str:
    if depth == 0 or draws.random() < 0.3:
        return draws.choice(ATOMS)
    kind = draws.randrange(5)
    if kind == 0:
        return "(" + "|".join(random_pattern(draws, depth - 1) for _ in range(draws.randrange(1, 4))) + ")"
    if kind == 1:
        quantifier = draws.choice(["*", "+", "?", "{2}", "{1,}", "{,2}", "{1,3}", "*?", "+?", "{0,2}?"])
        return f"(?:{random_pattern(draws, depth - 1)}){quantifier}"
    return "".join(random_pattern(draws, depth - 1) for _ in range(draws.randrange(1, 4)))


def matches(pattern: str, text: str) -> bool:
    return re.fullmatch(pattern, text, re.ASCII) is not None


def test_automata_accept_what_re_matches():
    draws, accepted = random.Random(0), 0
    letters = "ab c7é☃𝄞.-\n{\u0660"  # the last one a digit, but not of ASCII
    for _ in range(400):
        pattern = random_pattern(draws)
        own = of_regex(pattern)
        for _ in range(40):
            text = "".join(draws.choices(letters, k=draws.randrange(6)))
            assert own.accepts(text) == matches(pattern, text), (pattern, text)
            accepted += own.accepts(text)
    assert accepted > 500


@pytest.mark.parametrize(
    ("pattern", "texts"),
    [
        (r"#### \d{1,4}", ["#### 7", "#### 1234", "#### 12345", "####7"]),
        (r"a{2,}|b{,2}|c{2}", ["", "a", "aa", "aaaa", "bb", "bbb", "cc"]),
        (r"x{,}y{z}{2", ["y{z}{2", "xxy{z}{2", "xy"]),
        (r"[]a]+[^]]", ["]a]b", "]a]]"]),
        (r"[a\-z]-[+-]", ["--+", "b-+", "z--"]),
        (r"\x41\u2603\U0001D11E\t\0[\b]", ["A☃𝄞\t\0\b"]),
        (r"(a*)*(b|)+", ["", "aab", "aba"]),
        ("a||b", ["", "a", "b", "ab"]),
        (r"[\ud7ff-\ue000]", ["\ud7ff", "\ue000", "a"]),
        (r"[\W\d]", ["1", "☃", "a", "é"]),
        ("[^a-zb]+", ["x", "A", "☃A"]),
        (r"a(b[^\0-\U0010ffff]|c)?", ["a", "ab", "ac", "abc", "abb"]),
    ],
)
def test_the_corners_of_the_syntax_are_those_of_re(pattern, texts):
    own = of_regex(pattern)
    assert [own.accepts(text) for text in texts] == [matches(pattern, text) for text in texts]


def test_utf8_ranges_hold_the_code_points_between_and_no_others():
    draws = random.Random(1)
    corners = [0, 0x7F, 0x80, 0x7FF, 0x800, 0xD7FF, 0xE000, 0xFFFF, 0x10000, 0x10FFFF]
    for _ in range(300):
        low, high = sorted(draws.choice([draws.randrange(0x110000), draws.choice(corners), draws.randrange(0x900)]) for _ in range(2))
        if low <= 0xDFFF and high >= 0xD800:
            continue
        sequences = list(utf8_ranges(low, high))
        size = sum(int(np.prod([last - first + 1 for first, last in sequence])) for sequence in sequences)
        assert size == high - low + 1
        for code in {low, high, (low + high) // 2}:
            data = chr(code).encode()
            fits = [
                len(s) == len(data) and all(first <= byte <= last for byte, (first, last) in zip(data, s, strict=True)) for s in sequences
            ]
            assert sum(fits) == 1


def machine(tokenizer: Tokenizer, **kinds) -> Machine:
    return Constraints(tokenizer, tokenizer.vocab_size + 3).machine(Constraint(**kinds), tokenizer.stop_ids)


def say(tokenizer: Tokenizer, own: Machine, seed: int, most: int = 40) -> str | None:
    """Random logits until a stop id comes; None where the answer was cut off."""
    logits = torch.randn(most, tokenizer.vocab_size + 3, generator=torch.Generator().manual_seed(seed)) * 2
    state, ids = BEGIN, []
    for position in range(most):
        mask = own.blocked(state)
        assert not mask.all()
        (token,), _ = sample_token(logits[position : position + 1], SamplingParams(), uniforms(seed, [0], [position]), mask)
        if int(token) in tokenizer.stop_ids:
            return tokenizer.decode(ids)
        ids.append(int(token))
        state = own.advance(state, int(token))
        assert state != DEAD
    return None


@pytest.mark.parametrize("name", TOKENIZERS)
def test_every_finished_answer_matches_its_pattern(name):
    tokenizer, draws, finished = TOKENIZERS[name], random.Random(2), 0
    for seed in range(120):
        pattern = random_pattern(draws)
        try:
            own = machine(tokenizer, regex=pattern)
        except UserError as error:  # of this tokenizer's text the space before the first word is no part
            assert name == "pieces" and "no tokens" in str(error)
            continue
        text = say(tokenizer, own, seed)
        finished += text is not None
        assert text is None or matches(pattern, text), (pattern, text)
    assert finished > 60


def test_texts_that_cannot_be_completed_are_not_begun():
    own = of_regex(r"a(b[^\0-\U0010ffff]|c)?")
    assert own.walk(START, b"ab") == DEAD != own.walk(START, b"ac")


def test_the_tree_of_beginnings_reads_every_token():
    draws = random.Random(5)
    for _ in range(60):
        pieces = [bytes(draws.choices(b"abc", k=draws.randrange(5))) for _ in range(draws.randrange(1, 40))]
        own = of_regex(draws.choice(["(a|bc)*", "[ab]+c?", "a(b|c){2}", "(ab|cb)c*", "c?b?a?"]))
        expected = [own.walk(START, piece) if piece else DEAD for piece in pieces]
        assert Vocabulary(pieces).after(own.transitions, START).tolist() == expected


@pytest.mark.parametrize("name", TOKENIZERS)
def test_masks_allow_exactly_the_tokens_that_keep_the_answer_possible(name):
    tokenizer, draws = TOKENIZERS[name], random.Random(3)
    later = tokenizer.token_bytes()
    for _ in range(25):
        own = of_regex(random_pattern(draws))
        held = Machine(own, (Vocabulary(later), Vocabulary(later)), tokenizer.stop_ids, len(later), torch.device("cpu"))
        for state in draws.sample(range(START, len(own.accepting)), min(6, len(own.accepting) - 1)):
            walked = [own.walk(state, piece) if piece else DEAD for piece in later]
            expected = [end == DEAD for end in walked]
            for stop in tokenizer.stop_ids:
                expected[stop] = not own.accepting[state]
            assert held.blocked(state).tolist() == expected
            assert [held.advance(state, token) for token in range(len(later))] == walked


@pytest.mark.parametrize("name", TOKENIZERS)
def test_choices_are_said_and_nothing_else(name):
    tokenizer, texts = TOKENIZERS[name], ("ab", "aba", "b", "é☃")
    own = machine(tokenizer, choice=texts)
    assert {say(tokenizer, own, seed) for seed in range(200)} == set(texts)


def test_choices_have_the_models_distribution_given_what_was_said():
    tokenizer = bytes_tokenizer()
    own = machine(tokenizer, choice=("a", "ab", "c"))
    logits = torch.full((1, tokenizer.vocab_size + 3), 7.0)  # everything else is far likelier
    logits[0, ord("a")], logits[0, ord("c")] = np.log(3.0), np.log(1.0)
    logits[0, ord("b")], logits[0, tokenizer.eot_id], logits[0, tokenizer.stop_ids[1]] = np.log(2.0), np.log(5.0), np.log(1.0)
    points = 8000
    grid = (torch.arange(points, dtype=torch.float64) + 0.5) / points

    def shares(state: int) -> dict[int, float]:
        ids, _ = sample_token(logits.expand(points, -1), SamplingParams(), grid, own.blocked(state))
        values, counts = ids.unique(return_counts=True)
        return dict(zip(values.tolist(), (counts / points).tolist(), strict=True))

    end, after_a = tokenizer.stop_ids[1], own.advance(BEGIN, ord("a"))
    assert shares(BEGIN) == pytest.approx({ord("a"): 3 / 4, ord("c"): 1 / 4}, abs=2 / points)
    assert shares(after_a) == pytest.approx({ord("b"): 2 / 8, tokenizer.eot_id: 5 / 8, end: 1 / 8}, abs=2 / points)
    assert shares(own.advance(after_a, ord("b"))) == pytest.approx({tokenizer.eot_id: 5 / 6, end: 1 / 6}, abs=2 / points)
    assert own.complete(after_a) and not own.complete(BEGIN) and own.advance(after_a, ord("c")) == DEAD


def test_a_stop_id_with_text_of_its_own_only_ends_the_answer():
    tokenizer, newline = bytes_tokenizer(), ord("\n")
    kinds = Constraints(tokenizer, tokenizer.vocab_size)
    own = kinds.machine(Constraint(regex="a[^b]?"), (newline,))
    assert own.blocked(BEGIN)[newline] and not own.blocked(own.advance(BEGIN, ord("a")))[newline]
    with pytest.raises(UserError, match="no tokens"):
        kinds.machine(Constraint(regex="a\nb"), (newline,))


def words() -> Tokenizer:
    backend = Backend(models.WordLevel({"yes": 0, "no": 1, "way": 2, EOT: 3, "[UNK]": 4}, unk_token="[UNK]"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    return Tokenizer(backend)


def test_without_single_bytes_only_what_tokens_can_complete_is_begun():
    own = machine(words(), regex="(yes|no)( way| hay)?|maybe")
    assert [token for token in range(3) if not own.blocked(BEGIN)[token]] == [0, 1]
    assert not own.blocked(own.advance(BEGIN, 1))[[2, 3]].any()
    own = machine(words(), regex="yes hay|no way")  # "yes" leads nowhere
    assert own.blocked(BEGIN)[:3].tolist() == [True, False, True]
    with pytest.raises(UserError, match=r"^decode.choice: \['maybe'\]; the tokenizer has no tokens to say it$"):
        machine(words(), choice=("maybe",))


@pytest.mark.parametrize(("make", "ids"), [(pieces_tokenizer, 266), (words, 3), (bytes_tokenizer, 256)])
def test_bytes_of_tokens_make_the_text(make, ids):
    tokenizer = make()
    first, later = tokenizer.token_bytes(first=True), tokenizer.token_bytes()
    assert len(first) == len(later) == tokenizer.vocab_size
    assert not any(later[i] for i in tokenizer._special_ids)
    draws = random.Random(4)
    for _ in range(200):
        chosen = [draws.randrange(ids) for _ in range(6)]
        joined = first[chosen[0]] + b"".join(later[i] for i in chosen[1:])
        if "\ufffd" not in tokenizer.decode(chosen):
            assert joined.decode() == tokenizer.decode(chosen)


def test_a_tokenizer_whose_text_depends_on_more_than_its_tokens_is_refused():
    backend = Backend(models.WordLevel({"a": 0, "b": 1, "[UNK]": 2}, unk_token="[UNK]"))
    backend.decoder = decoders.CTC()  # the second of two equal tokens says nothing
    with pytest.raises(UserError, match=r"^data.tokenizer: .*no answer can be held to a pattern"):
        machine(Tokenizer(backend), regex="a")


def test_masks_and_machines_asked_for_longest_ago_are_made_anew(monkeypatch):
    monkeypatch.setattr(module, "MASK_BYTES", 600)
    monkeypatch.setattr(module, "MOST_MACHINES", 1)
    tokenizer = bytes_tokenizer()
    kinds = Constraints(tokenizer, tokenizer.vocab_size)
    own = kinds.machine(Constraint(regex="[ab]c[de]"), tokenizer.stop_ids)
    assert kinds.machine(Constraint(regex="[ab]c[de]"), tokenizer.stop_ids) is own
    states = [BEGIN, own.advance(BEGIN, ord("a")), own.advance(own.advance(BEGIN, ord("a")), ord("c"))]
    before = [own.blocked(state).tolist() for state in states]
    assert len(own._masks) == 2 and [own.blocked(state).tolist() for state in states] == before
    kinds.machine(Constraint(regex="x"), tokenizer.stop_ids)
    assert kinds.machine(Constraint(regex="[ab]c[de]"), tokenizer.stop_ids) is not own


def test_rows_without_constraints_share_the_mask_of_all():
    tokenizer = bytes_tokenizer()
    own = machine(tokenizer, choice=("b",))
    nothing = torch.zeros(tokenizer.vocab_size + 3, dtype=torch.bool)
    nothing[ord("x")] = True
    assert blocked_rows(nothing, [None, None]) is nothing
    together = blocked_rows(nothing, [None, (own, BEGIN)])
    assert torch.equal(together[0], nothing) and (~together[1]).nonzero().flatten().tolist() == [ord("b")]


@pytest.mark.parametrize(
    ("pattern", "message"),
    [
        ("a(b", r"character 2 \(\(\): this group is not closed"),
        ("ab)", r"character 3 \(\)\): there is no group to close"),
        ("a[bc", r"character 2 \(\[\): this class is not closed"),
        ("*a", r"character 1 \(\*\): there is nothing to repeat"),
        ("a**", r"character 3 \(\*\): there is nothing to repeat"),
        ("a{2}{3}", r"character 5 \(\{\): there is nothing to repeat"),
        ("a*+", r"character 3 \(\+\): possessive quantifiers are not supported"),
        ("^a", r"character 1 \(\^\): anchors are not supported; .*end to end"),
        ("a$", r"character 2 \(\$\): anchors are not supported"),
        (r"(a)\1", r"character 4 \(\\\): back-references and octal"),
        (r"\bword", r"character 1 \(\\\): \\b is not supported"),
        (r"\p{L}", r"character 1 \(\\\): \\p is not supported"),
        (r"\xZ1", r"character 1 \(\\\): \\x needs 2 hexadecimal"),
        (r"\uD800", "a surrogate is no character"),
        ("a\\", r"nothing after the backslash"),
        ("(?=a)", r"character 2 \(\?\): .*only \(\?:\.\.\.\)"),
        ("(?P<n>a)", r"only \(\?:\.\.\.\)"),
        ("a{3,2}", r"character 2 \(\{\): at least 3 but at most 2"),
        ("[z-a]", r"character 2 \(z\): a range needs"),
        (r"[\d-z]", r"a range needs"),
        ("a{200000}", r"at most 100000 repetitions"),
        ("(" * 200 + ")" * 200, r"at most 100 groups"),
        (r"a[^\0-\U0010ffff]", r"matches no text at all"),
        ("[ab]*a[ab]{20}", r"needs more than 20000 states"),
        ("((a{400}){400}){400}", r"needs more than 20000 states"),
        ("(?:.*a){1500}", r"needs more than 20000000 steps to be prepared"),  # hours, without that bound
        ("(?:a?){9000}", r"needs more than 20000000 steps to be prepared"),
    ],
)
def test_patterns_that_cannot_be_used_are_refused_at_the_place(pattern, message):
    with pytest.raises(UserError, match=message) as caught:
        of_regex(pattern)
    assert str(caught.value).startswith(f"decode.regex: {pattern!r}") and "\n" not in str(caught.value)


def test_threads_that_ask_at_once_share_one_machine():
    held, made = Constraints(bytes_tokenizer(), 261), []
    real = module.Machine
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "Machine", lambda *arguments: made.append(1) or real(*arguments))
        with ThreadPoolExecutor(8) as threads:
            found = list(threads.map(lambda _: held.machine(Constraint(regex="[ab]{2,40}"), (256,)), range(32)))
    assert len(made) == 1 and len(set(map(id, found))) == 1


def test_too_many_choices_are_refused():
    with pytest.raises(UserError, match=r"^decode.choice: the texts have more than 20000 beginnings"):
        of_texts(f"{i:06d}" for i in range(30000))
