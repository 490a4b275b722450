"""Rerankers, and what a search makes of one: order, budget, fall-back, rest, and who may be read."""

import asyncio
import json
import os
import threading
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from actors.reranker import Reranker as RerankerActor
from actors.retriever import Retriever as RetrieverActor
from nexus import telemetry
from nexus.config import Config, Served
from nexus.errors import ConfigError, InvalidRequest, Overloaded, Unavailable, UpstreamInvalid
from nexus.filters import parse_filter
from nexus.grounding import assess
from nexus.models import by_embedder, cross_encoder
from nexus.registry import Task, open_model
from nexus.reranking import MOST_FAILURES, REST_SECONDS, Reranking, best_first, check_scores, in_threads
from nexus.retrieval import RetrievalSettings
from nexus.types import SearchRequest, Vector
from tests.conftest import ALICE, BOB, MALLORY, House
from tests.tiny_encoders import write_cross_encoder
from tests.words import WordEmbedder

os.environ["HF_HUB_OFFLINE"] = "1"  # before the libraries read it

TEXTS = ["the gripper closes with four newton metres", "a wheel", "", "lamp " * 400, "größe 数据库 \ud83d", "torque"]
FAILURES = [
    (TimeoutError(), "timeout"), (Unavailable("away"), "unavailable"), (Overloaded("full"), "overloaded"),
    (UpstreamInvalid("nonsense"), "invalid"), (InvalidRequest("too long"), "refused"),
]  # fmt: skip


class Scripted:
    """A reranker that answers what it is told to, and notes what it was asked."""

    name = "scripted"

    def __init__(self, *answers: object) -> None:
        self.answers = list(answers)
        self.asked: list[tuple[str, list[str], float]] = []

    def __call__(self, query: str, texts: Sequence[str], seconds: float) -> Vector:
        self.asked.append((query, list(texts), seconds))
        answer = self.answers.pop(0) if len(self.answers) > 1 else self.answers[0]
        if isinstance(answer, Exception):
            raise answer
        return answer(texts) if callable(answer) else answer


class Clock:
    now = 1000.0

    def __call__(self) -> float:
        return self.now


def backwards(texts: Sequence[str]) -> Vector:
    """The last is the best."""
    return np.arange(len(texts), dtype=np.float32) / len(texts)


def fallbacks(reason: str) -> float:
    return telemetry.rerank_fallbacks.labels(reason)._value.get()


# The cross encoder


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_cross_encoder(tmp_path_factory.mktemp("models") / "tiny-reranker")


@pytest.fixture(scope="module")
def reranker(folder: Path) -> cross_encoder.CrossEncoderReranker:
    return cross_encoder.open(f"cross-encoder:{folder}", threads=1)


def score_by_transformers(folder: Path, query: str, texts: Sequence[str]) -> Vector:
    """The model's own logits, one pair at a time, through a sigmoid."""
    import torch
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForSequenceClassification.from_pretrained(folder).eval()
    scores = []
    with torch.inference_mode():
        for text in texts:
            clean = text.encode(errors="replace").decode()
            pair = tokenizer([query], [clean], truncation=True, max_length=64, return_tensors="pt")
            scores.append(float(torch.sigmoid(model(**pair).logits[0, 0])))
    return np.array(scores, np.float32)


def test_a_cross_encoder_gives_the_sigmoid_of_its_logits_in_the_order_of_the_texts(
    reranker: cross_encoder.CrossEncoderReranker, folder: Path
) -> None:
    scores = reranker.rerank("torque of the gripper", TEXTS)
    assert scores.shape == (len(TEXTS),) and scores.dtype == np.float32
    expected = score_by_transformers(folder, "torque of the gripper", TEXTS)
    assert np.ptp(expected) > 0.01, "the tiny model tells its texts apart"
    np.testing.assert_allclose(scores, expected, atol=1e-4)
    assert reranker.rerank("torque", []).shape == (0,)
    assert reranker.name == "tiny-reranker"


