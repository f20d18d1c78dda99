"""Talk with a language model in the terminal: a run's, an adapter's on its base, or any model.

    ./run.sh -m bmft.chat                             smollm2 as it is
    ./run.sh -m bmft.chat --run runs/instruct_lora    what a run made of its base
    ./run.sh -m bmft.chat --base MODEL [--adapter DIR] --temperature 0.7 --top-p 0.9

An answer streams as it is written. A line that begins with / is a command: /new forgets the dialog,
/system TEXT begins a new one with these instructions, /quit ends, as the end of input does. Ctrl-C
stops an answer, which is then forgotten with its question; where one is waited for, it ends.
"""

import argparse
import itertools
import sys

from bmft import generate, predict, writing
from bmft.data.dialogs import Turn
from bmft.errors import Mistake, Parser, command
from bmft.generate import LIKELIEST, Sampling
from bmft.peft import files

COMMANDS = "/new, /system TEXT, /quit"


def main(argv):
    layout = argparse.RawTextHelpFormatter
    parser = Parser("bmft.chat", description=__doc__, formatter_class=layout)
    parser.add_argument("--run", help="a run directory")
    parser.add_argument("--base", help="a model: directory, preset or Hub id; smollm2")
    parser.add_argument("--adapter", help="an adapter directory, ours or PEFT's")
    parser.add_argument("--tokens", type=int, default=256, help="of an answer, at most")
    parser.add_argument("--seed", type=int, default=0)
    for name, value in LIKELIEST._asdict().items():
        flag = "--" + name.replace("_", "-")
        parser.add_argument(flag, type=type(value), default=value, help=f"{value} unless given")
    options = parser.parse_args(argv)
    if options.run and (options.base or options.adapter):
        raise Mistake("give --run DIR, or --base MODEL with or without --adapter DIR")
    converse(_writer(options), _lines(), options.seed)


def _writer(options):
    sampling = Sampling(**{name: getattr(options, name) for name in Sampling._fields})
    generate.check(sampling, shown=True)
    how = {"tokens": options.tokens, "sampling": sampling}
    if options.adapter:
        files.card(options.adapter)  # a run or a model in its place is a mistake
    if not (options.run or options.adapter):
        return writing.load(options.base or "smollm2", **how)
    found = predict.load(options.run or options.adapter, base=options.base, **how)
    if not isinstance(found, writing.Writer):
        raise Mistake(f"{options.run or options.adapter} is no language model's: it cannot talk")
    return found


def _lines():
    """What the user types, a line at a time."""
    while True:
        try:
            yield input("> " if sys.stdin.isatty() else "")
        except (EOFError, KeyboardInterrupt):
            return


def converse(writer, lines, seed=0):
    """Answer lines, an iterable of texts, and print the answers."""
    turns = []
    for number, line in zip(itertools.count(seed), lines, strict=False):
        line = line.strip()
        if line == "/quit":
            return
        if line.startswith("/"):
            turns = _told(line, turns)
        elif line:
            asked = [*turns, Turn("user", line)]
            try:
                answer = writer.answer(asked, seed=number, show=_print)
            except Mistake as mistake:  # no room, or no place for a second question
                print(f"{mistake}; /new begins anew")
                continue
            except KeyboardInterrupt:  # enough of it
                print()
                continue
            print(flush=True)
            turns = [*asked, Turn("assistant", answer)]


def _told(line, turns):
    """The turns behind a command."""
    name, _, text = line.partition(" ")
    if name == "/new":
        return []
    if name == "/system" and text.strip():
        return [Turn("system", text.strip())]
    print(f"{name} is no command; {COMMANDS}")
    return turns


def _print(text):
    print(text, end="", flush=True)


if __name__ == "__main__":
    raise SystemExit(command(main))
