"""The program: one recipe, one work directory, trained or evaluated.

    python -m vlm_jax.main --config=configs/lvm_3b.py:tiny --workdir=runs/lvm
    python -m vlm_jax.main --config=configs/lvm_3b.py --workdir=... --config.train.batch_size=64
    python -m vlm_jax.main --config=... --workdir=... --mode=evaluate

The same command run again continues from the newest good checkpoint. On several hosts, run it on
every host: TPU pods, SLURM and MPI are found by themselves, elsewhere give --coordinator,
--num_processes and --process_id. Recipes are looked up in the current folder first, then among
those installed with the package.
"""

import os
import pathlib
import sys
import types

from absl import flags
from ml_collections import config_flags

FLAGS = flags.FLAGS

config_flags.DEFINE_config_file("config", None, "recipe, F or F:arg", lock_config=True)
flags.DEFINE_string("workdir", None, "folder for checkpoints, metrics and pictures")
flags.DEFINE_enum("mode", "train", ["train", "evaluate"], "what to do")
flags.DEFINE_string("coordinator", None, "host:port of process 0, the same on every host")
flags.DEFINE_integer("num_processes", None, "number of processes, with --coordinator")
flags.DEFINE_integer("process_id", None, "this process, 0 to num_processes-1")


def main(argv=None):
    """Parses flags, then runs; user errors end in one message and exit status 2, not a trace."""
    argv = _locate_recipe(list(sys.argv if argv is None else argv))
    if {"-h", "-help", "--help"} & set(argv[1:]):
        print(f"{__doc__}\n{FLAGS.module_help(sys.modules[__name__])}")
        return
    try:
        FLAGS(argv)
    except flags.Error as error:
        _fail(f"{error}{_suggest(str(error), argv)}")
    if FLAGS["config"].value is None or not FLAGS.workdir:
        _fail("both --config and --workdir are needed; --help shows the use")

    # Heavy imports only now: --help and a mistyped flag answer at once.
    from vlm_jax import run as program

    try:
        program.run(
            FLAGS.config,
            pathlib.Path(FLAGS.workdir),
            mode=FLAGS.mode,
            coordinator=FLAGS.coordinator,
            num_processes=FLAGS.num_processes,
            process_id=FLAGS.process_id,
        )
    except program.USER_ERRORS as error:
        if os.environ.get("VLM_JAX_TRACE"):
            raise
        _fail(f"{error}\n(set VLM_JAX_TRACE=1 for the trace)")


def _locate_recipe(argv):
    """Falls back to installed recipes; lets a recipe say `from configs import other`."""
    for index, argument in enumerate(argv):
        if argument == "--config" and index + 1 < len(argv):
            name, at = argv[index + 1], index + 1
        elif argument.startswith("--config="):
            name, at = argument.removeprefix("--config="), index
        else:
            continue
        path, _, arg = name.partition(":")
        installed = pathlib.Path(__file__).parent / "configs" / pathlib.Path(path).name
        if not os.path.exists(path) and installed.exists():
            path = str(installed)
            argv[at] = ("" if at > index else "--config=") + path + (f":{arg}" if arg else "")
        configs = types.ModuleType("configs")
        configs.__path__ = [os.path.dirname(os.path.abspath(path))]
        sys.modules["configs"] = configs
    return argv


def _suggest(message, argv):
    """The nearest key of the recipe for a mistyped `--config.a.b=v`."""
    from vlm_jax import config as config_lib

    key = next((word.strip("'\"") for word in message.split() if "config." in word), "")
    key = key.lstrip("-").partition("=")[0].removeprefix("config.")
    try:
        given = [a for a in argv if a.startswith("--config=")]
        recipe = flags.FlagValues()
        config_flags.DEFINE_config_file("config", flag_values=recipe)
        recipe([argv[0], *given])
        known = [path for path, _ in _leaves(config_lib.plain(recipe.config))]
    except Exception:  # the recipe itself is what is wrong; the message already says so
        return ""
    return config_lib.nearest(key, known) if key and key not in known else ""


def _leaves(tree, prefix=""):
    for key, value in tree.items():
        yield f"{prefix}{key}", value
        if isinstance(value, dict):
            yield from _leaves(value, f"{prefix}{key}.")


def _fail(message):
    print(f"error: {message}", file=sys.stderr)
    sys.exit(2)


if __name__ == "__main__":
    main()