@pytest.mark.parametrize("activation", ["torch.nn.modules.linear.Identity", "torch.nn.modules.activation.Sigmoid"])
def test_scores_are_between_0_and_1_whatever_the_model_does_to_its_logits(tmp_path: Path, activation: str) -> None:
    folder = write_cross_encoder(tmp_path / "model", sentence_transformers={"activation_fn": activation})
    scores = cross_encoder.open(f"cross-encoder:{folder}").rerank("torque of the gripper", TEXTS)
    np.testing.assert_allclose(scores, score_by_transformers(folder, "torque of the gripper", TEXTS), atol=1e-4)


def test_threads_get_the_same_scores(reranker: cross_encoder.CrossEncoderReranker) -> None:
    texts = [f"number {n} " * (n + 1) for n in range(12)]
    expected = reranker.rerank("number", texts)
    with ThreadPoolExecutor(6) as pool:
        found = list(pool.map(lambda n: reranker.rerank("number", texts[n:]), range(12)))
    for n, scores in enumerate(found):
        np.testing.assert_allclose(scores, expected[n:], atol=1e-4)


@pytest.mark.parametrize("address", ["cross-encoder:", "openai:x", "", "cross-encoder:no/such/folder"])
def test_an_address_without_a_model_is_refused_with_the_way_out(address: str) -> None:
    with pytest.raises(ConfigError, match="cross-encoder:/path/to/model"):
        cross_encoder.open(address)


@pytest.mark.parametrize(
    ("change", "word"),
    [
        ({"architectures": ["BertModel"]}, "BertModel"), ({"architectures": None}, "does not say"),
        ({"id2label": {"0": "a", "1": "b"}}, "2 labels"), ({"auto_map": {"AutoModel": "own.Model"}}, "own code"),
        ({"model_type": "never-heard-of"}, "cannot be loaded"),
    ],
)  # fmt: skip
def test_a_model_of_another_kind_is_refused(tmp_path: Path, change: dict[str, object], word: str) -> None:
    folder = write_cross_encoder(tmp_path / "model")
    config = folder / "config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | change))
    with pytest.raises(ConfigError, match=word):
        cross_encoder.open(f"cross-encoder:{folder}")


def test_a_model_that_was_trained_with_two_labels_is_refused(tmp_path: Path) -> None:
    folder = write_cross_encoder(tmp_path / "model", labels=2)
    with pytest.raises(ConfigError, match="2 labels"):
        cross_encoder.open(f"cross-encoder:{folder}")


@pytest.mark.parametrize("content", [None, "{", "[]x"])
def test_a_folder_without_a_readable_configuration_is_refused(tmp_path: Path, content: str | None) -> None:
    if content is not None:
        (tmp_path / "config.json").write_text(content)
    with pytest.raises(ConfigError, match=r"config\.json"):
        cross_encoder.open(f"cross-encoder:{tmp_path}")


@pytest.mark.parametrize(
    ("fault", "error"), [(RuntimeError("CUDA out of memory"), Unavailable), (None, UpstreamInvalid)]
)
def test_a_device_that_fails_and_scores_that_are_none(
    reranker: cross_encoder.CrossEncoderReranker, monkeypatch: pytest.MonkeyPatch, fault: Exception | None, error: type
) -> None:
    def predict(pairs: list, **_: object) -> Vector:
        if fault is not None:
            raise fault
        return np.full(len(pairs), np.nan, np.float32)

    monkeypatch.setattr(reranker._model, "predict", predict)
    with pytest.raises(error, match="tiny-reranker"):
        reranker.rerank("torque", ["one", "two"])


# Reranking by the embedder, and the actor


def test_the_embedder_as_a_reranker_gives_its_cosine_from_0_to_1() -> None:
    kinds: list[str] = []

    class Noting(WordEmbedder):
        def embed(self, texts: Sequence[str], input_type: str = "passage") -> np.ndarray:
            kinds.append(input_type)
            return super().embed(texts)

    embedder = Noting()
    by = open_model("rerank", "by-embedder:", embedder=embedder, threads=2)
    texts = ["gripper torque", "wheel", "gripper"]
    query, *rows = WordEmbedder().embed(["gripper torque", *texts])
    np.testing.assert_allclose(by.rerank("gripper torque", texts), [(1 + query @ row) / 2 for row in rows], atol=1e-6)
    assert kinds == ["query", "passage"]
    assert by.rerank("gripper", []).shape == (0,)
    with pytest.raises(ConfigError, match="by-embedder"):
        by_embedder.open("by-embedder:x", embedder=embedder)


