"""How the tests of a whole Nexus speak to it; each file starts the one that it is about, as `nexus`."""

from collections.abc import Iterator

import httpx
import openai
import pytest

from tests.running import Running


@pytest.fixture
def http(nexus: Running) -> Iterator[httpx.Client]:
    with nexus.http() as client:
        yield client


@pytest.fixture
def client(nexus: Running) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{nexus.url}/v1", api_key=nexus.key, max_retries=0, timeout=120) as client:
        yield client
