"""The one error of this folder, so that programs can print its message without a trace."""


class WeightsError(ValueError):
    """A checkpoint that cannot be used; the message names the file and the remedy."""