def test_opposite_vectors_are_0_and_equal_ones_1_in_spite_of_rounding() -> None:
    query = np.array([[1.0000001, 0]], np.float32)
    assert by_embedder.nearness(query, np.array([[1, 0], [-1, 0], [0, 1]], np.float32)).tolist() == [1, 0, 0.5]


def test_the_actor_reranks_as_its_model_does(folder: Path, reranker: cross_encoder.CrossEncoderReranker) -> None:
    async def ask() -> Vector:
        actor = RerankerActor(f"cross-encoder:{folder}", 1, Served(address=f"cross-encoder:{folder}").offered())
        assert await actor.ready()
        return await actor.rerank("torque", TEXTS)

    np.testing.assert_allclose(asyncio.run(ask()), reranker.rerank("torque", TEXTS), atol=1e-5)


# Scores


@pytest.mark.parametrize(
    "scores", [[0.1], [[0.1, 0.2]], [0.1, float("nan")], [0.1, 1.5], [-0.1, 0.2], ["x", "y"], None, [[1], [1, 2]]]
)
def test_scores_that_are_none_are_seen(scores: object) -> None:
    with pytest.raises(UpstreamInvalid):
        check_scores(scores, 2)


def test_the_best_is_first_and_ties_stay_in_order() -> None:
    assert best_first(check_scores([0.5, 0.9, 0.5, 0.0, 0.9], 5)) == [1, 4, 0, 2, 3]


# Searches


@pytest.fixture
def shelf(house: House) -> House:
    for n in range(8):
        house.put(f"{n}.txt", f"the gripper closes with torque {'and force ' * n}on shelf {n}")
    return house


def lend(house: House, score: object, candidates: int = 30, clock: object = None) -> Reranking:
    house.retriever.reranking = Reranking("scripted", score, candidates, 0.5, clock or Clock())
    return house.retriever.reranking


def names(house: House, who: object = ALICE, **fields: object) -> list[str]:
    return [hit.source for hit in house.retriever.search(SearchRequest("gripper torque", **fields), who).hits]


def test_the_best_candidates_are_in_the_order_of_the_reranker_and_the_rest_after_them(shelf: House) -> None:
    fused = names(shelf)
    scripted = Scripted(backwards)
    lend(shelf, scripted, candidates=3)
    assert names(shelf) == [*reversed(fused[:3]), *fused[3:]]
    ((query, texts, seconds),) = scripted.asked
    assert (query, seconds, len(texts)) == ("gripper torque", 0.5, 3)
    assert texts[0].startswith(f"{fused[0]}\nthe gripper"), "it reads what the embedder read, title and text"


def test_a_hit_keeps_its_fused_score_and_says_its_place(shelf: House) -> None:
    before = {hit.chunk_id: hit for hit in shelf.retriever.search(SearchRequest("gripper torque"), ALICE).hits}
    lend(shelf, Scripted(backwards), candidates=4)
    result = shelf.retriever.search(SearchRequest("gripper torque", explain=True), ALICE)
    for rank, hit in enumerate(result.hits, 1):
        routes = dict(hit.routes)
        place = routes.pop("rerank", None)
        assert replace(hit, routes=routes) == before[hit.chunk_id]
        assert (place is not None) == (rank <= 4)
        assert place is None or (place.rank, place.score) == (rank, (4 - rank) / 4)
    assert result.explain["rerank"] == {
        "applied": True, "why": "scripted ordered the best 4", "fallback": None
    }  # fmt: skip
    assert "rerank" in result.seconds


