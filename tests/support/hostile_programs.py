"""Programs that try to break out of the sandbox, or to be judged better than they are."""

# Each `attempt` is true where it got what it wanted. SECRET is a file of the user's, DIRECTORY is
# one that the user may write, PORT is listened on.
BREAK_OUTS = {
    "fork_bomb": """
import os
def attempt():
    started = 0
    try:
        while True:
            if os.fork() == 0:
                while True: pass
            started += 1
    except OSError:
        return started > 6
""",
    "thread_bomb": """
import threading, time
def attempt():
    started = 0
    try:
        while True:
            threading.Thread(target=time.sleep, args=(60,), daemon=True).start()
            started += 1
    except RuntimeError:
        return started > 6
""",
    "memory_of_many_processes": """
import os
def fill():
    held = []
    try:
        while True: held.append(bytearray(1 << 20))
    except MemoryError:
        return len(held)
def attempt():
    children, sizes = [], []
    try:
        while True:
            out, into = os.pipe()
            child = os.fork()
            if child == 0:
                os.write(into, str(fill()).encode())
                os._exit(0)
            os.close(into)
            children.append(out)
    except OSError:
        pass
    return sum(int(os.read(out, 9)) for out in children) > 6 * 128
""",
    "memory_outside_of_processes": """
import ctypes, os
libc = ctypes.CDLL(None)
def attempt():
    memory = [libc.shmget(0, 1 << 20, 0o1600), libc.memfd_create(b"", 0), libc.syscall(447, 0)]
    return any(number >= 0 for number in memory)
""",
    "fill_the_disk": """
import itertools
def attempt():
    written = 0
    try:
        for number in itertools.count():
            with open(f"file{number}", "wb", buffering=0) as file:
                written += file.write(bytes(1 << 20))
    except OSError:
        return written > 8 << 20
""",
    "many_empty_files": """
import itertools
def attempt():
    try:
        for number in itertools.count():
            open(str(number), "x").close()
    except OSError:
        return number > 4096
""",
    "large_sparse_file": """
import os
def attempt():
    try:
        with open("sparse", "wb") as file:
            os.truncate(file.fileno(), 1 << 40)
        return True
    except OSError:
        return False
""",
    "read_the_users_files": """
import glob, os
def attempt():
    found = [SECRET] if os.path.exists(SECRET) else []
    for pattern in ("/root/.ssh", "/home/*", "/etc/shadow", "/etc/passwd", "/var/*", "/run/*"):
        found += glob.glob(pattern)
    return found
""",
    "write_outside": """
import os
def attempt():
    written = []
    for directory in (DIRECTORY, "", "/dev", "/lib", "/usr/lib", "/usr", "/etc", "/tmp", "/var"):
        try:
            open(f"{directory}/written", "x")
            written.append(directory)
        except OSError:
            pass
    for directory in ("/", "/lib", "/usr/lib"):
        if not os.statvfs(directory).f_flag & os.ST_RDONLY:
            written.append(directory)
    return written
""",
    "symlink_out": """
import os
def attempt():
    os.symlink(SECRET, "in")
    os.symlink(DIRECTORY, "out")
    gained = []
    for path, mode in (("in", "r"), ("out/written", "x")):
        try:
            open(path, mode)
            gained.append(path)
        except OSError:
            pass
    return gained
""",
    "network": """
import ctypes, socket
def attempt():
    gained = []
    try:
        gained.append(socket.create_connection(("127.0.0.1", PORT), timeout=1))
    except OSError:
        pass
    for family in range(45):
        for kind in (socket.SOCK_STREAM, socket.SOCK_DGRAM, socket.SOCK_RAW):
            try:
                socket.socket(family, kind)
                gained.append((family, kind))
            except OSError:
                pass
    return gained
""",
    "kill_the_parents": """
import os, signal
def attempt():
    for pid in (-1, os.getppid(), 1):
        try:
            os.kill(pid, signal.SIGKILL)
        except ProcessLookupError:
            pass
    return os.getppid() > 2
""",
    "escape_by_ctypes": """
import ctypes, os
libc = ctypes.CDLL(None)
def attempt():
    buffer = ctypes.create_string_buffer(8)
    vector = (ctypes.c_void_p * 2)(ctypes.addressof(buffer), 8)
    new_user, new_mounts, parent = 0x10000000, 0x20000, os.getppid()
    clone = {"x86_64": 56, "aarch64": 220}[os.uname().machine]
    calls = [
        ("unshare", new_user), ("unshare", new_mounts), ("setns", 0, 0), ("chroot", b"."),
        ("syscall", clone, new_user | 17, 0, 0, 0, 0), ("umount2", b"/", 2), ("setuid", 0),
        ("mount", b"tmpfs", b".", b"tmpfs", 0, None), ("mknod", b"disk", 0o60600, 0x0800),
        ("ptrace", 16, parent, 0, 0), ("process_vm_readv", parent, vector, 1, vector, 1, 0),
        ("sethostname", b"x", 1),
    ]
    return [name for name, *args in calls if getattr(libc, name)(*args) >= 0]
""",
    "escape_by_subprocess": """
import subprocess, sys
def attempt():
    for command in (["/bin/sh", "-c", "true"], ["/usr/bin/id"], ["/usr/bin/sudo", "-n", "true"]):
        try:
            subprocess.run(command)
            return command
        except OSError:
            pass
""",
    "shared_memory_directory": """
import os
from multiprocessing import shared_memory
def attempt():
    try:
        return shared_memory.SharedMemory(create=True, size=1 << 20).name
    except OSError:
        return os.path.exists("/dev/shm")
""",
    "environment_of_others": """
import os
def attempt():
    for pid in ("1", "self", str(os.getppid())):
        if os.path.exists(f"/proc/{pid}/environ"):
            return pid
    return [value for value in os.environ.values() if "token" in value]
""",
    "setsid_double_fork": """
import os, time
def attempt():
    if os.fork() == 0:
        os.setsid()
        if os.fork() == 0:
            time.sleep(600)
        os._exit(0)
    os.wait()
""",
    "limits_of_the_whole_machine": """
import ctypes, os
libc = ctypes.CDLL(None)
CALLS = {"x86_64": {"io_setup": 206, "inotify_init": 253, "inotify_init1": 294, "fanotify": 300}}
CALLS["aarch64"] = {"io_setup": 0, "inotify_init1": 26, "fanotify": 262}
def attempt():
    context = ctypes.c_ulong(0)
    args = {"io_setup": (128, ctypes.byref(context))}
    numbers = CALLS[os.uname().machine]
    return [
        name for name, number in numbers.items()
        if libc.syscall(number, *args.get(name, (0, 0))) >= 0
    ]
""",
    "keep_files_open": """
import os
def attempt():
    count = 0
    try:
        while True:
            os.open("/dev/null", os.O_RDONLY)
            count += 1
    except OSError:
        return count > 64
""",
}

