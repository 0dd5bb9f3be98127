"""
Another of the scripts, run by this one.
"""
import os
import signal
import subprocess
import sys
import threading

class Stopped(Exception):
    """A signal asked this script to stop while the other one worked; that one has saved and ended."""

def _in_a_terminal():
    """Does Ctrl-C reach this process, and with it all that it has started?"""
    try:
        terminal = os.open('/dev/tty', os.O_RDONLY)
    except OSError:
        return os.name == 'nt'
    try:
        return os.tcgetpgrp(terminal) == os.getpgrp()
    finally:
        os.close(terminal)

def run(command, cwd=None):
    """python COMMAND, a list -> its exit status. SIGINT, SIGTERM and SIGHUP go on to it; once it has saved
    and ended, Stopped is raised here. (In another thread than the main one Python takes no handlers.)"""
    child = subprocess.Popen([sys.executable, *command], cwd=cwd)
    if threading.current_thread() is not threading.main_thread():
        return child.wait()
    asked = False

    def pass_on(number, frame):
        nonlocal asked
        asked = True
        if number != signal.SIGINT:
            child.send_signal(number)
        elif not _in_a_terminal():              # a second SIGINT, if one has come, would mean: at once
            child.send_signal(signal.SIGTERM)

    before = {}
    for number in (signal.SIGINT, signal.SIGTERM, getattr(signal, 'SIGHUP', None)):
        if number is not None and signal.getsignal(number) is not signal.SIG_IGN:       # nohup ignores SIGHUP
            before[number] = signal.signal(number, pass_on)
    try:
        status = child.wait()
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
    if asked:
        raise Stopped
    return status
