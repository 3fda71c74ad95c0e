"""Compares the sandbox with one interpreter: python benchmarks/code_mutants.py DATA

DATA holds humaneval/ and mbpp/ in the layout of the benchmarks. Every reference solution of
HumanEval and MBPP, and 2,000 right programs made from them, run in the sandbox, and also beside
their tests in one plain interpreter. A program is made by changing how a solution is called or what
it returns: a fraction, an instance of a subclass, an object with an `__eq__` of its own, and so on.
The interpreter decides which programs are right. Prints how many of each kind the sandbox judges
otherwise, and names some of them. The interpreter has no walls, so only changes that do no harm are
made here. Time is not compared: both have 60 seconds.
"""

import argparse
import os
import random
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from itertools import islice
from pathlib import Path

from code_references import reference

from moi_jax.cli.command import run_command
from moi_jax.evaluation.options import BenchmarkOptions
from moi_jax.evaluation.protocol import Item
from moi_jax.evaluation.sandbox.execution import Program
from moi_jax.evaluation.sandbox.sandbox import Sandbox
from moi_jax.evaluation.tasks import mbpp
from moi_jax.evaluation.tasks.code_task import CodeTask
from moi_jax.evaluation.tasks.humaneval import HumanEval

Candidate = tuple[CodeTask, Item, str]

SECONDS = 60.0
SHOWN = 5  # programs of a kind that are named
AT_A_TIME = 16  # programs of a kind that are tried before their number is looked at again

