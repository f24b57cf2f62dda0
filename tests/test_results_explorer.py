"""The results explorer of the documentation site, in a headless Chromium without a network."""

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from PIL import Image

from levin.core import paths

sync_api = pytest.importorskip("playwright.sync_api", reason="needs the extra docs")

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="needs Chromium: apt-get install chromium")

NAMES = sorted(file.parent.name for file in paths.EXPERIMENTS.glob("*/reference.yaml"))
SUMMARIES = {
    name: json.loads(file.read_text())
    for name in NAMES
    if (file := paths.EXPERIMENTS / name / "summary.json").is_file()
}
TRACES = "meta => document.querySelector('.chart').data.filter(trace => trace.meta === meta).length"
SHOWN = "rows => rows.filter(row => row.offsetParent).map(row => row.dataset.name)"


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    """Build the pages of results, and return the address of their folder."""
    out = tmp_path_factory.mktemp("site")
    only = [
        "extensions=myst_nb,repository_links,results_explorer",
        "include_patterns=results/**",
        "root_doc=results/index",
    ]
    settings = [word for setting in only for word in ("-D", setting)]
    command = [sys.executable, "-m", "sphinx", "--fail-on-warning", "--quiet", *settings, paths.ROOT / "docs", out]
    done = subprocess.run([*map(str, command)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return (out / "results").as_uri()


@pytest.fixture(scope="module")
def browser():
    with sync_api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield browser
        browser.close()


@pytest.fixture
def page(browser):
    """Return a page, and check in the end that it logged no error and asked for nothing but files of the site."""
    page, faults = browser.new_page(), []
    page.on("console", lambda message: faults.append(message.text) if message.type in ("error", "warning") else None)
    page.on("pageerror", lambda error: faults.append(str(error)))
    page.on("requestfailed", lambda request: faults.append(request.url))
    page.on("request", lambda request: None if is_local(request.url) else faults.append(request.url))
    yield page
    page.close()
    assert not faults


def is_local(address):
    return address.split(":")[0] in ("file", "data", "blob")


def shown(page):
    return page.eval_on_selector_all("#results-explorer tbody tr", SHOWN)


def test_all_results_are_listed_and_a_filter_hides_the_others(site, page):
    page.goto(f"{site}/index.html")
    assert sorted(shown(page)) == NAMES
    page.select_option("select[name=verdict]", "inconclusive")
    wanted = [name for name in NAMES if SUMMARIES.get(name, {}).get("verdict") == "inconclusive"]
    assert sorted(shown(page)) == wanted
    assert page.inner_text(".count") == f"{len(wanted)} of {len(NAMES)} results"
    assert "verdict=inconclusive" in page.url
    page.click("text=Show all")
    assert sorted(shown(page)) == NAMES


def test_the_address_sets_the_filters(site, page):
    page.goto(f"{site}/index.html#algo=sac&env=pendulum-v1")
    assert shown(page) == ["sac_pendulum"]
    assert page.inner_text(".chart-title") == "SAC Pendulum-v1"


def test_filters_that_exclude_each_other_show_a_message(site, page):
    page.goto(f"{site}/index.html#algo=sac&env=cartpole-v1")
    assert shown(page) == []
    assert page.inner_text(".count") == "No result has all three."


def test_every_result_can_be_selected_and_has_a_curve_per_seed(site, page):
    for name in NAMES:
        page.goto(f"{site}/index.html#{name}")
        assert page.inner_text("#results-explorer .details a >> nth=-1").endswith(f"experiments/{name}")
        if name not in SUMMARIES:
            assert page.inner_text(".chart") == "Not run yet: there are no curves."
            continue
        assert "Not run yet" not in page.inner_text(".chart")
        assert page.evaluate(TRACES, "seed") == len(SUMMARIES[name]["seeds"]), name
        assert page.locator(".chart .scatterlayer .trace").count() >= len(SUMMARIES[name]["seeds"]), name
        assert SUMMARIES[name]["because"] in page.inner_text(".details"), name


def test_the_required_score_and_the_published_band_are_drawn(site, page):
    page.goto(f"{site}/index.html#sac_halfcheetah_300k")  # published: 8651.3 ± 271.7, required: 8380
    gate, band, line = page.evaluate("document.querySelector('.chart').layout.shapes.map(each => [each.y0, each.y1])")
    assert gate == [8380, 8380]
    assert band == pytest.approx([8379.6, 8923])
    assert line == [8651.3, 8651.3]


def test_ticked_results_are_compared(site, page):
    page.goto(f"{site}/index.html#sac_pendulum")
    page.check("tr[data-name=td3_pendulum] input")
    assert page.url.endswith("#sac_pendulum,td3_pendulum")
    assert page.evaluate(TRACES, "mean") == 2
    seeds = sum(len(SUMMARIES[name]["seeds"]) for name in ("sac_pendulum", "td3_pendulum"))
    assert page.evaluate(TRACES, "seed") == seeds
    page.click("tr[data-name=ddpg_pendulum] td.number >> nth=0")
    assert page.url.endswith("#ddpg_pendulum")
    assert page.evaluate(TRACES, "mean") == 1


def test_links_within_the_page_keep_the_selection(site, page):
    page.goto(f"{site}/index.html#sac_pendulum,td3_pendulum")
    page.evaluate("location.hash = ''")
    page.evaluate("location.hash = 'furo-main-content'")
    page.wait_for_timeout(50)  # until the event of the change
    assert page.evaluate(TRACES, "mean") == 2
    page.evaluate("location.hash = 'ddpg_pendulum'")
    page.wait_for_function("document.querySelector('.chart').data.filter(each => each.meta === 'mean').length === 1")


def test_curves_of_training_episodes_can_be_chosen(site, page):
    page.goto(f"{site}/index.html#sac_pendulum")
    axis = "document.querySelector('.chart').layout.yaxis.title.text"
    assert page.evaluate(axis) == "evaluation return"
    assert page.evaluate(TRACES, "published") > 0
    page.click(".curve-kinds >> text=training")
    assert page.evaluate(axis) == "training return"
    # The published numbers and the required score are those of evaluations.
    assert page.evaluate(TRACES, "published") == 0
    assert page.evaluate("document.querySelector('.chart').layout.shapes") == []


def test_the_chart_follows_light_and_dark(site, page):
    ink = "document.querySelector('.chart').layout.font.color"
    page.emulate_media(color_scheme="light")
    page.goto(f"{site}/index.html")
    light = page.evaluate(ink)
    page.emulate_media(color_scheme="dark")
    page.wait_for_function(f"{ink} !== {light!r}")
    page.click(".content-icon-container .theme-toggle")  # from automatic to light
    page.wait_for_function(f"{ink} === {light!r}")


@pytest.mark.parametrize("address", ["index.html#trpo_hopper", "sac_halfcheetah.html"])
def test_pages_fit_a_phone(site, page, address):
    page.set_viewport_size({"width": 390, "height": 844})
    page.goto(f"{site}/{address}")
    assert page.evaluate("document.documentElement.scrollWidth") == 390


def test_each_result_has_a_page_with_pictures(site):
    folder = Path(site.removeprefix("file://"))
    for name in NAMES:
        text = (folder / f"{name}.html").read_text()
        verdict = SUMMARIES.get(name, {}).get("verdict", "not run")
        assert re.findall(r'<span class="verdict [^"]*">([^<]*)<', text) == [verdict], name
        article = text.partition("<article")[2].partition("</article>")[0]
        pictures = re.findall(r'<img[^>]* src="([^"]*)"', article)
        has_animation = (paths.EXPERIMENTS / name / "policy.webp").is_file()
        assert pictures.count(f"../_static/results/{name}.webp") == has_animation, name
        assert len(pictures) == article.count("<img") == has_animation + (name in SUMMARIES), name
        for picture in pictures:
            with Image.open(folder / picture) as image:
                image.load()


@pytest.mark.parametrize("name", ["sac_pendulum", "sac_halfcheetah"])
def test_a_browser_shows_the_verdict_and_the_pictures_of_a_result(name, site, page):
    page.goto(f"{site}/{name}.html")
    assert page.inner_text(".verdict") == SUMMARIES[name]["verdict"]
    widths = page.evaluate("[...document.querySelectorAll('article img')].map(image => image.naturalWidth)")
    assert len(widths) == (paths.EXPERIMENTS / name / "policy.webp").is_file() + 1
    assert all(widths)


def test_the_data_of_the_charts_stay_small(site):
    script = Path(site.removeprefix("file://")).parent / "_static" / "results_data.js"
    assert script.stat().st_size < 2_000_000
