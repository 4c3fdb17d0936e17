"""What a person does with the page."""

import re
from pathlib import Path
from urllib.parse import parse_qs, urlsplit

import pytest
from playwright.sync_api import Page, expect

from rollout_server.traces.writer import TraceWriter
from tests.rollout_server.inspector.page.conftest import TOKEN

SWITCHED = "?run=demo&sequence=625.0.0"  # the teacher took over at 20


def query(page: Page) -> dict[str, list[str]]:
    return parse_qs(urlsplit(page.url).query)


def set_slider(page: Page, name: str, value: float) -> None:
    page.locator(f"input[type=range][name={name}]").fill(str(value))


def test_a_run_is_opened_from_the_list_and_shows_its_curves(page: Page) -> None:
    page.goto("./")
    page.get_by_role("link", name="demo", exact=True).click()
    expect(page.get_by_role("heading", name="demo")).to_be_visible()
    expect(page.locator(".chart .svg-container")).to_have_count(6)
    expect(page.get_by_text("Nothing recorded yet")).to_have_count(0)
    expect(page.locator(".facts")).to_contain_text("144")
    expect(page.get_by_text("live · 144 sequences")).to_be_visible()
    expect(page.get_by_role("link", name="Try it")).to_have_count(0)


def test_filters_are_part_of_the_address_and_survive_a_reload(page: Page) -> None:
    page.goto("?run=demo&tab=sequences")
    expect(page.get_by_text("1 to 25 of 144")).to_be_visible()
    page.get_by_label("Switched").select_option("true")
    page.get_by_label("Step from").fill("5")
    expect(page.get_by_text("1 to 25 of 37")).to_be_visible()
    assert query(page)["switched"] == ["true"]
    assert query(page)["first_step"] == ["5"]
    page.reload()
    expect(page.get_by_text("1 to 25 of 37")).to_be_visible()
    expect(page.get_by_label("Switched")).to_have_value("true")
    page.get_by_label("Text").fill("in no sequence")
    expect(page.get_by_text("No sequence matches")).to_be_visible()


def test_pages_and_orders_can_be_turned(page: Page) -> None:
    page.goto("?run=demo&tab=sequences")
    page.get_by_role("button", name="Next").click()
    expect(page.get_by_text("26 to 50 of 144")).to_be_visible()
    page.get_by_role("button", name="Divergence").click()
    expect(page.get_by_text("1 to 25 of 144")).to_be_visible()
    expect(page.locator("th[aria-sort=descending]")).to_contain_text("Divergence")
    assert query(page)["order"] == ["mean_divergence"]


def test_a_token_shows_its_numbers_on_hover_and_by_keyboard(page: Page) -> None:
    page.goto("?run=demo&tab=sequences&switched=true")
    page.locator(".texts a").first.click()
    expect(page.locator(".token[data-i]")).to_have_count(38)
    expect(page.locator(".info")).to_contain_text("position 20")
    expect(page.locator(".info")).to_contain_text("teacher takes over")
    page.locator("#token-7").hover()
    expect(page.locator(".info")).to_contain_text("position 7")
    expect(page.locator(".info dt").first).to_have_text("divergence")
    expect(page.locator(".info .best li").first).to_be_visible()
    page.locator(".tokens").focus()
    page.keyboard.press("ArrowRight")
    expect(page.locator(".info")).to_contain_text("position 8")
    expect(page.locator("#token-8")).to_have_attribute("aria-selected", "true")
    page.go_back()
    expect(page.get_by_text("1 to 25 of 115")).to_be_visible()


def test_moving_k_moves_the_switch(page: Page) -> None:
    page.goto(SWITCHED)
    expect(page.locator(".verdict")).to_contain_text("As recorded: a switch at 20")
    set_slider(page, "floor", 0.01)
    expect(page.locator(".verdict")).to_contain_text("Would switch at 14; recorded: a switch at 20")
    expect(page.locator(".token.replayed")).to_have_count(1)
    expect(page.locator("#token-14")).to_have_class(re.compile("replayed"))
    set_slider(page, "multiplier", 5)
    expect(page.locator(".verdict")).to_contain_text("As recorded: a switch at 20")
    expect(page.locator(".token.replayed")).to_have_count(0)
    assert query(page)["multiplier"] == ["5"]
    expect(page.locator(".report")).to_contain_text("144 sequences")
    set_slider(page, "window", 40)  # the teacher took over at 20, before such an average is filled
    expect(page.locator(".verdict")).to_contain_text("Can't be judged")
    expect(page.locator(".token.replayed")).to_have_count(0)


