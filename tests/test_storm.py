"""A minute of pytest-xdist workers that share named locks while random ones of them are killed."""

import os
import random
import re
import subprocess
import sys
from pathlib import Path

import pytest

import shlock
from shlock import _names, snapshot

HAMMER = Path(__file__).parent / "storm" / "hammer.py"
LOCKS = 3


@pytest.mark.storm
@pytest.mark.patience(300)
@pytest.mark.parametrize("workers", [4, 8])
def test_a_storm_hangs_nobody_and_never_lets_two_inside(workers, domain, tmp_path):
    page = tmp_path / "page"
    page.write_bytes(bytes(4096))
    seed = random.randrange(10**6)
    # Used from beginning to end, so that no "clean" of another test finds it unused in a moment when all others are dead.
    held_open = shlock.Lock("storm:0", domain=domain)
    print(f"seed {seed}")
    environment = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST")} | {
        "SHLOCK_STORM_DOMAIN": domain,
        "SHLOCK_STORM_PAGE": str(page),
        "SHLOCK_STORM_SECONDS": os.environ.get("SHLOCK_STORM_SECONDS", "60"),
        "SHLOCK_STORM_SEED": str(seed),
        "SHLOCK_STORM_WORKERS": str(workers - 1),
        "PYTHONPATH": str(Path(__file__).parents[1]),
    }
    run = subprocess.run(
        [
            sys.executable,
            "-m",
            "pytest",
            str(HAMMER),
            "-n",
            str(workers),
            "--dist",
            "load",
            "-q",
            "-rA",
            "-p",
            "no:cacheprovider",
        ]
        + ["-p", "no:randomly", "--confcutdir", str(HAMMER.parent), "-c", os.devnull, "--rootdir", str(HAMMER.parent)],
        env=environment,
        capture_output=True,
        text=True,
        timeout=280,
    )
    output = run.stdout + run.stderr
    # The one test that kills its worker is reported as crashed; nothing else fails.
    assert re.search(rf"\b1 failed, {workers} passed\b", output), output
    assert "worker 'gw" in output and "crashed while running" in output, output
    words = memoryview(page.read_bytes()).cast("Q")
    assert words[3 * LOCKS] == 0, f"{words[3 * LOCKS]} times two were inside (seed {seed})"
    assert min(words[LOCKS : 2 * LOCKS]) > 100, words[: 3 * LOCKS + 1].tolist()
    assert sum(words[2 * LOCKS : 3 * LOCKS]) > 0, "nobody was killed inside: this storm was none"
    del held_open
    _names._domains.pop(domain, None)
    snapshot.clean(domain)
    assert snapshot.domains() == [] or domain not in [found.domain for found in snapshot.domains()]
