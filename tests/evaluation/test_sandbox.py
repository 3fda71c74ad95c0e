"""The sandbox: what programs may take, what they see, and who says that they passed."""

import ctypes
import importlib
import os
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest

from moi_jax.common.errors import UserError
from moi_jax.evaluation.sandbox import backends
from moi_jax.evaluation.sandbox import sandbox as sandbox_module
from moi_jax.evaluation.sandbox.backends import Backend, Limits, candidates, command
from moi_jax.evaluation.sandbox.execution import Program, Verdict, execute
from moi_jax.evaluation.sandbox.inside import rpc
from moi_jax.evaluation.sandbox.packages import Packages
from moi_jax.evaluation.sandbox.probe import unenforced
from moi_jax.evaluation.sandbox.sandbox import Sandbox, strict_backend

from support.hostile_programs import BREAK_OUTS, ENDED, VERDICT_ATTACKS

# No limit on wall time that a busy machine reaches, but for programs that do nothing but wait.
LIMITS = Limits(wall=120.0, cpu=1, memory=128 << 20, file_size=2 << 20, disk=8 << 20)
PR_SET_CHILD_SUBREAPER = 36

Execute = Callable[..., Verdict]


@pytest.fixture(scope="module", params=["bubblewrap", "namespaces"])
def backend(request: pytest.FixtureRequest) -> Backend:
    if request.param not in candidates():
        pytest.skip(f"{request.param} is not installed")
    try:
        execute(request.param, LIMITS, program("pass", "pass"))
    except UserError as error:
        pytest.skip(str(error))
    return request.param


def test_every_limit_holds(backend: Backend):
    assert unenforced(partial(execute, backend), LIMITS) is None


@pytest.fixture
def run(backend: Backend) -> Iterator[Execute]:
    """Judges in the strict sandbox, and sees to it that nothing is left running."""
    prctl = ctypes.CDLL(None).prctl
    before = _descendants(os.getpid())
    # What a sandbox leaves behind becomes a child of this process.
    prctl(PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)
    yield lambda program, limits=LIMITS: execute(backend, limits, program)
    for _ in range(500):
        left = _descendants(os.getpid()) - before
        for pid in left:
            with suppress(ChildProcessError):
                os.waitpid(pid, os.WNOHANG)
        if not left:
            break
        time.sleep(0.02)
    prctl(PR_SET_CHILD_SUBREAPER, 0, 0, 0, 0)
    assert not left


def _descendants(pid: int) -> set[int]:
    children = set()
    for path in Path(f"/proc/{pid}/task").glob("*/children"):
        with suppress(FileNotFoundError, ProcessLookupError):
            children |= {int(child) for child in path.read_text().split()}
    return children.union(*map(_descendants, children))


def program(code: str, *tests: str, names: tuple[str, ...] = ("f",), trusted: str = "") -> Program:
    return Program(code, names, tests, trusted)


