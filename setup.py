"""Package megatron_rpp and the command `rpp`. What is pinned and tested together is in requirements/."""

from setuptools import find_namespace_packages, setup

setup(
    name="megatron_rpp",
    version="0.1.0",
    description="REINFORCE++ on Megatron-Core, with SGLang rollouts",
    python_requires=">=3.11",
    # The stand-ins of device/sglang_cpu have folders without __init__.py.
    packages=find_namespace_packages(include=["megatron_rpp*", "checkpoint_tools*", "launch*"]),
    # `rpp launch slurm` renders the scripts of launch/slurm.
    package_data={"megatron_rpp": ["device/sglang_cpu/**/*"], "launch.slurm": ["*.sbatch"]},
    entry_points={"console_scripts": ["rpp = megatron_rpp.cli:main"]},
    # sglang is not among them: its own list brings CUDA, so `make setup` and the extra `gpu` install it.
    install_requires=[
        "torch>=2.11",
        "numpy",
        "megatron-core>=0.16.1,<0.20",
        "transformers>=5.19",
        "tokenizers",
        "sentencepiece",
        "protobuf",
        "jinja2",
        "safetensors",
        "math-verify",
        "reasoning-gym",
        "requests",
        "aiohttp",
        "einops",
        "psutil",
        "rich",
        "tensorboard",
        "matplotlib",
    ],
    extras_require={
        # What tests check names and settings against: these replace CPU's megatron-core 0.16.1 in one environment.
        # SGLang pins torch to a build for CUDA 13; Transformer Engine's core would come for CUDA 12.
        "gpu": ["sglang==0.5.23", "megatron-core==0.19.2", "transformer-engine[core_cu13,pytorch]==2.20.2", "mpi4py"],
        "test": ["pytest", "pytest-timeout", "hypothesis", "ruff", "mypy", "import-linter"],
        # Sources of kind parquet and huggingface; about 260 MB, pandas included.
        "data": ["datasets", "pyarrow"],
        "docs": ["mkdocs"],
    },
)
