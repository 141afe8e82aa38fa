"""The root command, and messages for all errors."""

from __future__ import annotations

import errno
import io
import logging
import sys
from typing import Annotated

import typer

from svgpipe.manifests.errors import InterruptedRunError, SvgpipeError, compile_error, memory_error
from svgpipe.manifests.filesystem import client_error
from svgpipe.manifests.manifest import svgpipe_version

from . import analysis_commands, artifact_commands, run_commands, sample_commands, stage_commands
from .cluster import stop_on_sigterm

app = typer.Typer(
    help="Train latent diffusion from cached vision features: shard, extract, train, sample, evaluate.\n\n"
    "Every command resumes: run it again after an interruption.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
app.add_typer(run_commands.app)
app.add_typer(stage_commands.app)
app.add_typer(sample_commands.app)
app.add_typer(artifact_commands.app)
app.add_typer(analysis_commands.app)


def _print_version(value: bool) -> None:
    if value:
        typer.echo(f"svgpipe {svgpipe_version()}")
        raise typer.Exit


@app.callback()
def _root(
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version and exit.")
    ] = False,
) -> None:
    del version


def _explain(error: OSError) -> str:
    where = f"{error.filename}: " if error.filename else ""
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        return f"{where}no space left on the device. Finished work is kept; free space and run the command again."
    if error.errno in (errno.ENOENT, errno.ENOTDIR, errno.EISDIR, errno.EEXIST, errno.EACCES, errno.EPERM, errno.EROFS):
        return f"{where}{error.strerror}. Check the path and its permissions."
    return f"{where}{error.strerror or error}. Finished work is kept."


def _show_log() -> None:
    """Show svgpipe's own log lines on stderr, for example the attention kernel; no other library's."""
    log = logging.getLogger("svgpipe")
    if not log.handlers:
        handler = logging.StreamHandler()
        handler.setFormatter(logging.Formatter("%(message)s"))
        log.addHandler(handler)
        log.setLevel(logging.INFO)
        log.propagate = False


def _stopped() -> int:
    typer.echo("stopped. Finished work is kept; the same command resumes.", err=True)
    return 130


def _interrupted(error: BaseException | None) -> bool:
    """Return whether Ctrl-C caused an error. Inside another library's lock it can surface as a RuntimeError."""
    while error is not None:
        if isinstance(error, KeyboardInterrupt):
            return True
        error = error.__cause__ or error.__context__
    return False


def main(arguments: list[str] | None = None) -> int:
    """Run one command. A user's mistake prints one message, without a traceback.

    Returns:
        The exit code.
    """
    _show_log()
    try:
        result = app(arguments, standalone_mode=False, prog_name="svgpipe")
    except InterruptedRunError as error:
        typer.echo(str(error), err=True)
        return error.exit_code
    except SvgpipeError as error:
        typer.echo(f"error: {error}", err=True)
        return error.exit_code
    except (KeyboardInterrupt, typer.Abort):
        return _stopped()
    except OSError as error:
        typer.echo(f"error: {_explain(error)}", err=True)
        return 1
    except Exception as error:
        if _interrupted(error):
            return _stopped()
        if (refused := memory_error(error) or compile_error(error) or client_error(error)) is not None:
            typer.echo(f"error: {refused}", err=True)
            return 1
        # Usage errors have click's class, which newer typer versions vendor and do not export.
        show = getattr(error, "show", None)
        if not callable(show):
            raise
        show()
        return 2
    # typer silently converts Ctrl-C to the result 130.
    return _stopped() if result == 130 else result if isinstance(result, int) else 0


def entry() -> None:
    """Run the console script."""
    stop_on_sigterm()
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")  # a terminal may not know "…" or a class name
    sys.exit(main())
