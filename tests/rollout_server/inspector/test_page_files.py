import logging

import pytest
from fastapi import FastAPI
from fastapi.testclient import TestClient

from rollout_server.inspector import page_files


def test_plotly_comes_from_the_installed_package_and_is_not_sent_twice(client: TestClient) -> None:
    first = client.get("/plotly.min.js")
    assert first.status_code == 200
    assert first.headers["content-type"].startswith("text/javascript")
    assert "plotly.js v" in first.text[:100]
    assert client.get("/plotly.min.js", headers={"If-None-Match": first.headers["etag"]}).status_code == 304
    assert client.head("/plotly.min.js").headers["content-length"] == str(len(first.content))


def test_nothing_else_of_the_package_is_served(client: TestClient) -> None:
    for path in ("/widgetbundle.js", "/datasets/iris.csv.gz", "/plotly.min.js/x"):
        assert client.get(path).status_code == 404


@pytest.mark.parametrize("package", ["no_such_package", "json"])
def test_without_the_package_one_line_says_what_to_install(package: str, caplog: pytest.LogCaptureFixture) -> None:
    app = FastAPI()
    with caplog.at_level(logging.WARNING):
        page_files.add_to(app, package)
    assert [record.getMessage() for record in caplog.records] == [
        f"the page shows no charts: {package} is not installed; pip install 'adaswitch[inspector]'"
    ]
    client = TestClient(app)
    assert client.get("/plotly.min.js").status_code == 404
    assert client.get("/").status_code == 200
