"""List the packages; everything else is in pyproject.toml.

A static list would have to be edited for every new subpackage, and `packages.find` cannot give the
top-level folders kernels/ and specs/ the names glazoo.kernels and glazoo.specs.
"""

from setuptools import find_packages, setup

setup(
    packages=[
        *find_packages(include=["glazoo", "glazoo.*"]),
        "glazoo.kernels",
        *(f"glazoo.{name}" for name in find_packages(include=["kernels.*"])),
        "glazoo.specs",
    ],
)
