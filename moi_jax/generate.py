"""python -m moi_jax.generate CKPT [PROMPT]: answers of a checkpoint, or a chat with it."""

import argparse
import signal
import sys
from collections.abc import Callable
from itertools import count
from pathlib import Path
from typing import TYPE_CHECKING

from moi_jax.cli.arguments import (
    COUNT,
    POSITIVE,
    PROBABILITY,
    TEMPERATURE,
    add_model,
    chosen_system,
    text,
)
from moi_jax.common.errors import UserError, run_command

if TYPE_CHECKING:
    from moi_jax.checkpoints.opener import OpenCheckpoint
    from moi_jax.sampling.requests import Completion, Request
    from moi_jax.sampling.sampler import Sampler

CHAT_CONTEXT = 8192  # of a chat, where the model's own is longer
INTERRUPTED = 128 + signal.SIGINT


def main() -> int:
    args = _arguments()
    # Any text may be answered, whatever the terminal's encoding can show.
    sys.stdout.reconfigure(errors="backslashreplace")  # type: ignore[union-attr]
    try:
        _generate(args)
    except KeyboardInterrupt:
        print(file=sys.stderr)
        return INTERRUPTED
    return 0


def _generate(args: argparse.Namespace) -> None:
    chats = args.prompt is None and args.prompt_ids is None and args.conversations is None
    if chats and not (sys.stdin and sys.stdin.isatty()):  # it is None where it was closed
        args.prompt, chats = _standard_input(), False
    if args.conversations:
        _answer_file(args)
        return
    opened = _open(args)
    if chats:
        _chat(opened, args)
    elif args.prompt_ids:
        _answer_ids(opened, args)
    else:
        _answer_prompt(opened, args)


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m moi_jax.generate",
        description="Answers a prompt, or a file of conversations, by a checkpoint or the newest "
        "step of a run. Without any it chats on a terminal, and elsewhere reads the prompt from "
        "standard input. Answers go to standard output, all else to standard error.",
    )
    parser.add_argument("checkpoint", type=Path, metavar="CKPT")
    parser.add_argument("prompt", nargs="?", type=text, metavar="PROMPT", help="a user's message")
    asked = parser.add_mutually_exclusive_group()
    asked.add_argument(
        "--prompt-ids",
        type=_ids,
        metavar="1,2,3",
        help="raw token ids; the new ones are printed, without the one that stops",
    )
    asked.add_argument(
        "--conversations",
        type=Path,
        metavar="FILE",
        help='JSON Lines of {"messages": [...]}, a user\'s message last',
    )
    parser.add_argument(
        "--out",
        type=Path,
        metavar="FILE",
        help="with --conversations: the rows with their answers and why each ended (finish); a "
        "killed command goes on when it is given again",
    )
    add_model(parser.add_argument_group("the model"))
    _add_answer(parser.add_argument_group("the answer"))
    _add_cache(parser.add_argument_group("the cache"))
    args = parser.parse_intermixed_args()
    if args.prompt is not None and (args.prompt_ids or args.conversations):
        raise UserError("PROMPT, --prompt-ids and --conversations are asked one at a time")
    if (args.conversations is None) != (args.out is None):
        raise UserError("--conversations and --out go together; give both or neither")
    if args.prompt_ids and (args.system is not None or args.no_system):
        raise UserError("--prompt-ids are the whole prompt; leave --system and --no-system out")
    if args.prompt_ids and args.stop:
        raise UserError(
            "--stop ends a text and --prompt-ids prints ids, of which one may pass its end; "
            "leave --stop out"
        )
    return args


def _add_answer(group: "argparse._ArgumentGroup") -> None:
    group.add_argument(
        "--max-new-tokens", type=POSITIVE, default=512, metavar="N", help="default: 512"
    )
    group.add_argument(
        "--temperature",
        type=TEMPERATURE,
        default=0.0,
        metavar="T",
        help="0 takes the likeliest token (default). Qwen's own chat samples: --temperature 1 "
        "--top-p 0.8",
    )
    group.add_argument(
        "--top-k", type=COUNT, default=0, metavar="K", help="among the K likeliest (default: all)"
    )
    group.add_argument(
        "--top-p",
        type=PROBABILITY,
        default=1.0,
        metavar="P",
        help="among the fewest likeliest that together have probability P (default: 1)",
    )
    group.add_argument(
        "--seed",
        type=COUNT,
        default=0,
        metavar="N",
        help="of the draws; the n-th row of a file, or question of a chat, has N + n (default: 0)",
    )
    group.add_argument(
        "--stop",
        type=_stop,
        action="append",
        default=[],
        metavar="TEXT",
        help="end the answer before TEXT, beside where the chat template ends it; may be repeated; "
        "not with --prompt-ids",
    )


