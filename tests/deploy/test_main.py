import subprocess
import sys
from pathlib import Path

from deploy.__main__ import shadowed_package

REPOSITORY = Path(__file__).parents[2]


def test_our_own_packages_are_not_shadowed():
    assert shadowed_package() is None


def test_a_package_that_is_nowhere_is_named():
    assert "package no_such_package is missing" in str(shadowed_package(("no_such_package",)))


def test_a_package_of_the_same_name_is_one_line_that_says_where_it_lies(tmp_path):
    (tmp_path / "common").mkdir()
    (tmp_path / "common" / "__init__.py").touch()
    script = f"import sys; sys.path.insert(0, {str(tmp_path)!r}); from deploy.__main__ import main; main()"
    ran = subprocess.run(
        [sys.executable, "-c", f"import sys; sys.path.insert(0, {str(REPOSITORY)!r}); import deploy; {script}"],
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert ran.returncode == 1
    assert ran.stderr.count("\n") == 1
    assert f"error: package common is shadowed by {tmp_path / 'common' / '__init__.py'}" in ran.stderr
