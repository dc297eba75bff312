"""Every option of a Python verb is one of its command, with its default in --help."""

import inspect
import pathlib
import re

import pytest

from vlm_jax import loading, predict
from vlm_jax import task as task_lib
from vlm_jax.encoders import image_tokenizer
from vlm_jax.systems import lvm, nxtp
from vlm_jax.systems.nxtp import model as nxtp_model

VERBS = {
    "lvm": (lvm.Lvm.continue_, lvm.from_run, lvm.from_upstream),
    "nxtp": (nxtp_model.Nxtp.label, nxtp_model.Nxtp.label_stream, nxtp.from_upstream),
    "vqgan": (image_tokenizer.ImageTokenizer.encode_stream,),
}
# What the command takes in its own way: its inputs, and errors, which it always lists.
INPUTS = {"self", "frames", "images", "pictures", "checkpoint", "task", "formatter", "params"}
INPUTS |= {"on_error"}
# A command draws more at once; 0 and 16 both stand for what the weights say.
OTHER_DEFAULTS = {("lvm", "candidates"), ("nxtp", "k"), ("vqgan", "batch_size")}
OTHER_DEFAULTS |= {("lvm", "context_images")}


def parser_of(system):
    commands = task_lib.resolve(f"vlm_jax.systems.{system}.command_line", "systems")
    return predict.make_parser(system, commands)


@pytest.mark.parametrize("system", VERBS)
def test_options_of_verbs_are_options_of_the_command(system):
    parser = parser_of(system)
    there = {action.dest for action in parser._actions}
    for verb in (*VERBS[system], loading.load):
        for name, parameter in inspect.signature(verb).parameters.items():
            if name in INPUTS | {"system", "fields"}:
                continue
            assert name in there, (verb, name)
            if (system, name) not in OTHER_DEFAULTS:
                assert parser.get_default(name) == parameter.default, (verb, name)


@pytest.mark.parametrize("system", VERBS)
def test_every_option_is_explained_with_its_default(system):
    parser = parser_of(system)
    text = re.sub(r"\s+", " ", parser.format_help())
    for action in parser._actions:
        assert action.help, action.dest
        if action.option_strings and action.default not in (None, "==SUPPRESS=="):
            assert action.option_strings[0] in text and f"(default: {action.default})" in text


def test_help_lists_every_system_with_a_line(capsys):
    with pytest.raises(SystemExit) as stopped:
        predict.main(["--help"])
    assert stopped.value.code == 0
    lines = capsys.readouterr().out.partition("\nSystems:\n")[2].splitlines()
    root = pathlib.Path(task_lib.__file__).parent / "systems"
    has_one = [
        name for name in task_lib.known("systems") if (root / name / "command_line.py").exists()
    ]
    assert {"lvm", "nxtp", "vqgan"} <= set(has_one)
    assert [line.split()[0] for line in lines] == has_one
    assert all(len(line.split()) > 3 for line in lines)
    assert any("name what is in photos." in line for line in lines)


def test_fields_that_weights_do_not_take_are_named():
    with pytest.raises(ValueError, match="tiny is loaded without 'clip'"):
        loading.load("vqgan", "tiny", clip="ViT-L-14.pt")
