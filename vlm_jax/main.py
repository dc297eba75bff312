"""The program: one recipe, one work directory, trained or evaluated.

    python -m vlm_jax.main --config=configs/lvm_3b.py:tiny --workdir=runs/lvm
    python -m vlm_jax.main --config=configs/lvm_3b.py --workdir=... --config.train.batch_size=64
    python -m vlm_jax.main --config=... --workdir=... --mode=evaluate
    python -m vlm_jax.main --config=... --describe

The same command run again continues from the newest good checkpoint. On several hosts, run it on
every host: TPU pods, SLURM and MPI are found by themselves, elsewhere give --coordinator,
--num_processes and --process_id. Recipes are looked up in the current folder first, then among
those shipped with the package, which recipes anywhere import by `from configs import lvm_3b`.
"""

import os
import pathlib
import sys

from absl import flags
from ml_collections import config_flags

from vlm_jax import console, recipes


def main(argv=None):
    """Parses flags, then runs; user errors end in one message and exit status 2, not a trace."""
    console.tolerate_any_text()
    argv = _locate_recipe(list(sys.argv if argv is None else argv))
    values = _define_flags(argv)
    if {"-h", "-help", "--help"} & set(argv[1:]):
        print(f"{__doc__}\n{values.get_help()}")
        return
    try:
        values(argv)
    except (flags.Error, OSError, AttributeError, TypeError, ValueError) as error:
        _fail(str(error))
    except KeyError as error:  # an override below a section that the recipe has not
        message = str(error.args[0]).replace("\n", ". ")
        _fail(f"unknown key in an override of --config: {message}")
    if values.describe and values["config"].value is not None:
        _describe(values.config)
        return
    if values["config"].value is None or not values.workdir:
        _fail("both --config and --workdir are needed; --help shows the use")

    # Heavy imports only now: --help and a mistyped flag answer at once.
    from vlm_jax import run as program

    try:
        program.run(
            values.config,
            pathlib.Path(values.workdir),
            mode=values.mode,
            coordinator=values.coordinator,
            num_processes=values.num_processes,
            process_id=values.process_id,
            given=config_flags.get_override_values(values["config"]),
        )
    except program.USER_ERRORS as error:
        if os.environ.get("VLM_JAX_TRACE"):
            raise
        status = getattr(error, "exit_status", 2)
        _fail(f"{error}\n(set VLM_JAX_TRACE=1 for the trace)", status)


def _describe(config):
    from vlm_jax import config as config_lib
    from vlm_jax import describe

    try:
        print(describe.text(config))
    except (config_lib.ConfigError, OSError) as error:
        _fail(str(error))


def _define_flags(argv):
    values = flags.FlagValues()
    # Not locked: a recipe need not list every field. The dataclass that reads a section refuses
    # unknown keys and wrong types, whether they come from the file or from the command line.
    config_flags.DEFINE_config_file(
        "config",
        None,
        "recipe: F or F:arg; --config.a.b=v overrides a value",
        flag_values=values,
        lock_config=False,
        accept_new_attributes=True,
        sys_argv=argv,
    )
    text = "folder for checkpoints, metrics and pictures"
    flags.DEFINE_string("workdir", None, text, flag_values=values)
    modes = ["train", "evaluate"]
    flags.DEFINE_enum("mode", "train", modes, "what to do", flag_values=values)
    text = "print every key of the recipe with its value, type, default and meaning, and end"
    flags.DEFINE_boolean("describe", False, text, flag_values=values)
    text = "host:port of process 0, the same on every host"
    flags.DEFINE_string("coordinator", None, text, flag_values=values)
    text = "number of processes, with --coordinator"
    flags.DEFINE_integer("num_processes", None, text, flag_values=values)
    text = "this process, 0 to num_processes-1"
    flags.DEFINE_integer("process_id", None, text, flag_values=values)
    return values


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
        try:
            recipe = recipes.find(path)
        except FileNotFoundError as error:
            _fail(str(error))
        argv[at] = ("" if at > index else "--config=") + str(recipe) + (f":{arg}" if arg else "")
        recipes.make_importable(recipe)
    return argv


def _fail(message, status=2):
    print(f"error: {message}", file=sys.stderr)
    sys.exit(status)


if __name__ == "__main__":
    main()
