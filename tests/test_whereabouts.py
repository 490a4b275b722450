"""Where models are planned, as whoever asks them is told."""

import pytest

from cluster.plan import Place, Plan, encode
from deployments.whereabouts import Whereabouts
from nexus.errors import UpstreamInvalid


class Voters:
    """In place of Coordination: what is peeked at."""

    content: bytes | None = None

    def peek(self, key: str) -> bytes | None:
        assert key == "placement"
        return self.content


def test_a_model_is_asked_where_it_is_planned_now_and_anywhere_while_that_is_not_known() -> None:
    voters = Voters()
    whereabouts = Whereabouts(voters)  # type: ignore[arg-type]
    assert whereabouts.is_planned("embedder", "sark") and whereabouts.is_planned("embedder", "clu")
    voters.content = encode(Plan((Place("embedder", 0, "sark"), Place("reranker-0", 0, "clu"))))
    assert whereabouts.is_planned("embedder", "sark") and not whereabouts.is_planned("embedder", "clu")
    voters.content = encode(Plan((Place("embedder", 0, "clu"),)))
    assert whereabouts.is_planned("embedder", "clu") and not whereabouts.is_planned("embedder", "sark")
    voters.content = b"rubbish"
    with pytest.raises(UpstreamInvalid, match="placement"):
        whereabouts.is_planned("embedder", "clu")
