"""What a document was cut from, as bytes that are kept beside its version: so that it can be cut anew, another way."""

import json
import zlib

from nexus.types import Block, Parsed

FORM = 1


def pack(parsed: Parsed) -> bytes:
    """The title and the blocks, compressed."""
    blocks = [
        [one.kind, one.text, one.level, one.page, one.first_line, one.last_line, one.header] for one in parsed.blocks
    ]
    return zlib.compress(json.dumps([FORM, parsed.title, blocks], separators=(",", ":")).encode())


def unpack(content: bytes) -> Parsed | None:
    """What `pack` was given, as far as a chunker looks at it; None for bytes that are damaged."""
    try:
        form, title, blocks = json.loads(zlib.decompress(content))
        return Parsed(title, "", tuple(Block(*one) for one in blocks)) if form == FORM else None
    except (zlib.error, ValueError, TypeError):
        return None
