"""Every poisoned request is answered with a 4xx in the shape of its route, and nothing is logged as a fault."""

import logging

import pytest

from tests.conftest import Door
from tests.poison import Poison, poisons

MODEL = "extractive"
ALL = list(poisons(MODEL))


@pytest.mark.parametrize("poison", ALL, ids=[poison.name for poison in ALL])
def test_poison_is_refused(door: Door, poison: Poison, caplog: pytest.LogCaptureFixture) -> None:
    headers = {**door.headers(), **poison.headers}
    with caplog.at_level(logging.WARNING, "nexus.gateway"):
        answer = door.client.post(poison.path, content=poison.content, headers=headers)
    assert 400 <= answer.status_code < 500, answer.text[:300]
    body = answer.json()
    if poison.path.startswith("/v1/"):
        assert set(body["error"]) == {"message", "type", "param", "code"}
        assert len(body["error"]["message"]) < 2000
    else:
        assert body["status"] == answer.status_code
    assert not caplog.records


def test_the_harmless_form_of_the_same_request_is_answered(door: Door) -> None:
    body = {"model": MODEL, "messages": [{"role": "user", "content": "hi"}], "max_tokens": 1}
    assert door.client.post("/v1/chat/completions", json=body, headers=door.headers()).status_code == 200
