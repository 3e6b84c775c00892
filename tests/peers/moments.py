"""Second moments of the inputs of tiny-llama's matrices, computed apart from qconv.

    moments.py QCONV           compares qconv's with a forward pass in numpy (`make peers`)
    moments.py QCONV record    compares them with transformers, and records fixtures/tiny-llama/moments.safetensors

The second needs torch and transformers (`make peers-models`).
"""

import hashlib
import json
import subprocess
import sys
import tempfile
from pathlib import Path

import gguf
import numpy as np

from check import SOURCE, read_safetensors

FIXTURE = SOURCE / "moments.safetensors"
WINDOWS, N_CTX = 4, 512
# What the fixture holds of the layers: all of one triangle, the diagonal and some rows of a larger one.
LAYER, ROWS = 1, 8


def with_numpy(ids: np.ndarray) -> dict[str, np.ndarray]:
    """The inputs of each matrix, `tokens x columns`, in F64: Llama's layers, one window at a time."""
    config = json.loads((SOURCE / "config.json").read_text())
    weights = {n: w.astype(np.float64) for n, w in read_safetensors(SOURCE / "model.safetensors").items()}
    heads, kv_heads = config["num_attention_heads"], config["num_key_value_heads"]
    size = config["hidden_size"] // heads
    seen: dict[str, list[np.ndarray]] = {}

    def norm(x, weight):
        return x / np.sqrt((x * x).mean(-1, keepdims=True) + config["rms_norm_eps"]) * weight

    def rotate(x):
        angles = np.outer(np.arange(len(x)), config["rope_parameters"]["rope_theta"] ** (-np.arange(0, size, 2) / size))
        cos, sin = np.cos(angles)[:, None], np.sin(angles)[:, None]
        a, b = x[..., :size // 2], x[..., size // 2:]
        return np.concatenate([a * cos - b * sin, b * cos + a * sin], -1)

    for window in ids:
        x = weights["model.embed_tokens.weight"][window]
        n = len(window)
        future = np.triu(np.full((n, n), -np.inf), 1)
        for i in range(config["num_hidden_layers"]):
            w = {k.removeprefix(f"model.layers.{i}.").removesuffix(".weight"): v for k, v in weights.items()
                 if k.startswith(f"model.layers.{i}.")}

            def see(name, value):
                seen.setdefault(f"blk.{i}.{name}.weight", []).append(value)

            h = norm(x, w["input_layernorm"])
            see("attn_q", h)
            q, k, v = (h @ w[f"self_attn.{p}_proj"].T for p in "qkv")
            q, k = rotate(q.reshape(n, heads, size)), rotate(k.reshape(n, kv_heads, size))
            k, v = (np.repeat(t.reshape(n, kv_heads, size), heads // kv_heads, 1) for t in (k, v))
            scores = np.einsum("ihd,jhd->hij", q, k) / np.sqrt(size) + future
            p = np.exp(scores - scores.max(-1, keepdims=True))
            p /= p.sum(-1, keepdims=True)
            h = np.einsum("hij,jhd->ihd", p, v).reshape(n, -1)
            see("attn_output", h)
            x = x + h @ w["self_attn.o_proj"].T
            h = norm(x, w["post_attention_layernorm"])
            see("ffn_gate", h)
            gate = h @ w["mlp.gate_proj"].T
            h = gate / (1 + np.exp(-gate)) * (h @ w["mlp.up_proj"].T)
            see("ffn_down", h)
            x = x + h @ w["mlp.down_proj"].T
    return {name: np.concatenate(parts) for name, parts in seen.items()}


def with_transformers(ids: np.ndarray) -> dict[str, np.ndarray]:
    """The same from transformers, computed in F32."""
    import torch
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(SOURCE, dtype=torch.float32, attn_implementation="eager").eval()
    seen: dict[str, list[np.ndarray]] = {}
    names = {"self_attn.q_proj": "attn_q", "self_attn.o_proj": "attn_output", "mlp.gate_proj": "ffn_gate",
             "mlp.down_proj": "ffn_down"}
    for i, layer in enumerate(model.model.layers):
        for ours, theirs in names.items():
            def hook(_, inputs, name=f"blk.{i}.{theirs}.weight"):
                seen.setdefault(name, []).append(inputs[0][0].double().numpy())
            layer.get_submodule(ours).register_forward_pre_hook(hook)
    with torch.no_grad():
        for window in ids:
            model(torch.tensor(window[None].astype(np.int64)))
    return {name: np.concatenate(parts) for name, parts in seen.items()}


def square(packed: np.ndarray, n: int) -> np.ndarray:
    full = np.zeros((n, n))
    full[np.triu_indices(n)] = packed
    return full + np.triu(full, 1).T


def compare(qconv: Path, ids: np.ndarray, text: str, inputs: dict[str, np.ndarray], by: str) -> None:
    with tempfile.TemporaryDirectory() as tmp:
        tmp = Path(tmp)
        (tmp / "text.txt").write_text(text)
        run = lambda *args: subprocess.run([qconv, *args, "-q"], check=True, cwd=tmp)
        run("hf-to-gguf", SOURCE.resolve(), "-o", "f32.gguf", "-t", "f32", "--no-verify")
        run("calibrate", "f32.gguf", "-o", "moments.gguf", "--text", "text.txt", "--ctx", str(N_CTX))
        reader = gguf.GGUFReader(tmp / "moments.gguf")
        tensors = {t.name: np.array(t.data).reshape(-1) for t in reader.tensors}
        tokens = bytes(reader.fields["moments.tokens.sha256"].parts[-1]).decode()
        assert tokens == hashlib.sha256(ids.astype("<i4").tobytes()).hexdigest(), "qconv read other tokens"
        assert {n.removesuffix(".counts") for n in tensors if n.endswith(".counts")} == inputs.keys()
        worst = 0.0
        for name, x in inputs.items():
            assert tensors[name + ".counts"].view(np.int64)[0] == len(x), name
            expected = x.T @ x
            scale = np.sqrt(np.outer(np.diag(expected), np.diag(expected)))
            found = square(tensors[name + ".in_moments"], x.shape[1])
            worst = max(worst, np.abs((found - expected) / scale).max(),
                        np.linalg.norm(found - expected) / np.linalg.norm(expected))
            for part, value in ((".in_sum", x.sum(0)), (".in_sum_abs", np.abs(x).sum(0))):
                worst = max(worst, (np.abs(tensors[name + part] - value) / np.abs(x).sum(0)).max())
        assert worst < 1e-3, f"moments depart from {by}: {worst:.2e}"
        print(f"moments: {len(inputs)} inputs, {len(ids)} windows, largest relative error against {by} {worst:.2e}")


def decode(ids: np.ndarray) -> str:
    """Byte-level BPE: each character of a token stands for a byte."""
    vocab = json.loads((SOURCE / "tokenizer.json").read_text())["model"]["vocab"]
    plain = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [b for b in range(256) if b not in plain]
    of = {chr(b): b for b in plain} | {chr(256 + n): b for n, b in enumerate(others)}
    tokens = {i: t for t, i in vocab.items()}
    return bytes(of[c] for i in ids.reshape(-1) for c in tokens[int(i)]).decode()


def main() -> None:
    qconv = Path(sys.argv[1]).resolve()
    if sys.argv[2:] == ["record"]:
        from safetensors.numpy import save_file
        from transformers import AutoTokenizer

        text = (SOURCE / "calibration.txt").read_text()
        ids = AutoTokenizer.from_pretrained(SOURCE)(text, add_special_tokens=False)["input_ids"]
        ids = np.array(ids[:WINDOWS * N_CTX], np.int32).reshape(WINDOWS, N_CTX)
        inputs = with_transformers(ids)
        compare(qconv, ids, decode(ids), inputs, "transformers")
        attention, down = inputs[f"blk.{LAYER}.attn_q.weight"], inputs[f"blk.{LAYER}.ffn_down.weight"]
        attention, down = attention.T @ attention, down.T @ down
        save_file({
            "input_ids": ids,
            f"blk.{LAYER}.attn_q.weight": attention[np.triu_indices(len(attention))].astype(np.float32),
            f"blk.{LAYER}.ffn_down.weight.rows": down[:ROWS].astype(np.float32),
            f"blk.{LAYER}.ffn_down.weight.diagonal": np.diag(down).astype(np.float32),
        }, FIXTURE, metadata={"made_by": "tests/peers/moments.py record"})
        print(f"{FIXTURE}: {FIXTURE.stat().st_size} bytes")
        return
    from safetensors.numpy import load_file
    ids = load_file(FIXTURE)["input_ids"]
    compare(qconv, ids, decode(ids), with_numpy(ids), "numpy")


if __name__ == "__main__":
    main()
