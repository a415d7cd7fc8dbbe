"""What pyproject.toml cannot say: the wheel has `configs/` as `detr_jax/configs/`."""

from setuptools import find_packages, setup

setup(
    packages=[*find_packages(include=["detr_jax*", "pallas_kernels*"]), "detr_jax.configs"],
    package_dir={"detr_jax.configs": "configs"},
)
