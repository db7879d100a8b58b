"""The error of this room. It imports nothing, so that everything may raise it."""


class DataError(ValueError):
    """Something is wrong with a dataset or its description. Messages name file, episode or key, and what is valid."""
