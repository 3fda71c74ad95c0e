"""python -m moi_jax.generate CKPT [PROMPT]: answers of a checkpoint, or a chat with it."""

import argparse
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from moi_jax.cli.arguments import (
    COUNT,
    POSITIVE,
    PROBABILITY,
    TEMPERATURE,
    add_hosts,
    add_model,
    chosen_system,
    local_path,
    text,
)
from moi_jax.cli.command import run_command
from moi_jax.cli.hosts import check_same_command, join_hosts
from moi_jax.cli.jax_environment import prepare_jax
from moi_jax.cli.signals import interrupts_end_answers
from moi_jax.common.errors import UserError
from moi_jax.config.training import COMPILATION_CACHE

if TYPE_CHECKING:
    from collections.abc import Sequence

    from moi_jax.checkpoints.opener import OpenCheckpoint
    from moi_jax.sampling.requests import GenerationConfig


def main() -> int:
    args = _arguments()
    prepare_jax(COMPILATION_CACHE)

    from moi_jax.common.log import show_logs
    from moi_jax.config import Cluster
    from moi_jax.parallel import hosts
    from moi_jax.parallel.stuck import limit_batches

    show_logs(stderr=True, process_index=hosts.process_index)  # standard output is for answers
    join_hosts(args, Cluster())
    limit_batches(Cluster().stuck_seconds)
    check_same_command(args)
    chats = args.prompt is None and args.prompt_ids is None and args.conversations is None
    if chats:
        args.prompt = hosts.from_main("the prompt", _standard_input)
        chats = args.prompt is None
    if chats and hosts.joined():
        raise UserError(
            "a chat runs in one process; on many hosts give a prompt, or --conversations"
        )
    _generate(args, chats)
    return 0


def _generate(args: argparse.Namespace, chats: bool) -> None:
    """Opens the checkpoint, and answers what the arguments ask, or chats."""
    import jax

    from moi_jax.checkpoints.opener import open_checkpoint, open_tokenizer
    from moi_jax.parallel import hosts
    from moi_jax.sampling.chat import start_chat
    from moi_jax.sampling.completion_file import check_absent, complete_file, read_conversations
    from moi_jax.sampling.requests import GenerationConfig

    # Mistakes in the files are told before the parameters are read.
    tools = _tools(args)
    rows = []
    if args.conversations:
        hosts.from_main("the answers' file", lambda: check_absent(args.out))
        _, typing = open_tokenizer(args.checkpoint, args.chat_template)
        rows = read_conversations(args.conversations, typing)
    checkpoint = open_checkpoint(
        args.checkpoint,
        devices=jax.devices(),
        dtype=args.dtype,
        mesh=args.mesh,
        chat_template=args.chat_template,
        verify=args.verify,
        base=args.base,
        by_layer=True,
    )
    config = GenerationConfig(
        max_new_tokens=args.max_new_tokens,
        temperature=args.temperature,
        top_k=args.top_k,
        top_p=args.top_p,
        seed=args.seed,
        stop_strings=tuple(args.stop),
    )
    system = chosen_system(args, checkpoint.system_prompt)
    if rows:
        complete_file(
            checkpoint, rows, args.out, config,
            system=system, thinking=args.thinking, slots=args.slots, context=args.context,
        )  # fmt: skip
    elif chats:
        interrupts_end_answers()
        start_chat(
            checkpoint, config,
            system=system, tools=tools, thinking=args.thinking, context=args.context,
        )  # fmt: skip
    else:
        _answer(args, checkpoint, config, system, tools)


def _tools(args: argparse.Namespace) -> "Sequence[str]":
    """The tools of --tools, if the checkpoint knows tools as its chat template writes them."""
    from moi_jax.checkpoints.items import read_items
    from moi_jax.sampling.tool_file import read_tools

    if not args.tools:
        return ()
    tools = read_tools(args.tools)
    if read_items(args.checkpoint).prompts.get("tools") == "react":
        raise UserError(
            f"{args.checkpoint} was trained with data.tools: react, so it knows no tools in the "
            f"form of its chat template; leave out --tools, and list the tools in a row of "
            f"--conversations, which writes them as ReAct text"
        )
    return tools


