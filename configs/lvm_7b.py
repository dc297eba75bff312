"""LVM 7B, the released size: `lvm_3b.py` with the numbers of the published command.

524,288 tokens an update and a schedule that is far from its end when training stops: the published
run counts micro-steps (400,000, four to an update) but decays over 288,000 updates. Hardware: nodes
of eight GPUs in the published command; hours and numbers are not stated.
"""

from configs import lvm_3b


def get_config(arg=""):
    return lvm_3b.recipe(
        "lvm_7b", arg, batch_size=128, steps=100_000, decay_steps=288_000, accumulate=4
    )
