"""Exit statuses of `imvar batch`; those from sysexits.h have its numbers."""

from typing import Any

from ..errors import ImvarError

DONE, TOO_MANY_ERRORS, MISUSED = 0, 1, 2
GIVEN_UP = 70  # EX_SOFTWARE: workers die whatever the driver does
OUT_OF_MEMORY = 71  # EX_OSERR
FULL_DISK = 74  # EX_IOERR
TO_BE_MADE_AGAIN = 75  # EX_TEMPFAIL: verify found files that are not as they were written
INTERRUPTED, TERMINATED = 130, 143  # 128 + the signal

MEANINGS = {
    MISUSED: "an error in the settings or the environment, see above",
    OUT_OF_MEMORY: "a lack of memory, see above",
    FULL_DISK: "a full disk, see above",
    INTERRUPTED: "an interrupt",
    TERMINATED: "a request to end",
}
EXPECTED = set(MEANINGS)
"""What a worker ends with that does not change when it is started again."""


class BatchError(ImvarError):
    """A batch cannot go on. `status`: the exit status of the command."""

    def __init__(self, *args: Any, status: int = 1):
        super().__init__(*args)
        self.status = status
