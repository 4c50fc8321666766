"""What runs inside the sandbox: an interpreter server that forks one process per tree node.

The file is imported by path in a fresh interpreter; of this package it sees `preload`, `grading` with what that
imports (grading servers) and `arithmetic` (the lane's worker), and nothing else. A *zygote* imports and warms up, locks
itself down, then serves its channel; every command makes it fork, and the child runs the command's code, reports, and
serves its own channel in turn, so that each node can be forked again.

Channels are AF_UNIX SEQPACKET sockets. Command packet: b"C" + code, or b"G" + JSON pairs to grade, or
b"P" + JSON answers to group, or b"M" + JSON list of codes to run one after another, or b"A" to become the
worker of the arithmetic lane; it carries the child's channel as SCM_RIGHTS. Replies: b"H" (greeting), then
one b"R" + JSON result. Nothing said here is believed further than as a claim about this node.
"""

from __future__ import annotations

import gc
import os
import sys
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from _socket import socket as Socket

MESSAGE_CHARS = 2000
"""Longest exception message that is reported."""

GC_THRESHOLDS = (10_000, 20, 20)
"""Collections are for lineages that would run out of memory; those at Python's usual (700, 10, 10) cost a
sympy step a tenth of its time."""

RECURSION_LIMIT = 1000
"""The harness's own, Python's usual one; a lineage that sets another keeps it from step to step."""

# Called after untrusted code, which may have replaced them where they live.
_close, _exit, _fork, _freeze = os.close, os._exit, os.fork, gc.freeze
_settrace, _setprofile = sys.settrace, sys.setprofile
_getrecursionlimit, _setrecursionlimit = sys.getrecursionlimit, sys.setrecursionlimit
_type_name = type.__dict__["__name__"].__get__


def quote(text: str) -> str:
    """`text` as a JSON string in ASCII; lone surrogates become escapes, so that it cannot fail."""
    if text.isascii() and text.isprintable() and '"' not in text and "\\" not in text:
        return '"' + text + '"'
    out = []
    for char in text:
        point = ord(char)
        if char == "\n":
            out.append("\\n")
        elif char in '"\\':
            out.append("\\" + char)
        elif 32 <= point < 127:
            out.append(char)
        elif point < 0x10000:
            out.append(f"\\u{point:04x}")
        else:
            point -= 0x10000
            out.append(f"\\u{0xD800 + (point >> 10):04x}\\u{0xDC00 + (point & 0x3FF):04x}")
    return '"' + "".join(out) + '"'


def make_capture(cap: int) -> Any:
    """A text stream that keeps the first `cap` bytes (UTF-8) written since its last `take`."""
    import io

    class Capture(io.TextIOBase):
        encoding = "utf-8"
        errors = "strict"

        def __init__(self) -> None:
            self.parts: list[str] = []
            self.room = cap
            self.cut = False

        def writable(self) -> bool:
            return True

        def write(self, text: str) -> int:
            if not isinstance(text, str):
                raise TypeError(f"write() argument must be str, not {type(text).__name__}")
            if self.room > 0:
                piece = text if len(text) <= self.room else text[: self.room]
                size = len(piece) if piece.isascii() else len(piece.encode("utf-8", "surrogatepass"))
                if size > self.room:
                    data = piece.encode("utf-8", "surrogatepass")[: self.room]
                    piece = data.decode("utf-8", "ignore")
                    size = self.room
                if len(piece) < len(text):
                    self.cut = True
                self.parts.append(piece)
                self.room -= size
            elif text:
                self.cut = True
            return len(text)

        def take(self) -> tuple[str, bool]:
            text, cut = "".join(self.parts), self.cut
            self.parts, self.room, self.cut = [], cap, False
            return text, cut

    return Capture


def describe_exception(error: BaseException, traceback: Any, filename: str) -> str:
    """Type, message and line of `error` as JSON members. Runs untrusted `__str__`; capped."""
    kind = _type_name(type(error))
    try:
        message = str(error)
        message = message[:MESSAGE_CHARS] if type(message) is str else ""
    except BaseException:
        message = ""
    line = None
    if isinstance(error, SyntaxError) and type(error.lineno) is int:
        line = error.lineno
    while traceback is not None:
        if traceback.tb_frame.f_code.co_filename == filename:
            line = traceback.tb_lineno
        traceback = traceback.tb_next
    return f',"e":{quote(kind[:200])},"m":{quote(message)},"l":{"null" if line is None else line}'


