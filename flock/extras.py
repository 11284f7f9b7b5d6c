"""Install commands for optional packages."""

import re
import shlex


def pip_install(package: str) -> str:
    """Return the command that installs *package* in the versions that this distribution declares.

    It names the package instead of an extra, so it works however this distribution was installed.
    """
    # Imported here because the import is slow, and only needed when a package is missing.
    from importlib.metadata import PackageNotFoundError, requires

    try:
        declared = requires("flockapi") or []
    except PackageNotFoundError:  # running from a checkout that is not installed
        declared = []
    requirements = (requirement.partition(";")[0].strip() for requirement in declared)
    matching = next((text for text in requirements if re.split(r"[^\w.-]", text)[0] == package), package)
    return f"pip install {shlex.quote(matching)}"