def _add_cache(group: "argparse._ArgumentGroup") -> None:
    group.add_argument(
        "--slots",
        type=POSITIVE,
        default=16,
        metavar="N",
        help="conversations of a file answered at a time (default: 16)",
    )
    group.add_argument(
        "--context",
        type=POSITIVE,
        metavar="N",
        help="tokens of the longest prompt and its answer together: the cache is made for them "
        f"(default: what is asked needs, for a chat {CHAT_CONTEXT:,}; the model's length at most)",
    )


def _stop(given: str) -> str:
    if not given:
        raise argparse.ArgumentTypeError("an empty text ends nothing")
    return text(given)


def _ids(given: str) -> list[int]:
    """The ids of "1,2,3"."""
    try:
        return [int(COUNT(part)) for part in given.split(",")]
    except argparse.ArgumentTypeError:
        raise argparse.ArgumentTypeError(f"{given!r} is no list of ids such as 1,2,3") from None


def _standard_input() -> str:
    prompt = ""
    if sys.stdin:
        sys.stdin.reconfigure(encoding="utf-8", errors="strict")  # type: ignore[union-attr]
        try:
            prompt = sys.stdin.read().removesuffix("\n")
        except UnicodeDecodeError:
            raise UserError("standard input is not valid UTF-8") from None
    if not prompt.strip():
        raise UserError("there is no prompt: give one, or --conversations, or chat on a terminal")
    return prompt


def _open(args: argparse.Namespace) -> "OpenCheckpoint":
    import jax

    from moi_jax.checkpoints.opener import open_checkpoint

    return open_checkpoint(
        args.checkpoint,
        devices=jax.devices(),
        dtype=args.dtype,
        mesh=args.mesh,
        chat_template=args.chat_template,
    )


def _sampler(opened: "OpenCheckpoint", slots: int, context: int) -> "Sampler":
    """Says what the cache will take before anything is allocated for it."""
    from moi_jax.sampling.chat_model import make_sampler

    sampler = make_sampler(
        opened.bind,
        opened.config,
        opened.tokenizer,
        slots=slots,
        context=context,
        mesh=opened.mesh,
    )
    limit = opened.config.seq_length
    longer = f"; the model was made for {limit:,} tokens" if context > limit else ""
    _note(f"{opened.step} in {opened.dtype}; {sampler.describe()}{longer}")
    return sampler


