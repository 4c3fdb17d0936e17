"""The files of the page: its own, and Plotly's JavaScript from the installed Python package ``plotly``.

The package is only located, not imported.
"""

from importlib.util import find_spec
from logging import getLogger
from pathlib import Path

from fastapi import FastAPI, Request, Response
from fastapi.staticfiles import StaticFiles

_PAGE = Path(__file__).parent / "page"
PLOTLY = "plotly.min.js"
logger = getLogger(__name__)


def add_to(app: FastAPI, package: str = "plotly") -> None:
    """Serve the page at ``/`` and the charting library of ``package`` at ``/plotly.min.js``.

    Without the package the page works, but each chart is replaced by a line that says what is missing.
    """
    folder = charts_folder(package)
    if folder is None:
        logger.warning("the page shows no charts: %s is not installed; pip install 'adaswitch[inspector]'", package)
    else:
        files = StaticFiles(directory=folder)  # answers with ETag, Last-Modified and 304, as for the page's own files

        async def charts(request: Request) -> Response:
            return await files.get_response(PLOTLY, request.scope)

        app.add_route(f"/{PLOTLY}", charts, methods=["GET", "HEAD"], include_in_schema=False)
    if _PAGE.is_dir():
        app.mount("/", StaticFiles(directory=_PAGE, html=True), name="page")


def charts_folder(package: str) -> Path | None:
    """The folder of the package that holds Plotly's JavaScript; None if it is not installed or has none."""
    spec = find_spec(package)
    folders = [Path(place) / "package_data" for place in (spec.submodule_search_locations or [])] if spec else []
    return next((folder for folder in folders if (folder / PLOTLY).is_file()), None)