# What becomes of a result. `change` is applied to it, and if it does not change a list, tuple or
# dict itself, to what is in it.
RESULTS = {
    "subclass": """
class Int(int): pass
class Float(float): pass
class Str(str): pass
class List(list): pass
class Tuple(tuple): pass
class Dict(dict): pass
class Set(set): pass
KINDS = {int: Int, float: Float, str: Str, list: List, tuple: Tuple, dict: Dict, set: Set}
def change(value):
    return KINDS.get(type(value), lambda value: value)(value)
""",
    "fraction": """
from fractions import Fraction
def change(value):
    return Fraction(value) if type(value) in (int, float) else value
""",
    "decimal": """
from decimal import Decimal
def change(value):
    return Decimal(value) if type(value) in (int, float) else value
""",
    "number of numpy": """
import numpy as np
KINDS = {int: np.int64, float: np.float64, bool: np.bool_, str: np.str_}
def change(value):
    return KINDS.get(type(value), lambda value: value)(value)
""",
    "array": """
import numpy as np
def change(value):
    return np.array(value) if type(value) in (int, float, bool) else value
""",
    "UserList, UserDict, UserString": """
from collections import UserDict, UserList, UserString
def change(value):
    kinds = {list: UserList, dict: UserDict, str: UserString}
    return kinds.get(type(value), lambda value: value)(value)
""",
    "OrderedDict, named tuple, frozenset": """
from collections import OrderedDict, namedtuple
def record(value):
    return namedtuple("Record", [f"field_{n}" for n in range(len(value))])(*value)
def change(value):
    kinds = {dict: OrderedDict, tuple: record, set: frozenset}
    return kinds.get(type(value), lambda value: value)(value)
""",
    "Counter, view of a dict": """
from collections import Counter
def change(value):
    kinds = {dict: Counter, set: lambda value: dict.fromkeys(value).keys()}
    return kinds.get(type(value), lambda value: value)(value)
""",
    "enum of a built-in type": """
from enum import Enum, IntEnum
def change(value):
    if type(value) is str:
        return Enum("Word", {"WORD": value}, type=str).WORD
    return IntEnum("Number", {"NUMBER": value}).NUMBER if type(value) is int else value
""",
    "object with its own __eq__": """
class Answer:
    def __init__(self, value): self.value = value
    def __eq__(self, other): return self.value == other
    def __hash__(self): return hash(self.value)
    def __bool__(self): return bool(self.value)
def change(value):
    return Answer(value) if type(value) in (int, float, str, bool) else value
""",
    "object with its own arithmetic": """
class Number:
    def __init__(self, value): self.value = value
    def __sub__(self, other): return self.value - other
    def __bool__(self): return bool(self.value)
def change(value):
    return Number(value) if type(value) in (float, bool) else value
""",
}
RESULT = """
changed = []
def deep(value):
    other = change(value)
    if other is not value:
        changed.append(value)
        return other
    if type(value) in (list, tuple):
        return type(value)(map(deep, value))
    return {key: deep(item) for key, item in value.items()} if type(value) is dict else value
def wrapped(right):
    return lambda *args, **kwargs: deep(right(*args, **kwargs))
"""
# How a solution is called.
CALLS = {
    "as it is": "wrapped = lambda right: right",
    "printing": """
def wrapped(right):
    print("module")
    def other(*args):
        print("called", args, flush=True)
        return right(*args)
    return other
""",
    "with a demonstration": """
def wrapped(right):
    return right
if __name__ == "__main__":
    raise SystemExit("shown")
""",
    "an object": """
class Solution:
    def __init__(self, right): self.right = right
    def __call__(self, *args): return self.right(*args)
wrapped = Solution
""",
    "a method": """
class Solution:
    def __init__(self, right): self.right = right
    def solve(self, *args): return self.right(*args)
wrapped = lambda right: Solution(right).solve
""",
    "memory of its own": """
memory = {}
def wrapped(right):
    def other(*args):
        if repr(args) not in memory:
            memory[repr(args)] = right(*args)
        return memory[repr(args)]
    return other
""",
    "emptied arguments": """
def wrapped(right):
    def other(*args):
        result = right(*args)
        for arg in args:
            if isinstance(arg, (list, dict, set)) and arg is not result:
                arg.clear()
        return result
    return other
""",
    "a thread": """
import threading
def wrapped(right):
    def other(*args):
        results = []
        thread = threading.Thread(target=lambda: results.append(right(*args)))
        thread.start()
        thread.join()
        return results[0]
    return other
""",
    "a coroutine": """
import asyncio
def wrapped(right):
    async def solve(args):
        await asyncio.sleep(0)
        return right(*args)
    return lambda *args: asyncio.run(solve(args))
""",
    "a file": """
import os, pickle, tempfile
def wrapped(right):
    def other(*args):
        with tempfile.TemporaryDirectory() as directory:
            path = os.path.join(directory, "result")
            with open(path, "wb") as file:
                pickle.dump(right(*args), file)
            with open(path, "rb") as file:
                return pickle.load(file)
    return other
""",
    "an exception": """
class Found(Exception): pass
def wrapped(right):
    def raising(*args):
        raise Found(right(*args))
    def other(*args):
        try:
            raising(*args)
        except Found as found:
            return found.args[0]
    return other
""",
    "deep recursion": """
import sys
sys.setrecursionlimit(20_000)
def wrapped(right):
    def deeper(depth, args):
        return deeper(depth - 1, args) if depth else right(*args)
    return lambda *args: deeper(5_000, args)
""",
    "a child process": """
import os, pickle
def wrapped(right):
    def other(*args):
        out, into = os.pipe()
        child = os.fork()
        if child == 0:
            os.write(into, pickle.dumps(right(*args)))
            os._exit(0)
        os.waitpid(child, 0)
        os.close(into)
        with open(out, "rb") as file:
            return pickle.load(file)
    return other
""",
    "multiprocessing": """
import multiprocessing
def wrapped(right):
    def other(*args):
        context = multiprocessing.get_context("fork")
        queue = context.SimpleQueue()
        process = context.Process(target=lambda: queue.put(right(*args)))
        process.start()
        result = queue.get()
        process.join()
        return result
    return other
""",
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("data", type=Path)
    parser.add_argument("--sandbox", choices=["strict", "weak"], default="strict")
    parser.add_argument("--count", type=int, default=2000, help="right programs, of all kinds")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    tasks = open_tasks(args.data, args.sandbox)
    solutions = [(task, item) for task in tasks for item in task.load()]
    sandbox = tasks[0].sandbox
    print(f"sandbox {sandbox.backend}, one interpreter: Python {sys.version.split()[0]}")
    print("| kind | right in one interpreter | the sandbox judges otherwise |\n| --- | --- | --- |")
    references = ((task, item, reference(item)) for task, item in solutions)
    compare("reference solutions", references, len(solutions), sandbox)
    kinds = {
        **{f"result: {name}": RESULT + code for name, code in RESULTS.items()},
        **{f"call: {name}": code for name, code in CALLS.items()},
    }
    order = random.Random(args.seed)
    right, differing = 0, []
    for number, (name, code) in enumerate(kinds.items(), 1):
        shuffled = order.sample(solutions, len(solutions))
        mutants = ((task, item, mutant(item, code)) for task, item in shuffled)
        # What a kind lacks is made up for by the next ones.
        wanted = round(args.count * number / len(kinds)) - right
        found, otherwise = compare(name, mutants, wanted, sandbox)
        right += found
        differing.append(otherwise)
    print(f"\n{right} mutants, {sum(map(len, differing))} judged otherwise; some of each kind:")
    print(*(line for lines in differing for line in lines[:SHOWN]), sep="\n")


def open_tasks(data: Path, sandbox: str) -> tuple[CodeTask, CodeTask]:
    options = BenchmarkOptions(
        data,
        data,
        allow_code_execution=True,
        sandbox=sandbox,
        code_timeout=SECONDS,
        code_packages=("numpy",),
    )
    mbpp.EVALUATED = range(1, 975)
    return HumanEval(options), mbpp.MBPP(options)


def mutant(item: Item, code: str) -> str:
    """The reference of an item with its functions wrapped; classes stay."""
    names = item.gold.get("names") or [item.gold["entry_point"]]
    functions = [name for name in names if f"def {name}" in reference(item)]
    return "\n".join([reference(item), code, *(f"{name} = wrapped({name})" for name in functions)])


def compare(
    name: str, candidates: Iterator[Candidate], count: int, sandbox: Sandbox
) -> tuple[int, list[str]]:
    """Prints a row of the table.

    Returns:
      The number of right programs, at most `count`, and a line on each one judged otherwise.
    """
    right = list(islice(right_ones(candidates), count))
    verdicts = list(sandbox.run_all(program for _, program in right))
    differing = [
        f"  {name}: {item}: {verdict.failure}: {verdict.error}"
        for (item, _), verdict in zip(right, verdicts, strict=True)
        if not verdict.passed
    ]
    share = len(differing) / max(1, len(right))
    print(f"| {name} | {len(right)} | {len(differing)} ({share:.1%}) |", flush=True)
    return len(right), differing


def right_ones(candidates: Iterator[Candidate]) -> Iterator[tuple[str, Program]]:
    """The id and program of the candidates whose tests pass in one interpreter."""
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        while tried := list(islice(candidates, AT_A_TIME)):
            programs = [task.program(item, f"```python\n{code}\n```") for task, item, code in tried]
            for (_, item, _), program, right in zip(
                tried, programs, pool.map(passes_in_one_interpreter, programs), strict=True
            ):
                if right:
                    yield item.id, program


def passes_in_one_interpreter(program: Program) -> bool:
    """Whether the tests pass beside the program. A result that is to be changed must have been."""
    check = "assert changed" if RESULT in program.code else ""
    source = "\n".join([program.trusted, program.code, *program.tests, check])
    run = "import sys; exec(compile(sys.stdin.read(), 'one', 'exec'), {'__name__': 'program'})"
    with tempfile.TemporaryDirectory() as directory:
        try:
            done = subprocess.run(
                [sys.executable, "-I", "-c", run],
                input=source.encode(),
                capture_output=True,
                cwd=directory,
                timeout=SECONDS,
            )
        except subprocess.TimeoutExpired:
            return False
    return done.returncode == 0


if __name__ == "__main__":
    run_command(main)
