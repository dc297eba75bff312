r"""NXTP on G70M: G3M and LAION-Synthetic (arXiv 2312.02142). See nxtp_g3m.py for the command.

The published run has 414,138 updates of 512 images, five days on 32 A100. The released checkpoint
is named after 1,656,549 updates, which are the same three epochs at 128 images.
"""

from configs import nxtp_g3m


def get_config(arg=""):
    if arg:
        return nxtp_g3m.get_config(arg)
    return nxtp_g3m.full(
        dict(
            cc3m=dict(split="cc3m_train", weight=2_698_118.0),
            sbu=dict(split="sbu_train", weight=828_816.0),
            coco=dict(split="coco_train", weight=118_287.0),
            laion=dict(split="laion_train", weight=67_034_168.0),
        ),
        steps=414_138,
    )