def test_more_is_reranked_than_is_asked_for(shelf: House) -> None:
    fused = names(shelf)
    scripted = Scripted(backwards)
    lend(shelf, scripted, candidates=6)
    assert names(shelf, k=2) == [fused[5], fused[4]]
    assert len(scripted.asked[0][1]) == 6


def test_equal_scores_change_nothing(shelf: House) -> None:
    fused = names(shelf)
    lend(shelf, Scripted(lambda texts: [0.5] * len(texts)))
    assert names(shelf) == fused


@pytest.mark.parametrize(("failure", "reason"), FAILURES)
def test_whatever_the_reranker_fails_with_the_fused_order_stays_and_says_so(
    shelf: House, failure: Exception, reason: str
) -> None:
    plain = shelf.retriever.search(SearchRequest("gripper torque", k=3), ALICE)
    lend(shelf, Scripted(failure))
    before = fallbacks(reason)
    result = shelf.retriever.search(SearchRequest("gripper torque", k=3, explain=True), ALICE)
    assert result.hits == plain.hits and result.by_score == plain.hits
    assert result.explain["rerank"]["applied"] is False and result.explain["rerank"]["fallback"] == reason
    assert "scripted" in result.explain["rerank"]["why"]
    assert "rerank" in result.seconds
    assert fallbacks(reason) == before + 1


@pytest.mark.parametrize("nonsense", [[0.5], [float("nan")] * 8, [7.0] * 8, "scores"])
def test_nonsense_is_no_order(shelf: House, nonsense: object) -> None:
    fused = names(shelf)
    lend(shelf, Scripted(nonsense))
    result = shelf.retriever.search(SearchRequest("gripper torque", explain=True), ALICE)
    assert [hit.source for hit in result.hits] == fused
    assert result.explain["rerank"]["fallback"] == "invalid"


def test_a_fault_of_the_program_is_not_taken_for_a_slow_reranker(shelf: House) -> None:
    lend(shelf, Scripted(ZeroDivisionError()))
    with pytest.raises(ZeroDivisionError):
        names(shelf)


def test_a_search_may_do_without_and_is_told_where_there_is_none(shelf: House) -> None:
    fused = names(shelf)
    with pytest.raises(InvalidRequest, match=r"models\.reranker") as refusal:
        names(shelf, rerank=True)
    assert refusal.value.pointer == "/rerank"
    scripted = Scripted(backwards)
    lend(shelf, scripted)
    assert names(shelf, rerank=False) == fused and not scripted.asked
    assert names(shelf, rerank=True) == names(shelf) == fused[::-1]


def test_where_nothing_is_found_nobody_is_asked(shelf: House) -> None:
    scripted = Scripted(backwards)
    lend(shelf, scripted)
    shelf.put("x.txt", "gripper")
    nowhere = parse_filter({"source": "y.txt"})
    result = shelf.retriever.search(SearchRequest("gripper", filters=nowhere, explain=True), ALICE)
    assert result.hits == () and not scripted.asked
    assert result.explain["rerank"]["why"] == "nothing was found"


# What a reranker may read


def test_a_reranker_never_reads_what_the_asker_may_not_see(shelf: House) -> None:
    shelf.put("secret.txt", "the gripper torque is secret", readers=frozenset({"alice"}))
    shelf.put("foreign.txt", "the gripper torque of others", who=MALLORY)
    shelf.put("old.txt", "the gripper torque was otherwise")
    shelf.put("old.txt", "the gripper torque is new")
    draft = shelf.describe("draft.txt", ["the gripper torque is a draft"])
    shelf.stage(draft, ["the gripper torque is a draft"])
    scripted = Scripted(backwards)
    lend(shelf, scripted)
    names(shelf, BOB, graph="on")
    names(shelf, ALICE)
    by_bob, by_alice = ("\n".join(texts) for _, texts, _ in scripted.asked)
    for hidden in ("secret", "others", "otherwise", "draft"):
        assert hidden not in by_bob
    assert "is new" in by_bob and "is secret" in by_alice


