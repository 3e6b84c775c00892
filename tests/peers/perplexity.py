"""Computes perplexity and KL divergence by their definitions from the probabilities that another build
of llama.cpp gives (PyPI's xllamacpp), and compares them with what `qconv eval` says.

`make peers` runs it: perplexity.py PATH/TO/qconv, from the repository's root.
"""

import json
import struct
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np
import xllamacpp

N_CTX, WINDOWS = 512, 2


def log_probs(path: Path, windows: list[list[int]], n_vocab: int) -> np.ndarray:
    """Of the predictions that are scored: after the tokens N_CTX / 2 to N_CTX - 2 of each window."""
    params = xllamacpp.CommonParams()
    params.model.path = str(path)
    params.n_ctx, params.n_parallel, params.warmup, params.verbosity = N_CTX, 1, False, -1
    params.cpuparams.n_threads = 1
    server = xllamacpp.Server(params)
    rows = []
    for window in windows:
        for end in range(N_CTX // 2 + 1, N_CTX):
            request = {"prompt": window[:end], "n_predict": 1, "logprobs": n_vocab, "cache_prompt": True}
            answer = server.handle_completions(request)
            found = answer["choices"][0]["logprobs"]["content"][0]["top_logprobs"]
            assert len(found) == n_vocab, len(found)
            row = np.empty(n_vocab)
            row[[c["id"] for c in found]] = [c["logprob"] for c in found]
            rows.append(row)
    return np.array(rows)


def main() -> None:
    qconv = Path(sys.argv[1]).resolve()

    def run(*args) -> bytes:
        return subprocess.run([qconv, *args, "-q"], check=True, stdout=subprocess.PIPE).stdout

    def measured(*args) -> dict:
        return json.loads(run("eval", *args, "--json", "-j", "1"))

    with tempfile.TemporaryDirectory() as tmp:
        files = {t: Path(tmp) / f"{t}.gguf" for t in ["f32", "bf16", "q4_0"]}
        for file_type, path in files.items():
            run("hf-to-gguf", "fixtures/tiny-llama", "-o", path, "--type", file_type, "--no-verify")
        moments = Path(tmp) / "moments.gguf"
        run("calibrate", files["bf16"], "-o", moments, "--text", "fixtures/tiny-llama/calibration.txt",
            "--process-output", "--chunks", "8")
        searched = {"gptq": "q4_0", "awq+trainable": "iq4_xs", "ternary": "tq2_0"}
        for method, file_type in searched.items():
            files[method] = Path(tmp) / f"{file_type}-{method}.gguf"
            run("quantize", files["bf16"], files[method], "-t", file_type, "--method", method, "--moments", moments)
        # A baseline begins with the text's tokens: formats/spec/baseline.md.
        base = Path(tmp) / "base"
        run("eval", "baseline", files["f32"], "-o", base, "--chunks", str(WINDOWS))
        n_ctx, n_vocab, count, _, _, bos = struct.unpack("<5Ii", base.read_bytes()[8:32])
        assert (n_ctx, count) == (N_CTX, WINDOWS)
        tokens = np.frombuffer(base.read_bytes()[32:32 + 4 * N_CTX * WINDOWS], np.int32).reshape(WINDOWS, N_CTX)
        following = tokens[:, N_CTX // 2 + 1:].ravel()
        read = tokens.copy()
        if bos >= 0:
            read[:, 0] = bos
        theirs = {name: log_probs(path, read.tolist(), n_vocab) for name, path in files.items()}
        # What quantizers searched runs there as it runs here.
        for name in ["f32", "bf16", *searched]:
            ours = measured("perplexity", files[name], "--chunks", str(WINDOWS))["perplexity"]["value"]
            expected = float(np.exp(-theirs[name][np.arange(len(following)), following].mean()))
            print(f"perplexity {name}: {ours:.5f}, from llama.cpp's probabilities {expected:.5f}")
            # Ternary products round activations, and builds do that in different orders.
            assert abs(ours / expected - 1) < (1e-2 if name == "ternary" else 1e-3), name
        ours = measured("kld", files["q4_0"], "--base", files["bf16"], "--chunks", str(WINDOWS))
        ours, (p, q) = ours["divergence"]["kld"]["value"], (theirs["bf16"], theirs["q4_0"])
        # Below this a probability of the base does not count.
        expected = float(np.where(p > -16, np.exp(p) * (p - q), 0).sum(axis=1).mean())
        print(f"KLD q4_0 from bf16: {ours:.6f}, from llama.cpp's probabilities {expected:.6f}")
        assert abs(ours - expected) < 1e-4
    print("make peers: perplexity and KL divergence are llama.cpp's")


if __name__ == "__main__":
    main()
