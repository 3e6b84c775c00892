"""The table of docs/quantizers.md: method x type, on a model and on text that was not used for calibration.

    quantizers.py QCONV [METHODS [TYPES [CHUNKS]]]

Methods and types are lists with commas. `llama.cpp` is what llama-quantize writes with its importance
matrix of the same text, byte for byte (`tests/quantize.rs`); `rtn` what it writes without. Needs nothing but
Python.
"""

import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

FIXTURES = Path(__file__).resolve().parents[2] / "fixtures"
SOURCE = FIXTURES / "tiny-llama"
METHODS = "rtn,llama.cpp,awq,gptq,awq+gptq,trainable,adaround"
TYPES = "q4_0,q4_k_s,q3_k_s,q2_k,iq4_xs"


def measured(args: list[str], cwd: Path) -> tuple[float, int]:
    """Seconds and the most bytes in memory."""
    begun = time.monotonic()
    child = subprocess.Popen(args, cwd=cwd)
    _, status, usage = os.wait4(child.pid, 0)
    assert status == 0, args
    return time.monotonic() - begun, usage.ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def main() -> None:
    qconv = str(Path(sys.argv[1]).resolve())
    given = dict(enumerate(sys.argv[2:]))
    methods, types = given.get(0, METHODS).split(","), given.get(1, TYPES).split(",")
    with tempfile.TemporaryDirectory() as tmp:
        tmp = Path(tmp)
        run = lambda *args: measured([qconv, *args, "-q"], tmp)
        run("hf-to-gguf", str(SOURCE), "-o", "m.gguf", "-t", "bf16", "--no-verify")
        took = run("calibrate", "m.gguf", "-o", "moments.gguf", "--text", str(SOURCE / "calibration.txt"),
                   "--process-output")
        print(f"calibrate: {took[0]:.1f} s, {took[1] / 2**20:.0f} MiB\n")
        files, costs = [], []
        for file_type in types:
            for method in methods:
                more = {"rtn": [], "llama.cpp": ["--imatrix", str(FIXTURES / "imatrix/tiny-llama.gguf")]}
                more = more.get(method, ["--method", method, "--moments", "moments.gguf"])
                files.append(f"{file_type}-{method}.gguf")
                costs.append(run("quantize", "m.gguf", files[-1], "-t", file_type, *more))
        done = subprocess.run([qconv, "eval", "compare", "m.gguf", *files, "--text", str(SOURCE / "evaluation.txt"),
                               "--chunks", given.get(2, "12"), "--json", "-q"],
                              cwd=tmp, check=True, capture_output=True)
        base, *rows = json.loads(done.stdout)
    ppl, kld = (lambda row, key=key: row[key]["value"] for key in ("perplexity", "kld"))
    print("| type | method | KLD | of llama.cpp's | perplexity | seconds | peak MiB |\n|---|---|---|---|---|---|---|")
    print(f"| bf16 | | 0 | | {ppl(base):.2f} | | |")
    for k, (row, (seconds, peak)) in enumerate(zip(rows, costs)):
        file_type, method = types[k // len(methods)], methods[k % len(methods)]
        ratio = ""
        if "llama.cpp" in methods:
            ratio = f"{kld(row) / kld(rows[k - k % len(methods) + methods.index('llama.cpp')]):.2f}"
        print(f"| {file_type} | {method} | {kld(row):.5f} | {ratio} | {ppl(row):.2f} | {seconds:.1f} | "
              f"{peak / 2**20:.0f} |")


if __name__ == "__main__":
    main()
