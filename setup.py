"""What is installed and what it needs; pyproject.toml holds the build backend and the settings of the tools.

The Triton kernels live in the top-level folder `kernels/`, but Hugging Face publishes a package of that name, which
transformers imports. So the folder is never a package of its own: it has no `__init__.py`, and is installed as
`locos_fast.kernels` through the symlink `locos_fast/kernels` (tests/test_packaging.py checks both).
"""

import re
from pathlib import Path

from setuptools import find_packages, setup

ROOT = Path(__file__).parent
VERSION = re.search(r'__version__ = "(.+)"', (ROOT / "locos_fast" / "_version.py").read_text())[1]
README = ROOT / "README.md"

TEST = [
    "pytest>=8",
    "pytest-benchmark",
    "pytest-xdist",
    "hypothesis",
    "import-linter",
    "setuptools>=77",
]  # setuptools: the tests build the wheel
DEV = [*TEST, "ruff", "mypy"]

setup(
    name="locos_fast",
    version=VERSION,
    description="Find the retrieval heads of a long-context language model by what they write",
    long_description=README.read_text(encoding="utf-8") if README.exists() else "",
    long_description_content_type="text/markdown",
    author="The locos_fast authors",
    license="MIT",
    license_files=["LICENSE"],
    python_requires=">=3.11",
    packages=[*find_packages(include=["locos_fast", "locos_fast.*"]), "locos_fast.kernels"],
    package_data={"locos_fast": ["py.typed"]},
    install_requires=[
        "torch>=2.11",
        'triton>=3.6; sys_platform == "linux"',
        "transformers>=5.17.0,<5.25",  # below the first release that `make compat` was not run with
        "accelerate",
        "huggingface_hub",
        "numpy",
        "packaging",
        "safetensors",
        "gguf",
        "platformdirs",
        "rouge-score",
        "typer",
        "rich",
        "matplotlib",
    ],
    extras_require={"test": TEST, "dev": DEV},
    entry_points={"console_scripts": ["locos-fast = locos_fast.cli:main"]},
)
