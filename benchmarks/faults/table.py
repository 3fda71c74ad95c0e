"""What a campaign found, as markdown."""

from collections import Counter
from collections.abc import Iterable, Mapping

from cases import Case
from verdicts import EXACT, NAMED_STOP, SKIPPED, WRONG

VERDICTS = (EXACT, NAMED_STOP, WRONG, SKIPPED)


def report(cases: Iterable[Case], kinds: Mapping[str, str]) -> str:
    """A summary, and one table for each group; `kinds` maps the name of a case to its verdict."""
    groups: dict[str, list[Case]] = {}
    for case in cases:
        if case.name in kinds:
            groups.setdefault(case.group, []).append(case)
    parts = [_summary(groups, kinds)]
    parts += [
        f"### {group[0].upper()}{group[1:]}\n\n{_table(groups[group], kinds)}" for group in groups
    ]
    return "\n\n".join(parts) + "\n"


def _summary(groups: Mapping[str, list[Case]], kinds: Mapping[str, str]) -> str:
    rows = [["faults", "played", *VERDICTS]]
    total: Counter[str] = Counter()
    for group, cases in groups.items():
        counts = Counter(kinds[case.name] for case in cases)
        total += counts
        rows.append([group, *map(str, (len(cases), *(counts[kind] for kind in VERDICTS)))])
    rows.append(["all", *map(str, (total.total(), *(total[kind] for kind in VERDICTS)))])
    return _markdown(rows)


def _table(cases: list[Case], kinds: Mapping[str, str]) -> str:
    """A row for each place, a column for each fault."""
    faults = list(dict.fromkeys(case.fault for case in cases))
    found = {(case.place, case.fault): kinds[case.name] for case in cases}
    rows = [[cases[0].group, *faults]]
    for place in dict.fromkeys(case.place for case in cases):
        rows.append([place, *(found.get((place, fault), "") for fault in faults)])
    return _markdown(rows)


def _markdown(rows: list[list[str]]) -> str:
    head, *body = [f"| {' | '.join(row)} |" for row in rows]
    return "\n".join([head, f"|{' --- |' * len(rows[0])}", *body])
