"""Errors that several rooms raise."""

from __future__ import annotations


class ConfigError(ValueError):
    """A mistake in a config file or in an override. The message says what is wrong and what would be valid."""
