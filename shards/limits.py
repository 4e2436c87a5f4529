"""What an image may be at most, and how one that is more, or none at all, is refused."""

MAX_PIXELS = 64_000_000
MAX_SIDE = 65_535
MAX_FILE_BYTES = 512 * 2**20
"""Of a file; and of the decoded values of an array, which is kept as it is."""


class ImageRefused(Exception):  # noqa: N818 (an outcome with a cause, not a fault)
    """An image that is not packed; `cause` is one word, counted under it.

    One of `empty`, `too_large`, `unsupported_format`, `unsupported_mode`, `truncated`, `corrupt`;
    of arrays and TIFFs of many bands also `wrong_channels`, `unsupported_compression`, and
    `needs_imagecodecs` where a library that reads the compression is not installed.
    """

    def __init__(self, cause: str) -> None:
        super().__init__(cause)
        self.cause = cause


def check_size(width: int, height: int, num_bytes: int = 0) -> None:
    """Raises `ImageRefused` for sides in pixels, or bytes when decoded, above the limits."""
    if min(width, height) < 1:
        raise ImageRefused("corrupt")
    if width * height > MAX_PIXELS or max(width, height) > MAX_SIDE or num_bytes > MAX_FILE_BYTES:
        raise ImageRefused("too_large")
