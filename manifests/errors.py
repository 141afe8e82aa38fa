"""Errors for mistakes of a user and for damaged files.

    SvgpipeError                 one clear message, exit code 1
    ├── UsageError               the command line or a recipe is invalid, exit code 2
    ├── MismatchError            two artifacts, or an artifact and a config, do not match
    ├── ArtifactError            a file or directory is missing, damaged, unfinished or of another kind
    ├── DivergedError            training produced NaN or infinity
    └── InterruptedRunError      the user stopped the run; finished work is kept, exit code 130

A message says where, what was expected, what was found, and what to do.
"""

from __future__ import annotations

import errno
import os


class SvgpipeError(Exception):
    """Base of all errors that are printed as one message, without a traceback."""

    exit_code = 1


class UsageError(SvgpipeError):
    """A command or recipe that is invalid."""

    exit_code = 2


class MismatchError(SvgpipeError):
    """Two artifacts that must match do not. The message names both and the differing fields."""


class ArtifactError(SvgpipeError):
    """A file or directory that is missing, damaged, unfinished or of another kind."""


class DivergedError(SvgpipeError):
    """Training produced NaN or infinity. The message names the step and the last good checkpoint."""


class InterruptedRunError(SvgpipeError):
    """The user stopped the run. Finished work is on disk, and the same command resumes."""

    exit_code = 130


def first_line(error: BaseException) -> str:
    """Return class and first line of another library's error, for use inside a message."""
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0]}" if lines else type(error).__name__


MEMORY_ADVICE = (
    "A smaller batch_size needs less memory: an evaluation continues with it (--set SECTION.batch_size=N), other "
    "stages start again in another output directory."
)


def memory_error(error: BaseException, advice: str = MEMORY_ADVICE) -> SvgpipeError | None:
    """Return the error to raise when a GPU or the CPU ran out of memory; None for any other error.

    The class is recognised by its name, because it is defined in torch, and not every command loads torch.

    Args:
        error: what was raised.
        advice: last sentence of the message: options that need less memory.
    """
    on_gpu = type(error).__name__ == "OutOfMemoryError" and type(error).__module__.partition(".")[0] == "torch"
    if not on_gpu and "DefaultCPUAllocator: can't allocate" not in str(error):
        return None
    return SvgpipeError(f"out of memory ({first_line(error)}). Finished work is kept. {advice}")


def compile_error(error: BaseException) -> SvgpipeError | None:
    """Return the error to raise when torch.compile failed; None for any other error. Recognised by the module."""
    if not type(error).__module__.startswith(("torch._dynamo", "torch._inductor")):
        return None
    return SvgpipeError(
        f"torch.compile failed ({first_line(error)}). Finished work is kept. Compiling needs a C++ compiler, such as "
        "g++, and free space for temporary files. To run without compiling: --set diffusion.compile=false, "
        "evaluation.compile=false or extract.compile=false."
    )


def storage_error(path: object, error: Exception) -> Exception:
    """Return the error to raise for a failed write that a storage library reports as text.

    A full disk becomes an OSError with its number. Anything else becomes an ArtifactError with the library's text.
    """
    text = str(error)
    if os.strerror(errno.ENOSPC) in text or "os error 28" in text:
        return OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))
    return ArtifactError(f"{path}: could not be written: {text}")