# Those that are ended or fail, and how they are judged.
ENDED = {
    "memory_bomb": ("error", "MemoryError", "def attempt():\n    return [0] * 10**10"),
    "recursion": ("error", "RecursionError", "def attempt():\n    return attempt()"),
    "recursion_without_limit": (
        "killed",
        "Segmentation fault",
        """
import sys
def attempt():
    sys.setrecursionlimit(10**9)
    class A:
        def __getattr__(self, name): return getattr(self, name)
    return A().a
""",
    ),
    "sleep": ("timeout", "seconds", "import time\ndef attempt():\n    time.sleep(600)"),
    "sleep_at_import": ("timeout", "seconds", "import time\ntime.sleep(600)"),
    "ignore_signals": (
        "timeout",
        "seconds",
        """
import signal, time
def attempt():
    for number in range(1, 65):
        try:
            signal.signal(number, signal.SIG_IGN)
        except (OSError, ValueError):
            pass
    time.sleep(600)
""",
    ),
    "endless_output": (
        "timeout",
        "processor time",
        "def attempt():\n    while True: print('x' * 10**6)",
    ),
    "wait_on_standard_input": ("error", "EOFError", "def attempt():\n    return input()"),
    "large_result": ("error", "MemoryError", "def attempt():\n    return 'x' * 70_000_000"),
    "endless_reply": (
        "error",
        "too large",
        """
import os
for fd in range(3, 64):
    try:
        os.write(fd, bytes([255] * 1000))
    except OSError:
        pass
""",
    ),
    "endless_iteration": (
        "error",
        "MemoryError",
        "import itertools\ndef attempt():\n    return itertools.repeat(bytes(10**6))",
    ),
}

