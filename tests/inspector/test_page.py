"""The page in a real browser: over the service, and from one exported file without a network."""

from __future__ import annotations

import importlib.util
import json
import re
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
from axe_playwright_python.sync_playwright import Axe
from dumped_run import questions, rewrite, write_game, write_run, write_step
from find_browser import open_browser
from inspector_process import once, serving
from playwright.sync_api import expect

expect.set_options(timeout=20_000)

# Where a view is, and what is there when it is drawn.
VIEWS = {"curves": (".chart", "#/curves"), "questions": ("tbody tr", "#/questions?run=one")}


@dataclass
class Site:
    """The service over two runs, and the export of them."""

    url: str
    folder: Path
    exported: Path


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Site]:
    folder = tmp_path_factory.mktemp("runs")
    other = {"siop_gain": "log", "siop_baseline": "pooled"}
    runs = aside(lambda: [write_run(folder / "one"), write_run(folder / "two", **other)])
    done = once(*runs, "--export", folder / "out.html", "--recompute", "ablation=release")
    assert done.returncode == 0, done.stderr
    with serving(*runs, "--recompute", "ablation=release") as (url, _):
        yield Site(url, folder, folder / "out.html")


def aside(call: Callable[[], Any]) -> Any:
    """In a thread of its own: Playwright has an event loop in this one, beside which no other can run."""
    with ThreadPoolExecutor(1) as pool:
        return pool.submit(call).result()


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    with open_browser() as found:
        yield found


@dataclass
class Tab:
    """A page, what went wrong on it, and what it asked for."""

    page: Any
    errors: list[str] = field(default_factory=list)
    requests: list[str] = field(default_factory=list)

    def open(self, address: str, until: str) -> Any:
        self.page.goto(address)
        self.page.wait_for_selector(until)
        return self.page


@pytest.fixture
def tab(browser: Any) -> Iterator[Tab]:
    context = browser.new_context(viewport={"width": 1280, "height": 800})
    context.grant_permissions(["clipboard-read", "clipboard-write"])
    context.set_default_timeout(20_000)
    found = Tab(context.new_page())
    found.page.on("console", lambda message: found.errors.append(message.text) if message.type == "error" else None)
    found.page.on("pageerror", lambda error: found.errors.append(str(error)))
    found.page.on("request", lambda request: found.requests.append(request.url))
    yield found
    context.close()
    assert found.errors == []


def first_question(tab: Tab, base: str, query: str = "run=one&sort=clusters&descending=1") -> Any:
    page = tab.open(f"{base}#/questions?{query}", "tbody tr")
    page.locator("tbody tr a.open").first.click()
    page.wait_for_selector(".turn")
    return page


def rows(page: Any) -> list[str]:
    return [re.sub(r"\s+", " ", text) for text in page.locator("tbody tr").all_inner_texts()]


# ---------------------------------------------------------------------- curves
def test_curves_can_be_read_with_mouse_and_keys_and_runs_switched(tab: Tab, site: Site) -> None:
    page = tab.open(site.url, ".chart")
    turns = page.locator(".chart", has_text="Turns of a rollout")
    assert page.locator(".chart").count() >= 9
    assert turns.locator("path.line").count() == 2
    turns.locator(".plot").hover(position={"x": 60, "y": 40})
    assert "step 1" in turns.inner_text()
    turns.locator(".plot").focus()
    page.keyboard.press("ArrowRight")
    page.keyboard.press("ArrowRight")
    step = re.search(r"step (\d)", turns.inner_text())
    assert step is not None and turns.locator(".plot").get_attribute("aria-valuenow") == step[1]
    page.get_by_label("two").uncheck()
    expect(page.locator("h1")).to_have_text("Run")
    assert "runs=one" in page.url
    assert page.locator(".chart", has_text="Turns of a rollout").locator("path.line").count() == 1
    page.locator(".chart", has_text="Turns of a rollout").locator(".plot").focus()
    page.keyboard.press("Enter")
    page.wait_for_selector("tbody tr")
    assert page.locator("tbody tr").count() == 3 and "step_from=6" in page.url