def test_a_reranker_reads_only_what_the_filter_leaves(house: House) -> None:
    from nexus.filters import parse_filter

    house.put("in.txt", "gripper torque inside", metadata={"line": 1})
    house.put("out.txt", "gripper torque outside", metadata={"line": 2})
    scripted = Scripted(backwards)
    lend(house, scripted)
    assert names(house, filters=parse_filter({"line": 1})) == ["in.txt"]
    assert all("outside" not in text for _, texts, _ in scripted.asked for text in texts)


# Confidence


def test_confidence_is_that_of_the_fused_order_whether_the_reranker_answers_or_not(shelf: House) -> None:
    shelf.put("lamp.txt", "the lamp is yellow")
    query = "gripper torque on shelf 3"
    plain = shelf.retriever.search(SearchRequest(query, k=4), ALICE)
    lend(shelf, Scripted(backwards))
    reranked = shelf.retriever.search(SearchRequest(query, k=4), ALICE)
    assert reranked.hits[0].source == "lamp.txt"
    assert reranked.by_score == plain.hits
    assert assess(query, reranked.by_score) == assess(query, plain.by_score) != assess(query, reranked.hits)


# Rest


def test_a_reranker_that_failed_three_times_in_a_row_is_left_alone_and_then_tried_again(shelf: House) -> None:
    fused = names(shelf)
    clock = Clock()
    scripted = Scripted(*[TimeoutError()] * MOST_FAILURES, Unavailable("away"), backwards)
    lend(shelf, scripted, clock=clock)
    for _ in range(MOST_FAILURES):
        assert names(shelf) == fused
    before = fallbacks("resting")
    clock.now += REST_SECONDS - 0.1
    result = shelf.retriever.search(SearchRequest("gripper torque", explain=True), ALICE)
    assert result.explain["rerank"]["fallback"] == "resting" and [hit.source for hit in result.hits] == fused
    assert len(scripted.asked) == MOST_FAILURES and fallbacks("resting") == before + 1
    clock.now += 0.1
    assert names(shelf) == fused and len(scripted.asked) == MOST_FAILURES + 1
    assert names(shelf) == fused and len(scripted.asked) == MOST_FAILURES + 1, "one more failure, one more rest"
    clock.now += REST_SECONDS
    assert names(shelf) == fused[::-1]


def test_failures_between_successes_are_not_in_a_row(shelf: House) -> None:
    failing = [TimeoutError()] * (MOST_FAILURES - 1)
    scripted = Scripted(*failing, backwards, *failing, backwards)
    lend(shelf, scripted)
    for _ in range(2 * MOST_FAILURES):
        names(shelf)
    assert len(scripted.asked) == 2 * MOST_FAILURES


# The budget


class Stuck:
    """A reranker that answers only once it is let go."""

    name = "stuck"

    def __init__(self) -> None:
        self.begun = threading.Semaphore(0)
        self.go = threading.Event()
        self.calls = 0

    def rerank(self, query: str, texts: Sequence[str]) -> Vector:
        self.calls += 1
        self.begun.release()
        self.go.wait()
        return backwards(texts)


@pytest.fixture
def stuck() -> Iterator[Stuck]:
    stuck = Stuck()
    yield stuck
    stuck.go.set()


def test_a_reranker_of_this_process_is_waited_for_no_longer_than_told(stuck: Stuck) -> None:
    with ThreadPoolExecutor(1) as threads:
        score = in_threads(stuck, threads)
        with pytest.raises(TimeoutError):
            score("torque", ["one"], 0.001)
        stuck.begun.acquire()
        with pytest.raises(TimeoutError):  # the one thread is taken: this one never begins
            score("torque", ["two"], 0.001)
        stuck.go.set()
        assert score("torque", ["three", "four"], 60).tolist() == [0, 0.5]
    assert stuck.calls == 2, "what nobody waits for any more was not begun"


class Elsewhere:
    """A reranker behind a handle: awaited, and told when nobody waits any more."""

    def __init__(self) -> None:
        self.cancelled = threading.Event()
        self.hangs = True

    async def rerank(self, query: str, texts: Sequence[str]) -> Vector:
        try:
            if self.hangs:
                await asyncio.Event().wait()
        except asyncio.CancelledError:
            self.cancelled.set()
            raise
        return backwards(texts)


