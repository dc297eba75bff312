"""Inference from the command line; writes pictures, or a line per input.

python -m vlm_jax.predict lvm --checkpoint=RUN --continue a.png b.png --n=2 --out=pictures
python -m vlm_jax.predict lvm --checkpoint=RUN --pair a.png a2.png --query=b.png --out=pictures
python -m vlm_jax.predict nxtp --checkpoint=RUN --image PHOTOS --out=labels.jsonl
python -m vlm_jax.predict SYSTEM --help

Exit status: 0 when something was made, 1 when no input could be used, 2 for a wrong command, 130
when it was interrupted.
"""

import argparse
import sys

from vlm_jax import console


def main(argv=None):
    """Parses the system's own arguments, loads it, lets it write its answer."""
    console.tolerate_any_text()
    argv = list(sys.argv[1:] if argv is None else argv)

    from vlm_jax import task as task_lib

    if not argv or argv[0].startswith("-"):
        print(f"{__doc__}\nSystems: {', '.join(task_lib.known('systems'))}")
        sys.exit(0 if argv in (["-h"], ["--help"]) else 2)
    try:
        commands = task_lib.resolve(f"vlm_jax.systems.{argv[0]}.command_line", "systems")
    except ValueError:
        known = task_lib.known("systems")
        print(f"error: no system {argv[0]!r}; known: {', '.join(known)}", file=sys.stderr)
        sys.exit(2)
    parser = argparse.ArgumentParser(
        prog=f"vlm_jax.predict {argv[0]}",
        description=commands.__doc__,
        formatter_class=_Help,
    )
    parser.add_argument("--checkpoint", required=True, help="work directory or released weights")
    parser.add_argument("--out", default="predictions", help="folder, or file, see above")
    commands.add_arguments(parser)
    args = parser.parse_args(argv[1:])

    from vlm_jax import run

    try:
        status = commands.predict(args)
    except KeyboardInterrupt:
        print("\nstopped; the same command continues", file=sys.stderr)
        sys.exit(130)
    except (*run.USER_ERRORS, ValueError) as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    if status:
        sys.exit(status)


class _Help(argparse.RawDescriptionHelpFormatter, argparse.ArgumentDefaultsHelpFormatter):
    """The module's text as it stands, and every default."""


if __name__ == "__main__":
    main()
