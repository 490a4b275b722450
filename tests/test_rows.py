"""The rows of a tenant in memory find what stores/memory.py finds, in whatever order they came and went."""

import random
import threading
from collections.abc import Iterator

import numpy as np
import pytest

from nexus import rows as rows_module
from nexus.ports import IndexRow, Scope
from nexus.rows import Rows
from nexus.stores import memory
from nexus.stores.memory import MemoryVectors
from nexus.types import Vector, Vectors

INDEX, DIMENSION = "nx_rows", 32
WORDS = "abcdefghijklmnop"
SCOPES = (Scope("t"), Scope("t", None, ("t:a", "t:zz")), Scope("t", None, ("t:a", "t:b")), Scope("u"))


def unit(dice: np.random.Generator, count: int = 1, dimension: int = DIMENSION) -> Vectors:
    vectors = dice.standard_normal((count, dimension)).astype(np.float32)
    return vectors / np.linalg.norm(vectors, axis=1, keepdims=True)


def row(number: int, dice: random.Random, vector: Vector) -> IndexRow:
    terms = " ".join(dice.choices(WORDS, k=dice.randint(0, 30)))
    return IndexRow(f"c{number}", f"d{number // 3}", dice.choice(("t", "t:a", "t:b")), terms, vector)


@pytest.fixture
def early() -> Iterator[None]:
    """Codes from a few rows on."""
    kept, rows_module.COARSE_ROWS = rows_module.COARSE_ROWS, 300
    yield
    rows_module.COARSE_ROWS = kept


def compare(reference: MemoryVectors, rows: Rows, scope: Scope, query: str, vector: Vector) -> None:
    for expected, found in (
        (reference.search_dense(INDEX, vector, 10, scope), rows.search_dense(vector, 10, scope)),
        (reference.search_text(INDEX, query, 10, scope), rows.search_text(query, 10, scope)),
    ):
        assert [score for _, score in found] == pytest.approx([score for _, score in expected], abs=1e-5)
        for (i, score), (other, _) in zip(found, expected, strict=True):  # of equal ones rounding may name another
            assert i == other or sum(abs(score - one) < 1e-5 for _, one in expected) > 1 or i == found[-1][0]


@pytest.mark.usefixtures("early")
@pytest.mark.parametrize("seed", range(2))
def test_any_order_of_changes_finds_what_the_reference_finds(seed: int) -> None:
    dice, numbers = random.Random(seed), np.random.default_rng(seed)
    reference, rows = memory.open("memory:"), Rows(INDEX, DIMENSION)
    reference.open_index(INDEX, DIMENSION)
    for _ in range(50):
        change = dice.random()
        if change < 0.6:
            batch = [row(dice.randrange(700), dice, vector) for vector in unit(numbers, dice.randint(1, 60))]
            reference.upsert(INDEX, batch)
            rows.upsert(batch)
        elif change < 0.75:
            ids = [f"c{dice.randrange(700)}" for _ in range(20)]
            reference.delete(INDEX, ids)
            rows.delete(ids)
        elif change < 0.8:
            held = list(reference._indexes[INDEX].values())
            some = [one for one, _ in dice.sample(held, min(5, len(held)))]
            reference.upsert(INDEX, [IndexRow(o.chunk_id, o.document_id, "t:b", o.terms, o.vector) for o in some])
            rows.admit([one.chunk_id for one in some], "t:b")
        else:
            rows.tidy(whole=dice.random() < 0.5)
        documents = tuple(f"d{dice.randrange(240)}" for _ in range(dice.choice((0, 1, 30, 400))))
        query = " ".join(dice.choices(WORDS + "z", k=4))
        for scope in (*SCOPES, Scope("t", documents, ("t:b",))):
            compare(reference, rows, scope, query, unit(numbers)[0])
        assert rows.chunk_ids == reference.chunk_ids(INDEX) and len(rows) == reference.count(INDEX)


@pytest.mark.usefixtures("early")
def test_codes_name_the_very_best_of_many() -> None:
    """Clouds, as texts are: 6,000 vectors around 150 centres, 384 dimensions. Recall against brute force is 1."""
    dice = np.random.default_rng(7)
    centres = unit(dice, 150, 384)
    vectors = np.repeat(centres, 40, axis=0) + 0.6 * unit(dice, 6_000, 384)
    vectors = (vectors / np.linalg.norm(vectors, axis=1, keepdims=True)).astype(np.float32)
    rows = Rows(INDEX, 384)
    rows.upsert([IndexRow(f"c{n}", f"d{n}", "t", "", vector) for n, vector in enumerate(vectors)])
    rows.tidy()
    assert rows._state.coarse is not None
    thinned = Scope("t", tuple(f"d{n}" for n in range(0, 6_000, 3)))
    for query in centres[:50] + 0.6 * unit(dice, 50, 384):
        query = (query / np.linalg.norm(query)).astype(np.float32)
        exact = vectors @ query
        for scope, among in ((Scope("t"), np.arange(6_000)), (thinned, np.arange(0, 6_000, 3))):
            best = among[np.argsort(-exact[among], kind="stable")[:10]]
            found = rows.search_dense(query, 10, scope)
            assert [i for i, _ in found] == [f"c{n}" for n in best]
            assert [score for _, score in found] == pytest.approx(exact[best].tolist(), abs=1e-6)


