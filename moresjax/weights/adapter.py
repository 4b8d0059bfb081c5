"""Adapters: what a run trained, as one safetensors file with a description.

`adapter.safetensors` holds every trained parameter under its name in the model; `adapter.json` says
which method it is and what it was trained on.
"""

import json
from pathlib import Path

import numpy as np
from safetensors.numpy import save_file

from moresjax import __version__
from moresjax.build import trained_parameters
from moresjax.training.config import read_config


def save_adapter(workdir: str | Path, out: str | Path) -> Path:
    """Writes the newest checkpoint of a run as an adapter; returns the safetensors path.

    Raises:
      UserError: when the folder is not a run's directory or has no checkpoint.
    """
    workdir, out = Path(workdir), Path(out)
    arrays = {name: np.asarray(x) for name, x in trained_parameters(workdir).items()}
    config = read_config(workdir / "config.json")
    out.mkdir(parents=True, exist_ok=True)
    save_file(arrays, out / "adapter.safetensors", metadata={"format": "moresjax"})
    description = {
        "format": "moresjax-adapter",
        "version": __version__,
        "tuning": config.tuning,
        "also_train": list(config.also_train),
        "parameters": sum(x.size for x in arrays.values()),
        "model": config.model.to_dict(),
    }
    (out / "adapter.json").write_text(json.dumps(description, indent=2) + "\n")
    return out / "adapter.safetensors"
