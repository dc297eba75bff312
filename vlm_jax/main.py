"""The program: one recipe, one work directory, trained or evaluated.

    python -m vlm_jax.main --config=configs/lvm_3b.py:tiny --workdir=runs/lvm
    python -m vlm_jax.main --config=configs/lvm_3b.py --workdir=... --config.train.batch_size=64
    python -m vlm_jax.main --workdir=... --mode=evaluate        with the run's own recipe
    python -m vlm_jax.main --config=... --describe

The same command run again continues from the newest good checkpoint. On several hosts, run it on
every host: TPU pods, SLURM and MPI are found by themselves, elsewhere give --coordinator,
--num_processes and --process_id. Recipes are looked up in the current folder first, then among
those shipped with the package, which recipes anywhere import by `from configs import lvm_3b`;
--config=RUN/config.json takes that of a run.

Exit status: 0 done, or saved because SIGTERM, SIGHUP or Ctrl-C asked to stop; 1 an error in the
code, or evaluations that failed; 2 something to mend (the message says what); 3 another process of
the job failed (its message is repeated) or never came; 129, 130 and 143 SIGHUP, Ctrl-C and SIGTERM
before there was anything to save.
"""

import argparse
import os
import pathlib
import re
import signal
import sys
import traceback
import warnings

from vlm_jax.machines import console, process_end, stop_signal
from vlm_jax.program import recipes, recorded, requirements


def main(argv=None):
    """Parses flags, then runs; user errors end in one message and exit status 2, not a trace."""
    stop = stop_signal.StopSignal(_leave)
    console.tolerate_any_text()
    try:
        values = _parse(list(sys.argv if argv is None else argv))
        if values:
            _run(values, stop)
    finally:
        stop.restore()


def _run(values, stop):
    from ml_collections import config_flags

    # Heavy imports only now: --help and a mistyped flag answer at once.
    distributed, program = _import_program()
    try:
        with distributed.job(values.coordinator, values.num_processes, values.process_id) as peers:
            stop.join(peers)
            program.run(
                values.config,
                pathlib.Path(values.workdir),
                mode=values.mode,
                stop=stop,
                given=config_flags.get_override_values(values["config"]),
            )
    except program.USER_ERRORS as error:
        if os.environ.get("VLM_JAX_TRACE"):
            traceback.print_exc()
        message = f"error: {error}\n(set VLM_JAX_TRACE=1 for the trace)"
        distributed.end(getattr(error, "exit_status", process_end.USER_ERROR), message)
    except SystemExit as error:  # of code that the run calls: nothing of ours ends like that
        distributed.end(1, f"error: the run was ended before its end, by sys.exit({error.code!r})")
    except Exception:
        traceback.print_exc()
        distributed.end(1)


def _import_program():
    try:
        if problems := requirements.unmet():
            raise ImportError("; ".join(problems))
        from vlm_jax.machines import distributed
        from vlm_jax.program import run as program
    except (ImportError, AttributeError, TypeError, RuntimeError) as error:
        if os.environ.get("VLM_JAX_TRACE"):
            raise
        _fail(requirements.explain(error))
    return distributed, program


def _leave(number):
    name = signal.Signals(number).name
    process_end.end(
        process_end.SIGNAL + number, f"stopped by {name}: nothing new was there to be saved"
    )


