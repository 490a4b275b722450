"""Where files live; a scheme with a module here is opened by it, and every other one by filesystem.py."""

from nexus.errors import InvalidRequest

MAX_PATH_CHARACTERS = 1000
MAX_NAME_BYTES = 255
PARTIAL = ".nexus-partial"  # a folder of each tenant's, with what is not whole yet


def check_path(path: str, pointer: str | None = None) -> str:
    """The path, if it stays below where it begins and every storage can have it. Raises InvalidRequest.

    Any character may be in a name but '/' and NUL.
    """
    shown = ascii(path[:80])
    if not path or len(path) > MAX_PATH_CHARACTERS:
        raise InvalidRequest(f"a file's path has 1 to {MAX_PATH_CHARACTERS} characters", pointer=pointer)
    if "\0" in path or any(0xD800 <= ord(character) < 0xE000 for character in path):
        raise InvalidRequest(f"the path {shown} is no UTF-8 text, or has a NUL", pointer=pointer)
    parts = path.split("/")
    if any(part in ("", ".", "..") for part in parts):
        raise InvalidRequest(
            f"the path {shown} must be relative and plain: no '/' at its ends, no '//', no '.' and no '..'",
            pointer=pointer,
        )
    if any(len(part.encode()) > MAX_NAME_BYTES for part in parts):
        raise InvalidRequest(f"a name in the path {shown} has more than {MAX_NAME_BYTES} bytes", pointer=pointer)
    if parts[0] == PARTIAL:
        raise InvalidRequest(f"{PARTIAL} is a folder of Nexus's own", pointer=pointer)
    return path
