"""Packaging. `pip install -e .` for the system, `pip install -e ".[test]"` for its tests."""

import re
from pathlib import Path

from setuptools import find_packages, setup

ROOT = Path(__file__).parent
VERSION = re.search(r'__version__ = "(.+)"', (ROOT / "moresjax/_version.py").read_text())[1]

setup(
    name="moresjax",
    version=VERSION,
    description="Train, evaluate and explain multimodal LLMs by editing representations, in JAX",
    long_description=(ROOT / "README.md").read_text(),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    python_requires=">=3.11",
    # The config files are part of the package, so that the demo finds them wherever it runs.
    packages=[*find_packages(include=["moresjax", "moresjax.*"]), "moresjax.configs"],
    package_dir={"moresjax.configs": "configs"},
    package_data={"moresjax.reports": ["*.j2"]},
    install_requires=[
        "jax>=0.10,<0.11",
        "flax>=0.12.8,<0.13",
        "optax>=0.2.8",
        "orbax-checkpoint>=0.12",
        "grain>=0.2.18",
        "array_record>=0.8",
        "transformers>=5.0",
        "tokenizers",
        "safetensors",
        "tensorflow-datasets>=4.9.10",
        "ml_collections>=1.1",
        "pillow",
        "numpy",
        "jaxtyping>=0.3",
        "lm_eval>=0.4.13",
        "scikit-learn",
        "matplotlib",
        "jinja2",
        "tensorboardX",
        "tqdm",
    ],
    extras_require={
        "tpu": ["jax[tpu]>=0.10,<0.11"],
        "gpu": ["jax[cuda12]>=0.10,<0.11"],
        # torch 2.13.0 is the build that the parity tests were written against.
        "test": [
            "pytest",
            "pytest-xdist",
            "hypothesis",
            "beartype",
            "torch==2.13.0",
            "peft>=0.21",
            "ruff",
            # Plans are compiled for TPUs on any machine.
            "jax[tpu]>=0.10,<0.11",
        ],
    },
    entry_points={"console_scripts": ["moresjax=moresjax.cli:main"]},
    classifiers=[
        "Programming Language :: Python :: 3.11",
        "Topic :: Scientific/Engineering :: Artificial Intelligence",
    ],
)