def test_one_run_is_always_shown(tab: Tab, site: Site) -> None:
    page = tab.open(f"{site.url}#/curves?runs=two", ".chart")
    page.get_by_label("two").click()
    expect(page.get_by_label("two")).to_be_checked()
    assert not page.get_by_label("one").is_checked() and "runs=two" in page.url


def test_runs_may_have_any_name(tab: Tab, tmp_path: Path) -> None:
    names = ["a,b", "100%2C", "<i>&=#?", "é ü"]
    runs = aside(lambda: [write_run(tmp_path / name, steps=2) for name in names])
    with serving(*runs) as (url, _):
        page = tab.open(url, ".chart")
        for count, name in enumerate(names[:3], start=1):
            page.get_by_label(name, exact=True).uncheck()
            expect(page.locator(".summary")).to_have_count(len(names) - count)
        page.reload()
        expect(page.locator(".summary b")).to_have_text([names[3]])
        page.get_by_label(names[0], exact=True).check()
        expect(page.locator(".summary b")).to_have_text([names[0], names[3]])
        for name in names:
            page.goto(url)
            page.locator("#to-questions").click()
            page.get_by_label(name, exact=True).check()
            page.locator("a.open").first.click()
            page.wait_for_selector(".turn")
        page.goto("about:blank")


def test_a_running_training_is_followed_until_the_service_ends(tab: Tab, site: Site) -> None:
    folder = aside(lambda: write_run(site.folder / "live", steps=2))
    with serving(folder) as (url, _):
        page = tab.open(url, ".chart")
        assert "2 steps" in page.locator(".summary").inner_text()
        aside(lambda: write_step(folder / "rollouts", 3, questions(3)))
        expect(page.locator(".summary")).to_contain_text("3 steps")
        page.goto(f"{url}#/questions?run=live")
        expect(page.locator("tbody tr")).to_have_count(9)
        aside(lambda: write_step(folder / "rollouts", 4, questions(4)))
        expect(page.locator("tbody tr")).to_have_count(12)
    expect(page.locator("#bar [role=alert]")).to_contain_text("this is what was there before")
    assert page.locator("tbody tr").count() == 12
    page.goto("about:blank")
    tab.errors = [error for error in tab.errors if "net::ERR" not in error]


# ---------------------------------------------------------------------- finding
def test_filters_are_in_the_address_and_walk_with_the_question(tab: Tab, site: Site) -> None:
    page = tab.open(f"{site.url}#/questions?run=one", "tbody tr")
    assert page.locator("tbody tr").count() == 18
    page.keyboard.press("/")
    page.keyboard.type("where is 1")
    expect(page.locator("tbody tr")).to_have_count(6)
    page.get_by_label("step from").fill("3")
    expect(page.locator("tbody tr")).to_have_count(4)
    page.get_by_role("link", name="advantage").click()
    page.wait_for_selector("th[aria-sort=ascending] >> text=advantage")
    before = rows(page)
    assert all(name in page.url for name in ("text=where+is+1", "step_from=3", "sort=advantage_min"))
    page.reload()
    page.wait_for_selector("tbody tr")
    assert rows(page) == before and page.locator("input[name=text]").input_value() == "where is 1"
    page.get_by_label("no answer").check()
    expect(page.locator("tbody tr")).not_to_have_count(len(before))
    page.get_by_label("no answer").uncheck()
    expect(page.locator("tbody tr")).to_have_count(len(before))
    page.keyboard.press("j")
    page.keyboard.press("j")
    page.keyboard.press("Enter")
    page.wait_for_selector(".turn")
    second = page.url
    page.keyboard.press("k")
    expect(page).not_to_have_url(second)
    expect(page.locator("#before")).to_be_hidden()  # the first question is there
    page.keyboard.press("j")
    expect(page).to_have_url(second)
    expect(page.locator("#before")).to_be_visible()
    page.keyboard.press("u")
    page.wait_for_selector("tbody tr")
    assert rows(page) == before


def test_the_list_keeps_its_filter_in_another_run_and_its_place_after_a_question(tab: Tab, site: Site) -> None:
    page = tab.open(f"{site.url}#/questions?run=one&text=where&step_from=3", "tbody tr")
    page.get_by_label("two").check()
    expect(page.locator("tbody tr")).to_have_count(12)
    assert "run=two" in page.url and "step_from=3" in page.url and page.get_by_label("step from").input_value() == "3"
    page.locator("a.open").nth(4).click()
    page.wait_for_selector(".turn")
    page.keyboard.press("u")
    expect(page.locator("a.open").nth(4)).to_be_focused()
    page.keyboard.press("j")
    expect(page.locator("a.open").nth(5)).to_be_focused()


