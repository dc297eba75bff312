"""Sheets of photos with labels: sizes, and colours that tell right labels."""

import numpy as np
from PIL import ImageColor

from vlm_jax.systems.nxtp import label_sheet


def colours(sheet_u8):
    return {tuple(colour) for colour in sheet_u8.reshape(-1, 3)}


def entry(labels, references=()):
    return label_sheet.Entry(np.full((8, 4, 3), 128, np.uint8), labels, references)


def test_only_labels_that_are_true_are_green():
    green = ImageColor.getrgb(label_sheet.RIGHT)
    right = label_sheet.draw([entry([("dog", 0.5)], ["dog"])])
    wrong = label_sheet.draw([entry([("cat", 0.5)], ["dog"])])
    assert green in colours(right) and green not in colours(wrong)


def test_sizes():
    one = label_sheet.draw([entry([("dog", 0.5)])], cell=100)
    three = label_sheet.draw([entry([("dog", 0.5)])] * 3, columns=2, cell=100)
    assert one.shape[1] == 116 and three.shape[1] == 224
    assert three.shape[0] - 8 == 2 * (one.shape[0] - 8)
    more = label_sheet.draw([entry([("dog", 0.5)] * 9)], cell=100, shown=3)
    assert more.shape[0] - one.shape[0] == 2 * 17


def test_long_labels_stay_in_their_cell():
    sheet = label_sheet.draw([entry([("w" * 300, 0.5)], ["w" * 300])], cell=100)
    assert (sheet[110:, 108:] == 255).all()


def test_labels_of_any_text():
    odd = ["two\nlines", "", "\0", "\t", "ü\u2028x", "w" * 10**6, " " * 1000, "犬"]
    sheet = label_sheet.draw([entry([(text, float("nan")) for text in odd], odd)], cell=100)
    assert (sheet[110:, 108:] == 255).all()
