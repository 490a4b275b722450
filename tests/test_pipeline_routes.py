"""`execute`, the list of pipelines, and follow-up questions, through the front door."""

import json
from collections.abc import AsyncGenerator
from dataclasses import replace

import pytest
from starlette.testclient import TestClient

from deployments.gateway import build
from nexus.balancer import Balancer, Member, Weights
from nexus.config import Pipelines
from nexus.errors import Overloaded
from nexus.models.extractive import NOTHING_TO_QUOTE
from nexus.types import Delta, Prompt
from tests.conftest import Door
from tests.test_gateway import add, check_problem

DATA = {"user_input": "The pump in bay 4 runs at 40 bar. What pressure does the pump run at?"}


class Echo:
    """A generator that says which call it is; the call `fails_at` is refused."""

    name, sees_images = "echo", False

    def __init__(self, *said: str, fails_at: int = 0) -> None:
        self.said, self.fails_at = said, fails_at
        self.asked: list[Prompt] = []

    async def stream(self, prompt: Prompt) -> AsyncGenerator[Delta]:
        self.asked.append(prompt)
        call = len(self.asked)
        if call == self.fails_at:
            raise Overloaded("every place is taken")
        yield Delta(self.said[call - 1] if self.said else f"said {call}", finish_reason="stop")

    async def check(self) -> None: ...


def reopen(door: Door, generator: object = None, rewrite: bool = False, **pipelines: object) -> TestClient:
    """The same door with another generator, or other pipelines."""
    config = door.lent.config.model_copy(update={"pipelines": Pipelines(**pipelines)})
    tools = replace(door.lent.rag, generator=generator or door.lent.rag.generator, rewrite=rewrite)
    members = [Member(one, 0.5) for one in (generator, door.lent.rag.generator) if one is not None]
    balancer = Balancer(members, Weights(1, 1, 1), probe_seconds=5)
    lent = replace(door.lent, config=config, rag=tools, balancer=balancer)
    return TestClient(build(lent), raise_server_exceptions=False)


@pytest.mark.parametrize(
    ("asked", "steps"),
    [
        ({"template_name": "analyze_only"}, ["analysis"]),
        ({"template_name": "full_analysis"}, ["analysis", "reasoning_and_explanation", "critique", "summary"]),
        ({"protocol_names": ["ReasoningAndExplanationProtocol"]}, ["reasoning_and_explanation"]),
        ({"protocol_names": ["critique", "SummaryProtocol"]}, ["critique", "summary"]),
        ({"template_name": "mine", "model": "echo", "max_tokens": 9}, ["summary", "critique"]),
    ],
)
def test_steps_are_taken_and_shown_in_order(door: Door, asked: dict, steps: list[str]) -> None:
    echo = Echo()
    client = reopen(door, echo, templates={"mine": ("SummaryProtocol", "critique")})
    headers = {**door.headers("default", "x", "infer"), "x-request-id": "trace-1"}
    body = client.post("/execute", json={**asked, "initial_data": DATA}, headers=headers).json()
    assert set(body) == {"template_name", "steps", "result", "model", "trace_id"}
    assert (body["template_name"], body["model"], body["trace_id"]) == (asked.get("template_name"), "echo", "trace-1")
    assert [step["step"] for step in body["steps"]] == steps
    assert [step["result"] for step in body["steps"]] == [f"said {n}" for n in range(1, len(steps) + 1)]
    assert all(set(step) == {"step", "result", "finish_reason", "seconds"} for step in body["steps"])
    assert body["result"] == body["steps"][-1]["result"] and body["steps"][0]["finish_reason"] == "stop"
    assert {prompt.max_tokens for prompt in echo.asked} == {asked.get("max_tokens")}
    assert {prompt.tenant for prompt in echo.asked} == {"default"}


def test_the_founding_requests_work_without_a_language_model(door: Door) -> None:
    for asked, data, result in (
        ({"template_name": "analyze_only"}, {"user_input": "test"}, NOTHING_TO_QUOTE),
        ({"protocol_names": ["ReasoningAndExplanationProtocol"]}, {"user_input": "openai test"}, NOTHING_TO_QUOTE),
        ({"template_name": "full_analysis"}, DATA, "The pump in bay 4 runs at 40 bar."),
    ):
        answer = door.client.post("/execute", json={**asked, "initial_data": data}, headers=door.headers())
        assert (answer.status_code, answer.json()["result"]) == (200, result)
        assert answer.json()["model"] == "extractive"