def slowly(page: Any) -> None:
    """Every question takes longer than a hand from key to key."""
    page.evaluate(
        "() => { const now = window.fetch; window.fetch = async (where, ...rest) => {"
        " if (String(where).startsWith('/api/question?')) await new Promise((done) => setTimeout(done, 400));"
        " return now(where, ...rest); }; }"
    )


def place(page: Any) -> int:
    return int(re.search(r"[?&]at=(\d+)", page.url)[1])  # type: ignore[index]


@pytest.mark.parametrize(
    ("keys", "ends"),
    [("kj", 5), ("jk", 5), ("jjj", 8), ("kkkkkkkkkkkk", 0), ("jjjjjjjjjjjjjjjjjjjjjjjj", 17), ("jjkjk", 6)],
)
def test_keys_act_on_where_the_reader_is_however_fast(tab: Tab, site: Site, keys: str, ends: int) -> None:
    page = tab.open(f"{site.url}#/questions?run=one", "tbody tr")
    groups = page.locator("a.open").evaluate_all("(all) => all.map((one) => one.textContent)")
    page.locator("a.open").nth(5).click()
    page.wait_for_selector(".turn")
    slowly(page)
    for key in keys:
        page.keyboard.press(key)
    expect(page).to_have_url(re.compile(f"[?&]at={ends}(&|$)"))
    expect(page.locator("h1")).to_have_text(groups[ends])
    page.keyboard.press("g")  # after all of them
    expect(page.locator("#gold-text")).to_have_text("Paris")
    assert place(page) == ends


def test_a_key_waits_for_the_page_that_the_one_before_leads_to(tab: Tab, site: Site) -> None:
    page = tab.open(f"{site.url}#/questions?run=one", "tbody tr")
    groups = page.locator("a.open").evaluate_all("(all) => all.map((one) => one.textContent)")
    page.locator("a.open").nth(5).click()
    page.wait_for_selector(".turn")
    slowly(page)
    for key in "jgl":
        page.keyboard.press(key)
    expect(page.locator("#gold-text")).to_have_text("Paris")
    expect(page.locator("h1")).to_have_text(groups[6])
    expect(page.locator(".rollout.chosen")).to_have_count(1)
    for key in "ju":
        page.keyboard.press(key)
    expect(page.locator("a.open").nth(7)).to_be_focused()


def test_what_is_wrong_is_told(tab: Tab, site: Site) -> None:
    tab.open(f"{site.url}#/question?run=one&step=99&group=none", ".error")
    assert "no question none in step 99" in tab.page.locator(".error").inner_text()
    tab.open(f"{site.url}#/odd", ".error")
    page = tab.page
    page.goto(f"{site.url}#/questions?run=one&step_from=x")
    page.wait_for_selector("p.error")
    tab.errors = [error for error in tab.errors if "status of 404" not in error and "status of 422" not in error]


# ---------------------------------------------------------------------- a question
def test_a_question_shows_each_rollout_with_its_credit(tab: Tab, site: Site) -> None:
    page = first_question(tab, site.url)
    assert page.locator(".rollout").count() == 4
    clusters = page.locator(".cluster")
    assert clusters.count() >= 2 and "mass" in clusters.first.inner_text()
    lines = page.evaluate(
        "const v = new URLSearchParams(location.hash.split('?')[1]);"
        "fetch(`/api/lines?run=one&step=${v.get('step')}&group=${v.get('group')}`).then((a) => a.json())"
    )["rollouts"]
    for line in lines:
        column = page.locator(f".rollout[data-session='{line['session']}']")
        cards = column.locator(".turn")
        assert cards.count() == len(line["turn_advantages"])
        for turn, advantage in enumerate(line["turn_advantages"]):
            shown = cards.nth(turn).locator(".advantage b").first.inner_text()
            assert float(shown.replace("−", "-")) == pytest.approx(advantage, abs=0.006)
            assert cards.nth(turn).locator(".other").count() == 1
            side = "up" if advantage > 0 else "down" if advantage < 0 else "none"
            assert side in (cards.nth(turn).locator(".head").get_attribute("class") or "")
        assert column.locator(".support svg").count() == bool(line.get("support"))
    assert page.locator("text=Paris").count() and page.locator("#gold-text").inner_text() == ""
    page.keyboard.press("g")
    assert page.locator("#gold-text").inner_text() == "Paris"
    page.keyboard.press("l")
    page.keyboard.press("l")
    assert page.locator(".rollout.chosen").count() == 1
    page.keyboard.press("?")
    assert page.get_by_role("dialog").is_visible()
    page.keyboard.press("Escape")


