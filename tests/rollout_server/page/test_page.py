"""What a person does with the page."""

import hashlib
import re
from pathlib import Path
from urllib.parse import parse_qs, urlsplit

import pytest
from playwright.sync_api import Page, expect

from rollout_server.traces.writer import TraceWriter

PAGE = Path(__file__).parents[3] / "rollout_server" / "api" / "page"
SWITCHED = "?run=demo&sequence=p1-0.0.0"


def query(page: Page) -> dict[str, list[str]]:
    return parse_qs(urlsplit(page.url).query)


def set_slider(page: Page, name: str, value: float) -> None:
    page.locator(f"input[type=range][name={name}]").fill(str(value))


def test_a_run_is_opened_from_the_list_and_shows_its_curves(page: Page) -> None:
    page.goto("./")
    page.get_by_role("link", name="demo", exact=True).click()
    expect(page.get_by_role("heading", name="demo")).to_be_visible()
    expect(page.locator(".chart canvas")).to_have_count(4)
    expect(page.get_by_text("Nothing recorded yet")).to_have_count(2)
    expect(page.get_by_text("live · 40 sequences")).to_be_visible()


def test_filters_are_part_of_the_address_and_survive_a_reload(page: Page) -> None:
    page.goto("?run=demo&tab=sequences")
    expect(page.get_by_text("1 to 25 of 40")).to_be_visible()
    page.get_by_label("Switched").select_option("true")
    page.get_by_label("Step from").fill("2")
    expect(page.get_by_text("1 to 4 of 4")).to_be_visible()
    assert query(page)["switched"] == ["true"]
    assert query(page)["first_step"] == ["2"]
    page.reload()
    expect(page.get_by_text("1 to 4 of 4")).to_be_visible()
    expect(page.get_by_label("Switched")).to_have_value("true")
    page.get_by_label("Text").fill("in no sequence")
    expect(page.get_by_text("No sequence matches")).to_be_visible()


def test_pages_and_orders_can_be_turned(page: Page) -> None:
    page.goto("?run=demo&tab=sequences")
    page.get_by_role("button", name="Next").click()
    expect(page.get_by_text("26 to 40 of 40")).to_be_visible()
    page.get_by_role("button", name="Divergence").click()
    expect(page.get_by_text("1 to 25 of 40")).to_be_visible()
    expect(page.locator("th[aria-sort=descending]")).to_contain_text("Divergence")
    assert query(page)["order"] == ["mean_divergence"]


def test_a_token_shows_its_numbers_on_hover_and_by_keyboard(page: Page) -> None:
    page.goto("?run=demo&tab=sequences&switched=true")
    page.locator(".texts a").first.click()
    expect(page.locator(".token[data-i]")).to_have_count(40)
    expect(page.locator(".info")).to_contain_text("position 30")
    page.locator("#token-7").hover()
    expect(page.locator(".info")).to_contain_text("position 7")
    expect(page.locator(".info dt").first).to_have_text("divergence")
    expect(page.locator(".info .best li").first).to_be_visible()
    page.locator(".tokens").focus()
    page.keyboard.press("ArrowRight")
    expect(page.locator(".info")).to_contain_text("position 8")
    expect(page.locator("#token-8")).to_have_attribute("aria-selected", "true")
    page.go_back()
    expect(page.get_by_text("1 to 8 of 8")).to_be_visible()


def test_moving_k_moves_the_switch(page: Page) -> None:
    page.goto(SWITCHED)
    set_slider(page, "multiplier", 0.5)
    expect(page.locator(".verdict")).to_contain_text("Would switch at")
    expect(page.locator(".token.replayed")).to_have_count(1)
    early = int(page.locator(".verdict b").inner_text())
    assert 3 <= early < 30
    expect(page.locator(f"#token-{early}")).to_have_class(re.compile("replayed"))
    assert query(page)["multiplier"] == ["0.5"]
    expect(page.locator(".report")).to_contain_text("40 sequences")
    set_slider(page, "window", 40)  # the teacher took over at 30, before such an average is filled
    expect(page.locator(".verdict")).to_contain_text("Can't be judged")
    expect(page.locator(".token.replayed")).to_have_count(0)


def test_two_runs_are_compared(page: Page) -> None:
    page.goto("./")
    page.get_by_label("Compare demo").check()
    page.get_by_label("Compare hostile").check()
    page.get_by_role("button", name="Compare two runs").click()
    expect(page.get_by_role("columnheader", name="hostile")).to_be_visible()
    expect(page.locator(".chart canvas").first).to_be_visible()


def test_text_of_a_model_stays_text(page: Page) -> None:
    for view in ("?run=hostile&tab=sequences", "?run=hostile&sequence=p1-0.0.0"):
        page.goto(view)
        expect(page.get_by_text("<script>window.hacked").first).to_be_visible()
        assert page.evaluate("window.hacked") is None
        assert page.locator("main script, main img").count() == 0


def test_dark_follows_the_system_and_the_button(page: Page) -> None:
    background = "getComputedStyle(document.body).backgroundColor"
    page.emulate_media(color_scheme="dark")
    page.goto("./")
    dark = page.evaluate(background)
    page.get_by_role("button", name="Switch to light colours").click()
    assert page.evaluate(background) != dark
    page.reload()
    assert page.evaluate(background) != dark


@pytest.mark.parametrize("view", ["./", "?run=demo", "?run=demo&tab=sequences", "?run=demo&tab=replay", SWITCHED])
def test_nothing_is_wider_than_a_phone(page: Page, view: str) -> None:
    page.set_viewport_size({"width": 390, "height": 844})
    page.goto(view)
    expect(page.locator("h1")).to_be_visible()
    page.wait_for_function("!document.querySelector('.loading')")
    assert page.evaluate("document.documentElement.scrollWidth") == 390


def test_a_new_step_appears_by_itself(page: Page, runs_dir: Path, make_sequence) -> None:
    page.goto("?run=demo")
    expect(page.get_by_text("live · 40 sequences")).to_be_visible()
    writer = TraceWriter(runs_dir / "demo" / "traces", decode=str, token_texts=lambda ids: [str(i) for i in ids])
    writer.write_segment(3, [make_sequence(prompt_id="new")])
    expect(page.get_by_text("live · 41 sequences")).to_be_visible()
    expect(page.locator(".facts")).to_contain_text("41")


def test_what_is_broken_is_said(page: Page, runs_dir: Path) -> None:
    (runs_dir / "demo" / "traces" / "step-000002" / "tokens.parquet").write_bytes(b"broken")
    page.goto("?run=demo")
    expect(page.get_by_text("1 broken part(s) of the trace left out")).to_be_visible()


def test_the_charting_library_is_the_one_recorded() -> None:
    folder = PAGE / "vendor" / "uplot"
    lines = (folder / "SHA256SUMS").read_text().splitlines()
    assert len(lines) == 3
    for line in lines:
        digest, name = line.split()
        assert hashlib.sha256((folder / name).read_bytes()).hexdigest() == digest