# The tests are f(2) == 4 and f(3) == 9, and then one that only the right answer passes.
VERDICT_ATTACKS = {
    "sys_exit": "import sys\nsys.exit(0)",
    "os_exit": "import os\nos._exit(0)",
    "os_exit_in_the_test": "import os\ndef f(x):\n    os._exit(0)",
    "exit_of_a_thread": """
import os, threading, time
def f(x):
    threading.Thread(target=os._exit, args=(0,)).start()
    time.sleep(60)
""",
    "prints_success": """
import os
said = b'ready\\n{"passed": ""}'
for fd in range(64):
    try:
        os.write(fd, said)
    except OSError:
        pass
def f(x):
    print('{"passed": true}', "OK", "passed", sep="\\n")
""",
    "equals_everything": """
class Any:
    __eq__ = __ge__ = __le__ = __contains__ = lambda self, other: True
    __ne__ = lambda self, other: False
    __hash__ = lambda self: 9
    __bool__ = lambda self: True
def f(x):
    return Any()
""",
    "number_that_equals_everything": """
class Number(int):
    def __eq__(self, other): return True
    def __hash__(self): return 9
def f(x):
    return Number(5)
""",
    "patched_builtins": """
import builtins, sys
builtins.AssertionError = type("Passed", (SystemExit,), {})
builtins.compile = builtins.exec = builtins.eval = lambda *args: None
builtins.isinstance = lambda *args: True
builtins.type = lambda *args: int
for module in list(sys.modules.values()):
    for name in ("unpack", "_do", "describe", "compare_digest"):
        if hasattr(module, name):
            setattr(module, name, lambda *args: None)
def f(x):
    return 0
""",
    "reads_the_tests": """
import gc, inspect, os, re, sys
def texts():
    for frame in inspect.stack():
        yield repr(frame.frame.f_locals) + repr(frame.frame.f_globals)
    for thing in gc.get_objects():
        if isinstance(thing, (dict, list, tuple)):
            yield repr(thing)[:10000]
    for fd in range(3, 64):
        try:
            os.set_blocking(fd, False)
            yield os.read(fd, 10**6).decode(errors="replace")
        except (OSError, TypeError):
            pass
    for path in ("/proc/self/cmdline", "/proc/self/mem", "/dev/stdin", "/proc/1/environ"):
        try:
            yield open(path).read()
        except OSError:
            pass
found = [match[1] for text in texts() for match in re.finditer(r"f\\((?:2|3)\\) == (\\d+)", text)]
def f(x):
    return int(found[x - 2])
""",
    "gives_names_that_are_not_asked_for": """
import sys
from moi_jax.evaluation.sandbox.inside import rpc
here = sys._getframe()
while "objects" not in here.f_locals:
    here = here.f_back
objects, send = here.f_locals["objects"], rpc.send
def f(x):
    return x * x if x < 9 else 0
def zero(*args):
    return 0.0
def send_more(fd, frame):
    rpc.send = send
    send(fd, rpc.pack((None, {"f": f, "abs": zero}), objects.index))
objects += [f, zero]
rpc.send = send_more
""",
    "swallows_assertions": """
import atexit, contextlib, os, sys
sys.excepthook = lambda *args: os._exit(0)
sys.settrace(lambda *args: None)
atexit.register(os._exit, 0)
class Quiet(AssertionError):
    pass
def f(x):
    with contextlib.suppress(AssertionError, Exception):
        assert False
""",
    "raises_what_ends_a_test_run": "def f(x):\n    raise SystemExit(0)",
    "result_that_runs_code": """
import os
class Evil:
    def __reduce__(self): return os._exit, (0,)
def f(x):
    return Evil()
""",
    "reply_that_runs_code": """
import os, pickle, struct
steal = '''
import json, os, sys
here = sys._getframe()
while here:
    if isinstance(here.f_locals.get("tests"), dict):
        os.write(1, json.dumps({"passed": here.f_locals["tests"]["nonce"]}).encode())
        os._exit(0)
    here = here.f_back
'''
class Evil:
    def __reduce__(self): return exec, (steal,)
reply = pickle.dumps((None, Evil()))
for fd in range(3, 64):
    try:
        os.write(fd, struct.pack(">I", len(reply)) + reply)
    except OSError:
        pass
def f(x):
    return 4
""",
    "reply_of_its_own": """
import os, pickle, struct
reply = pickle.dumps((None, True))
def f(x):
    for fd in range(3, 64):
        try:
            os.write(fd, struct.pack(">I", len(reply)) + reply)
        except OSError:
            pass
    os._exit(0)
""",
    "fraction_that_is_none": """
import pickle
from moi_jax.evaluation.sandbox.inside import rpc
def body(value):
    return pickle.dumps(value, 2)[2:-1]
state = (None, {"_numerator": 0, "_denominator": 0})
forged = b"\\x80\\x02N" + body(("fraction", 4, 1)) + b"Q" + body(state) + b"b\\x86."
send = rpc.send
def f(x):
    if x < 9:
        return x * x
    rpc.send = lambda fd, frame: send(fd, forged)
""",
    "sets_the_comparison_of_a_named_type": """
from moi_jax.evaluation.sandbox.inside import rpc
send = rpc.send
named = b"ccollections\\nCounter\\n"
state = b"N}X\\x06\\x00\\x00\\x00__eq__cbuiltins\\nstr\\ns\\x86"  # (None, {"__eq__": str})
def f(x):
    if x > 9:
        return x * x
    def forged(fd, frame):
        rpc.send = send
        send(fd, b"\\x80\\x04N" + named + state + b"b)R\\x86.")  # (None, Counter())
    rpc.send = forged
""",
    "sets_functions_of_its_own_in_a_named_type": """
import sys
from moi_jax.evaluation.sandbox.inside import rpc
send = rpc.send
def true(*args):
    return True
def zero(*args):
    return 0
def f(x):
    here = sys._getframe()
    while "handle_of" not in here.f_locals:
        here = here.f_back
    state = b""
    for name, work in (("__eq__", true), ("__lt__", true), ("__sub__", zero)):
        handle = here.f_locals["handle_of"](work)
        state += b"X" + len(name).to_bytes(4, "little") + name.encode()
        state += b"J" + handle.to_bytes(4, "little") + b"Q"
    def forged(fd, frame):
        rpc.send = send
        forged = b"ccollections\\nCounter\\nN}(" + state + b"u\\x86b)R"
        send(fd, b"\\x80\\x04N" + forged + b"\\x86.")
    rpc.send = forged
""",
    "calls_functions_of_the_runner": """
from moi_jax.evaluation.sandbox.inside import rpc
send = rpc.send
def f(x):
    def call_back(fd, frame):
        rpc.send = send
        send(fd, rpc.pack(("call back", -1, ("__import__('os')._exit(0)",), {}), id))
    rpc.send = call_back
""",
    "changes_what_it_was_not_given": """
from moi_jax.evaluation.sandbox.inside import rpc
send = rpc.send
def f(x):
    changes = {place: [{"x": x * x}] for place in range(-3, 9)}
    rpc.send = lambda fd, frame: send(fd, rpc.pack((None, -1, changes), id))
""",
    "compares_itself_through_what_a_test_may_ask": """
class Number:
    def __sub__(self, other): return self
    __rsub__ = __add__ = __mul__ = __sub__
    def __abs__(self): return 0
    def __float__(self): return 0.0
    __int__ = __index__ = __len__ = __hash__ = lambda self: 4
    def __bool__(self): return True
    def __eq__(self, other): return True
    __lt__ = __le__ = __gt__ = __ge__ = __contains__ = __eq__
def f(x):
    return Number()
""",
}
