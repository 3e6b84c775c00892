"""Reads what qconv wrote with the PyPI packages gguf and safetensors, and compares the values.

`make peers` runs it: check.py PATH/TO/qconv, from the repository's root.
"""

import json
import subprocess
import sys
import tempfile
from pathlib import Path

import gguf
import numpy as np
from safetensors import safe_open

SOURCE = Path("fixtures/tiny-llama")
# Type, and the largest error allowed, relative to the largest weight of the tensor.
TYPES = {"f32": 0.0, "f16": 1e-3, "bf16": 0.0, "q8_0": 0.005, "q5_1": 0.04, "q5_0": 0.07,
         "q4_1": 0.08, "q4_0": 0.14, "tq2_0": 0.51, "tq1_0": 0.51}
NEEDED = ["general.architecture", "general.name", "general.file_type", "llama.block_count",
          "llama.embedding_length", "llama.attention.head_count", "llama.attention.head_count_kv",
          "tokenizer.ggml.model", "tokenizer.ggml.pre", "tokenizer.ggml.tokens",
          "tokenizer.ggml.token_type", "tokenizer.ggml.merges"]


def bf16(raw: np.ndarray, shape) -> np.ndarray:
    return (raw.view(np.uint16).astype(np.uint32) << 16).view(np.float32).reshape(shape)


def read_safetensors(path: Path) -> dict[str, np.ndarray]:
    """All tensors as float32. numpy has no bfloat16: those are read by the header's offsets."""
    with safe_open(path, "np") as file:
        names = list(file.keys())
        data = path.read_bytes()
        n = int.from_bytes(data[:8], "little")
        header = json.loads(data[8:8 + n])
        tensors = {}
        for name in names:
            info = header[name]
            assert list(file.get_slice(name).get_shape()) == info["shape"], name
            if info["dtype"] == "BF16":
                lo, hi = info["data_offsets"]
                raw = np.frombuffer(data, np.uint8)[8 + n + lo:8 + n + hi]
                tensors[name] = bf16(raw, info["shape"])
            else:
                tensors[name] = file.get_tensor(name).astype(np.float32)
    return tensors


def permuted(w: np.ndarray, heads: int) -> np.ndarray:
    """Rows as ggml's RoPE wants them: the halves of each head interleaved."""
    return w.reshape(heads, 2, w.shape[0] // heads // 2, *w.shape[1:]).swapaxes(1, 2).reshape(w.shape)


def expected(source: dict[str, np.ndarray], config: dict) -> dict[str, np.ndarray]:
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, config["num_hidden_layers"])
    result = {}
    for name, value in source.items():
        if ".q_proj." in name:
            value = permuted(value, config["num_attention_heads"])
        if ".k_proj." in name:
            value = permuted(value, config["num_key_value_heads"])
        result[names.get_name(name, try_suffixes=(".weight", ".bias"))] = value
    return result


def main() -> None:
    qconv = Path(sys.argv[1]).resolve()
    config = json.loads((SOURCE / "config.json").read_text())
    wanted = expected(read_safetensors(SOURCE / "model.safetensors"), config)
    with tempfile.TemporaryDirectory() as tmp:
        tmp = Path(tmp)
        for file_type, allowed in TYPES.items():
            output = tmp / f"{file_type}.gguf"
            subprocess.run([qconv, "hf-to-gguf", SOURCE, "-o", output, "--type", file_type, "--no-verify", "-q"],
                           check=True)
            reader = gguf.GGUFReader(output)
            missing = [key for key in NEEDED if key not in reader.fields]
            assert not missing, f"{file_type}: metadata lacks {missing}"
            assert len(reader.fields["tokenizer.ggml.tokens"].data) == config["vocab_size"]
            found = {t.name: t for t in reader.tensors}
            assert found.keys() == wanted.keys(), f"{file_type}: {found.keys() ^ wanted.keys()}"
            worst = 0.0
            for name, value in wanted.items():
                tensor = found[name]
                assert list(reversed(tensor.shape)) == list(value.shape), f"{file_type} {name}: {tensor.shape}"
                decoded = gguf.quants.dequantize(tensor.data, tensor.tensor_type).reshape(value.shape)
                if value.ndim == 1:
                    assert tensor.tensor_type == gguf.GGMLQuantizationType.F32, name
                error = float(np.abs(decoded - value).max() / np.abs(value).max())
                assert error <= allowed, f"{file_type} {name}: relative error {error}, at most {allowed}"
                worst = max(worst, error)
            kinds = sorted({t.tensor_type.name for t in reader.tensors})
            print(f"gguf {file_type:>6}: {len(found)} tensors ({', '.join(kinds)}), largest relative error {worst:.2e}")

        back = tmp / "back"
        subprocess.run([qconv, "gguf-to-hf", tmp / "bf16.gguf", "-o", back, "-q", "--max-shard-size", "3M"], check=True)
        index = json.loads((back / "model.safetensors.index.json").read_text())["weight_map"]
        tensors = {}
        for shard in sorted(set(index.values())):
            part = read_safetensors(back / shard)
            assert all(index[name] == shard for name in part), shard
            tensors |= part
        source = read_safetensors(SOURCE / "model.safetensors")
        assert tensors.keys() == source.keys() == index.keys()
        for name, value in source.items():
            assert np.array_equal(tensors[name], value), name
        print(f"safetensors: {len(tensors)} tensors in {len(set(index.values()))} shards, as they were")
    print("make peers: the Python packages gguf and safetensors read what qconv writes")


if __name__ == "__main__":
    main()