def _context(opened: "OpenCheckpoint", args: argparse.Namespace, needed: int) -> int:
    """--context, or what is needed, in the sampler's steps: few programs to compile and keep."""
    from moi_jax.sampling.sampler import SHORTEST_CACHE

    return args.context or min(
        -(-needed // SHORTEST_CACHE) * SHORTEST_CACHE, opened.config.seq_length
    )


def _request(prompt: list[int], args: argparse.Namespace, number: int = 0) -> "Request":
    from moi_jax.sampling.requests import Request

    return Request(
        prompt,
        max_new_tokens=args.max_new_tokens,
        temperature=args.temperature,
        top_k=args.top_k,
        top_p=args.top_p,
        seed=args.seed + number,
        stop_strings=tuple(args.stop),
    )


def _answer(
    opened: "OpenCheckpoint",
    sampler: "Sampler",
    request: "Request",
    show: Callable[[str], None] | None = None,
) -> "Completion":
    """The answer to one request.

    Raises:
      UserError: the model gives no finite logits.
    """
    on_text = (lambda _, text: show(text)) if show else None
    ((_, completion),) = sampler.run(opened.parameters, [request], on_text)
    if completion.finish == "not_finite":
        raise _not_finite(opened)
    return completion


def _not_finite(opened: "OpenCheckpoint", which: str = "") -> UserError:
    return UserError(
        f"{which}the logits of {opened.step} in {opened.dtype} are not finite (NaN or infinite): "
        f"it is damaged, or its training has diverged"
    )


def _answer_one(
    opened: "OpenCheckpoint",
    args: argparse.Namespace,
    prompt: list[int],
    show: Callable[[str], None] | None = None,
) -> "Completion":
    """Raises UserError where there is no answer."""
    context = _context(opened, args, len(prompt) + args.max_new_tokens)
    sampler = _sampler(opened, 1, context)
    completion = _answer(opened, sampler, _request(prompt, args), show)
    if completion.finish == "too_long":
        raise UserError(
            f"the prompt has {len(prompt):,} tokens and the context {context:,}, with no room for "
            f"an answer; shorten it or raise --context (the model's length is "
            f"{opened.config.seq_length:,})"
        )
    return completion


def _answer_prompt(opened: "OpenCheckpoint", args: argparse.Namespace) -> None:
    from moi_jax.text.conversations import Message
    from moi_jax.text.rendering import render_prompt

    messages = [Message("user", args.prompt)]
    prompt = render_prompt(
        messages, opened.tokenizer, chosen_system(args, opened.prompts["default_system_prompt"])
    )
    completion = _answer_one(opened, args, prompt, _show)
    print()
    _note(_cut(completion))


def _answer_ids(opened: "OpenCheckpoint", args: argparse.Namespace) -> None:
    beyond = [number for number in args.prompt_ids if number >= opened.config.vocab_size]
    if beyond:
        raise UserError(
            f"--prompt-ids {beyond[0]}: the model has the ids 0 to {opened.config.vocab_size - 1:,}"
        )
    completion = _answer_one(opened, args, args.prompt_ids)
    print(",".join(map(str, completion.tokens)))
    _note(_cut(completion))


def _answer_file(args: argparse.Namespace) -> None:
    from moi_jax.checkpoints.items import parameters_fingerprint
    from moi_jax.common.progress import count_bar
    from moi_jax.sampling.conversation_file import (
        AnsweredFile,
        check_absent,
        read_conversations,
    )
    from moi_jax.text.rendering import render_prompt

    check_absent(args.out)  # before what takes long
    rows = read_conversations(args.conversations)
    opened = _open(args)
    system = chosen_system(args, opened.prompts["default_system_prompt"])
    prompts = [render_prompt(row.messages, opened.tokenizer, system) for row in rows]
    decided = ("max_new_tokens", "temperature", "top_k", "top_p", "seed", "stop", "context")
    made_by = {"parameters": parameters_fingerprint(opened.step), "dtype": opened.dtype}
    made_by |= {name: getattr(args, name) for name in decided}
    answers = AnsweredFile(args.out, rows, prompts, made_by)
    waiting = answers.waiting()
    if len(waiting) < len(rows):
        _note(f"{len(rows) - len(waiting)} of {len(rows)} were answered before")
    requests = [_request(prompts[n], args, n) for n in waiting]
    context = _context(opened, args, max(map(len, prompts)) + args.max_new_tokens)
    if waiting:
        sampler = _sampler(opened, min(args.slots, len(waiting)), context)
        try:
            with count_bar("answers", len(waiting)) as advance:
                for index, completion in sampler.run(opened.parameters, requests):
                    answers.add(waiting[index], completion)
                    advance(1)
        except KeyboardInterrupt:
            _note(f"{answers.partial} keeps the answers so far; the same command goes on")
            raise
    counts = answers.finish()
    ended = ", ".join(f"{finish} {number}" for finish, number in sorted(counts.items()))
    _note(f"{args.out}: {len(rows)} answers ({ended})")
    if bad := counts.get("not_finite"):
        raise _not_finite(opened, f"{bad} of {len(rows)} rows have no whole answer: ")


def _chat(opened: "OpenCheckpoint", args: argparse.Namespace) -> None:
    from moi_jax.sampling.chat import Chat, chat_on_terminal

    context = _context(opened, args, CHAT_CONTEXT)
    sampler = _sampler(opened, 1, context)
    room = min(args.max_new_tokens, context // 2)
    chat = Chat(
        opened.tokenizer,
        chosen_system(args, opened.prompts["default_system_prompt"]),
        context,
        room,
    )
    numbers = count()

    def answer(prompt: list[int], show: Callable[[str], None]) -> str | None:
        return _cut(_answer(opened, sampler, _request(prompt, args, next(numbers)), show))

    chat_on_terminal(chat, answer, _note)


def _show(text: str) -> None:
    print(text, end="", flush=True)


def _note(line: str | None) -> None:
    if line:
        print(line, file=sys.stderr, flush=True)


def _cut(completion: "Completion") -> str | None:
    """What to tell of an answer that its length ended."""
    if completion.finish != "length":
        return None
    return f"(cut after {len(completion.tokens):,} tokens; see --max-new-tokens and --context)"


if __name__ == "__main__":
    run_command(main)
