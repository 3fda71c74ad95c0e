"""Files of judgments, in the layout of FastChat (lm-sys/FastChat, fastchat/llm_judge).

FastChat's tools can read ours, and we take the judgments of its gen_judgment.py as they are.
"""

import hashlib
import json
import threading
from dataclasses import dataclass
from pathlib import Path
from typing import Any

Json = dict[str, Any]

MISSING = -1  # the score of a missing rating in the file; FastChat's tools ignore it
NO_VERSION = "not recorded"  # the judge's version in judgments of FastChat


@dataclass(frozen=True, slots=True)
class JudgeRequest:
    """One answer to rate: its question and turn, and the prompt that shows it to the judge."""

    question_id: int
    turn: int
    prompt_name: str
    system: str
    user: str

    @property
    def hash(self) -> str:
        """A hash of the question, the answers, the reference and the instructions."""
        text = json.dumps([self.system, self.user])
        return hashlib.sha256(text.encode()).hexdigest()[:16]


def judgments_path(out: Path, judge: str) -> Path:
    """The file of judgments in a directory of results, where FastChat's tools write theirs."""
    return out / "mt_bench" / "model_judgment" / f"{judge.replace('/', '_')}_single.jsonl"


class Judgments:
    """A file of judgments, one JSON object per line. A line that was cut is dropped.

    A judgment belongs to a request if the judge, the name of the prompt and the whole text that
    the judge was shown are the same. Ours also store the judge's system prompt, as a part of
    "prompt_hash"; FastChat does not.
    """

    def __init__(self, path: Path):
        self.path = path
        self._lock = threading.Lock()
        self._found: dict[tuple[str, str, str], Json] = {}
        path.parent.mkdir(parents=True, exist_ok=True)
        text = path.read_bytes() if path.exists() else b""
        # Only a line feed ends a line of JSON Lines; the last line may lack it.
        lines = text.removesuffix(b"\n").split(b"\n") if text else []
        whole = b"".join(line + b"\n" for line in lines if self._take(line))
        if whole != text:
            beside = path.with_name(f".{path.name}")
            beside.write_bytes(whole)
            beside.replace(path)

    def _take(self, line: bytes) -> bool:
        """Stores the judgment of a line, if it is one; False where the line is incomplete."""
        try:
            record = json.loads(line)
        except ValueError:
            return False
        match record:
            case {
                "judge": [str(judge), str(prompt_name)],
                "user_prompt": str(shown),
                "score": int() | float(),
                "judgment": str(),
                "turn": int(),
            }:
                record.setdefault("judge_version", NO_VERSION)
                known_by = record.get("prompt_hash", shown)
                self._found[judge, prompt_name, known_by] = record
        return True

    def find(self, judge: str, request: JudgeRequest) -> Json | None:
        """The judgment of a request; None where there is none."""
        ours = self._found.get((judge, request.prompt_name, request.hash))
        return ours or self._found.get((judge, request.prompt_name, request.user))

    def append(self, record: Json) -> None:
        """Adds a record to the file. May be called from any thread."""
        line = json.dumps(record) + "\n"
        with self._lock, self.path.open("a", encoding="utf-8") as file:
            file.write(line)
            self._take(line.encode())
