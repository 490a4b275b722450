"""A model of this process: whoever runs it next to others does not wait for its thread."""

from collections.abc import AsyncGenerator
from contextlib import aclosing

from actors.hops import begin, hop
from nexus.config import Served, Telemetry
from nexus.errors import NexusError
from nexus.ports import Generator as GeneratorPort
from nexus.registry import open_model
from nexus.tracing import streamed
from nexus.types import Delta, Prompt
from nexus.vocabulary import KIND, MODEL


@hop
class Generator:
    """One in-process model, for instance a GGUF file."""

    def __init__(self, model: Served, telemetry: Telemetry | None = None) -> None:
        begin("generator", telemetry)
        self._model: GeneratorPort = open_model(
            "generate", model.address, name=model.called, context_length=model.context_length
        )

    async def generate(self, prompt: Prompt) -> AsyncGenerator[list[Delta | NexusError]]:
        """Deltas, a few at a time; an error is the last item."""
        try:
            stream = streamed("generate", self._model.stream(prompt), {KIND: "CHAIN", MODEL: self._model.name})
            async with aclosing(stream) as deltas:
                async for delta in deltas:
                    yield [delta]
        except NexusError as error:
            yield [error]

    async def ready(self) -> bool:
        """True once the model could be asked. Raises Unavailable."""
        await self._model.check()
        return True
