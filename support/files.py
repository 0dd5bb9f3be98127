"""
Files that are whole or absent, and the one exception for what a user can put right.
"""
import contextlib
import errno
import math
import os
import secrets
import sys
import time

import torch

try:
    import fcntl
except ImportError:             # Windows: nobody warns of two runs or evaluations in one folder
    fcntl = None

class Refused(Exception):
    """Wrong input. Its text is one line that says what to do; a script prints it and ends with status 2.
    Never raised for a fault of our own, which keeps its traceback."""

@contextlib.contextmanager
def atomic(path):
    """with atomic(path) as tmp: write tmp. Afterwards path is the whole new file or, after any error, still
    the old one."""
    folder = os.path.dirname(os.path.abspath(path))
    os.makedirs(folder, exist_ok=True)
    tmp = os.path.join(folder, f'.{os.path.basename(path)}.{secrets.token_hex(4)}.tmp')
    try:
        yield tmp
        with open(tmp, 'rb+') as f:
            os.fsync(f.fileno())            # on disk before the name points at it
        os.replace(tmp, path)
    except OSError as e:
        if e.filename in (None, tmp):       # a full disk names no file
            e.filename = path
        raise
    finally:
        with contextlib.suppress(FileNotFoundError):
            os.remove(tmp)

def check_writable(path):
    """Raises Refused where atomic(path) would fail after the work; path stays as it is."""
    if os.path.isdir(path):
        raise Refused(f'cannot write {path}: it is a folder')
    try:
        with atomic(f'{path}.try') as tmp, open(tmp, 'w') as f:
            f.write('')
        os.remove(f'{path}.try')
    except OSError as e:
        raise Refused(cannot_write(path, e)) from e

def save(path, content):
    """torch.save, whole or not at all. Raises OSError."""
    with atomic(path) as tmp, open(tmp, 'wb') as f:
        try:
            torch.save(content, f)
        except RuntimeError as e:       # torch.save's word for a full disk; what the disk said is behind it
            if isinstance(e.__context__, OSError):
                raise e.__context__
            raise OSError(errno.EIO, str(e)) from e

def lock(file, shared=False):
    """Lock an open file until this process ends, however; false if another process holds it. shared: beside
    others that share it."""
    try:
        if fcntl:
            fcntl.lockf(file, (fcntl.LOCK_SH if shared else fcntl.LOCK_EX) | fcntl.LOCK_NB)
    except (BlockingIOError, PermissionError):
        return False
    return True

def is_locked(path):
    """Does another process hold this lock? Of a run it is FOLDER/.lock."""
    if not os.path.exists(path):
        return False
    with open(path) as f:               # a shared lock asks for no right to write; closing it lets go again
        return not lock(f, shared=True)

def wait_for(path, what, seconds=math.inf):
    """Until no other process holds this lock, or for so many seconds. what: a line for the screen."""
    begun = time.monotonic()
    if is_locked(path):
        say(what)
    while is_locked(path) and time.monotonic() - begun < seconds:
        time.sleep(1)

# -----------------------------------------------------------------------------
# what goes wrong

def cannot_write(path, problem):
    """problem: an OSError. -> a line."""
    full = 'the disk is full: ' if problem.errno in (errno.ENOSPC, errno.EDQUOT) else ''
    return f'{full}cannot write {path}: {problem.strerror or problem}'

def out_of_memory(problem):
    """Is it, by its text, PyTorch's, oneDNN's or cuDNN's RuntimeError for that?"""
    signs = 'out of memory', "can't allocate memory", 'alloc_failed'
    return any(sign in str(problem).lower() for sign in signs)

# -----------------------------------------------------------------------------
# the screen

def plain_output():
    """A path that the terminal's encoding does not know is written with escapes instead of
    ending the script."""
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, 'reconfigure'):          # a notebook's or pytest's may not have it
            stream.reconfigure(errors='backslashreplace')

def say(*lines):
    """print, line by line, whatever becomes of the reader: `| head` must not end a training."""
    try:
        for line in lines:
            print(line, flush=True)
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
