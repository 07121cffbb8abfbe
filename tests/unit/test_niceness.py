"""Who steps back for whom."""

import subprocess
import sys

from cluster import niceness


def test_a_process_steps_back_once_and_its_children_with_it() -> None:
    script = """
import os, subprocess
from cluster import niceness
before = os.nice(0)
niceness.renice(before + 5)
niceness.renice(before + 5)
print(os.nice(0) - before, end=" ", flush=True)
niceness.renice(before)
subprocess.run(["nice"], check=True)
"""
    words = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True).stdout.split()
    assert words[0] == "5"
    assert words[1] == str(int(subprocess.run(["nice"], capture_output=True, text=True, check=True).stdout) + 5)


def test_engines_come_first_and_training_last() -> None:
    assert 0 < niceness.CARRYING < niceness.TRAINING
