"""Right programs are judged right although they run in another process than their tests.

The oracle is one plain interpreter: it runs a program and its tests in one namespace.
"""

from collections.abc import Iterator
from importlib.metadata import distribution
from pathlib import Path

import pytest

from moi_jax.common.errors import UserError
from moi_jax.evaluation.sandbox.backends import Backend, Limits, candidates
from moi_jax.evaluation.sandbox.execution import Program, Verdict, execute
from moi_jax.evaluation.sandbox.packages import NONE, Packages, find_packages

LIMITS = Limits(wall=120.0, cpu=10)
# The names that a test may use from a program.
NAMES = ("f", "g", "Point")

RIGHT = {
    "a fraction": (
        "from fractions import Fraction\ndef f(x): return Fraction(x, 2)",
        "assert f(8) == 4 and f(1) == 0.5 and abs(f(3) - 1.5) < 1e-9\nassert str(f(1)) == '1/2'",
    ),
    "views of a dict": (
        "def f(d): return d.keys()\ndef g(d): return d.values(), d.items()",
        "assert f({1: 0, 2: 0}) == {1, 2} and f({}) != []\nvalues, items = g({1: 5, 2: 5})\n"
        "assert len(values) == 2 and list(values) == [5, 5] and items == {(1, 5), (2, 5)}",
    ),
    "a user's list, dict and string": (
        "from collections import UserDict, UserList, UserString\n"
        "def f(x): return UserList(x)\ndef g(x): return UserDict(x), UserString('text')",
        "assert f([1, 2]) == [1, 2] and f([1, 2])[1] == 2 and f([1, 2])[:1] == [1]\n"
        "mapping, text = g({'a': 1})\nassert mapping == {'a': 1} and text == 'text'",
    ),
    "a collection of one's own": (
        "class Row:\n    def __init__(self, items): self.items = items\n"
        "    def __len__(self): return len(self.items)\n"
        "    def __getitem__(self, at): return self.items[at]\n"
        "    def __setitem__(self, at, item): self.items[at] = item\n"
        "    def __delitem__(self, at): del self.items[at]\n"
        "    def __contains__(self, item): return item in self.items\n"
        "def f(x): return Row(x)",
        "row = f([3, 4])\nassert len(row) == 2 and row[1] == 4 and row[-1:] == [4] and 3 in row\n"
        "row[0] = 5\ndel row[1]\nassert list(row) == [5] and row and not f([])",
    ),
    "a dataclass": (
        "from dataclasses import dataclass\n@dataclass(order=True, frozen=True)\n"
        "class Point:\n    x: int\n    y: int\ndef f(x, y): return Point(x, y)",
        "assert f(1, 2) == Point(1, 2) and f(1, 2) != Point(2, 2) and {f(1, 2)} == {Point(1, 2)}\n"
        "assert sorted([Point(2, 1), Point(1, 9)])[0].y == 9 and f(1, 2) < Point(1, 3)\n"
        "assert str(f(1, 2)) == 'Point(x=1, y=2)' and isinstance(f(1, 2), Point)\n"
        "assert f(1, 2) != (1, 2) and not isinstance(3, Point)",
    ),
    "an enum": (
        "from enum import Enum\nclass Point(Enum):\n    A = 1\n    B = 2\n"
        "def f(x): return Point(x)",
        "assert f(1) == Point.A and f(1) is Point.A and f(2) != Point.A and f(2).name == 'B'",
    ),
    "named tuples and the like": (
        "from collections import Counter, OrderedDict, defaultdict, namedtuple\n"
        "Pair = namedtuple('Pair', 'x y')\ndef f(x): return Pair(x, [x])\n"
        "def g(pair): return Counter('aab'), defaultdict(int, a=1), OrderedDict(b=pair.x)",
        "assert f(1) == (1, [1]) and f(1).x == 1\ncounter, default, ordered = g(f(3))\n"
        "assert counter.most_common(1) == [('a', 2)] and counter['z'] == default['z'] == 0\n"
        "assert default == {'a': 1, 'z': 0} and ordered == {'b': 3}",
    ),
    "collections of one's own kind": (
        "from collections import Counter, OrderedDict, defaultdict\n"
        "class Letters(Counter): pass\nclass Recent(OrderedDict): pass\n"
        "def f(text): return Letters(text), defaultdict(lambda: [9], a=text)\n"
        "def g():\n    recent = Recent(a=1, b=2)\n    recent.move_to_end('a')\n"
        "    return recent, {'nested': [OrderedDict(c=Counter('dd'))]}",
        "from collections import Counter, OrderedDict\nletters, default = f('aab')\n"
        "assert letters - Counter('a') == {'a': 1, 'b': 1} and letters['z'] == 0\n"
        "assert default == {'a': 'aab'} and default['z'] == [9]\nrecent, nested = g()\n"
        "assert recent == OrderedDict(b=2, a=1) and recent != OrderedDict(a=1, b=2)\n"
        "assert nested == {'nested': [{'c': {'d': 2}}]}",
    ),
    "a named tuple with names that are replaced": (
        "from collections import namedtuple\nPair = namedtuple('Pair', 'class x', rename=True)\n"
        "def f(): return Pair(1, 2)\ndef g(pair): return pair._0 + pair.x",
        "assert f() == (1, 2) and f()._0 == 1 and f().x == 2 and g(f()) == 3",
    ),
    "views of a dict as arguments": (
        "def f(d): return d.items()\ndef g(*views): return [sorted(view) for view in views]",
        "d = {2: 5, 1: 6}\nassert g(d.keys(), d.values(), d.items(), f(d)) == "
        "[[1, 2], [5, 6], [(1, 6), (2, 5)], [(1, 6), (2, 5)]]",
    ),
    "arguments that are changed before an exception": (
        "def f(items, seen):\n    items.append(seen)\n    seen.add(1)\n    raise ValueError('bad')",
        "items, seen = [], set()\ntry:\n    f(items, seen)\n    assert False\n"
        "except ValueError:\n    pass\nassert items == [{1}] and items[0] is seen",
    ),
    "arguments that become too deep to be sent before an exception": (
        "def f(items):\n    for _ in range(10_000): items[:] = [items[:]]\n"
        "    raise ValueError('bad')",
        "try:\n    f([])\n    assert False\nexcept ValueError as error:\n"
        "    assert str(error) == 'bad'",
    ),
    "arguments that are changed": (
        "def f(items): items.sort(); items.append([9])\n"
        "def g(rows, named=None):\n    rows[0][0] = 5\n    rows.reverse()\n"
        "    named and named.update(c=named.pop('a'))\n    return rows",
        "items = [3, 1]\nassert f(items) is None and items == [1, 3, [9]]\n"
        "rows, named = [[1], [2]], {'a': {1}}\nfirst, letters = rows[0], named['a']\n"
        "assert g(rows, named=named) is rows and rows == [[2], [5]] and rows[1] is first\n"
        "assert named == {'c': {1}} and named['c'] is letters",
    ),
    "changes of many kinds": (
        "def f(a, b, c, d):\n    a.add(3); b.extend(b'x'); c.appendleft(0); d['n'] += 1\n",
        "from collections import Counter, deque\na, b, c, d = {1}, bytearray(b'y'), deque([1]), "
        "Counter(n=1)\nf(a, b, c, d)\n"
        "assert (a, b, list(c), d['n'], type(d)) == ({1, 3}, b'yx', [0, 1], 2, Counter)",
    ),
    "functions of the tests": (
        "def f(work, items): return [work(item) for item in items]\n"
        "def g(work):\n    try:\n        work()\n    except ValueError as error:\n"
        "        return str(error)",
        "assert f(lambda x: x + 1, [1, 2]) == [2, 3]\n"
        "seen = []\nf(seen.append, [1, 2])\nassert seen == [1, 2]\n"
        "def fail(): raise ValueError('told')\nassert g(fail) == 'told'\n"
        "assert f(lambda x: f(lambda y: x * y, [1, 2]), [3]) == [[3, 6]]\n"
        "assert f(abs, [-1]) == [1] and f(str.upper, ['a']) == ['A']\n"
        "assert f(int, (digit for digit in '12')) == [1, 2]",
    ),
    "iterators without an end": (
        "import itertools\ndef f(): return itertools.count(1)\ndef g(x): yield from x",
        "numbers = f()\nassert next(numbers) == 1 and next(numbers) == 2\n"
        "assert list(itertools.islice(f(), 3)) == [1, 2, 3] and list(g('ab')) == ['a', 'b']\n"
        "rest = g('a')\nnext(rest)\nassert next(rest, None) is None",
    ),
    "exceptions that are expected": (
        "class Mine(ValueError): pass\ndef f(x): raise Mine('bad')\ndef g(x): return {}[x]",
        "try:\n    f(1)\n    assert False\nexcept ValueError as error:\n"
        "    assert str(error) == 'bad'\ntry:\n    g(1)\n    assert False\n"
        "except LookupError:\n    pass\ntry:\n    g('key')\n    assert False\n"
        "except KeyError as error:\n    assert str(error) == \"'key'\"",
    ),
    "numbers of one's own": (
        "class Angle:\n    def __float__(self): return 0.5\n    def __int__(self): return 7\n"
        "    __index__ = __int__\n    def __repr__(self): return 'angle'\n"
        "def f(): return Angle()",
        "import math\nassert math.isclose(f(), 0.5) and int(f()) == 7 and hex(f()) == '0x7'\n"
        "assert f'{[f()]}' == '[angle]'",
    ),
}