@pytest.mark.parametrize("name", BREAK_OUTS)
def test_break_outs_gain_nothing(
    name: str, run: Execute, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setenv("HF_TOKEN", "token of the user's")
    secret, directory = tmp_path / "secret", tmp_path / "directory"
    secret.write_text("secret")
    directory.mkdir()
    with socket.create_server(("127.0.0.1", 0)) as server:
        told = f"SECRET, DIRECTORY, PORT = {str(secret)!r}, {str(directory)!r}, "
        told += f"{server.getsockname()[1]}\n"
        tests = ("gained = attempt()", "assert not gained, gained")
        verdict = run(program(told + BREAK_OUTS[name], *tests, names=("attempt",)))
        server.setblocking(False)
        with pytest.raises(BlockingIOError):
            server.accept()
    # Bubblewrap's first process is its own, and the runner can be killed; it does not pass then.
    killed = name == "kill_the_parents" and verdict.failure == "killed"
    assert verdict.passed or killed, verdict
    assert not any(directory.iterdir())
    assert secret.read_text() == "secret"


@pytest.mark.parametrize("name", ENDED)
def test_endless_programs_are_ended(name: str, run: Execute):
    failure, error, code = ENDED[name]
    limits = replace(LIMITS, wall=1.0) if error == "seconds" else LIMITS
    verdict = run(program(code, "list(attempt())", names=("attempt",)), limits)
    assert verdict.failure == failure
    assert error in verdict.error


@pytest.mark.parametrize("name", VERDICT_ATTACKS)
def test_attacks_on_the_verdict_fail(name: str, run: Execute):
    tests = ("assert f(2) == 4", "assert f(3) == 9", "assert abs(f(12345) - 152399025) < 0.5")
    assert not run(program(VERDICT_ATTACKS[name], *tests)).passed


def test_the_attributes_of_a_fraction_cannot_be_forged(run: Execute):
    """One of 0 / 0 is neither below nor above any number."""
    verdict = run(program(VERDICT_ATTACKS["fraction_that_is_none"], "assert not f(12345) > 1"))
    assert verdict.failure == "error"
    assert verdict.error.startswith("UnpicklingError: a fraction has no state")


@pytest.mark.parametrize(("module", "name"), sorted(rpc.CONSTRUCTORS))
def test_no_attribute_of_a_type_that_a_reply_names_can_be_set(module: str, name: str):
    kind = getattr(importlib.import_module(module), name)
    with pytest.raises(TypeError, match="cannot set '__eq__' attribute of immutable type"):
        kind.__eq__ = kind.__eq__


def test_the_end_of_a_program_is_no_exception_that_a_test_expects(run: Execute):
    test = "try:\n    f(-1)\nexcept Exception:\n    pass"
    verdict = run(program("import os\ndef f(x):\n    os._exit(7)", test))
    assert verdict == Verdict("killed", "the program ended with status 7 before its tests")


def test_a_forged_error_is_short_and_printable(run: Execute):
    forged = """
from moi_jax.evaluation.sandbox.inside import rpc
send = rpc.send
def f(x):
    said = "error", "\\ud800\\n\\x1b" * 9999, {}, ["ValueError"]
    rpc.send = lambda fd, frame: send(fd, rpc.pack(said, id))
"""
    assert run(program(forged, "f(2)")) == Verdict("error", ("???" * 500)[:500])


def test_signals_do_not_disturb_the_verdict():
    """The program can send them. One that arrives while the verdict is written waits."""
    script = """
import os, signal
from moi_jax.evaluation.sandbox.inside import runner
def interrupt():
    os.kill(os.getpid(), signal.SIGALRM)
    os.kill(os.getpid(), signal.SIGINT)
runner.confine.end_children = interrupt
runner._end_after(600.0)
runner._end_with({"failure": "wrong"})
"""
    ended = subprocess.run([sys.executable, "-c", script], capture_output=True, timeout=60)
    assert (ended.stdout, ended.stderr) == (b'{"failure": "wrong"}', b"")


@pytest.mark.parametrize("said", ["{", "{}{}", "no verdict"])
def test_half_a_verdict_is_that_of_a_killed_runner(said: str, monkeypatch: pytest.MonkeyPatch):
    script = f"print('ready'); print({said!r}, end='')"
    monkeypatch.setattr(backends, "command", lambda *args: [sys.executable, "-c", script])
    verdict = execute("weak", LIMITS, program("pass", "pass"))
    assert verdict == Verdict(
        "killed", "the runner of the tests was killed while it wrote its verdict"
    )


def test_what_is_caught_here_passes_in_one_interpreter():
    """The oracle: run beside their tests, as is usual, these would have passed."""
    for name in ("equals_everything", "number_that_equals_everything"):
        namespace: dict = {}
        exec(VERDICT_ATTACKS[name] + "\nassert f(2) == 4\nassert f(3) == 9", namespace)


def test_nothing_outlives_an_evaluation_that_is_killed(backend: Backend, run: Execute):
    sleep = (
        f"from moi_jax.evaluation.sandbox.execution import *; "
        f"from {Limits.__module__} import Limits; "
        f"execute({backend!r}, Limits(wall=600), Program('import time; time.sleep(600)', (), ()))"
    )
    evaluation = subprocess.Popen([sys.executable, "-c", sleep])
    while len(_descendants(evaluation.pid)) < 3:
        assert evaluation.poll() is None
        time.sleep(0.02)
    evaluation.kill()
    evaluation.wait()


def test_right_and_wrong_programs_are_told_apart(run: Execute):
    square = "def f(x):\n    return x * x"
    assert run(program(square, "assert f(2) == 4", "assert f(3) == 9")) == Verdict(None)
    verdict = run(program(square, "assert f(2) == 4", "assert f(3) == 8, 'cube'"))
    assert verdict == Verdict("wrong", "AssertionError: cube in: assert f(3) == 8, 'cube'")


@pytest.mark.parametrize(
    ("code", "verdict"),
    [
        ("  \n", Verdict("no code")),
        (
            "def f(x) return x",
            Verdict("syntax error", "SyntaxError: expected ':' (<program>, line 1)"),
        ),
        (
            "def g(x): pass",
            Verdict("error", "NameError: name 'f' is not defined in: assert f(2) == 4"),
        ),
        ("def f(x):\n    return x / 0", Verdict("error", "ZeroDivisionError: division by zero")),
        ("def f(x):\n    assert x > 3, 'a\\nb\\x1b'", Verdict("error", "AssertionError: b?")),
        (
            "import os\ndef f(x):\n    os._exit(7)",
            Verdict("killed", "the program ended with status 7 before its tests"),
        ),
    ],
)
def test_failures_are_told_by_kind(code: str, verdict: Verdict, run: Execute):
    assert run(program(code, "assert f(2) == 4")) == verdict


@pytest.mark.parametrize(
    "value",
    [
        "None",
        "True",
        "-(10**40)",
        "0.1 + 0.2",
        "float('inf')",
        "1 + 2j",
        "'\\ud800 text'",
        "b'bytes'",
        "bytearray(b'bytes')",
        "[1, [2.5, ('x', {3})], {'a': frozenset({4})}]",
        "range(3)",
        "__import__('decimal').Decimal('1.50')",
        "__import__('datetime').date(2020, 2, 29)",
        "__import__('collections').deque([1, 2])",
        "int",
    ],
)
def test_values_arrive_as_they_are(value: str, run: Execute):
    tests = (f"value = {value}", "assert f(value) == value", "assert type(f(value)) is type(value)")
    assert run(program("def f(x):\n    return x", *tests)) == Verdict(None)


def test_subclasses_of_built_in_types_arrive_as_types_that_the_runner_knows(run: Execute):
    code = """
from collections import Counter, OrderedDict, defaultdict, namedtuple
from enum import Enum, IntEnum
Point = namedtuple("Point", "x y")
class Colour(str, Enum): RED = "red"
class Level(IntEnum): ONE = 1
def f():
    plain = [Point(1, 2), Counter("aab"), OrderedDict(a=1), defaultdict(int, b=2)]
    return [*plain, Colour.RED, Level.ONE]
"""
    expected = "[(1, 2), {'a': 2, 'b': 1}, {'a': 1}, {'b': 2}, 'red', 1]"
    tests = (
        "from collections import Counter, OrderedDict, defaultdict",
        f"assert f() == {expected}",
        "point, *others = map(type, f())",
        "assert others == [Counter, OrderedDict, defaultdict, str, int]",
        "assert point.__bases__ == (tuple,) and not hasattr(point, '_ask')",
    )
    assert run(program(code, *tests)) == Verdict(None)


def test_objects_stay_with_the_program(run: Execute):
    code = """
class Node:
    def __init__(self, value): self.value, self.left = value, None
    def depth(self, *, start=0): return start + 1 + (self.left.depth() if self.left else 0)
def f(node): return node.left.value
def values(node):
    while node:
        yield node.value
        node = node.left
"""
    setup = "root = Node(1)\nroot.left = Node(2)"
    tests = (
        setup,
        "assert f(root) == 2",
        "assert root.depth(start=1) == 3",
        "assert list(values(root)) == [1, 2]",
        "assert root.value == 1 and root.left is not None",
        "assert root != Node(1)",
    )
    names = ("f", "Node", "values")
    assert run(program(code, *tests, names=names)) == Verdict(None)


def test_trusted_helpers_are_not_the_programs(run: Execute):
    """The program cheats by another helper than the one that its tests were written with."""
    code = "def helper(x):\n    return 0\ndef f(x):\n    return 1"
    trusted = "def helper(x):\n    return x * x"
    cheated = program(code, "assert helper(f(2)) == 0", names=("f", "helper"), trusted=trusted)
    assert run(cheated).failure == "wrong"
    uses = "def f(x):\n    return helper(x)"
    assert run(program(uses, "assert f(3) == 9", trusted=trusted)) == Verdict(None)


def test_orders_of_sets_are_the_same_in_every_run(run: Execute):
    order = program("def f():\n    return list(set('abcdefgh'))", "raise ValueError(f())")
    errors = {run(order).error for _ in range(3)}
    assert len(errors) == 1
    assert "'a'" in errors.pop()


def test_verdicts_come_in_the_order_of_the_programs(backend: Backend):
    sandbox = Sandbox.__new__(Sandbox)
    sandbox.backend, sandbox.limits, sandbox.workers = backend, LIMITS, 3
    taken = []

    def programs() -> Iterator[Program]:
        for number in range(10):
            taken.append(number)
            code = (
                f"import time\ntime.sleep({0.2 if number == 0 else 0})\ndef f(x): return {number}"
            )
            yield program(code, "assert f(0) % 2 == 0")

    verdicts = sandbox.run_all(programs())
    assert next(verdicts).passed
    assert len(taken) <= 6  # so many at a time as keep three workers busy
    assert [verdict.passed for verdict in verdicts] == [number % 2 == 0 for number in range(1, 10)]


@pytest.mark.parametrize(
    ("loosened", "named"),
    [
        ({"memory": 1 << 30}, "memory"),
        ({"processes": 100}, "the number of processes"),
        ({"file_size": 1 << 30, "disk": 1 << 30}, "the size of a file"),
        ({"disk": 1 << 30}, "disk space"),
        ({"open_files": 100}, "open files"),
        ({"cpu": 20, "wall": 2.0}, "processor time (not done after 2 seconds)"),
    ],
)
def test_a_limit_that_does_not_hold_is_named(loosened: dict, named: str, backend: Backend):
    def loose(limits: Limits, program: Program) -> Verdict:
        return execute(backend, replace(limits, **loosened), program)

    assert unenforced(loose, LIMITS) == named


def test_strict_is_refused_where_a_limit_does_not_hold(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(sandbox_module, "candidates", lambda: ["weak"])
    with pytest.raises(UserError, match=r"weak: network access.*--sandbox weak"):
        strict_backend.__wrapped__(LIMITS)
    monkeypatch.setattr(sandbox_module, "candidates", lambda: [])
    with pytest.raises(UserError, match="needs Linux"):
        strict_backend.__wrapped__(LIMITS)


def test_weak_limits_time_memory_and_files_and_cleans_up(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("HF_TOKEN", "token of the user's")
    sandbox = Sandbox("weak", LIMITS)
    code = "import os\ndef f():\n    open('made', 'x')\n    return os.getcwd(), dict(os.environ)"
    seen = "directory, environment = f()\nassert 'HF_TOKEN' not in environment"
    assert sandbox.run(program(code, f"{seen}\nassert directory == environment['HOME']")).passed
    verdict = sandbox.run(program(code, f"{seen}\nraise ValueError(directory)"))
    directory = verdict.error.removeprefix("ValueError: ").split(" in: ")[0]
    assert directory.startswith("/")
    assert not Path(directory).exists()
    sandbox.limits = replace(LIMITS, wall=2.0)
    for name in ("memory_bomb", "sleep", "large_result"):
        failure, _, code = ENDED[name]
        assert sandbox.run(program(code, "attempt()", names=("attempt",))).failure == failure
    assert not sandbox.run(program(VERDICT_ATTACKS["equals_everything"], "assert f(2) == 4")).passed


FORGED_FROM_THE_RUNNERS_MEMORY = """
import os, re, signal
def regions(maps):
    for line in maps:
        yield (int(address, 16) for address in line.split()[0].split("-"))
def f(x):
    parent = os.getppid()
    with open(f"/proc/{parent}/maps") as maps, open(f"/proc/{parent}/mem", "rb", 0) as memory:
        for start, end in regions(maps):
            try:
                memory.seek(start)
                nonce = re.search(rb'"nonce": "([0-9a-f]{32})"', memory.read(end - start))
            except (OSError, OverflowError):
                continue
            if nonce:
                with open(f"/proc/{parent}/fd/1", "wb", 0) as out:
                    out.write(b'{"passed": "%s"}' % nonce[1])
                os.kill(parent, signal.SIGKILL)
"""


NESTED = """
import os
def f(outside):
    start = os.getcwd()
    open("file", "x")
    os.symlink(outside, "link")
    os.mkdir("closed")
    os.mkdir("closed/inner")
    os.symlink(outside, "closed/link")
    os.chmod("closed", 0)
    for _ in range(1500):
        os.mkdir("deeper")
        os.chdir("deeper")
    os.chdir(start)
"""
MOVED = """
import os
def f(outside):
    here = os.getcwd()
    os.mkdir("inner")
    os.rename(here, here + "-moved")
    os.symlink(outside, here)
"""


@pytest.mark.parametrize("code", [NESTED, MOVED])
def test_weak_leaves_no_file_behind_and_touches_none_outside(
    code: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    scratch, outside = tmp_path / "scratch", tmp_path / "outside"
    scratch.mkdir()
    outside.mkdir(mode=0o500)
    (outside / "kept").mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(scratch))
    asked = program(code, f"assert f({str(outside)!r}) is None")
    assert Sandbox("weak", LIMITS).run(asked) == Verdict(None)
    left = list(scratch.iterdir())
    subprocess.run(["rm", "-rf", scratch], check=True)  # pytest cannot remove so deep a tree
    assert left == []
    assert (outside / "kept").is_dir()
    assert outside.stat().st_mode & 0o777 == 0o500


ORPHANS = """
import os, time
def f(wait):
    for _ in range(3):
        out, into = os.pipe()
        if os.fork() == 0:
            os.setsid()
            child = os.fork()
            if child:
                os.write(into, str(child).encode())
                os._exit(0)
            os.closerange(0, 64)
            time.sleep(600)
            os._exit(0)
        os.wait()
        with open(PIDS, "a") as file:
            file.write(os.read(out, 20).decode() + " ")
    time.sleep(wait)
"""


@pytest.mark.parametrize(("wait", "failure"), [(0, None), (600, "timeout")])
def test_weak_leaves_no_process_behind(wait: int, failure: str | None, tmp_path: Path):
    pids = tmp_path / "pids"
    code = f"PIDS = {str(pids)!r}\n{ORPHANS}"
    limits = replace(LIMITS, wall=120.0 if failure is None else 4.0)
    assert Sandbox("weak", limits).run(program(code, f"f({wait})")).failure == failure
    left = pids.read_text().split()
    assert len(left) == 3
    assert not [pid for pid in left if Path(f"/proc/{pid}").exists()]


def test_another_backend_takes_over_where_bubblewrap_cannot_start(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    broken = tmp_path / "bwrap"
    broken.write_text("#!/no/such/interpreter\n")
    broken.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    assert candidates() == ["bubblewrap", "namespaces"]
    assert command("bubblewrap")[0] == str(broken)  # found by the user's PATH, not by bwrap's
    with pytest.raises(UserError, match=r"sandbox .bubblewrap. does not start here: "):
        execute("bubblewrap", LIMITS, program("pass", "pass"))

    def start(execute: Execute, limits: Limits, packages: Packages) -> None:
        assert execute(limits, program("pass", "pass")).passed

    monkeypatch.setattr(sandbox_module, "unenforced", start)
    monkeypatch.setattr(sandbox_module, "candidates", lambda: ["bubblewrap", "weak"])
    assert strict_backend.__wrapped__(LIMITS) == "weak"


def test_weak_hides_the_runners_memory_from_the_program_even_of_root():
    verdict = Sandbox("weak", LIMITS).run(program(FORGED_FROM_THE_RUNNERS_MEMORY, "f(2)"))
    assert verdict.failure == "error"
    assert verdict.error.startswith(("PermissionError", "FileNotFoundError"))


def test_weak_leaves_no_capabilities_to_what_the_program_starts():
    code = """
import subprocess
def f():
    status = subprocess.run(["cat", "/proc/self/status"], capture_output=True, text=True).stdout
    return [line.split()[1] for line in status.splitlines() if line.startswith("CapEff")]
"""
    test = "assert set(''.join(f())) <= {'0'}, f()"
    assert Sandbox("weak", LIMITS).run(program(code, test)) == Verdict(None)
