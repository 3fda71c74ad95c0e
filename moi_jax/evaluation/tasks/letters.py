"""Finds the choice (A to D) of an answer in free text, by rules."""

import re
from collections.abc import Sequence

LETTERS = "ABCD"
# A letter alone; not the article ("A common cause") and not a name ("C++", "D = 3").
LETTER = re.compile(
    r"(?<![\w'’-])([A-D])(?![\w'’+#-]|\s*=)"
    r"(?!(?<=A)\s(?!(?:and|as|because|for|has|is|or|since|was|would)\b)[a-z])"
)
# Before a letter: "answer is", "choice would be the", "Option:", "I choose".
STATED = re.compile(
    r"\b(?:(?:answer|choice|option)\b[^.\n]*?(?:\bis(?:n['’]t)?\b|\bbe\b|[:=])|choos\w+|chose|select|pick)"
    r"\s*(?:[a-z]+[\s:,]+){0,3}[\s\"'“‘(\[]*$",
    re.IGNORECASE,
)
# After a letter: "is correct", "would be the best answer".
JUDGED = re.compile(
    r"[^.\n]{0,60}?\b(?:is|be|was|seems)\b[^.\n]{0,20}?"
    r"\b(?:correct|right|best (?:answer|choice))\b",
    re.IGNORECASE,
)
LEADING = re.compile(r"\(?([A-D])(?:\s*[.):\n]|\s+[-–—]\s|\s*$)")
ALONE = re.compile(r"\(?([a-dA-D])\)?\.?")
BOXED = re.compile(r"\\boxed\{\s*(?:\\text\w*\{)?\s*\(?([A-D])\b")
NEGATED = re.compile(r"\b(?:not|never|neither|wrong|incorrect|false)\b|n['’]t\b", re.IGNORECASE)

# Words that are not a part of a longer word or number.
WHOLE = r"(?<![\w-])(?<!\d[.,]){}(?!\w|[.,]\d)"


def find_letter(text: str, choices: Sequence[str]) -> str | None:
    """The letter; None where no rule finds one.

    Letters within the words of a choice are not letters: where the text has all words of a choice
    that has such letters, or has them right behind "the answer is", the choice's own letter takes
    their place. Then the rules are tried in this order:

    1. the last \\boxed{B};
    2. stated: the last "answer is B", "choice: (B)" or "I choose B" without a "not";
    3. judged: the last "B is correct" or "B would be the best answer" without a "not";
    4. the text begins with "B.", "B)", "(B)" or "B:", or it is only the letter;
    5. only one letter stands alone in the text; letters that the text says are not the answer do
       not count;
    6. the words of exactly one choice are in the text, in upper or lower case; words that occur
       only within those of a longer choice do not count.
    """
    full = _unmarked(text)
    text = _unmarked(_with_letters(text, choices))  # the marks may tell choices apart
    choices = [_unmarked(choice) for choice in choices]
    text = _with_letters(text, choices)
    if boxed := BOXED.findall(text):
        return boxed[-1]
    letters = list(LETTER.finditer(text))
    ends = [0, *(letter.end() for letter in letters)]
    starts = [*(letter.start() for letter in letters), len(text)]
    befores = [text[end:start] for end, start in zip(ends, starts, strict=True)]
    found: list[str] = []
    denied: list[str] = []
    for said in (
        [STATED.search(before[-120:]) for before in befores[:-1]],
        [JUDGED.match(after[:120]) for after in befores[1:]],
    ):
        for letter, match in zip(letters, said, strict=True):
            if match:
                (denied if NEGATED.search(match.group()) else found).append(letter.group(1))
        if found:
            return found[-1]
    if first := LEADING.match(text) or ALONE.fullmatch(text):
        return first.group(1).upper()
    different = {letter.group(1) for letter in letters} - set(denied)
    return different.pop() if len(different) == 1 else _quoted(full, choices)


def _unmarked(text: str) -> str:
    """The text without marks of Markdown and of formulas."""
    return re.sub(r"[*`$]", "", text).strip()


def _with_letters(text: str, choices: Sequence[str]) -> str:
    """The text with letters in place of words of choices, the longest choice first."""
    plain = [choice.rstrip(".").rstrip() for choice in choices]
    pairs = zip(plain, LETTERS, strict=True)
    for words, letter in sorted(pairs, key=lambda pair: len(pair[0]), reverse=True):
        is_unique = [other.lower() for other in plain].count(words.lower()) == 1
        if words and is_unique and not ALONE.fullmatch(words):
            text = _replace(text, words, letter)
    return text


def _replace(text: str, words: str, letter: str) -> str:
    has_letter = LETTER.search(words)

    def replacement(match: re.Match[str]) -> str:
        stated = has_letter or STATED.search(text[max(0, match.start() - 120) : match.start()])
        return letter if stated else match.group()

    whole = r"\s+".join(map(re.escape, words.split()))
    return re.sub(WHOLE.format(whole), replacement, text, flags=re.IGNORECASE)


def _quoted(text: str, choices: Sequence[str]) -> str | None:
    """The letter of the only choice whose words are in the text."""
    text = _plain(text)
    by_words: dict[str, str] = {}
    for letter, choice in zip(LETTERS, choices, strict=True):
        words = _plain(choice)
        by_words[words] = by_words.get(words, "") + letter
    found = ""
    for words in sorted(filter(None, by_words), key=len, reverse=True):
        text, count = re.subn(WHOLE.format(re.escape(words)), "\0", text)
        found += by_words[words] if count else ""
    return found if len(found) == 1 else None


def _plain(text: str) -> str:
    return " ".join(text.casefold().split()).rstrip(".")
