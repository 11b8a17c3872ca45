#!/usr/bin/env python3
"""Train from a config: `python train.py --cfg fundus_wara.yaml`. Same as `wara train`."""

import sys

from wara.cli import program

if __name__ == "__main__":
    program(["train", *sys.argv[1:]])
