"""The entry point of ``adaswitch``: checks that its packages are not shadowed by others, then starts the CLI.

Imports only the standard library, so that the check runs before any package that could be shadowed.
"""

import sys
from importlib.util import find_spec
from pathlib import Path

_PACKAGES = ("common", "rollout_server", "trainer")


def shadowed_package(names: tuple[str, ...] = _PACKAGES) -> str | None:
    """One line naming the first package that Python would import from a folder other than ours, or None."""
    root = Path(__file__).resolve().parents[1]
    for name in names:
        spec = find_spec(name)
        if spec is None:
            return f"package {name} is missing next to {root / 'deploy'}: install adaswitch again"
        found = Path(spec.origin or next(iter(spec.submodule_search_locations or []), "built in")).resolve()
        if found != root / name / "__init__.py":
            return (
                f"package {name} is shadowed by {found}, expected {root / name}; use an environment without the other"
            )
    return None


def main() -> None:
    """Run the command line. Exits with 1 and one line if another package shadows one of ours."""
    if (problem := shadowed_package()) is not None:
        sys.exit(f"error: {problem}")
    from deploy.cli import main as run

    run()


if __name__ == "__main__":
    main()
