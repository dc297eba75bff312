"""The page about released weights is current, and its figures are those of the networks."""

import pathlib

import pytest

from vlm_jax.data import wheels
from vlm_jax.saving import released
from vlm_jax.systems.lvm import releases as lvm
from vlm_jax.systems.nextchat import releases as nextchat
from vlm_jax.systems.nxtp import releases as nxtp

ROOT = pathlib.Path(__file__).parents[1]


def test_the_page_is_current():
    page = (ROOT / "docs" / "weights.md").read_text()
    assert page == released.page(), "python -m vlm_jax.saving.released > docs/weights.md"


@pytest.mark.parametrize(
    "release, count",
    [
        (lvm.LVM, 6_544_199_680),
        (lvm.LVM_VQGAN, 146_244_675),
        (nextchat.NEXTCHAT, 7_741_812_788 + 256),  # as counted upstream, and a buffer
        (nxtp.LLAMA, 6_738_415_616),
        (nxtp.SMOLLM2, 134_515_008),
    ],
    ids=lambda x: getattr(x, "name", ""),
)
def test_parameters_as_published(release, count):
    assert released.num_params(release) == count


def test_readme_says_the_same():
    text = (ROOT / "README.md").read_text()
    for release, figures in (
        (lvm.LVM, "12.2, 24.4"),
        (lvm.LVM_VQGAN, "0.3, 0.5"),
        (nxtp.NXTP_G3M, "3.3, 6.6"),
    ):
        gib = [released.num_params(release) * size / 2**30 for size in (2, 4)]
        assert f"{gib[0]:.1f}, {gib[1]:.1f}" == figures and f"{figures} GiB" in text
        assert release.hub in text


def test_every_name_on_a_hub_is_in_the_notice():
    notice = (ROOT / "third_party" / "NOTICE.md").read_text()
    for release in (lvm.LVM, lvm.LVM_VQGAN, nxtp.NXTP_G3M, nextchat.NEXTCHAT, nextchat.VICUNA):
        assert release.hub in notice
    for name in set(wheels.PACKAGES) - {"imgviz"}:  # of which nothing is read
        assert f"| {name} " in notice, name
    assert "ViT-L-14.pt" in notice and "LLaMA 7B" in notice


@pytest.mark.parametrize("text, found", [
    ("Emma02/LVM_ckpts", [lvm.LVM]), ("clip=ViT-L-14.pt", [nxtp.CLIP]),
    ("clip=clip-vit-large-patch14-336,sam=sam_vit_h_4b8939.pth", [nextchat.CLIP_336, nextchat.SAM]),
    ("runs/mine", []), ("llama=smollm2", [nxtp.SMOLLM2]),
])  # fmt: skip
def test_names_of_files_say_which_release(text, found):
    assert released.named_in(text) == found
