"""What a user can get wrong on the launcher's command line or in its files."""

from __future__ import annotations


class LaunchError(Exception):
    """The launch cannot begin. The message says what was found, what was expected and what to do."""