def run_code(
    code: str, depth: int, namespace: dict[str, Any], stdout: Any, recursion_limit: int = RECURSION_LIMIT
) -> tuple[bytes, int]:
    """Run one step under its lineage's recursion limit; its result frame, and the limit it leaves."""
    filename = f"<step {depth}>"
    failure = ""
    try:
        compiled = compile(code, filename, "exec", dont_inherit=True)
        _setrecursionlimit(recursion_limit)
        exec(compiled, namespace)
        recursion_limit = _getrecursionlimit()
    except BaseException as error:
        _setrecursionlimit(RECURSION_LIMIT)
        failure = describe_exception(error, sys.exc_info()[2], filename)
    _settrace(None)
    _setprofile(None)
    _setrecursionlimit(RECURSION_LIMIT)
    text, cut = stdout.take()
    status = '"error"' if failure else '"ok"'
    frame = f'R{{"s":{status},"o":{quote(text)},"t":{"true" if cut else "false"}{failure}}}'
    return frame.encode("ascii"), recursion_limit


def run_grading(kind: bytes, payload: bytes) -> bytes:
    """Compare or group answers; the result frame."""
    import json

    from evolve.verify import grading

    data = json.loads(payload)
    result = [grading.equiv(a, b) for a, b in data] if kind == b"G" else grading.group(data)
    return b"R" + json.dumps({"g": result}).encode("ascii")


def serve(
    channel: Socket,
    namespace: dict[str, Any],
    stdout: Any,
    disarm: Callable[[], None],
    limit_cpu: Callable[[], None],
    here: str,
) -> None:
    """Fork on command for ever; in the child, run the command, report, and serve on.

    Written as one loop so that the stack does not grow with the depth of the tree.
    """
    from _socket import CMSG_LEN, SCM_RIGHTS, SOL_SOCKET, socket

    limit = 1 << 18
    space = CMSG_LEN(4)
    depth, recursion_limit = 0, RECURSION_LIMIT
    while True:
        packet, ancillary, _, _ = channel.recvmsg(limit, space)
        if not packet:
            _exit(0)
        fd = -1
        for level, kind, data in ancillary:
            if level == SOL_SOCKET and kind == SCM_RIGHTS:
                fd = int.from_bytes(data[:4], sys.byteorder)
        try:
            above = _fork()
        except OSError:  # No memory or processes just now. The child's channel closes, which says so.
            above = -1
        if above:
            _close(fd)
            continue
        channel.close()
        channel = socket(fileno=fd)
        verb = packet[:1]
        if depth == 0 and verb != b"A":  # All below inherit it; only here, before any code, may it be set.
            limit_cpu()
        channel.send(b"H")
        depth += 1
        if verb == b"C":
            code = packet[1:].decode("utf-8", "surrogatepass")
            del packet
            frame, recursion_limit = run_code(code, depth, namespace, stdout, recursion_limit)
            disarm()
        elif verb == b"M":
            import json

            for code in json.loads(packet[1:]):
                frame, recursion_limit = run_code(code, depth, namespace, stdout, recursion_limit)
                depth += 1
                if not frame.startswith(b'R{"s":"ok"'):
                    break
            disarm()
        elif verb == b"A":
            as_package(here)
            from evolve.verify import arithmetic

            arithmetic.Lane(run_code, stdout).serve(channel)
            _exit(0)
        else:
            frame = run_grading(verb, packet[1:])
        # What this step made is its children's too: a collection there would write to, and so copy, all of it.
        _freeze()
        try:
            channel.send(frame)
        except BaseException:
            _exit(70)
        del frame


def as_package(here: str) -> None:
    """Let this directory be imported from as `evolve.verify`, without the rest of the project."""
    import types

    for name in ("evolve", "evolve.verify"):
        sys.modules[name] = types.ModuleType(name)
        sys.modules[name].__path__ = [here]


