"""What a chunker cut from, as bytes: any document comes back as it was, and damage is known for what it is."""

from dataclasses import replace

from hypothesis import given
from hypothesis import strategies as st

from nexus import kept
from nexus.types import Block, Parsed

TEXT = st.text(st.characters(), max_size=20)  # lone surrogates, too
NUMBER = st.none() | st.integers(1, 10**6)
BLOCKS = st.builds(
    Block, st.sampled_from(["heading", "text", "list", "table", "code"]), TEXT, st.integers(0, 9), NUMBER, NUMBER,
    NUMBER, st.booleans(),
)  # fmt: skip


@given(st.builds(Parsed, TEXT, st.just("text/plain"), st.lists(BLOCKS, max_size=5).map(tuple)))
def test_any_document_comes_back_as_the_chunker_saw_it(parsed: Parsed) -> None:
    assert kept.unpack(kept.pack(parsed)) == replace(parsed, media_type="")


def test_bytes_that_are_damaged_are_none() -> None:
    packed = kept.pack(Parsed("a", "text/plain", tuple(Block("text", f"part {n} of it") for n in range(50))))
    spoilt = [packed[:at] + bytes([packed[at] ^ 1]) + packed[at + 1 :] for at in range(2, len(packed))]
    for content in (b"", b"x", packed[:-5], *spoilt):
        assert kept.unpack(content) is None
