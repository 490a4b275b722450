"""What can go wrong, and whose turn it is to act.

    NexusError
    ├── CallerError             the caller must change the request
    │   ├── InvalidRequest      a value is malformed or out of range
    │   ├── Unauthenticated     no credential, or one that is not valid
    │   ├── Forbidden           a valid credential that may not do this
    │   ├── ContentRefused      a rule on content, or the guard, refuses what is asked or answered
    │   ├── NotFound            no such thing, or not for this caller
    │   ├── Conflict            the thing changed meanwhile, or is of another kind
    │   │   └── Fenced          a later `begin` of the same document took over
    │   ├── TooLarge            over a limit that the message names
    │   ├── RateLimited         more than this caller may ask for in so short a time
    │   ├── UnsupportedMedia    a file format that nothing here reads
    │   └── Unprocessable       a file that its parser cannot read
    ├── TryAgain                nothing is wrong with the request; later it will work
    │   ├── Unavailable         a part is away or restarting
    │   ├── Overloaded          every place is taken
    │   └── TimedOut            it took longer than a request may
    └── OperatorError           whoever runs Nexus must act
        ├── ConfigError         a setting is wrong; nothing was started
        ├── AlreadyRunning      this home is in use by a running Nexus
        ├── UpstreamInvalid     a model or a store answered nonsense
        └── BlockRefused        a shared block is not what it should be; another machine's copy may be
            ├── BlockCorrupt    it is damaged, or another one in its place
            ├── BlockStale      it was good once: there is a newer one
            ├── WriterUnknown   signed by a machine that is not known, or is one no longer
            ├── Equivocation    its writer gave its number to another block too: a cloned machine, or a stolen key
            └── KeyUnknown      sealed under a key that is retired, or not on this machine

Each error carries a `code`, a stable word for programs, and a message for people that says what
is wrong, where, and what to do. Messages never hold a secret, a path of the server or a query.
"""


class NexusError(Exception):
    """The root of all errors that Nexus raises on purpose."""

    code = "internal_error"
    retry_after: float | None = None  # in seconds, where it is known when to come again

    def __init__(self, message: str, *, pointer: str | None = None, code: str | None = None) -> None:
        """`pointer` is an RFC 6901 JSON pointer to the field at fault, where there is one."""
        super().__init__(message)
        self.message = message
        self.pointer = pointer
        if code is not None:
            self.code = code

    def __reduce__(self) -> tuple[object, ...]:
        # Errors cross process borders; keyword arguments would otherwise be lost on the way.
        return _rebuild, (type(self), self.message, self.pointer, self.code)


def named(kind: str, message: str, code: str) -> NexusError:
    """The error of a class in this file, by its name: how one that was written down comes back."""
    return _rebuild(globals()[kind], message, None, code)


def _rebuild(kind: type[NexusError], message: str, pointer: str | None, code: str) -> NexusError:
    return kind(message, pointer=pointer, code=code)


class CallerError(NexusError):
    code = "invalid_request"


class InvalidRequest(CallerError):
    code = "invalid_request"


class Unauthenticated(CallerError):
    code = "invalid_api_key"


class Forbidden(CallerError):
    code = "forbidden"


class ContentRefused(CallerError):
    code = "content_refused"


class NotFound(CallerError):
    code = "not_found"


class Conflict(CallerError):
    code = "conflict"


class Fenced(Conflict):
    code = "fenced"


class TooLarge(CallerError):
    code = "too_large"


class RateLimited(CallerError):
    code = "rate_limit_exceeded"

    def __init__(
        self, message: str, *, retry_after: float = 1.0, pointer: str | None = None, code: str | None = None
    ) -> None:
        """After `retry_after` seconds there is room for one more."""
        super().__init__(message, pointer=pointer, code=code)
        self.retry_after = retry_after


class UnsupportedMedia(CallerError):
    code = "unsupported_media_type"


class Unprocessable(CallerError):
    code = "document_unprocessable"


class TryAgain(NexusError):
    code = "try_again"


class Unavailable(TryAgain):
    code = "unavailable"


class Overloaded(TryAgain):
    code = "overloaded"


class TimedOut(TryAgain):
    code = "timed_out"


class OperatorError(NexusError):
    code = "operator_error"


class ConfigError(OperatorError):
    code = "config_error"


class AlreadyRunning(OperatorError):
    code = "already_running"


class UpstreamInvalid(OperatorError):
    code = "upstream_invalid"


class BlockRefused(OperatorError):
    code = "block_refused"


class BlockCorrupt(BlockRefused):
    code = "block_corrupt"


class BlockStale(BlockRefused):
    code = "block_stale"


class WriterUnknown(BlockRefused):
    code = "writer_unknown"


class Equivocation(BlockRefused):
    code = "equivocation"


class KeyUnknown(BlockRefused):
    code = "key_unknown"
