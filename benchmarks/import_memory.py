"""Peak memory of loading a checkpoint, beside `transformers` doing the same.

    python benchmarks/import_memory.py [--sizes 1.1b 2.8b]

Writes random bfloat16 checkpoints of TinyLlama's and Phi-2's shapes, then loads each in a fresh
process and prints the largest resident size of that process against the size of the file.
"""

import argparse
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import ml_dtypes
import numpy as np
from safetensors.numpy import save_file
from transformers import LlamaConfig, PhiConfig

from moresjax.models.mllm import MLLMConfig
from moresjax.weights.families.base import decoder_config
from moresjax.weights.hf import model_mappings

GIB = 2**30
SHAPES = {
    "1.1b": LlamaConfig(
        hidden_size=2048,
        intermediate_size=5632,
        num_hidden_layers=22,
        num_attention_heads=32,
        num_key_value_heads=4,
        max_position_embeddings=2048,
    ),
    "2.8b": PhiConfig(
        hidden_size=2560,
        intermediate_size=10_240,
        num_hidden_layers=32,
        num_attention_heads=32,
        vocab_size=51_200,
        partial_rotary_factor=0.4,
    ),
}
LOADERS = {
    "moresjax": "import jax, moresjax as mj; m = mj.load({folder!r} + '/in').mllm; "
    "import flax.nnx as nnx; jax.block_until_ready(nnx.state(m))",
    "moresjax int8": "import jax, moresjax as mj; "
    "m = mj.load({folder!r} + '/in', quantize='int8').mllm; "
    "import flax.nnx as nnx; jax.block_until_ready(nnx.state(m))",
    "moresjax import": "from moresjax.inference.convert import import_model; "
    "import_model({folder!r} + '/in', {folder!r} + '/out')",
    "transformers": "import transformers; "
    "m = transformers.AutoModelForCausalLM.from_pretrained({folder!r} + '/in'); "
    "[float(x.detach().flatten()[::2048].sum()) for x in m.parameters()]",
}
REPORT = "; import resource; print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024)"


def write_checkpoint(config, folder: Path, shard: int = 2 * GIB) -> int:
    """Random bfloat16 weights in files of about `shard` bytes; returns the bytes of all."""
    hf = config.to_dict()
    sources = model_mappings(MLLMConfig(llm=decoder_config(hf)), hf)
    rng = np.random.default_rng(0)
    noise = (0.02 * rng.standard_normal(1 << 20)).astype(ml_dtypes.bfloat16)
    tensors, held, total, files = {}, 0, 0, 0
    names = [(name, source.tensor_shape) for source in sources for name in source.names]
    for number, (name, shape) in enumerate(names):
        tensors[name] = np.resize(noise, shape)
        held += tensors[name].nbytes
        if held >= shard or number == len(names) - 1:
            save_file(tensors, folder / f"model-{files:05d}.safetensors", metadata={"format": "pt"})
            tensors, total, held, files = {}, total + held, 0, files + 1
    config.dtype = "bfloat16"
    architecture = {"llama": "LlamaForCausalLM", "phi": "PhiForCausalLM"}[config.model_type]
    config.architectures = [architecture]
    config.save_pretrained(folder)
    index = {"metadata": {"total_size": total}, "weight_map": {}}
    for file in sorted(folder.glob("*.safetensors")):
        from safetensors import safe_open

        with safe_open(file, framework="numpy") as stored:
            index["weight_map"] |= dict.fromkeys(stored.keys(), file.name)
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    return total


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--sizes", nargs="+", default=list(SHAPES), choices=SHAPES)
    args = parser.parse_args()
    print("checkpoint   loader           file GiB  peak GiB   over      s")
    for name in args.sizes:
        with tempfile.TemporaryDirectory() as folder:
            (Path(folder) / "in").mkdir()
            size = write_checkpoint(SHAPES[name], Path(folder) / "in")
            for loader, code in LOADERS.items():
                start = time.monotonic()
                command = [sys.executable, "-c", code.format(folder=folder) + REPORT]
                done = subprocess.run(command, capture_output=True, text=True, check=True)
                seconds, peak = time.monotonic() - start, int(done.stdout.split()[-1])
                print(
                    f"{name:12s} {loader:15s} {size / GIB:9.2f} {peak / GIB:9.2f} "
                    f"{(peak - size) / GIB:+6.2f} {seconds:6.0f}",
                    flush=True,
                )


if __name__ == "__main__":
    main()
