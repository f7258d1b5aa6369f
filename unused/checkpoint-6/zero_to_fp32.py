#!/usr/bin/env python
"""Write the fp32 weights of a checkpoint in this directory to files that other programs load.

    ./zero_to_fp32.py . OUTPUT_DIRECTORY
"""

from deepspeed.utils.zero_to_fp32 import main

main()