def test_rare_words_beside_common_ones_find_what_the_reference_finds(monkeypatch: pytest.MonkeyPatch) -> None:
    """Words as texts have them, by Zipf's law; in most lists of common words only a few rows are looked up."""
    dice, weights, words = random.Random(5), [1 / n for n in range(1, 2_001)], [f"w{n}" for n in range(1, 2_001)]
    texts = [" ".join(dice.choices(words, weights, k=dice.randint(5, 60))) for _ in range(3_000)]
    (vector,), audiences = unit(np.random.default_rng(5)), [dice.choice(("t", "t:a")) for _ in texts]
    batch = [IndexRow(f"c{n}", f"d{n}", audiences[n], text, vector) for n, text in enumerate(texts)]
    reference, rows, left_out = memory.open("memory:"), Rows(INDEX, DIMENSION), []
    reference.open_index(INDEX, DIMENSION)
    reference.upsert(INDEX, batch)
    for first in range(0, len(batch), 900):
        rows.upsert(batch[first : first + 900])
    those = rows_module._those
    monkeypatch.setattr(rows_module, "_those", lambda *asked: left_out.append(len(asked[1])) or those(*asked))
    for n in range(60):
        query = " ".join(dice.choices(words, weights, k=n % 6 + 2))
        for scope in (Scope("t", None, ("t:a",)), Scope("t")):
            compare(reference, rows, scope, query, vector)
    assert sum(left_out) > 20_000


@pytest.mark.usefixtures("early")
def test_where_codes_cannot_tell_all_rows_are_scored() -> None:
    """All vectors are nearly the same one: no rounding tells them apart, and the best are found all the same."""
    dice = np.random.default_rng(3)
    vectors = unit(dice, 1, 384) + 1e-3 * unit(dice, 3_000, 384)
    vectors = (vectors / np.linalg.norm(vectors, axis=1, keepdims=True)).astype(np.float32)
    rows = Rows(INDEX, 384)
    rows.upsert([IndexRow(f"c{n}", f"d{n}", "t", "", vector) for n, vector in enumerate(vectors)])
    rows.tidy()
    for n in range(0, 3_000, 300):
        assert rows.search_dense(vectors[n], 1, Scope("t"))[0][0] == f"c{n}"


@pytest.mark.usefixtures("early")
def test_eight_searchers_and_a_writer_get_whole_answers() -> None:
    """Every row says in its text which replacement it is of; a search never finds one of them twice, or none."""
    numbers = np.random.default_rng(1)
    vectors = unit(numbers, 400)
    rows, ended, wrong = Rows(INDEX, DIMENSION), threading.Event(), []

    def write(step: int) -> None:
        rows.upsert([IndexRow(f"c{n}", f"d{n}", "t", f"all w{n} s{step}", vectors[n]) for n in range(400)])

    def search(number: int) -> None:
        while not ended.is_set():
            for n in range(number, 400, 8):
                by_text = [i for i, _ in rows.search_text(f"w{n}", 5, Scope("t"))]
                nearest = rows.search_dense(vectors[n], 2, Scope("t"))
                if by_text != [f"c{n}"] or nearest[0][0] != f"c{n}" or nearest[1][0] == nearest[0][0]:
                    wrong.append((n, by_text, nearest))

    write(0)
    searchers = [threading.Thread(target=search, args=(number,)) for number in range(8)]
    for one in searchers:
        one.start()
    for step in range(1, 40):
        write(step)
        rows.tidy(whole=step % 5 == 0)
    ended.set()
    for one in searchers:
        one.join()
    assert wrong == []
    assert len(rows) == 400


def test_what_was_deleted_leaves_memory_when_it_is_tidied() -> None:
    numbers = np.random.default_rng(2)
    secret, other = unit(numbers, 2)
    rows = Rows(INDEX, DIMENSION)
    rows.upsert([IndexRow("c1", "d1", "t", "plutonium", secret), IndexRow("c2", "d2", "t", "wheel", other)])
    rows.delete(["c1"])
    rows.tidy(whole=True)
    state = rows._state
    assert "plutonium" not in state.terms and "c1" not in state.ids and "d1" not in state.documents
    assert not (state.vectors == secret).all(axis=1).any()
    assert rows.search_text("wheel", 5, Scope("t"))[0][0] == "c2"


def test_how_rare_a_word_is_tells_nothing_of_what_others_may_read() -> None:
    vector = unit(np.random.default_rng(2))[0]
    rows = Rows(INDEX, DIMENSION)
    rows.upsert([IndexRow(f"c{n}", f"d{n}", "t", "gripper wheel" if n else "gripper", vector) for n in range(4)])
    before = rows.search_text("gripper", 5, Scope("t"))
    rows.upsert([IndexRow(f"x{n}", f"x{n}", "t:board", "gripper gripper", vector) for n in range(20)])
    assert rows.search_text("gripper", 5, Scope("t")) == before
    rows.delete([f"x{n}" for n in range(20)])
    assert rows.search_text("gripper", 5, Scope("t")) == before
