"""The oldest versions of other packages that a run starts with. Imports nothing heavy."""

import platform
from importlib.metadata import PackageNotFoundError, version

from packaging.version import InvalidVersion, Version

from mlkd_dist import __version__
from mlkd_dist.config import UserError

# As in pyproject.toml, which only an installation looks at. Below torch 2.10 and transformers 5.3
# lie known security holes, below deepspeed 0.19.8 numbers that were wrong without a word.
FLOORS = {
    "torch": "2.10",
    "deepspeed": "0.19.8",
    "transformers": "5.3",
    "accelerate": "1.10",
    "datasets": "4.0",
    "safetensors": "0.5",
}
RECORDED = ("torch", "deepspeed", "transformers", "tokenizers", "datasets")


def check_versions() -> None:
    for package, floor in FLOORS.items():
        found = installed(package)
        if found is None or older(found, floor):
            here = "is not installed" if found is None else f"{found} is too old"
            raise UserError(
                f"{package} {here}; {floor} or newer is needed: pip install '{package}>={floor}', "
                f"or `make setup` for the versions that were tested."
            )


def installed(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def older(found: str, floor: str) -> bool:
    try:
        # By the numbers alone: vendors ship 2.10.0a0+x as their 2.10.
        return Version(found).release < Version(floor).release
    except InvalidVersion:
        return False


def versions() -> dict[str, str | None]:
    """For the manifest of a checkpoint; and to compare the processes of a run."""
    return {"python": platform.python_version(), "mlkd_dist": __version__} | {
        package: installed(package) for package in RECORDED
    }


def refuse_different(of_processes: list[dict[str, str | None]]) -> None:
    """UserError where machines of one run have different versions."""
    first = of_processes[0]
    for rank, theirs in enumerate(of_processes):
        for package, found in theirs.items():
            if found != first[package]:
                raise UserError(
                    f"{package} is {found} in process {rank} and {first[package]} in process 0; "
                    f"install the same versions on all machines."
                )
