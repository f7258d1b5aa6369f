"""``python -m deepspeed`` is the ``deepspeed`` command."""

from __future__ import annotations

import sys

from deepspeed.launcher.runner import main

if __name__ == "__main__":
    sys.exit(main())