def test_two_runs_are_compared(page: Page) -> None:
    page.goto("./")
    page.get_by_label("Compare demo").check()
    page.get_by_label("Compare hostile").check()
    page.get_by_role("button", name="Compare two runs").click()
    expect(page.get_by_role("columnheader", name="hostile")).to_be_visible()
    expect(page.locator(".chart .svg-container").first).to_be_visible()


def test_text_of_a_model_stays_text(page: Page) -> None:
    for view in ("?run=hostile&tab=sequences", "?run=hostile&sequence=p0.0.0"):
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
    expect(page.locator(".loading")).to_have_count(0)
    assert page.evaluate("document.documentElement.scrollWidth") == 390


def test_a_new_step_appears_by_itself(page: Page, runs_dir: Path, make_sequence) -> None:
    page.goto("?run=demo")
    expect(page.get_by_text("live · 144 sequences")).to_be_visible()
    writer = TraceWriter(runs_dir / "demo" / "traces", decode=str, token_texts=lambda ids: [str(i) for i in ids])
    writer.write_segment(7, [make_sequence(prompt_id="new")])
    expect(page.get_by_text("live · 145 sequences")).to_be_visible()
    expect(page.locator(".facts")).to_contain_text("145")


def test_what_is_broken_is_said(page: Page, runs_dir: Path) -> None:
    traces = runs_dir / "demo" / "traces"
    (traces / "step-000002" / "tokens.parquet").write_bytes(b"broken")
    truncated = (traces / "step-000003" / "sequences.parquet").read_bytes()
    (traces / "step-000003" / "sequences.parquet").write_bytes(truncated[: len(truncated) // 2])
    (traces / "step-000004" / "tokens.parquet").unlink()
    (traces / "step-000005").rename(traces / ".step-000005.unfinished")  # being written: not broken, not there yet
    page.goto("?run=demo")
    notice = page.get_by_text("3 broken parts of the trace left out")
    expect(notice).to_be_visible()
    notice.click()
    for name in ("step-000002: tokens.parquet", "step-000003: sequences.parquet", "step-000004: tokens.parquet is mis"):
        expect(page.locator(".notice li").filter(has_text=name)).to_be_visible()
    expect(page.locator(".facts")).to_contain_text("48")


def test_a_token_is_asked_for_once_and_kept_for_the_tab(guarded_address: str, open_page) -> None:
    page = open_page(guarded_address, expected="401")
    page.goto("./")
    expect(page.get_by_text("A token is needed")).to_be_visible()
    page.get_by_label("Token").fill("not-the-one")
    page.get_by_role("button", name="Go on").click()
    expect(page.get_by_text("That was not it.")).to_be_visible()
    page.get_by_label("Token").fill(TOKEN)
    page.get_by_role("button", name="Go on").click()
    expect(page.get_by_role("link", name="demo", exact=True)).to_be_visible()
    page.reload()
    expect(page.get_by_role("link", name="demo", exact=True)).to_be_visible()
    assert TOKEN not in page.url
    assert page.evaluate("JSON.stringify(localStorage)").find(TOKEN) == -1


def test_a_prompt_is_tried_on_a_live_run(attached_address: str, open_page) -> None:
    page = open_page(attached_address)
    page.goto("?run=demo")
    page.get_by_role("link", name="Try it").click()
    page.get_by_label("Prompt").fill("1+2*3-4+5*6-7=")
    page.get_by_label("Seed").fill("3")
    page.get_by_role("button", name="Write", exact=True).click()
    expect(page.get_by_role("status").filter(has_text="ended by")).to_be_visible()
    tokens = page.locator(".token[data-i]")
    shown = [tokens.nth(i).inner_text() for i in range(tokens.count())]
    assert 1 <= len(shown) <= 24
    assert page.locator(".token.teacher[data-i]").count() > 0
    expect(page.locator(".chart .svg-container")).to_be_visible()
    page.locator("#token-0").hover()
    expect(page.locator(".info")).to_contain_text("position 0")
    page.get_by_label("Who writes").select_option("on_policy")
    page.get_by_role("button", name="Write", exact=True).click()
    expect(page.get_by_role("status").filter(has_text="no switch")).to_be_visible()
    expect(page.locator(".token.teacher[data-i]")).to_have_count(0)


def test_what_a_live_run_refuses_is_said(attached_address: str, open_page) -> None:
    page = open_page(attached_address, expected="422")
    page.goto("?run=demo&tab=live")
    page.get_by_label("Prompt").fill("1+2=")
    page.get_by_label("Most tokens").fill("500")
    page.get_by_role("button", name="Write", exact=True).click()
    expect(page.get_by_text("max_new_tokens must be <= ")).to_be_visible()


def test_no_chart_breaks_the_policy_on_content(page: Page) -> None:
    page.add_init_script(
        "window.violations = []; "
        "document.addEventListener('securitypolicyviolation', (e) => violations.push(e.violatedDirective + e.sample))"
    )
    for view in ("?run=demo", "?run=demo&tab=replay", SWITCHED):
        page.goto(view)
        expect(page.locator(".chart .svg-container").first).to_be_visible()
        page.get_by_role("button", name="Switch to").click()
        assert page.evaluate("violations") == []
        assert page.locator("style").count() == 0


def test_the_charting_library_is_loaded_only_where_a_chart_is_drawn(page: Page) -> None:
    asked: list[str] = []
    page.on("request", lambda request: asked.append(urlsplit(request.url).path))
    page.goto("./")
    page.get_by_role("link", name="demo", exact=True).hover()
    assert "/plotly.min.js" not in asked
    page.get_by_role("link", name="demo", exact=True).click()
    expect(page.locator(".chart .svg-container")).to_have_count(6)
    assert asked.count("/plotly.min.js") == 1


def test_a_chart_shows_the_values_under_the_mouse(page: Page) -> None:
    page.goto("?run=demo")
    switching = page.locator(".chart").filter(has_text="Switching")
    expect(switching.locator(".svg-container")).to_be_visible()
    box = switching.locator(".plot").bounding_box()
    assert box is not None
    page.mouse.move(box["x"] + box["width"] - 16, box["y"] + 60)
    expect(switching.locator(".legend")).to_contain_text("step 6")
    expect(switching.locator(".legend b").first).to_have_text(re.compile(r"^\d+%$"))
    expect(switching.locator(".dot:not([hidden])")).to_have_count(2)
    page.mouse.move(box["x"], box["y"] - 200)
    expect(switching.locator(".at")).to_have_text("")
    expect(switching.locator(".cursor")).to_be_hidden()


def test_a_click_in_the_chart_chooses_the_token(page: Page) -> None:
    page.goto(SWITCHED)
    plot = page.locator(".chart").filter(has_text="Divergence, nats").locator(".plot")
    expect(plot.locator(".svg-container")).to_be_visible()
    cursor = plot.locator(".cursor").bounding_box()  # at the switch, position 20
    page.locator("#token-7").click()
    expect(page.locator(".legend .at").first).to_have_text("position 7")
    assert cursor is not None
    page.mouse.click(cursor["x"], cursor["y"] + 50)
    expect(page.locator("#token-20")).to_have_attribute("aria-selected", "true")


def test_a_chart_follows_the_width_and_the_theme(page: Page) -> None:
    page.goto("?run=demo")
    drawing = page.locator(".chart .svg-container").first
    expect(drawing).to_be_visible()
    label = drawing.locator(".ytick text").first
    light = label.evaluate("e => getComputedStyle(e).fill")
    page.get_by_role("button", name="Switch to dark colours").click()
    expect(label).not_to_have_css("fill", light)
    page.set_viewport_size({"width": 390, "height": 844})
    expect(drawing.locator(".main-svg").first).to_have_css("width", re.compile(r"^3[0-5]\d"))


def test_without_the_package_each_chart_says_what_is_missing(address: str, open_page) -> None:
    page = open_page(address, expected="404")
    page.route("**/plotly.min.js", lambda route: route.fulfill(status=404))
    page.goto("?run=demo")
    expect(page.get_by_text("No chart: plotly.min.js could not be loaded.")).to_have_count(6)
