"""Package metadata. Settings of the tools are in pyproject.toml."""

import re
from pathlib import Path

from setuptools import find_packages, setup

ROOT = Path(__file__).parent
INIT = (ROOT / "aimet_quadapter" / "__init__.py").read_text(encoding="utf-8")
VERSION = re.search(r'^__version__ = "(.+)"$', INIT, re.MULTILINE).group(1)

REQUIRES = [
    "aimet-torch>=2.42",
    "bokeh>=3.6",
    "datasets>=4.0",
    "jinja2>=3.1",
    "jsonschema>=4.18",
    "lazy-loader>=0.4",
    "matplotlib>=3.9",
    "numpy>=2.2",
    "onnx>=1.20",
    "pydantic>=2.11",
    "pyyaml>=6.0.2",
    "safetensors>=0.5",
    "torch>=2.13",
    "tqdm>=4.66",
    "transformers>=5.7",
]
DEMO = ["accelerate>=1.10", "gguf>=0.17"]
# For Python 3.10, onnxruntime ends at 1.23; Qualcomm's plug-in with the HTP backend needs 3.11.
DEPLOY = [
    "onnxruntime>=1.23; python_version < '3.11'",
    "onnxruntime>=1.24; python_version >= '3.11'",
    "onnxruntime-qnn>=2.7; python_version >= '3.11'",
]
EVAL = ["accelerate>=1.10", "lm-eval>=0.4.13"]
LORA = ["peft>=0.17"]
OLIVE = ["olive-ai>=0.13"]
DEV = [
    *DEPLOY,
    *EVAL,
    *LORA,
    *OLIVE,
    "hypothesis>=6.100",
    "mypy>=1.15",
    "pytest>=8.3",
    "pytest-xdist>=3.6",
    "ruff>=0.12",
    "torchvision>=0.28",
]

setup(
    name="aimet_quadapter",
    version=VERSION,
    description="Quadapter for AIMET: one learned scale per channel that makes decoder language "
    "models fit for 8-bit quantization",
    long_description=(ROOT / "README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    author="aimet_quadapter contributors",
    license="BSD-3-Clause",
    license_files=["LICENSE"],
    keywords=["quantization", "aimet", "language models", "qualcomm", "htp", "quadapter"],
    classifiers=[
        "Development Status :: 4 - Beta",
        "Intended Audience :: Developers",
        "Intended Audience :: Science/Research",
        "Operating System :: POSIX :: Linux",
        "Programming Language :: Python :: 3 :: Only",
        "Topic :: Scientific/Engineering :: Artificial Intelligence",
        "Typing :: Typed",
    ],
    python_requires=">=3.10",
    packages=find_packages(include=["aimet_quadapter", "aimet_quadapter.*"]),
    package_data={
        "": ["*.pyi"],
        "aimet_quadapter": ["py.typed"],
        "aimet_quadapter.evaluation": ["default_model/*"],
        "aimet_quadapter.integrations": ["*.json"],
        "aimet_quadapter.results": ["*.css", "*.json", "*.jinja"],
    },
    install_requires=REQUIRES,
    extras_require={
        "demo": DEMO,
        "deploy": DEPLOY,
        "dev": DEV,
        "eval": EVAL,
        "lora": LORA,
        "olive": OLIVE,
    },
    entry_points={"console_scripts": ["quadapter=aimet_quadapter.cli:main"]},
)