@pytest.fixture
def config(tmp_path: Path) -> Config:
    return Config(
        home=tmp_path,
        stores={"vectors": "memory:", "documents": "sqlite:"},
        models={"reranker": "cross-encoder:/models/a-name", "rerank_seconds": 0.001, "rerank_candidates": 7},
    )


def actor_over(config: Config, elsewhere: object, house: House, monkeypatch: pytest.MonkeyPatch) -> RetrieverActor:
    def opened(kind: str, address: str, **_: object) -> object:
        stores = {"memory:": house.hades.vectors, "sqlite:": house.hades.documents}
        return stores.get(address, house.embedder)

    def opened_model(task: Task, address: str, **offered: object) -> object:
        return house.embedder if task == "embed" else open_model(task, address, **offered)

    monkeypatch.setattr("actors.retriever.open_part", opened)
    monkeypatch.setattr("actors.retriever.open_model", opened_model)
    actor = RetrieverActor(config, config.stores.vectors, elsewhere, house.hades.coordinator)
    house.retriever.resident = actor._retriever.resident  # closed with the house
    return actor


def test_a_reranker_in_another_process_is_given_up_when_its_time_is_over(
    config: Config, shelf: House, monkeypatch: pytest.MonkeyPatch
) -> None:
    fused = names(shelf)
    elsewhere = Elsewhere()
    actor = actor_over(config, elsewhere, shelf, monkeypatch)
    reranking = actor._retriever.reranking
    assert (reranking.name, reranking.candidates, reranking.seconds) == ("a-name", 7, 0.001)

    async def search() -> object:
        result = await actor.search(SearchRequest("gripper torque", explain=True), ALICE)
        await asyncio.to_thread(elsewhere.cancelled.wait, 60)
        return result

    result = asyncio.run(search())
    assert elsewhere.cancelled.is_set()
    assert [hit.source for hit in result.hits] == fused
    assert result.explain["rerank"]["fallback"] == "timeout"


def test_a_reranker_in_another_process_orders_what_is_found_here(
    config: Config, shelf: House, monkeypatch: pytest.MonkeyPatch
) -> None:
    fused = names(shelf)
    models = config.models.model_copy(update={"rerank_seconds": 60.0})
    elsewhere = Elsewhere()
    elsewhere.hangs = False
    actor = actor_over(config.model_copy(update={"models": models}), elsewhere, shelf, monkeypatch)
    evidence = asyncio.run(actor.retrieve(SearchRequest("gripper torque"), ALICE, 1, 100))
    assert [hit.source for hit in evidence.result.hits] == [*reversed(fused[:7]), fused[7]]
    assert [hit.source for hit in evidence.passages] == [fused[6]]


def test_without_a_handle_the_retriever_opens_its_reranker_itself(
    config: Config, shelf: House, monkeypatch: pytest.MonkeyPatch
) -> None:
    models = config.models.model_copy(update={"reranker": "by-embedder:", "rerank_seconds": 60.0})
    actor = actor_over(config.model_copy(update={"models": models}), None, shelf, monkeypatch)
    result = asyncio.run(actor.search(SearchRequest("gripper torque", explain=True), ALICE))
    assert result.explain["rerank"]["applied"]
    (query,) = shelf.embedder.embed(["gripper torque"])
    for hit in result.hits[:7]:
        (passage,) = shelf.embedder.embed([f"{hit.title}\n{hit.text}"])
        assert hit.routes["rerank"].score == pytest.approx((1 + query @ passage) / 2, abs=1e-5)


def test_no_reranker_is_the_default(tmp_path: Path, shelf: House, monkeypatch: pytest.MonkeyPatch) -> None:
    actor = actor_over(Config(home=tmp_path), None, shelf, monkeypatch)
    assert actor._retriever.reranking is None
    assert actor._retriever.settings == RetrievalSettings()
