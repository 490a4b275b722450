"""OpenAI's embeddings and Cohere's rerank over HTTP, from several models."""

import json
from collections.abc import Iterator, Sequence
from dataclasses import replace

import numpy as np
import pytest
from starlette.testclient import TestClient

from deployments.gateway import build
from nexus.errors import Overloaded
from nexus.types import Vector, Vectors
from tests.conftest import Door
from tests.test_gateway import check_openai_error
from tests.words import WordEmbedder

DOCUMENTS = ["the wheel turns", "the gripper closes with torque", "gripper", "a lamp"]


class Kinds:
    """An embedder that notes what its texts are said to be."""

    def __init__(self) -> None:
        self.asked: list[tuple[list[str], str]] = []

    async def embed(self, texts: Sequence[str], input_type: str = "passage") -> Vectors:
        self.asked.append((list(texts), input_type))
        return np.tile(np.array([[0.6, 0.8]], np.float32), (len(texts), 1))


class Told:
    """A reranker that answers what it is told to."""

    def __init__(self, answer: object) -> None:
        self.answer = answer
        self.asked: list[tuple[str, list[str]]] = []

    async def rerank(self, query: str, texts: Sequence[str]) -> Vector:
        self.asked.append((query, list(texts)))
        if isinstance(self.answer, Exception):
            raise self.answer
        return np.asarray(self.answer, np.float32)


class Models:
    """A door with a further embedder and a reranker behind it."""

    def __init__(self, door: Door, client: TestClient, embedder: Kinds, reranker: Told) -> None:
        self.client, self.embedder, self.reranker = client, embedder, reranker
        self.headers = {**door.headers(), "content-type": "application/json"}

    def post(self, path: str, **body: object) -> object:
        content = json.dumps(body)  # in ASCII, so that half a surrogate pair can be sent
        return self.client.post(f"/v1/{path}", content=content, headers=self.headers)

    def rerank(self, **fields: object) -> object:
        return self.post("rerank", **{"model": "judge", "query": "gripper torque", "documents": DOCUMENTS, **fields})

    def ranking(self, **fields: object) -> list[int]:
        answer = self.rerank(**fields)
        assert answer.status_code == 200, answer.text
        return [result["index"] for result in answer.json()["results"]]


@pytest.fixture
def models(door: Door) -> Iterator[Models]:
    embedder, reranker = Kinds(), Told([0.1, 0.9, 0.5, 0.5])
    others = {"judge": reranker, "odd-query": reranker}
    embedders = {**door.lent.embedders, "e5": embedder, "odd-query": embedder}
    lent = replace(door.lent, embedders=embedders, rerankers=others)
    with TestClient(build(lent), raise_server_exceptions=False) as client:
        yield Models(door, client, embedder, reranker)


# Reranking


def test_documents_come_back_best_first_and_ties_as_they_were_sent(models: Models) -> None:
    answer = models.rerank()
    assert answer.status_code == 200, answer.text
    body = answer.json()
    assert body["results"] == [
        {"index": index, "relevance_score": pytest.approx(score)}
        for index, score in [(1, 0.9), (2, 0.5), (3, 0.5), (0, 0.1)]
    ]
    assert body["model"] == "judge" and body["id"] == f"rerank-{answer.headers['x-request-id']}"
    assert body["usage"] == {"total_tokens": 2 + 3 + 5 + 1 + 2}
    assert models.reranker.asked == [("gripper torque", DOCUMENTS)]


def test_objects_are_documents_too_and_come_back_where_that_is_asked(models: Models) -> None:
    documents = [{"text": text} if number % 2 else text for number, text in enumerate(DOCUMENTS)]
    results = models.rerank(documents=documents, return_documents=True, top_n=2).json()["results"]
    assert [result["document"] for result in results] == [{"text": DOCUMENTS[1]}, {"text": DOCUMENTS[2]}]
    assert models.reranker.asked[0][1] == DOCUMENTS
    assert models.ranking(top_n=1) == [1] and models.ranking(top_n=99) == [1, 2, 3, 0]


def test_an_embedder_reranks_under_its_own_name(models: Models) -> None:
    query, *rows = WordEmbedder().embed(["gripper torque", *DOCUMENTS])
    cosines = [float(query @ row) for row in rows]
    results = models.rerank(model="word-embedder").json()["results"]
    assert [result["index"] for result in results] == sorted(range(4), key=lambda i: -cosines[i])
    for result in results:
        assert result["relevance_score"] == pytest.approx((1 + cosines[result["index"]]) / 2, abs=1e-5)
    models.ranking(model="e5")
    assert models.embedder.asked == [(["gripper torque"], "query"), (DOCUMENTS, "passage")]


def test_where_embedder_and_reranker_share_a_name_the_reranker_reranks(models: Models) -> None:
    assert models.ranking(model="odd-query") == [1, 2, 3, 0]
    assert not models.embedder.asked


def test_every_model_is_listed_once(models: Models) -> None:
    listed = [model["id"] for model in models.client.get("/v1/models", headers=models.headers).json()["data"]]
    assert {"nexus-rag", "word-embedder", "e5", "judge"} <= set(listed)
    assert len(set(listed)) == len(listed)
    assert models.client.get("/v1/models/judge", headers=models.headers).json()["id"] == "judge"