def _answer(
    args: argparse.Namespace,
    checkpoint: "OpenCheckpoint",
    config: "GenerationConfig",
    system: str | None,
    tools: "Sequence[str]",
) -> None:
    """Prints the answer to a prompt: text as it comes, or ids or the calls of tools at the end."""
    from moi_jax.parallel.hosts import is_main
    from moi_jax.sampling.generate import describe_cut, generate
    from moi_jax.text.answers import answer_lines
    from moi_jax.text.conversations import Message
    from moi_jax.text.rendering import render_prompt

    def show(text: str) -> None:
        if is_main():
            print(text, end="", flush=True)

    prompt = args.prompt_ids
    if not prompt:
        question, tokenizer = [Message("user", args.prompt)], checkpoint.tokenizer
        prompt = render_prompt(question, tokenizer, system, tools, args.thinking)
    completion = generate(
        checkpoint, prompt, config,
        context=args.context, on_text=None if args.prompt_ids or tools else show,
    )  # fmt: skip
    if tools:
        show(answer_lines(completion.text, checkpoint.tokenizer.template, tools, args.thinking))
    show((",".join(map(str, completion.tokens)) if args.prompt_ids else "") + "\n")
    if (note := describe_cut(completion)) and is_main():
        print(note, file=sys.stderr)


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m moi_jax.generate",
        description="Answers a prompt, or a file of conversations, with a checkpoint or the newest "
        "step of a run. Without a prompt it starts a chat on a terminal; elsewhere it reads the "
        "prompt from standard input. Answers go to standard output, everything else to standard "
        "error.",
    )
    parser.add_argument("checkpoint", type=Path, metavar="CKPT")
    parser.add_argument("prompt", nargs="?", type=text, metavar="PROMPT", help="a user's message")
    asked = parser.add_mutually_exclusive_group()
    asked.add_argument(
        "--prompt-ids",
        type=_ids,
        metavar="1,2,3",
        help="raw token ids; prints the new ids, without the stop token",
    )
    asked.add_argument(
        "--conversations",
        type=local_path,
        metavar="FILE",
        help='JSON Lines of {"messages": [...]}; the last message is a user\'s',
    )
    parser.add_argument(
        "--out",
        type=local_path,
        metavar="FILE",
        help="with --conversations: where the rows go, each with its answer and why it ended "
        "(finish); after a kill, give the same command again and it continues",
    )
    add_model(parser.add_argument_group("the model"))
    _add_tools(parser.add_argument_group("tools and thinking"))
    _add_answer(parser.add_argument_group("the answer"))
    _add_cache(parser.add_argument_group("the cache"))
    add_hosts(parser)
    args = parser.parse_intermixed_args()
    if args.prompt is not None and (args.prompt_ids or args.conversations):
        raise UserError("give only one of PROMPT, --prompt-ids and --conversations")
    if (args.conversations is None) != (args.out is None):
        raise UserError("--conversations and --out go together; give both or neither")
    if args.prompt_ids and (args.system is not None or args.no_system):
        raise UserError("--prompt-ids is the whole prompt; leave out --system and --no-system")
    if args.prompt_ids and (args.tools or args.thinking is not None):
        raise UserError("--prompt-ids is the whole prompt; leave out --tools and --thinking")
    if args.conversations and args.tools:
        raise UserError("each row of --conversations lists its own tools; leave out --tools")
    if args.prompt_ids and args.stop:
        raise UserError(
            "--stop cuts a text and --prompt-ids prints ids, which may not end where the text "
            "does; leave out --stop"
        )
    return args


def _add_tools(group: "argparse._ArgumentGroup") -> None:
    group.add_argument(
        "--tools",
        type=local_path,
        metavar="FILE",
        help="tools that the model may call, in OpenAI's form: a JSON list, or one a line; each "
        "call is shown as a line of JSON",
    )
    group.add_argument(
        "--thinking",
        type=_on_or_off,
        metavar="on|off",
        help="whether the model shall think, where its chat template has the choice (default: as "
        "the template does)",
    )


def _add_answer(group: "argparse._ArgumentGroup") -> None:
    group.add_argument(
        "--max-new-tokens", type=POSITIVE, default=512, metavar="N", help="default: 512"
    )
    group.add_argument(
        "--temperature",
        type=TEMPERATURE,
        default=0.0,
        metavar="T",
        help="0 takes the likeliest token (default); Qwen's own chat uses --temperature 1 "
        "--top-p 0.8",
    )
    group.add_argument(
        "--top-k",
        type=COUNT,
        default=0,
        metavar="K",
        help="sample among the K likeliest tokens (default: all)",
    )
    group.add_argument(
        "--top-p",
        type=PROBABILITY,
        default=1.0,
        metavar="P",
        help="sample among the fewest likeliest tokens with a total probability of P (default: 1)",
    )
    group.add_argument(
        "--seed",
        type=COUNT,
        default=0,
        metavar="N",
        help="seed of the sampling; row n of a file, or question n of a chat, uses N + n "
        "(default: 0)",
    )
    group.add_argument(
        "--stop",
        type=_stop,
        action="append",
        default=[],
        metavar="TEXT",
        help="end the answer before TEXT, or where the chat template ends it; may be repeated; not "
        "with --prompt-ids",
    )


def _add_cache(group: "argparse._ArgumentGroup") -> None:
    group.add_argument(
        "--slots",
        type=POSITIVE,
        default=16,
        metavar="N",
        help="how many conversations of a file are answered at a time (default: 16)",
    )
    group.add_argument(
        "--context",
        type=POSITIVE,
        metavar="N",
        help="tokens of the longest prompt and its answer together, which the cache must hold "
        "(default: as many as needed, for a chat 8,192; at most the model's length)",
    )


def _on_or_off(given: str) -> bool:
    if given not in ("on", "off"):
        raise argparse.ArgumentTypeError(f"{given!r} is neither on nor off")
    return given == "on"


def _stop(given: str) -> str:
    if not given:
        raise argparse.ArgumentTypeError("it is empty")
    return text(given)


def _ids(given: str) -> list[int]:
    """The ids of "1,2,3"."""
    try:
        return [int(COUNT(part)) for part in given.split(",")]
    except argparse.ArgumentTypeError:
        raise argparse.ArgumentTypeError(f"{given!r} is no list of ids such as 1,2,3") from None


def _standard_input() -> str | None:
    """The prompt on standard input; None where that is a terminal."""
    if sys.stdin and sys.stdin.isatty():
        return None
    prompt = ""
    if sys.stdin:  # it is None where it was closed
        sys.stdin.reconfigure(encoding="utf-8", errors="strict")  # type: ignore[union-attr]
        try:
            prompt = sys.stdin.read().removesuffix("\n")
        except UnicodeDecodeError:
            raise UserError("standard input is not valid UTF-8") from None
    if not prompt.strip():
        raise UserError(
            "there is no prompt: give one, give --conversations, or start a chat on a terminal"
        )
    return prompt


if __name__ == "__main__":
    run_command(main)