@pytest.mark.parametrize(
    ("body", "status", "words"),
    [
        ({"template_name": "dream"}, 404, "analyze_only, full_analysis"),
        ({"protocol_names": ["DreamProtocol"]}, 404, "analysis, critique"),
        ({"template_name": "analyze_only", "model": "gpt-9"}, 404, "ask for one of auto, extractive"),
        ({}, 422, "not both"),
        ({"template_name": "analyze_only", "protocol_names": ["critique"]}, 422, "not both"),
        ({"protocol_names": []}, 422, "1 to 8 steps"),
        ({"protocol_names": ["critique"] * 9}, 422, "1 to 8 steps"),
        ({"template_name": "analyze_only", "owner": "me"}, 400, "owner"),
        ({"template_name": "analyze_only", "max_tokens": 0}, 422, "max_tokens"),
        ({"template_name": "analyze_only", "initial_data": {}}, 422, "initial_data"),
        ({"template_name": "analyze_only", "initial_data": "text"}, 422, "initial_data"),
        ({"template_name": "analyze_only", "initial_data": {"x": "y" * 2**16}}, 422, "at most 65536 bytes"),
        ({"template_name": "analyze_only", "initial_data": {"x": float("nan")}}, 422, "cannot carry"),
    ],
)
def test_executions_that_cannot_be_meant(door: Door, body: dict, status: int, words: str) -> None:
    headers = {**door.headers(), "content-type": "application/json"}
    answer = door.client.post("/execute", content=json.dumps({"initial_data": DATA, **body}), headers=headers)
    assert words in check_problem(answer, status, "/execute")["detail"]


def test_a_failed_step_is_named_and_nothing_half_is_answered(door: Door) -> None:
    client = reopen(door, Echo(fails_at=3))
    body = {"template_name": "full_analysis", "initial_data": DATA}
    answer = client.post("/execute", json=body, headers=door.headers())
    detail = check_problem(answer, 503, "/execute")["detail"]
    assert detail == "the step 'critique' failed: every place is taken"
    assert answer.headers["retry-after"] and "said" not in answer.text


def test_the_pipelines_are_listed_with_templates_and_steps(door: Door) -> None:
    listed = door.client.get("/pipelines", headers=door.headers()).json()
    assert listed["pipelines"] == ["rag", "chat", "execute"]
    assert listed["steps"] == ["analysis", "critique", "reasoning_and_explanation", "summary"]
    assert listed["templates"]["analyze_only"] == ["analysis"]
    configured = reopen(door, enabled=("execute",), templates={"mine": ("summary",)})
    listed = configured.get("/pipelines", headers=door.headers()).json()
    assert listed["pipelines"] == ["execute"] and listed["templates"]["mine"] == ["summary"]
    assert "full_analysis" in listed["templates"]
    without = reopen(door, enabled=("rag",)).get("/pipelines", headers=door.headers()).json()
    assert without == {"pipelines": ["rag"], "templates": {}, "steps": []}


@pytest.mark.parametrize(
    ("enabled", "path", "body", "words"),
    [
        (("rag", "chat"), "/execute", {"template_name": "analyze_only", "initial_data": DATA}, "there are rag, chat"),
        (("execute",), "/rag/query", {"query": "gripper"}, "there are execute"),
        ((), "/mcp/s1/query", {"input": "gripper"}, "there is none"),
    ],
)
def test_a_pipeline_that_is_not_enabled_names_those_that_are(
    door: Door, enabled: tuple[str, ...], path: str, body: dict, words: str
) -> None:
    answer = reopen(door, enabled=enabled).post(path, json=body, headers=door.headers())
    problem = check_problem(answer, 404, path)
    assert problem["code"] == "pipeline_not_found" and words in problem["detail"]


def test_pipelines_need_the_permission_to_infer(door: Door) -> None:
    headers = door.headers("default", "reader", "documents:read")
    answer = door.client.post("/execute", json={"template_name": "analyze_only", "initial_data": DATA}, headers=headers)
    assert "'infer'" in check_problem(answer, 403, "/execute")["detail"]
    check_problem(door.client.get("/pipelines", headers=headers), 403, "/pipelines")


# ── follow-up questions ─────────────────────────────────────────────────────────────────────────

WHOLE = "What torque does the gripper close with?"


def test_an_answer_shows_what_was_searched_and_which_citations_are_wrong(door: Door) -> None:
    headers = door.headers()
    add(door, headers=headers)
    door.client.post("/mcp/s1/add_context", json={"content": "It is about the gripper."}, headers=headers)
    echo = Echo(WHOLE, "4 N·m [1], see [8].")
    client = reopen(door, echo, rewrite=True)
    query = {"query": "What torque does it close with?", "session_id": "s1"}
    body = client.post("/rag/query", json=query, headers=headers).json()
    assert (body["query"], body["rewritten_query"]) == (query["query"], WHOLE)
    assert body["invalid_citations"] == [8] and body["finish_reason"] == "stop"
    assert body["sources"][0]["cited"] and echo.asked[1].question == query["query"]
    assert {prompt.session for prompt in echo.asked} == {"s1"}
    session = reopen(door, Echo(WHOLE, "4 N·m [1]."), rewrite=True)
    body = session.post("/mcp/s1/query", json={"input": query["query"]}, headers=headers).json()
    assert (body["rewritten_query"], body["invalid_citations"], body["response"]) == (WHOLE, [], "4 N·m [1].")


def test_a_question_that_was_not_rewritten_says_so(door: Door) -> None:
    headers = door.headers()
    add(door, headers=headers)
    body = door.client.post("/rag/query", json={"query": WHOLE}, headers=headers).json()
    assert body["rewritten_query"] is None and body["invalid_citations"] == []