@pytest.mark.parametrize("kind", ["call", "passage"])
def test_the_same_query_or_passage_lights_up_in_other_rollouts(tab: Tab, site: Site, kind: str) -> None:
    page = first_question(tab, site.url)
    piece = page.locator(f".piece.{kind}").first
    text = piece.inner_text()
    piece.hover()
    same = page.locator(".same")
    assert same.count() > 1 and set(same.all_inner_texts()) == {text}
    page.locator("h1").hover()
    assert page.locator(".same").count() == 0
    piece.focus()
    assert page.locator(".same").count() > 1


def test_text_of_models_and_of_the_web_is_shown_and_not_run(tab: Tab, site: Site) -> None:
    for base in (site.url, site.exported.as_uri()):
        page = first_question(tab, base)
        passages = page.locator(".passage", has_text="<script>document.title = 'owned'</script>")
        assert passages.count() > 0 and "<img src=x onerror=" in passages.first.inner_text()
        assert page.locator("main script, main img").count() == 0
        assert "owned" not in page.title()


def copied(page: Any, rollout: int, button: str) -> str:
    """What a button of a rollout copies; the page says that it did."""
    page.evaluate("document.getElementById('live').textContent = ''")
    page.locator(".rollout").nth(rollout).get_by_role("button", name=button).click()
    expect(page.locator("#live.seen")).to_contain_text("Copied the rollout as")
    return page.evaluate("navigator.clipboard.readText()")  # type: ignore[no-any-return]


@pytest.mark.parametrize("search", ["run=one&sort=clusters&descending=1", "run=one&flags=no_answer"])
def test_each_rollout_is_copied_as_json_and_as_a_test_that_passes_and_alike_from_an_export(
    tab: Tab, site: Site, tmp_path: Path, search: str
) -> None:
    texts = []
    for base in (site.url, site.exported.as_uri()):
        page = first_question(tab, base, search)
        texts.append([copied(page, rollout, button) for rollout in range(4) for button in ("JSON", "test")])
    assert texts[0] == texts[1]
    shown = page.locator(".rollout").evaluate_all("(all) => all.map((one) => Number(one.dataset.session))")
    assert [json.loads(text)["session"] for text in texts[0][::2]] == shown
    for number, text in enumerate(texts[0][1::2]):
        path = tmp_path / f"copied_{number}.py"
        path.write_text(text)
        spec = importlib.util.spec_from_file_location("copied", path)
        assert spec is not None and spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        aside(module.test_turn_rewards)


def test_what_cannot_be_copied_is_told(tab: Tab, site: Site, tmp_path: Path) -> None:
    run = aside(lambda: write_run(tmp_path / "run", steps=2))
    (settings,) = (run / "rollouts").glob("settings-*.json")
    with serving(run) as (url, _):
        page = first_question(tab, url, "run=run")
        test = page.locator(".rollout").first.get_by_role("button", name="test")
        for algorithm, why in (({"adv_estimator": "grpo"}, "adv_estimator=grpo"), (None, "holds no settings")):
            found = json.loads(settings.read_text())
            settings.write_text(json.dumps({**found, "algorithm": algorithm}) if algorithm else "{}")
            test.click()
            expect(page.locator("#live.seen")).to_contain_text("Not copied as a test case")
            expect(page.locator("#live.seen")).to_contain_text(why)
        page.goto("about:blank")