@pytest.fixture(scope="module", params=["weak", "bubblewrap", "namespaces"])
def backend(request: pytest.FixtureRequest) -> Iterator[Backend]:
    if request.param != "weak":
        if request.param not in candidates():
            pytest.skip(f"{request.param} is not installed")
        try:
            execute(request.param, LIMITS, Program("pass", (), ("pass",)))
        except UserError as error:
            pytest.skip(str(error))
    return request.param


@pytest.mark.parametrize("name", RIGHT)
def test_right_programs_are_judged_right(name: str, backend: Backend):
    code, tests = RIGHT[name]
    trusted = "import itertools\n"
    namespace: dict = {}
    exec(f"{trusted}{code}\n{tests}", namespace)
    assert execute(backend, LIMITS, Program(code, NAMES, (tests,), trusted)) == Verdict(None)


# A number of another value at each use could be the root of any polynomial, as in HumanEval 32.
CHANGING = """
def f(): return Changing()
class Changing:
    last = 0
    def __index__(self):
        self.last += 1
        return self.last
    __int__ = __index__
    def __float__(self): return float(self.__index__())
"""


@pytest.mark.parametrize(
    ("code", "test", "failure"),
    [
        ("from fractions import Fraction\ndef f(): return Fraction(1, 3)", "f() == 0.33", "wrong"),
        ("def f(): return {1: 2}.keys()", "f() == [1]", "wrong"),
        ("class Point: pass\ndef f(): return Point()", "f() == Point()", "wrong"),
        ("class A:\n    def __bool__(self): return False\ndef f(): return A()", "f()", "wrong"),
        ("def f(): raise ValueError('bad')", "f()", "error"),
        ("def f(work): return work(1)", "f(lambda x: x + 1) == 3", "wrong"),
        ("def f(work): return work(1)", "f(object())", "error"),
        ("def f(x): raise StopIteration", "all(map(int.__eq__, map(f, [1]), [2]))", "error"),
        (CHANGING, "float(x := f()) != float(x)", "wrong"),
        (CHANGING, "int(x := f()) != int(x)", "wrong"),
        (CHANGING, "hex(x := f()) != hex(x)", "wrong"),
        ("def f(items): items.append(1)", "f(items := []) or items == []", "wrong"),
    ],
)
def test_wrong_programs_are_not(code: str, test: str, failure: str):
    namespace: dict = {}
    exec(code, namespace)
    verdict = execute("weak", LIMITS, Program(code, NAMES, (f"assert {test}",)))
    assert verdict.failure == failure


