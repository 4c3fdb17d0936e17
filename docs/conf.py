"""How `make docs` builds this folder. Nothing is fetched: fonts, scripts and styles are the theme's own files."""

import sys
from importlib.metadata import version as version_of
from pathlib import Path

from sphinx.application import Sphinx

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))

from docs.generators.columns import column_reference  # noqa: E402
from docs.generators.commands import command_reference  # noqa: E402
from docs.generators.rest import rest_reference  # noqa: E402
from docs.generators.settings import config_reference  # noqa: E402

project = "adaswitch"
author = "the adaswitch authors"
version = release = version_of("adaswitch")

extensions = ["myst_parser"]
source_suffix = {".md": "markdown"}
myst_enable_extensions = ["attrs_inline"]
myst_heading_anchors = 3
suppress_warnings = ["myst.strikethrough"]

html_theme = "furo"
html_title = "adaswitch"
html_show_sphinx = False
html_copy_source = False
html_static_path = ["_static"]
html_css_files = ["adaswitch.css"]

# A page holds this line where the text that comes from the code goes.
GENERATED = {
    "<!-- generated: configuration -->": config_reference,
    "<!-- generated: commands -->": command_reference,
    "<!-- generated: rest -->": rest_reference,
    "<!-- generated: columns -->": column_reference,
}


def fill_in(app: Sphinx, page: str, source: list[str]) -> None:
    for line, generate in GENERATED.items():
        if line in source[0]:
            source[0] = source[0].replace(line, generate())


def setup(app: Sphinx) -> None:
    app.connect("source-read", fill_in)