def lock_down(channel: Socket, settings: dict[str, Any], program: bytes) -> None:
    """Collapse the heap into huge pages, forbid dumps, load the seccomp program, hand out its listener."""
    import array
    import ctypes
    import socket

    libc = ctypes.CDLL(None, use_errno=True)
    for start, end in settings["ranges"]:
        start, end = -(-start >> 21) << 21, end >> 21 << 21
        if end > start:
            # MADV_COLLAPSE, which older kernels lack. It gives no hint that later pages should be huge, too.
            libc.madvise(ctypes.c_void_p(start), ctypes.c_size_t(end - start), 25)

    def prctl(*values: int) -> None:
        if libc.prctl(*[ctypes.c_ulong(v) for v in values]) != 0:
            raise OSError(ctypes.get_errno(), f"prctl{values}")

    # PR_SET_THP_DISABLE: memory is counted by page faults, and a huge page, as numpy asks for, is but one.
    prctl(41, 1, 0, 0, 0)
    prctl(4, 0, 0, 0, 0)  # PR_SET_DUMPABLE
    prctl(38, 1, 0, 0, 0)  # PR_SET_NO_NEW_PRIVS
    if not program:
        channel.send(b"R")
        return

    class Program(ctypes.Structure):
        _fields_ = [("len", ctypes.c_ushort), ("filter", ctypes.c_char_p)]

    described = Program(len(program) // 8, program)
    # seccomp(SECCOMP_SET_MODE_FILTER, SECCOMP_FILTER_FLAG_NEW_LISTENER, program)
    listener = libc.syscall(settings["seccomp_nr"], 1, ctypes.c_ulong(8), ctypes.byref(described))
    if listener < 0:
        raise OSError(ctypes.get_errno(), "seccomp refused the filter")
    channel.sendmsg([b"R"], [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", [listener]))])
    os.close(listener)


def main(kind: str, fd: int, here: str) -> None:
    """Warm up, lock down, serve. `here`: this file's directory, hidden from the code to be run."""
    import json
    import resource
    import signal
    import socket
    import types

    channel = socket.socket(fileno=fd)
    sys.path.remove(here)
    as_package(here)
    from evolve.verify.preload import fill_pools, preload

    preload(kind)
    if kind != "grade":
        for name in [name for name in sys.modules if name.partition(".")[0] == "evolve"]:
            del sys.modules[name]
    channel.send(b"W")
    settings = json.loads(channel.recv(1 << 18))
    program = channel.recv(1 << 18) if settings["seccomp"] else b""

    null = os.open("/dev/null", os.O_RDWR)
    for standard in (0, 1, 2):
        os.dup2(null, standard)
    if null > 2:
        os.close(null)
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)

    import builtins
    import io

    stdout, stderr = make_capture(settings["output_bytes"])(), make_capture(0)()
    inherited: Any = sys
    inherited.stdout = inherited.__stdout__ = stdout
    inherited.stderr = inherited.__stderr__ = stderr
    inherited.stdin = inherited.__stdin__ = io.StringIO()
    quitting: Any = builtins
    quitting.exit = quitting.quit = sys.exit
    module = types.ModuleType("__main__")
    module.__dict__["__builtins__"] = builtins
    sys.modules["__main__"] = module
    sys.argv = [""]

    setitimer, alarm, set_handler = signal.setitimer, signal.alarm, sys.modules["_signal"].signal
    child_ends, ignored = int(signal.SIGCHLD), int(signal.SIG_IGN)
    timers = (signal.ITIMER_REAL, signal.ITIMER_VIRTUAL, signal.ITIMER_PROF)

    def disarm() -> None:
        for timer in timers:
            setitimer(timer, 0)
        alarm(0)
        set_handler(child_ends, ignored)

    setrlimit, limit = resource.setrlimit, (settings["cpu_s"], settings["cpu_s"] + 1)

    def limit_cpu() -> None:
        setrlimit(resource.RLIMIT_CPU, limit)

    lock_down(channel, settings, program)
    gc.set_threshold(*GC_THRESHOLDS)
    gc.collect()
    _fillers = [] if kind == "light" else fill_pools()
    gc.freeze()
    try:
        serve(channel, module.__dict__, stdout, disarm, limit_cpu, here)
    finally:
        # The code broke the harness it ran in. At once: an orderly end takes the modules apart for seconds.
        _exit(70)
