from setuptools import find_packages, setup

setup(
    name="improved_diffusion",
    version="0.1.0",
    description="Train pixel-space diffusion models on your own images and sample from them (IDDPM)",
    packages=find_packages(include=["improved_diffusion", "improved_diffusion.*"]),
    python_requires=">=3.10",
    install_requires=[
        "torch>=2.4",
        "mpi4py>=3.1",  # imported under mpiexec only
        "blobfile>=2.0",  # imported for URLs only
        "numpy>=1.26",
        "pillow>=10.0",
        "tqdm>=4.60",
        "matplotlib>=3.7",  # imported where curves are drawn
    ],
    extras_require={
        "mpi": ["mpich"],
        "yaml": ["pyyaml>=6.0"],
        "digits": ["scikit-learn>=1.3"],
        "lsun": ["lmdb>=1.4"],
        "tensorboard": ["tensorboard>=2.14"],
        "wandb": ["wandb>=0.17"],
        "eval": ["torchmetrics>=1.4"],
        "test": [
            "pytest>=8.0",
            "pytest-timeout>=2.3",
            "scikit-learn>=1.3",
            "pyyaml>=6.0",
            "mpich",
            "diffusers>=0.30",
            "tensorboard>=2.14",
            "wandb>=0.17",
            "torchmetrics>=1.4",
            "scipy>=1.11",
        ],
        "dev": ["ruff>=0.6", "mypy>=1.11", "pre-commit>=3.8", "types-PyYAML"],
    },
)
