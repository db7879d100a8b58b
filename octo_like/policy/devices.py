"""What there is to compute on."""

import os

import jax

from octo_like.common.files import ConfigError


def find_devices() -> None:
    """Raises ConfigError when JAX finds no device of the kind that it was told to use."""
    try:
        jax.devices()
    except (RuntimeError, AssertionError) as error:  # JAX asserts that there is one when the only kind failed
        wanted = os.environ.get("JAX_PLATFORMS") or "any kind"
        reason = f": {error}" if str(error) else ""
        raise ConfigError(
            f"JAX finds no device of {wanted} (JAX_PLATFORMS){reason}; JAX_PLATFORMS=cpu computes here"
        ) from error
