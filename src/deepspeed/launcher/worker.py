"""One rank's process, before and around the user's script.

Run by path, as ``python -u worker.py LAUNCHER_PID KIND CORES LOG TARGET ARGUMENTS...``, so that a script which needs
no torch does not wait for it: only the standard library is imported here. In order: ask the kernel to end this process
with its launcher, pin it to CORES (comma-separated, or ``-``), send its output to the file LOG (or, ``-``, leave it),
then run TARGET, whose KIND is ``script``, ``module`` or ``program``. What ends the script
early is written to the file that TORCHELASTIC_ERROR_FILE names, in the form of torch's own ``record`` decorator; a
crash in native code leaves its Python stack in ``fault.txt`` beside it.
"""

from __future__ import annotations

import contextlib
import ctypes
import faulthandler
import json
import os
import runpy
import signal
import sys
import time
import traceback
from pathlib import Path
from typing import NoReturn

PR_SET_PDEATHSIG = 1
INTERRUPTED = 130


def main() -> None:
    """Become the rank that the command line describes."""
    launcher, kind, cores, log, *command = sys.argv[1:]
    end_with(int(launcher), signal.SIGKILL)
    if cores != "-":
        os.sched_setaffinity(0, {int(core) for core in cores.split(",")})
    if log != "-":
        redirect(Path(log))
    if kind == "program":
        execute(command)
    error_file = Path(os.environ["TORCHELASTIC_ERROR_FILE"])
    sys.argv[:] = command
    with (error_file.parent / "fault.txt").open("w") as faults:
        faulthandler.enable(faults)
        try:
            run(kind, command[0])
        except KeyboardInterrupt:
            sys.exit(INTERRUPTED)
        except Exception as error:
            _record(error, error_file)
            sys.exit(1)
        finally:
            faulthandler.disable()


def end_with(parent: int, number: signal.Signals) -> None:
    """Ask the kernel (Linux) for signal ``number`` when ``parent``, this process's own, ends: even when it is killed
    with SIGKILL and cannot clean up, nothing that it has started stays."""
    if sys.platform != "linux":
        return
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, number)
    if os.getppid() != parent:  # it died before the request above
        sys.exit("the launcher is gone")


def redirect(log: Path) -> None:
    """Send this process's output to a file."""
    log.parent.mkdir(parents=True, exist_ok=True)
    with log.open("wb") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)


def execute(command: list[str]) -> NoReturn:
    """Become another program."""
    try:
        os.execvp(command[0], command)
    except OSError as error:
        sys.exit(f"cannot run the program {command[0]}: {error.strerror}")


def run(kind: str, target: str) -> None:
    """Run a script or module in this process, as Python itself would."""
    if kind == "module":
        sys.path[0] = str(Path.cwd())
        runpy.run_module(target, run_name="__main__", alter_sys=True)
        return
    sys.path[0] = str(Path(target).resolve().parent)
    runpy.run_path(target, run_name="__main__")


def show(error: Exception) -> None:
    """Show an error in the script as the script itself would have shown it."""
    if sys.excepthook is sys.__excepthook__:
        sys.stderr.write(_traceback(error))
    else:  # the script has a way of its own to show errors
        sys.excepthook(type(error), error, error.__traceback__)


def _traceback(error: Exception) -> str:
    """The traceback from the script on, without the frames that lead there."""
    own, runner = Path(__file__).parent, (runpy.__file__, "<frozen runpy>")
    tree = traceback.TracebackException.from_exception(error)
    frames = [frame for frame in tree.stack if Path(frame.filename).parent != own and frame.filename not in runner]
    tree.stack = traceback.StackSummary.from_list(frames)
    return "".join(tree.format())


def _record(error: Exception, error_file: Path) -> None:
    """Leave the traceback to the launcher, which shows the first rank's and counts the others in one line each."""
    if sys.excepthook is not sys.__excepthook__:
        show(error)
    if error_file.exists():  # the script is decorated with torch's record, which has written it
        return
    text = _traceback(error)
    message = {
        "message": f"{type(error).__name__}: {error}",
        "extraInfo": {"py_callstack": text, "timestamp": str(int(time.time())), "time": time.time()},
    }
    scratch = error_file.with_suffix(".part")
    with contextlib.suppress(OSError):  # a full disk must not hide the error: it is then on stderr below
        scratch.write_text(json.dumps({"message": message}))
        scratch.replace(error_file)
        return
    sys.stderr.write(text)


if __name__ == "__main__":
    main()
