"""Optional packages, and the command that installs each."""

import re
import shlex

__all__ = ["pip_install"]


def pip_install(package: str) -> str:
    """The command that installs *package* in the versions that this distribution declares for it.

    It names the package and not an extra of ours, so it works however this distribution was installed.
    """
    # Imported here, since it takes long, and is needed only when something is missing.
    from importlib.metadata import PackageNotFoundError, requires

    try:
        declared = requires("flockapi") or []
    except PackageNotFoundError:  # it runs from a checkout that was never installed
        declared = []
    requirements = (requirement.partition(";")[0].strip() for requirement in declared)
    found = next((each for each in requirements if re.split(r"[^\w.-]", each)[0] == package), package)
    return f"pip install {shlex.quote(found)}"
