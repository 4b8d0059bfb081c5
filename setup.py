"""Packaging. `pip install -e .` for the system, `pip install -e ".[test]"` for its tests."""

import re
from pathlib import Path

from setuptools import find_packages, setup

ROOT = Path(__file__).parent
VERSION = re.search(r'__version__ = "(.+)"', (ROOT / "moresjax/_version.py").read_text())[1]

# The newest that each Python gets: 0.10 on 3.11, 0.12 from 3.12 on. CI runs the oldest and the
# newest pair.
JAX = ">=0.10,<0.13"

SERVE = ["starlette>=1.0", "uvicorn>=0.40", "sse-starlette>=3.0"]

setup(
    name="moresjax",
    version=VERSION,
    description="Train, evaluate and explain multimodal LLMs by editing representations, in JAX",
    long_description=(ROOT / "README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    author="The moresjax authors",
    license="Apache-2.0",
    license_files=["LICENSE"],
    keywords="jax flax multimodal llm llava peft reft mores steering interpretability tpu",
    project_urls={"MoReS (LLaVA Steering)": "https://arxiv.org/abs/2412.12359"},
    python_requires=">=3.11",
    # The config files are part of the package, so that commands find them wherever they run.
    packages=[
        *find_packages(include=["moresjax", "moresjax.*"], exclude=["moresjax.configs"]),
        "moresjax.configs",
    ],
    package_dir={"moresjax.configs": "configs"},
    package_data={"": ["py.typed", "*.j2", "words/*.txt"], "moresjax.serve": ["page/**/*"]},
    install_requires=[
        f"jax{JAX}",
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
        "msgspec>=0.20,<1",  # types of what is read from outside; one wheel, nothing below it
        "regex>=2024.4",  # patterns of users with a time limit; transformers has it too
        "lm_eval>=0.4.13",
        "scikit-learn",
        "matplotlib",
        "jinja2",
        "tensorboardX",
        "tqdm",
    ],
    extras_require={
        "tpu": [f"jax[tpu]{JAX}"],
        "gpu": [f"jax[cuda12]{JAX}"],
        "serve": SERVE,
        # torch 2.13.0 is the build that the parity tests were written against.
        "test": [
            "pytest",
            "pytest-xdist>=3.7",  # --no-loadscope-reorder
            "hypothesis>=6.100,<7",
            "beartype",
            "torch==2.13.0",
            "peft>=0.21",
            "gguf>=0.19",  # reads control vectors as llama.cpp does
            "ruff",
            "pyright[nodejs]",
            "nbclient",
            "nbformat",
            "ipykernel",
            *SERVE,
            "openai>=2",
            "httpx>=0.28",
            "lm_eval[api]>=0.4.13",  # its models that ask a server
            "playwright>=1.50",  # with Debian's chromium
            # Plans are compiled for TPUs on any machine.
            f"jax[tpu]{JAX}",
        ],
        "docs": ["mkdocs<2", "mkdocs-material", "mkdocstrings[python]", "mkdocs-jupyter"],
    },
    entry_points={"console_scripts": ["moresjax=moresjax.cli:main"]},
    classifiers=[
        "Development Status :: 4 - Beta",
        "Environment :: Console",
        "Intended Audience :: Science/Research",
        "Operating System :: POSIX",
        "Programming Language :: Python :: 3",
        "Programming Language :: Python :: 3.11",
        "Programming Language :: Python :: 3.12",
        "Programming Language :: Python :: 3.13",
        "Programming Language :: Python :: 3.14",
        "Topic :: Scientific/Engineering :: Artificial Intelligence",
        "Typing :: Typed",
    ],
)
