"""The script ``zero_to_fp32.py`` beside the checkpoints of a directory: ``./zero_to_fp32.py . OUTPUT`` writes weights."""

from __future__ import annotations

from pathlib import Path

NAME = "zero_to_fp32.py"

TEXT = '''#!/usr/bin/env python
"""Write the fp32 weights of a checkpoint in this directory to files that other programs load.

    ./zero_to_fp32.py . OUTPUT_DIRECTORY
"""

from deepspeed.utils.zero_to_fp32 import main

main()
'''


def write_script(directory: Path) -> None:
    """Put the script into ``directory``, whole or not at all, where it is not there already."""
    path = directory / NAME
    if path.is_file() and path.read_text() == TEXT:
        return
    temporary = directory / f".{NAME}"
    temporary.write_text(TEXT)
    temporary.chmod(0o744)
    temporary.rename(path)
