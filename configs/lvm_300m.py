"""LVM 300M: `lvm_3b.py` with the sizes of the paper's 300M model.

Hardware: TPU v3 pods; hours and numbers of this size are not stated.
"""

from configs import lvm_3b


def get_config(arg=""):
    return lvm_3b.recipe("lvm_300m", arg)
