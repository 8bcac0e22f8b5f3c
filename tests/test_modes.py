"""What matters most of the suite, again, in processes of each other mode of the bias (``SHLOCK_BIAS``).

The suite itself runs in the mode of its environment, ``adaptive`` if there is none: all of it passes in each,

    SHLOCK_BIAS=always python -m pytest -n 2

This portion is for every run: whoever changes a lock sees at once what it does to the biased path.  It is what meets most
states in least time: who waits, is interrupted, forks, is damaged, dies.
"""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
from support import TOKEN, program_environment

from shlock import _bias

HERE = Path(__file__).parent
LOCKS = "lock or Lock"
#: Those in which a process puts or takes so many messages that a ring's lock is biased.
RINGS = [("test_ring.py", ""), ("test_channel.py", "storm")]
#: The file, and which of its tests (pytest's -k).
PORTIONS = {
    "always": [
        ("test_waiting.py", ""),
        ("test_signals.py", LOCKS),
        ("test_fork.py", ""),
        ("test_damage.py", "any_flags"),
        ("test_against_stock.py", LOCKS),
        ("test_crash_points.py", f"({LOCKS}) and not leased"),
        ("test_ring.py", ""),
        ("test_channel.py", "interrupted or fork"),
        ("test_channel_crashes.py", "killed_at"),
        ("test_queue_crashes.py", "killed_at and not 700000"),
    ],
    "adaptive": [("test_waiting.py", ""), ("test_signals.py", LOCKS), ("test_fork.py", ""), *RINGS],
    "never": [("test_waiting.py", ""), ("test_signals.py", LOCKS), ("test_fork.py", ""), *RINGS],
}


@pytest.mark.patience(600)
@pytest.mark.parametrize(
    ("mode", "file", "tests"),
    [(mode, *portion) for mode, portions in PORTIONS.items() if mode != _bias._chosen for portion in portions],
)
def test_they_pass_with_the_bias(mode: str, file: str, tests: str) -> None:
    environment = {**program_environment(), "SHLOCK_BIAS": mode}
    for name in (TOKEN, "PYTEST_ADDOPTS", "PYTEST_CURRENT_TEST", "PYTEST_XDIST_WORKER", "PYTEST_XDIST_WORKER_COUNT"):
        environment.pop(name, None)  # it is a run of its own
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-k", tests, str(HERE / file)]
    ended = subprocess.run(command, cwd=HERE.parent, env=environment, capture_output=True, text=True)
    assert ended.returncode == 0, ended.stdout + ended.stderr
    print(ended.stdout.splitlines()[-1])
