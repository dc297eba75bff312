"""Inference from the command line; writes pictures, or a line per input.

python -m vlm_jax.predict lvm --checkpoint=RUN --continue a.png b.png --n=2 --out=pictures
python -m vlm_jax.predict lvm --checkpoint=RUN --pair a.png a2.png --query=b.png --out=pictures
python -m vlm_jax.predict nxtp --checkpoint=RUN --image PHOTOS --out=labels.jsonl
python -m vlm_jax.predict SYSTEM --help

Exit status: 0 when something was made, 1 when no input could be used, 2 for a wrong command, 130
when it was interrupted.
"""

import argparse
import ast
import pathlib
import sys

from vlm_jax.machines import console


def main(argv=None):
    """Parses the system's own arguments, loads it, lets it write its answer."""
    console.tolerate_any_text()
    argv = list(sys.argv[1:] if argv is None else argv)

    systems = _systems()
    if not argv or argv[0].startswith("-"):
        print(f"{__doc__}\nSystems:")
        for name, does in systems.items():
            print(f"  {name:<10} {does}")
        sys.exit(0 if argv in (["-h"], ["--help"]) else 2)
    if argv[0] not in systems:
        print(f"error: no system {argv[0]!r}; known: {', '.join(systems)}", file=sys.stderr)
        sys.exit(2)

    from vlm_jax import task as task_lib

    commands = task_lib.resolve(f"vlm_jax.systems.{argv[0]}.command_line", "systems")
    args = make_parser(argv[0], commands).parse_args(argv[1:])

    from vlm_jax import loading
    from vlm_jax.program import run

    try:
        status = commands.predict(args)
    except KeyboardInterrupt:
        print("\nstopped; the same command continues", file=sys.stderr)
        sys.exit(130)
    except (*run.USER_ERRORS, ValueError) as error:
        missing = loading.missing(argv[0], args.checkpoint)
        first = f"{missing}; also: " if missing and args.checkpoint not in str(error) else ""
        print(f"error: {first}{error}", file=sys.stderr)
        sys.exit(2)
    if status:
        sys.exit(status)


def make_parser(system, commands):
    """The parser of a system's arguments.

    Args:
      system: its name.
      commands: its module `command_line`.
    """
    parser = argparse.ArgumentParser(
        prog=f"vlm_jax.predict {system}",
        description=commands.__doc__,
        formatter_class=_Help,
    )
    parser.add_argument("--checkpoint", required=True, help="work directory or released weights")
    parser.add_argument("--out", default="predictions", help="folder, or file, see above")
    parser.add_argument(
        "--averaged",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="take the moving average of the parameters where a run kept one",
    )
    commands.add_arguments(parser)
    return parser


def _systems():
    """Name -> what its command does, the first line of its text; nothing is imported."""
    from vlm_jax import systems

    found = {}
    for folder in map(pathlib.Path, systems.__path__):
        for file in sorted(folder.glob("*/command_line.py")):
            text = ast.get_docstring(ast.parse(file.read_text(encoding="utf-8")))
            found[file.parent.name] = text.partition("\n")[0].partition(": ")[2]
    return found


class _Help(argparse.RawDescriptionHelpFormatter, argparse.ArgumentDefaultsHelpFormatter):
    """The module's text as it stands, and every default."""


if __name__ == "__main__":
    main()