def _parse(argv):
    """Values of the flags; None when it was help or a description that was asked for."""
    from absl import flags

    argv, record = _take_record(argv)
    argv = _locate_recipe(argv)
    try:
        values = _define_flags(argv, record)
        if {"-h", "-help", "--help"} & set(argv[1:]):
            print(f"{__doc__}\n{values.get_help()}")
            return None
        with warnings.catch_warnings():  # of how ml_collections loads recipes
            warnings.filterwarnings("ignore", "the load_module", DeprecationWarning)
            rest = values(argv)[1:]
    except KeyError as error:  # an override below a section that the recipe has not
        message = str(error.args[0]).replace("\n", ". ")
        _fail(f"unknown key in an override of --config: {message}")
    except flags.Error as error:
        _fail(_without_trace(str(error)))
    except Exception as error:  # a recipe is Python and may raise anything
        if os.environ.get("VLM_JAX_TRACE"):
            raise
        last = traceback.extract_tb(error.__traceback__)[-1]
        recipe = next((x for x in argv if x.startswith("--config")), "--config")
        _fail(f"{recipe}: {type(error).__name__}: {error} ({last.filename}:{last.lineno})")
    if rest:
        _fail(_explain_rest(rest, values))
    if values.describe and values["config"].value is not None:
        _describe(values.config)
        return None
    if values["config"].value is None or not values.workdir:
        _fail("both --config and --workdir are needed; --help shows the use")
    if re.match(r"[A-Za-z][A-Za-z0-9+.-]*://", values.workdir):
        _fail(
            f"--workdir={values.workdir} is not a folder: buckets are not written to directly. "
            "Mount it (gcsfuse, s3fs, ...) and give the mounted folder"
        )
    return values


def _describe(config):
    from vlm_jax.program import config as config_lib
    from vlm_jax.program import describe

    try:
        print(describe.text(config))
    except (config_lib.ConfigError, OSError) as error:
        _fail(str(error))


def _without_trace(message):
    """ml_collections puts what a recipe raises into its message, as the text of a trace."""
    if "Traceback" not in message:
        return message
    lines = message.strip().splitlines()
    return f"{lines[0].partition(': Error whilst')[0]}: {lines[-1]}"


def _explain_rest(rest, values):
    first = rest[0].lstrip("-")
    if rest[0].startswith("-"):
        return f"argument {rest[0]!r} would be ignored behind a bare '--': leave that out"
    name = first.partition("=")[0]
    if name.partition(".")[0] in (values["config"].value or ()):
        first = f"config.{first}"
    if "=" in first and (first.startswith("config.") or name in values):
        return f"argument {rest[0]!r} would be ignored; did you mean --{first}?"
    return f"argument {rest[0]!r} is not understood: arguments look like --name=value"


def _define_flags(argv, record=None):
    from absl import flags
    from ml_collections import config_flags

    values = flags.FlagValues()
    # Not locked: a recipe need not list every field. The dataclass that reads a section refuses
    # unknown keys and wrong types, whether they come from the file or from the command line.
    options = dict(
        help_string="recipe: F or F:arg; --config.a.b=v overrides a value",
        flag_values=values,
        lock_config=False,
        accept_new_attributes=True,
        sys_argv=argv,
    )
    if record is None:
        config_flags.DEFINE_config_file("config", None, **options)
        parser = values["config"].parser
        parser.parse = recipes.checked(parser.parse)
    else:
        config_flags.DEFINE_config_dict("config", recipes.complete(record), **options)
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


def _take_record(argv):
    """The arguments, and the recipe that a run recorded where they name one instead of a file.

    That is `--config=RUN/config.json`, and the run's own in `--mode=evaluate --workdir=RUN` alone.
    """
    known = argparse.ArgumentParser(add_help=False, allow_abbrev=False, exit_on_error=False)
    for name in ("--config", "--mode", "--workdir"):
        known.add_argument(name)
    try:
        found, rest = known.parse_known_args(argv[1:])
    except argparse.ArgumentError:  # without a value: absl says so
        return argv, None
    if found.config and found.config.endswith(".json"):
        try:
            record = recorded.read(pathlib.Path(found.config))
        except ValueError as error:
            _fail(str(error))
        given = [f"--{name}={x}" for name in ("mode", "workdir") if (x := getattr(found, name))]
        return [argv[0], *given, *rest], record
    if found.config or found.mode != "evaluate" or not found.workdir:
        return argv, None
    _, program = _import_program()
    try:
        return argv, recorded.of_run(found.workdir)
    except program.USER_ERRORS as error:
        _fail(f"{error}. Without a checkpoint --config is needed too")


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


def _fail(message):
    print(f"error: {message}", file=sys.stderr)
    sys.exit(2)


if __name__ == "__main__":
    main()