@pytest.mark.parametrize("model", ["gpt-4", "nexus-rag", "JUDGE"])
def test_a_reranker_that_is_not_there(models: Models, model: str) -> None:
    assert check_openai_error(models.rerank(model=model), 404, "not_found_error")["code"] == "model_not_found"


@pytest.mark.parametrize(
    "fields",
    [
        {"documents": []}, {"documents": ["x"] * 1001}, {"documents": "x"}, {"documents": [1]}, {"documents": [{}]},
        {"documents": [{"text": "x", "title": "y"}]}, {"documents": ["x" * (64 * 1024 + 1)]},
        {"documents": [{"text": "ä" * (32 * 1024 + 1)}]}, {"query": ""}, {"query": " \n"}, {"query": None},
        {"query": "ä" * (4 * 1024 + 1)}, {"top_n": 0}, {"top_n": -1}, {"unknown": 1}, {"model": ""},
        {"return_documents": "perhaps"}, {"query": "\ud83d"}, {"documents": ["\ud83d"]},
    ],
)  # fmt: skip
def test_what_cannot_be_reranked_is_refused_before_any_work(models: Models, fields: dict) -> None:
    check_openai_error(models.rerank(**fields), 400, "invalid_request_error")
    assert not models.reranker.asked


def test_what_is_just_small_enough_is_reranked(models: Models) -> None:
    models.reranker.answer = [0.5] * 1000
    assert len(models.ranking(documents=["x"] * 1000, query="ä" * 4 * 1024)) == 1000
    models.reranker.answer = [0.5]
    assert models.ranking(documents=["ä" * 32 * 1024]) == [0]


@pytest.mark.parametrize("nonsense", [[0.5], [0.5] * 5, [float("nan")] * 4, [2.0] * 4])
def test_nonsense_of_a_reranker_is_not_passed_on(models: Models, nonsense: list[float]) -> None:
    models.reranker.answer = nonsense
    check_openai_error(models.rerank(), 502, "server_error")


def test_a_reranker_without_a_free_place_says_when_to_come_back(models: Models) -> None:
    models.reranker.answer = Overloaded("every place is taken")
    answer = models.rerank()
    check_openai_error(answer, 503, "service_unavailable_error")
    assert answer.headers["retry-after"]


def test_reranking_needs_a_key_that_may_infer(door: Door) -> None:
    body = {"model": "word-embedder", "query": "x", "documents": ["y"]}
    check_openai_error(door.client.post("/v1/rerank", json=body), 401, "authentication_error")
    headers = door.headers("default", "reader", "documents:read")
    check_openai_error(door.client.post("/v1/rerank", json=body, headers=headers), 403, "permission_error")


# Embeddings


@pytest.mark.parametrize(
    ("fields", "kind"),
    [
        ({"model": "e5"}, "passage"), ({"model": "e5", "input_type": "query"}, "query"),
        ({"model": "e5", "input_type": "passage"}, "passage"), ({"model": "e5-query"}, "query"),
        ({"model": "e5-passage"}, "passage"), ({"model": "e5-query", "input_type": "query"}, "query"),
        ({"model": "odd-query"}, "passage"), ({"model": "odd-query-query"}, "query"),
    ],
)  # fmt: skip
def test_an_embedder_is_told_what_its_texts_are(models: Models, fields: dict, kind: str) -> None:
    answer = models.post("embeddings", input=["one", "two"], **fields)
    assert answer.status_code == 200, answer.text
    assert models.embedder.asked == [(["one", "two"], kind)]
    assert answer.json()["model"] == fields["model"]
    assert answer.json()["data"][1] == {"object": "embedding", "index": 1, "embedding": pytest.approx([0.6, 0.8])}


def test_the_documents_own_embedder_is_still_there(models: Models) -> None:
    data = models.post("embeddings", model="word-embedder-query", input="gripper").json()["data"]
    np.testing.assert_allclose(data[0]["embedding"], WordEmbedder().embed(["gripper"])[0], rtol=1e-5)
    assert not models.embedder.asked


def test_a_name_and_a_kind_that_contradict_each_other(models: Models) -> None:
    answer = models.post("embeddings", model="e5-query", input="x", input_type="passage")
    assert check_openai_error(answer, 400, "invalid_request_error")["param"] == "input_type"


@pytest.mark.parametrize("model", ["e6", "judge", "e5-", "e5-other", "-query", "e5-query-passage"])
def test_an_embedder_that_is_not_there(models: Models, model: str) -> None:
    answer = models.post("embeddings", model=model, input="x")
    assert check_openai_error(answer, 404, "not_found_error")["code"] == "model_not_found"


# Searches


def test_a_search_may_ask_for_no_reranker_but_not_for_one_that_is_not_there(door: Door) -> None:
    headers = door.headers()
    door.client.post("/rag/add_document", json={"filename": "a.txt", "content": "gripper torque"}, headers=headers)
    for fields, status in (({"rerank": False}, 200), ({"rerank": None}, 200), ({"rerank": True}, 422)):
        answer = door.client.post("/rag/search", json={"query": "gripper", **fields}, headers=headers)
        assert answer.status_code == status, answer.text
    assert answer.json()["errors"][0]["pointer"] == "/rerank"
    answer = door.client.post("/rag/search", json={"query": "gripper", "explain": True}, headers=headers)
    assert answer.json()["explain"]["rerank"] == {"applied": False, "why": "none is configured", "fallback": None}
