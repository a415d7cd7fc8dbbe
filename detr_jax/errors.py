"""Mistakes of a user's: errors whose message names the file or field, what was expected, and what to do.

The programs print their message and end with 1 (`detr_jax.cli.run`). Any other error is a bug of ours, or of a library,
and keeps its traceback.
"""


class UserError(ValueError):
    """A mistake in what a user gave: a file, a field of the config, an argument."""


class NotFoundError(UserError, FileNotFoundError):
    """A file or folder that a user named does not exist."""


class DataError(UserError):
    """A data set that cannot be trained on or evaluated as it is; the message names the file and the field."""
