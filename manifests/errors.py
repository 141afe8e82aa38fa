"""The errors that svgpipe raises for what a user or a file got wrong.

    SvgpipeError                 one clear message, exit code 1
    ├── UsageError               the command line or a recipe asks for something impossible, exit code 2
    ├── MismatchError            two artifacts, or an artifact and a config, do not belong together
    ├── ArtifactError            a file or directory is missing, damaged, unfinished or of another kind
    ├── DivergedError            training met a NaN or an infinity
    └── InterruptedRunError      a stop that was asked for; what was done is kept, exit code 130

A message names the file, what was expected, what was found and what to do next.
"""

from __future__ import annotations

import errno
import os


class SvgpipeError(Exception):
    """Something outside the code is wrong; the message is meant for the person at the terminal."""

    exit_code = 1


class UsageError(SvgpipeError):
    """A command or recipe that cannot work as written."""

    exit_code = 2


class MismatchError(SvgpipeError):
    """Two things that must belong together do not; the message names both and the differing fields."""


class ArtifactError(SvgpipeError):
    """A file or directory that is missing, damaged, unfinished or of another kind than needed."""


class DivergedError(SvgpipeError):
    """Training produced a NaN or an infinity; the message names the step and the last good checkpoint."""


class InterruptedRunError(SvgpipeError):
    """The run was asked to stop; everything finished so far is on disk and the same command resumes."""

    exit_code = 130


def first_line(error: BaseException) -> str:
    """Kind and first line of another library's error, for use inside a message."""
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0]}" if lines else type(error).__name__


MEMORY_ADVICE = (
    "A smaller batch_size needs less: an evaluation continues with it (--set SECTION.batch_size=N), other stages start "
    "again in another --out."
)


def memory_error(error: BaseException, advice: str = MEMORY_ADVICE) -> SvgpipeError | None:
    """What to raise for a GPU or CPU that ran out of memory; None for any other error.

    The error is recognised by its name, because its class lies in torch, and not every command loads torch.

    Args:
        advice: last sentence of the message: which options need less memory.
    """
    on_gpu = type(error).__name__ == "OutOfMemoryError" and type(error).__module__.partition(".")[0] == "torch"
    if not on_gpu and "DefaultCPUAllocator: can't allocate" not in str(error):
        return None
    return SvgpipeError(f"out of memory ({first_line(error)}). Finished work is kept. {advice}")


def storage_error(path: object, error: Exception) -> Exception:
    """What to raise for a failed write that a storage library reports in words of its own.

    A full disk becomes the OSError that it was; anything else an ArtifactError with the library's words.
    """
    text = str(error)
    if os.strerror(errno.ENOSPC) in text or "os error 28" in text:
        return OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))
    return ArtifactError(f"{path}: could not be written: {text}")