def test_a_method_without_clusters_shows_what_it_has(tab: Tab, tmp_path: Path) -> None:
    aside(lambda: write_game(tmp_path / "game"))
    with serving(tmp_path / "game") as (url, _):
        page = tab.open(url, ".chart")
        outcome = page.locator(".chart", has_text="Outcome")
        expect(outcome).to_contain_text("solved 0.250")
        titles = page.locator(".chart figcaption").all_inner_texts()
        assert "Reward by turn" in titles
        assert not any(word in title for title in titles for word in ("scorer", "Support", "luster", "answer")), titles
        page = first_question(tab, url, "run=game&step_from=2")
        assert page.locator(".cluster, .support").count() == 0
        header = page.locator(".rollout header").first.inner_text()
        assert "solved 0.25" in header and header.count("rollout 0") == 1 and "no answer" not in header
        assert "score +0.125" in page.locator(".turn .head").first.inner_text()
        page.keyboard.press("g")
        assert page.locator("#gold-text").inner_text() == "no label"
        page.goto("about:blank")


# ---------------------------------------------------------------------- the export
SEARCHES = [
    "",
    "&text=where+is+1",
    "&flags=right_negative&sort=outcome&descending=1",
    "&turns_from=4&advantage_to=-0.5",
    "&clusters_to=2&step_from=2&step_to=5&sort=reward_max",
    "&sort=question&descending=1",
]


@pytest.mark.parametrize("search", SEARCHES)
def test_an_export_finds_what_the_service_finds(tab: Tab, site: Site, search: str) -> None:
    page = tab.open(f"{site.url}#/questions?run=two{search}", "table")
    served = rows(page)
    tab.page.context.set_offline(True)
    page = tab.open(f"{site.exported.as_uri()}#/questions?run=two{search}", "table")
    assert rows(page) == served


def test_what_is_no_number_is_a_dash_and_named(tab: Tab, tmp_path: Path) -> None:
    run = aside(lambda: write_run(tmp_path / "odd", steps=1))
    rewrite(run / "rollouts" / "1.jsonl", score=float("nan"), evidence=float("-inf"), em=float("nan"))
    done = once(run, "--export", tmp_path / "out.html")
    assert done.returncode == 0, done.stderr
    with serving(run) as (url, _):
        for base in (url, (tmp_path / "out.html").as_uri()):
            page = tab.open(base, ".chart")
            assert "outcome – → –" in page.locator(".summary").inner_text()
            page = first_question(tab, base, "run=odd")
            assert "shown as –: evidence, score" in page.locator(".note").inner_text()
            assert "evidence –" in page.locator(".cluster").first.inner_text()
        page.goto("about:blank")


def test_an_export_opens_without_a_network(tab: Tab, site: Site) -> None:
    tab.page.context.set_offline(True)
    page = tab.open(site.exported.as_uri(), ".chart")
    assert "all of its 18 questions" in page.locator("#bar").inner_text()
    assert page.locator(".chart").count() >= 9
    page = first_question(tab, site.exported.as_uri())
    assert page.locator(".turn .other").count() > 0
    page.locator(".rollout").first.get_by_role("button", name="JSON").click()
    expect(page.locator("#live")).to_contain_text("JSON")
    assert all(url.startswith(("file:", "data:")) for url in tab.requests)


# ---------------------------------------------------------------------- for everybody
@pytest.mark.parametrize("width", [1280, 800])
@pytest.mark.parametrize("theme", ["light", "dark"])
@pytest.mark.parametrize("view", ["curves", "questions", "question"])
def test_every_view_can_be_used_by_everybody(tab: Tab, site: Site, view: str, theme: str, width: int) -> None:
    page = tab.page
    page.set_viewport_size({"width": width, "height": 800})
    page.emulate_media(color_scheme=theme)
    if view == "question":
        first_question(tab, site.url)
        page.keyboard.press("g")
    else:
        until, at = VIEWS[view]
        tab.open(site.url + at, until)
    found = Axe().run(page)
    bad = [v for v in found.response["violations"] if v["impact"] in ("serious", "critical")]
    assert not bad, json.dumps([(v["id"], [n["html"][:200] for n in v["nodes"][:3]]) for v in bad], indent=1)
    assert page.evaluate("document.documentElement.scrollWidth") <= width
