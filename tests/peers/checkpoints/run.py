"""Runs qconv."""

import os
import subprocess


def qconv(binary: str, *args) -> None:
    """Runs a command of qconv; where it fails, with what it says."""
    done = subprocess.run([binary, *map(str, args), "-q"], capture_output=True, text=True, env=os.environ)
    assert done.returncode == 0, f"qconv {' '.join(map(str, args))}: {done.stderr.strip()}"
