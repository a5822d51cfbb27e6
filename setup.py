"""Installs the repository's folders as one package: engine/ is imported as duotone.engine, and so on.

To find a module's file, drop `duotone.` and replace dots by slashes. `kernels/` and `data/` have no `__init__.py` on
purpose: as namespace packages they never shadow other packages of those names when the repository root is on `sys.path`.
"""

from setuptools import find_namespace_packages, setup

FOLDERS = ["engine", "kernels", "data"]
LINUX = 'platform_system == "Linux" and platform_machine == "x86_64"'

setup(
    name="duotone",
    version="0.1.0",
    description="A training engine for conditional diffusion models",
    license="Apache-2.0",
    python_requires=">=3.11,<3.13",
    package_dir={f"duotone.{folder}": folder for folder in FOLDERS},
    packages=[f"duotone.{package}" for package in find_namespace_packages(include=[f"{f}*" for f in FOLDERS])],
    install_requires=[
        "torch>=2.11,<2.14",
        "numpy>=2.0",
        "pillow>=11",
        "safetensors>=0.8",
        "transformers>=5.3",
        "webdataset>=1.0.2",
        "tyro>=1.0",
        "tqdm>=4.66",
        "wandb>=0.31",
        "tensorboard>=2.18",
        f"triton>=3.6; {LINUX}",
        f"xformers>=0.0.35; {LINUX}",
        f"nvidia-dali-cuda130>=2.2; {LINUX}",
        'deepspeed>=0.19.8; platform_system == "Linux"',
    ],
    extras_require={
        "dev": [
            "pytest>=8",
            "pytest-xdist>=3.6.1",
            "ruff>=0.17.5",
            "diffusers>=0.38",
            "scikit-learn>=1.5",
            "matplotlib>=3.9",
        ]
    },
    entry_points={"console_scripts": ["duotone = duotone.engine.cli:main"]},
)
