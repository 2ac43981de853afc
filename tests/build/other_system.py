"""Run as a script: makes this Python look like one of macOS or Windows, then runs the code that is its second argument.

What tells the system is changed, and what the system lacks is taken away: modules, parts of os, /proc. The modules
named after the code are imported before that: they are built for Linux and choose their parts by the system.
"""

import builtins
import ctypes
import importlib
import io
import os
import platform
import sys
import sysconfig

PLATFORMS = {"Darwin": "darwin", "Windows": "win32"}
NO_MODULES = {"Darwin": ["triton"], "Windows": ["triton", "fcntl", "grp", "pwd", "resource", "termios"]}
NO_AFFINITY = ["sched_getaffinity", "sched_setaffinity"]
NOT_IN_OS = {
    "Darwin": NO_AFFINITY,
    "Windows": [*NO_AFFINITY, "sysconf", "getloadavg", "fork", "register_at_fork", "uname"],
}
open_file = io.open


class LibraryOfWindows(ctypes.CDLL):
    def __init__(self, name, *arguments, **options):
        if name is None:
            raise TypeError("LoadLibrary() argument 1 must be str, not None")
        super().__init__(name, *arguments, **options)


def open_without_proc(file, *arguments, **options):
    if str(file).startswith("/proc/"):
        raise FileNotFoundError(file)
    return open_file(file, *arguments, **options)


def pretend(system):
    sys.platform = PLATFORMS[system]
    platform.system = lambda: system
    for name in NO_MODULES[system]:
        sys.modules[name] = None
    for name in NOT_IN_OS[system]:
        delattr(os, name)
    io.open = builtins.open = open_without_proc
    if system == "Windows":
        ctypes.CDLL = LibraryOfWindows


if __name__ == "__main__":
    system, code, *before = sys.argv[1:]
    for name in before:
        importlib.import_module(name)
    sysconfig.get_config_vars()  # read from a file that is named by the system
    pretend(system)
    sys.argv[1:] = []
    exec(code)