def test_a_test_passes_no_object_of_its_own(backend: Backend):
    test = "class Mine: pass\nf(Mine())"
    verdict = execute(backend, LIMITS, Program("def f(x): return x", NAMES, (test,)))
    assert verdict.failure == "error"
    assert "a test passes what cannot be sent to the program" in verdict.error


@pytest.fixture(scope="module")
def numpy_only() -> Packages:
    return find_packages(["numpy"])


def test_packages_are_visible_where_they_are_allowed(backend: Backend, numpy_only: Packages):
    code = (
        "import numpy as np\ndef f(x): return np.array(x).cumsum()\n"
        "def g(x): return np.mean(x), np.int64(3), {np.int64(1): np.bool_(True)}, x * np.float32(2)"
    )
    tests = (
        "import numpy as np\nassert np.allclose(f([1, 2]), [1, 3]) and (f([1, 2]) == [1, 3]).all()",
        "assert f(np.array([1, 2])).tolist() == [1, 3] and list(f([4])) == [4]",
        "mean, three, named, doubled = g(np.array([[1, 2], [3, 4]]))",
        "assert (mean, three, named) == (2.5, 3, {1: True}) and doubled.shape == (2, 2)",
    )
    assert execute(backend, LIMITS, Program(code, NAMES, tests), numpy_only) == Verdict(None)
    assert execute(backend, LIMITS, Program(code, NAMES, tests), NONE).error == (
        "ModuleNotFoundError: No module named 'numpy'"
    )


def test_packages_bring_what_they_require_and_are_told_with_their_version(numpy_only: Packages):
    assert numpy_only.versions == (f"numpy {distribution('numpy').version}",)
    jax = find_packages(["jax"])
    assert set(numpy_only.files) < set(jax.files)
    with pytest.raises(UserError, match="--code-packages names no_such_one, which is not"):
        find_packages(["no_such_one"])


def test_files_outside_the_installation_are_not_made_visible(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.syspath_prepend(tmp_path)
    _install(tmp_path, "manual", "manual/__init__.py,,\n/usr/share/man/man1/manual.1,,\n../up,,\n")
    (tmp_path / "manual").mkdir()
    visible = {str(tmp_path / name) for name in ("manual", "manual-1.0.dist-info")}
    assert set(find_packages(["manual"]).files) == visible


@pytest.mark.parametrize("record", [None, "", "__editable__.bare-1.0.pth,,\n__editable___f.py,,\n"])
def test_a_package_whose_files_are_not_listed_is_refused(
    record: str | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.syspath_prepend(tmp_path)
    _install(tmp_path, "bare", record)
    for name in ("__editable__.bare-1.0.pth", "__editable___f.py"):
        (tmp_path / name).touch()
    with pytest.raises(UserError, match=r"--code-packages names bare, but .* no file that can be"):
        find_packages(["bare"])


def _install(site: Path, name: str, record: str | None) -> None:
    """Writes the metadata of a distribution that lists these files, none if None."""
    metadata = site / f"{name}-1.0.dist-info"
    metadata.mkdir()
    (metadata / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.0\n")
    if record is not None:
        (metadata / "RECORD").write_text(f"{record}{metadata.name}/METADATA,,\n")
