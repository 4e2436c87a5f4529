"""What a command says when something fails: one line, without credentials.

`UserError` is the kind of failure a user can put right. `redact` is the project's one redactor;
`command` sends every error, and every traceback that would reach the terminal, through it. Where
an error comes from, and what it says, is the other modules' subject.
"""

import logging
import os
import re
import select
import sys
import threading
import traceback
from collections.abc import Callable
from pathlib import Path
from types import TracebackType
from urllib.parse import quote

from shards.format import FormatError

REDACTED = "***"

MIN_SECRET_CHARS = 6
"""Shorter values of credential variables stay: replacing `true` or `1` would garble any text."""

_SIGPIPE_STATUS = 141
"""As a shell says it of a program that writes to a pipe without a reader."""

_CREDENTIAL_NAME = re.compile(
    r"KEY|SECRET|TOKEN|PASSW|PASSPHRASE|CREDENTIAL|CONNECTION_STRING|SIGNATURE|(^|_)SAS(_|$)",
    re.IGNORECASE,
)
_PATTERNS = [
    # user:secret@ of any URL: up to the last @, because a secret may hold / and @ itself.
    (re.compile(r"(://)[^\s/@:\"']*:[^\s\"'<>]*@"), rf"\1{REDACTED}@"),
    # A token alone before the host. Not for abfs://CONTAINER@ACCOUNT, which is a name.
    (re.compile(r"((?:https?|s3|gs|gcs)://)[^\s/@\"'<>]+@", re.IGNORECASE), rf"\1{REDACTED}@"),
    # The query of an object's URL: whatever it is for, the store's own clients take none.
    (
        re.compile(r"\b((?:s3|gs|gcs|abfss?|az)://[^\s?\"'<>]*\?)[^\s\"'<>]*=[^\s\"'<>]*"),
        rf"\1{REDACTED}",
    ),
    # Signed URLs and headers of S3, Google and Azure; keys of connection strings.
    (
        re.compile(
            r"\b((?:X-(?:Amz|Goog)-)?(?:Signature|Credential|Security-Token)|sig|AWSAccessKeyId"
            r"|GoogleAccessId|AccountKey|SharedAccessKey|SharedAccessSignature"
            r"|(?:aws_)?secret(?:_access)?_key|aws_session_token|client_secret|password)"
            r"((?:%3D|=|[\"']?:\s?)[\"']?)[^\s&;,\"'<>]+",
            re.IGNORECASE,
        ),
        rf"\1\2{REDACTED}",
    ),
    (re.compile(r"\b(Bearer|SharedKey)(\s+)[^\s\"',]+", re.IGNORECASE), rf"\1\2{REDACTED}"),
    (
        re.compile(
            r"-----BEGIN [A-Z ]*PRIVATE KEY-----.*?(-----END [A-Z ]*PRIVATE KEY-----|$)", re.S
        ),
        REDACTED,
    ),
]

_CONTROL = re.compile(r"[\x00-\x1f\x7f-\x9f\u2028\u2029\ud800-\udfff]")


class UserError(Exception):
    """What a user can put right: one line that names the file or option and what to do."""


class StorageError(UserError):
    """A file or an object that could not be read or written, perhaps by this process alone."""


class MissingError(StorageError):
    """The storage answered: it has no such object."""


def redact(text: str) -> str:
    """`text` without credentials.

    Removed: `user:secret@` of URLs, signatures and keys of signed URLs, headers and connection
    strings, and the value of every environment variable whose name speaks of a credential.
    """
    for secret in _environment_secrets():
        text = text.replace(secret, REDACTED)
    for pattern, replacement in _PATTERNS:
        text = pattern.sub(replacement, text)
    return text


def _environment_secrets() -> list[str]:
    """Secret values as they are and as a URL spells them, longest first."""
    secrets = {
        value
        for name, value in os.environ.items()
        if len(value) >= MIN_SECRET_CHARS
        and _CREDENTIAL_NAME.search(name)
        and not _is_existing_path(value)
    }
    secrets |= {quote(secret, safe="") for secret in secrets}
    return sorted(secrets, key=len, reverse=True)


def _is_existing_path(value: str) -> bool:
    """Whether it is a file that holds a credential, which an error may name."""
    try:
        return Path(value).exists()
    except (OSError, ValueError):
        return False


def command(verb: str, action: Callable[[], int]) -> int:
    """Runs a command's `action`; returns its exit status, or 2 after one line about its error.

    From here on, tracebacks of any thread are printed without credentials.
    """
    redact_tracebacks()
    try:
        status = action()
        if sys.stdout is not None:
            sys.stdout.flush()
        return status
    except BrokenPipeError:
        if not _nobody_reads():
            raise
        return _SIGPIPE_STATUS
    except (UserError, FormatError) as error:
        print(one_line(redact(f"pixloom {verb}: error: {error}")), file=sys.stderr)
        return 2
    except MemoryError:
        print(f"pixloom {verb}: error: not enough memory", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print(f"pixloom {verb}: interrupted", file=sys.stderr)
        return 130


def _nobody_reads() -> bool:
    """Whether who read our stdout has seen enough, as `head` does; what is left goes nowhere."""
    poll = select.poll()
    poll.register(sys.stdout, 0)  # of a pipe's other end it tells in any case
    if not poll.poll(0):
        return False
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    return True


def tell(line: str) -> None:
    """A line on stderr, at once with its end: other processes write to the same place."""
    sys.stderr.write(f"{line}\n")
    sys.stderr.flush()


def one_line(text: str) -> str:
    """`text` with control characters and line ends, as names of files may have them, spelt out."""
    return _CONTROL.sub(lambda match: ascii(match[0])[1:-1], text)


def redact_tracebacks() -> None:
    """Takes credentials out of what the interpreter itself prints: uncaught errors of the main
    and of other threads, and records of loggers that nobody configured.

    A hook that somebody else has set stays, because it may not print at all.
    """
    if sys.excepthook is sys.__excepthook__:
        sys.excepthook = _print_exception
    if threading.excepthook is threading.__excepthook__:
        threading.excepthook = _print_thread_exception
    if logging.lastResort is not None:
        logging.lastResort.setFormatter(_RedactingFormatter())


def _print_exception(
    kind: type[BaseException], error: BaseException, trace: TracebackType | None
) -> None:
    text = "".join(traceback.format_exception(kind, error, trace))
    print(redact(text), end="", file=sys.stderr, flush=True)


def _print_thread_exception(hook: threading.ExceptHookArgs) -> None:
    if hook.exc_type is SystemExit or sys.stderr is None:
        return
    name = hook.thread.name if hook.thread is not None else "unknown"
    print(f"Exception in thread {name}:", file=sys.stderr)
    _print_exception(hook.exc_type, hook.exc_value or hook.exc_type(), hook.exc_traceback)


class _RedactingFormatter(logging.Formatter):
    def format(self, record: logging.LogRecord) -> str:
        return redact(super().format(record))
