"""The site of a made-up study, opened in a browser.

Nothing leaves the machine, nothing is broken, everything can be read, also on a phone.
"""
import base64
import io
import json
import re
import shutil
from functools import cache
from pathlib import Path
from urllib.parse import unquote, urlsplit

import nbformat
import numpy as np
import pandas as pd
import pytest
from levit_study.data.volumes import Volume
from levit_study.evidence.statistics import ALL
from levit_study.files import run_folders
from levit_study.params import load_params
from levit_study.report.charts import charts_html, size_charts
from levit_study.report.examples import toy_cases, toy_slice
from levit_study.report.look import About, Picture, save_figure, study_style
from levit_study.report.site import build_single_page, build_site
from levit_study.report.viewer import case_record, viewer_html
from matplotlib.figure import Figure
from nbformat.v4 import new_code_cell, new_markdown_cell, new_notebook, new_output

LOSSES, DATASETS = ("baseline", "focal", "focal_tversky"), ("phantom_ct", "acdc")
LONG = [f"a rather long column {k}" for k in range(14)]
WIDE = pd.DataFrame(np.arange(42).reshape(3, 14) / 7, columns=LONG)


def settings(root, **study):
    params = load_params(root / "tests/params.yaml")
    study = {"datasets": list(DATASETS), "losses": list(LOSSES), "seeds": [0], **study}
    return params.model_copy(update={"study": params.study.model_copy(update=study)})


def picture(title, size=(7, 2.6)):
    with study_style():
        figure = Figure(figsize=size, layout="constrained")
        for ax in figure.subplots(1, 2):
            ax.plot([1, 2, 3], [.2, .5, .6])
            ax.set(xlabel="epoch", ylabel="Dice (0 to 1)")
    caption = (f"{title}, synthetic data. Lines: means. Data: CT phantom (synthetic),"
               " n = 4 cases, 1 seed.")
    return Picture(figure, title, caption, f"{title}: the line rises from 0.2 to 0.6.")


def drawn(content):
    "What a notebook holds after a figure was shown"
    if isinstance(content, Picture):
        png, text = content._repr_png_(), repr(content)
    else:
        content.savefig(raw := io.BytesIO(), format="png", dpi=72)
        png, text = raw.getvalue(), "<Figure size 504x187 with 2 Axes>"
    data = {"image/png": base64.b64encode(png).decode(), "text/plain": text}
    return new_output("display_data", data)


def shown(table):
    data = {"text/html": table.to_html(), "text/plain": "a table"}
    return new_output("execute_result", data, execution_count=1)


def write(path, *cells):
    path.parent.mkdir(parents=True, exist_ok=True)
    kernel = {"name": "python3", "display_name": "python3", "language": "python"}
    nbformat.write(new_notebook(cells=list(cells), metadata={"kernelspec": kernel}), path)


def parameters(**values):
    text = "\n".join(f"{k} = {v!r}" for k, v in values.items())
    tags = ("parameters", "injected-parameters")
    return [new_code_cell(text, metadata={"tags": [tag]}) for tag in tags]


def write_run(folder, dataset, loss, seed):
    "The files of one run that the site reads"
    folder = run_folders(dataset, loss, seed, folder)[0]
    names = parameters(dataset=dataset, loss=loss, seed=seed)
    log = new_output("stream", name="stderr", text="epoch 1 of 2\n" * 40)
    course = "## The course of the training\n\nLoss and Dice of each epoch:"
    plots = [drawn(picture("x").figure), drawn(picture("y").figure)]
    write(folder / "train.ipynb", new_markdown_cell("# A training\n\nOne loss on one data set."),
          *names, new_code_cell("fit()", outputs=[log]), new_markdown_cell(course),
          new_code_cell("plot()", outputs=plots))
    write(folder / "evaluate.ipynb", new_markdown_cell("# An evaluation"), *names,
          new_code_cell("cases", outputs=[shown(WIDE)]))
    test_dice = .79 if dataset == "phantom_ct" else None
    numbers = {"best_epoch": 7, "best_dice": .81, "test_dice": test_dice}
    (folder / "metrics.json").write_text(json.dumps(numbers))


def write_tables(reports):
    common = {"patients": 4, "dice_low": .6, "dice_high": .8, "nsd_low": .5, "nsd_high": .7,
              "unit": "mm"}
    rows = [common | {"dataset": dataset, "structure": structure, "loss": loss, "split": split,
                      "dice": .7 + .02 * k, "nsd": .6 + .01 * k}
            for dataset in DATASETS for k, loss in enumerate(LOSSES)
            for split in ("valid", "test") for structure in ("a", "b", ALL)]
    pd.DataFrame(rows).to_csv(reports / "organs.csv", index=False)
    verdicts = ["inconclusive", "supported", "contradicted"]
    rows = [{"claim": f"C{k}", "dataset": dataset, "verdict": verdicts[k % 3], "standing": verdicts[k % 3],
             "statement": f"Claim {k} about focal_tversky & <others>",
             "interval": "focal - baseline: +0.0100 [-0.0200, +0.0400]"}
            for dataset in DATASETS for k in range(1, 10)]
    pd.DataFrame(rows).to_csv(reports / "claims.csv", index=False)


PROSE = """# Losses for imbalanced medical image segmentation

Synthetic data. See [the losses](../nbs/26_losses.paper.ipynb) and $p_t^\\gamma$:

$$\\frac{2TP}{2TP + FP + FN} \\quad \\text{Dice}$$"""


def made_up_cases():
    "Two cases for the viewer; the reference is the same in both, the second is segmented worse"
    for number, shift in (1, 2), (2, 5):
        slice_ = toy_slice(size=64, shift=shift, losses=LOSSES)
        image, label = (np.stack([slice_[key]] * 4) for key in ("image", "reference"))
        label[0] = 0
        maps = {loss: np.stack([labels] * 4) for loss, labels in slice_["predictions"].items()}
        volume = Volume(image, label, (5., 1., 1.), None, f"case000{number}")
        yield case_record(volume, maps, slice_["structures"])


def interactive():
    "What the report's notebook shows: charts after a picture, and a viewer"
    charts = size_charts(toy_cases(("phantom_ct",)), About(split="valid"))
    viewer = viewer_html(list(made_up_cases()), 3, toy_slice()["structures"], "phantom_ct")
    for html in charts_html(charts), viewer:
        data = {"text/html": html, "text/plain": "<IPython.core.display.HTML object>"}
        yield new_output("display_data", data)


def write_report(path, figures):
    "A report with what a site must cope with: formulas, wide tables, pictures, a widget"
    small = {"text/markdown": "| a | b |\n|--|--|\n| $x^2$ | 1 |", "text/plain": ""}
    widget = {"application/javascript": "fetch('https://example.org')", "text/plain": "7",
              "text/html": "<script src='https://example.org/x.js'></script>"}
    table = [shown(WIDE), new_output("display_data", small)]
    pictures = [drawn(each) for each in figures]
    charts, viewer = interactive()
    write(path, new_markdown_cell(PROSE), *parameters(split="test"),
          new_markdown_cell("## Table 1"), new_code_cell("table1", outputs=table),
          new_markdown_cell("## Figures"),
          new_code_cell("figures", metadata={"tags": ["hide-input"]}, outputs=[*pictures, charts]),
          new_code_cell("viewer", outputs=[viewer]),
          new_code_cell("widget", outputs=[new_output("display_data", widget)]))


def write_study(project, folder):
    "A study that never was, around the project's own library notebooks and pages"
    ignore = shutil.ignore_patterns(".ipynb_checkpoints", "study", "__pycache__")
    for name in ("nbs", "docs", "web"):
        shutil.copytree(project / name, folder / name, ignore=ignore)
    reports = folder / "reports"
    figures = [picture("Best Dice"), picture("Course of training", (7, 4))]
    for k, each in enumerate(figures):
        save_figure(each, reports / "figures", f"fig{k + 1}", "dvc repro report, revision 1a2b")
    write_report(reports / "report.ipynb", figures)
    for dataset in DATASETS:
        fingerprint = new_code_cell("fingerprint", outputs=[shown(WIDE)])
        write(reports / "data" / dataset / "prepare.ipynb",
              new_markdown_cell("# Preparing the data"), *parameters(dataset=dataset), fingerprint)
        for loss in LOSSES:
            write_run(folder, dataset, loss, 0)
    write_tables(reports)
    shutil.copytree(project / "reports/studies/acdc_128", reports / "studies/acdc_128")


@pytest.fixture(scope="module")
def study(root, tmp_path_factory):
    "The made-up study with its site built: (folder, lines that the build returned)"
    folder = tmp_path_factory.mktemp("study")
    write_study(root, folder)
    lines = build_site(settings(root), folder)
    build_single_page(settings(root), folder)
    return folder, lines


class Reader:
    "A browser window that keeps an account of what goes wrong"

    def __init__(self, browser, width=1440, height=900, scheme="light"):
        viewport = {"width": width, "height": height}
        self.context = browser.new_context(viewport=viewport, color_scheme=scheme,
                                           is_mobile=width < 500)
        self.context.route(re.compile(r"^(?!file:|data:|blob:)"), self.refuse)
        self.page, self.wrong = self.context.new_page(), []
        self.page.on("console", self.listen)
        self.page.on("pageerror", lambda e: self.wrong.append(f"script: {e}"))
        self.page.on("requestfailed", self.failed)

    def listen(self, message):
        if message.type in ("error", "warning"):
            self.wrong.append(f"console: {message.text}")

    def failed(self, request):
        "What a page was still loading when the next one was opened is no failure"
        if request.failure != "net::ERR_ABORTED":
            self.wrong.append(f"not loaded: {request.url}")

    def refuse(self, route):
        self.wrong.append(f"request to another machine: {route.request.url}")
        route.abort()

    def open(self, path):
        self.page.goto(path.as_uri(), wait_until="load")
        return self.page

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.context.close()


def site_of(folder):
    return folder / "reports" / "site"


def pages_of(folder):
    return [folder / "reports" / "index.html", *sorted(site_of(folder).rglob("*.html"))]


def test_builds_without_a_complaint(study):
    folder, lines = study
    assert lines == []
    names = {p.relative_to(site_of(folder)).as_posix() for p in pages_of(folder)[1:]}
    expected = {"index", "report", "data/phantom_ct", "runs/index",
                "runs/acdc-focal_tversky-seed0", "library/26_losses-paper", "studies/acdc_128",
                "studies/acdc_128/checklists", "cards/checklists", "cards/card-acdc-focal",
                "cards/datasheet-phantom_ct"}
    assert {f"{name}.html" for name in expected} <= names


def test_the_library_stands_in_the_order_of_its_rooms(study):
    text = (site_of(study[0]) / "index.html").read_text(encoding="utf-8")
    parts = re.findall(r'caption-text">Library: (\w+)<', text)
    packages = ["data", "model", "losses", "training", "evaluation", "evidence", "report"]
    assert parts == ["basics", *packages, "commands"]
    places = [text.index(f"library/{name}.html") for name in
              ("00_files", "26_losses-paper", "60_report-look", "64_report-site")]
    assert places == sorted(places)


LOADS = re.compile(
    r"""<(?:script|img|iframe|source|video)\b[^>]*\bsrc=["'](?:https?:)?//"""
    r"""|<link\b[^>]*rel=["'](?:stylesheet|preload|icon|preconnect)["'][^>]*"""
    r"""href=["'](?:https?:)?//|@import\s+url\(["']?https?:|url\(["']?https?:""")


def test_no_address_of_another_machine_is_loaded(study):
    "Without a browser: what pages and styles would load lies beside them"
    styles = sorted(site_of(study[0]).rglob("*.css"))
    assert styles
    for path in [*pages_of(study[0]), *styles]:
        assert not LOADS.search(path.read_text(encoding="utf-8")), path


LOOK = r"""() => ({
    pictures: [...document.images].map(i => ({
        alt: i.alt, loaded: i.complete && i.naturalWidth > 0,
        hidden: i.getAttribute('aria-hidden') === 'true'})),
    over: document.documentElement.scrollWidth - document.documentElement.clientWidth,
    ids: [...document.querySelectorAll('[id], a[name]')].map(e => e.id || e.name),
    links: [...document.querySelectorAll('a[href], link[href]')].map(e => e.href),
    raw: [...document.querySelectorAll('article p, article li, article td, main p, main li')]
        .map(e => [...e.childNodes].filter(n => n.nodeType === 3).map(n => n.data).join(' '))
        .filter(t => /\$[^$]*[\\_^][^$]*\$/.test(t))})"""


@pytest.fixture(scope="module")
def looked(study, browser):
    "What a browser sees of every page in a wide and in a small, dark window; looked at once"
    @cache
    def at(width, height, scheme):
        with Reader(browser, width, height, scheme) as reader:
            return {path: reader.open(path).evaluate(LOOK) | {"wrong": list(reader.wrong)}
                    for path in pages_of(study[0])}
    return at


WINDOW, PHONE = (1440, 900, "light"), (390, 844, "dark")

@pytest.mark.parametrize("window", [WINDOW, PHONE])
def test_every_page_in_a_browser(study, looked, window):
    """No error, no request to elsewhere, pictures loaded and described, nothing wider than the
    window, no formula left as LaTeX"""
    pictures = 0
    for path, page in looked(*window).items():
        name = path.relative_to(study[0] / "reports")
        pictures += len(page["pictures"])
        for each in page["pictures"]:
            assert each["loaded"], name
            assert each["hidden"] or len(each["alt"]) > 15, f"{name}: a figure without words"
        assert page["over"] <= 0, f"{name}: {page['over']} pixels wider than {window[0]}"
        assert not page["raw"], f"{name}: LaTeX left: {page['raw']}"
        assert page["wrong"] == [], f"{name}: {page['wrong']}"
    assert pictures > 20


def test_all_internal_links_lead_somewhere(looked):
    pages = looked(*WINDOW)
    ids = {path: set(page["ids"]) for path, page in pages.items()}
    links = [(path, link) for path, page in pages.items() for link in page["links"]]
    assert len(links) > 500
    for path, link in links:
        parts = urlsplit(link)
        if parts.scheme != "file": continue
        target = Path(unquote(parts.path))
        if target.is_dir():
            target /= "index.html"
        assert target.exists(), f"{path.name} links to {link}"
        if parts.fragment and target in ids:
            assert unquote(parts.fragment) in ids[target], f"{path.name} links to {link}"


def test_a_link_to_a_notebook_leads_to_its_page(study):
    text = (site_of(study[0]) / "report.html").read_text(encoding="utf-8")
    assert re.search(r'href="library/26_losses-paper\.html"[^>]*>(<[^>]*>)*the losses<', text)


def test_formulas_are_drawn_by_the_browser(study, browser):
    single, site = study[0] / "reports" / "index.html", site_of(study[0])
    script = """() => [...document.querySelectorAll('math')].map(m => m.getBoundingClientRect())
                .map(b => [b.width, b.height])"""
    with Reader(browser) as reader:
        for path in [single, site / "report.html", site / "library/26_losses-paper.html"]:
            sizes = reader.open(path).evaluate(script)
            assert sizes, path.name
            assert all(width > 2 and height > 4 for width, height in sizes), path.name
    assert "<mfrac>" in single.read_text(encoding="utf-8")


def test_landing_page_answers_on_one_screen(study, browser):
    tests = "9 tests of the paper's claims"
    words = ("synthetic", "0.740", "6 trainings", f"{tests}: 3 supported, 3 contradicted, 3 undecided",
             f"{tests}, rehearsed on synthetic scans: 3 supported", "One training per loss")
    with Reader(browser) as reader:
        page = reader.open(site_of(study[0]) / "index.html")
        text = page.inner_text("article")
        assert [each for each in words if each not in text] == []
        for name in ("What was asked", "What came out", "How sure"):
            assert page.get_by_role("heading", name=name).bounding_box()["y"] < 500
        for table in (".results", ".claims"):
            assert page.locator(table).bounding_box()["y"] < 500


def test_published_studies_and_open_items_are_shown(study):
    "Real scans on the first page; an item that no record decides is open"
    landing = (site_of(study[0]) / "index.html").read_text(encoding="utf-8")
    assert "On real scans" in landing and "3 trainings per loss" in landing
    assert 'href="studies/acdc_128.html"' in landing
    checklist = (site_of(study[0]) / "studies/acdc_128/checklists.html").read_text("utf-8")
    external = re.search(r"testing on external data.*?</tr>", checklist, re.S)[0]
    assert "○ open" in external and "44 items:" in checklist


def test_search_works_without_a_server(study, browser):
    with Reader(browser) as reader:
        page = reader.open(site_of(study[0]) / "index.html")
        page.goto((site_of(study[0]) / "search.html").as_uri() + "?q=tversky")
        page.wait_for_selector("ul.search li a", timeout=10_000)
        assert reader.wrong == []


def test_single_page_stands_alone(study, browser, tmp_path):
    alone = tmp_path / "mailed.html"
    shutil.copy(study[0] / "reports" / "index.html", alone)
    inside = "[...document.images].every(i => i.src.startsWith('data:') && i.naturalWidth > 0)"
    loaded = "document.querySelectorAll('script[src], link').length"
    with Reader(browser) as reader:
        page = reader.open(alone)
        assert page.evaluate(f"() => {inside}")
        assert page.evaluate(f"() => {loaded}") == 0
        assert page.locator("img").count() == 3 and page.locator(".cell_input").count() == 0
        assert reader.wrong == []
    assert 'href="site/index.html"' in alone.read_text(encoding="utf-8")


STAGE, STATUS = ".study-viewer .stage", ".study-viewer .status"


def says(page, words, place=STATUS):
    "Wait until the live text says so"
    page.wait_for_function("([place, words]) => document.querySelector(place).innerText.includes(words)",
                           arg=[place, words], timeout=60_000)


@pytest.mark.parametrize(("width", "scheme", "file"), [(1440, "light", "site/report.html"), (390, "dark", "index.html")])
def test_the_viewer_by_keyboard(study, browser, width, scheme, file):
    with Reader(browser, width, 844 if width < 500 else 900, scheme) as reader:
        page = reader.open(study[0] / "reports" / file)
        says(page, "case0002, slice ")   # the worst first
        page.locator(STAGE).focus()
        for key, words in (("Home", "slice 1 of 4, baseline"), ("ArrowRight", "slice 2 of 4"), ("2", "focal: Dice of this slice"),
                           ("r", "reference"), ("End", "slice 4 of 4"), ("PageDown", "case0001, slice "), ("i", "image alone")):
            page.keyboard.press(key)
            says(page, words)
        page.keyboard.press("3")
        page.keyboard.press("e")
        says(page, "focal Tversky")
        assert page.locator(".study-viewer .errors input:checked").count() == 3
        missed = int(page.locator(".study-viewer .errors small").first.inner_text())
        assert missed > 0
        before = page.locator(f"{STAGE} canvas").evaluate("c => c.toDataURL()")
        page.keyboard.press("c")
        page.wait_for_timeout(300)
        assert page.locator(f"{STAGE} canvas").evaluate("c => c.toDataURL()") != before   # more contrast
        unnamed = """[...document.querySelectorAll('.study-viewer :is(input, select, button)')]
            .filter(e => !(e.labels && e.labels.length) && !e.innerText).length"""
        assert page.evaluate(unnamed) == 0
        assert page.evaluate("document.documentElement.scrollWidth - document.documentElement.clientWidth") <= 0
        assert reader.wrong == []


def test_the_viewer_by_mouse(study, browser):
    with Reader(browser) as reader:
        page = reader.open(study[0] / "reports" / "index.html")
        says(page, "case0002")
        page.locator(STAGE).scroll_into_view_if_needed()
        page.locator(STAGE).hover()
        page.locator(STAGE).focus()
        page.keyboard.press("Home")
        page.mouse.wheel(0, 100)
        says(page, "slice 2 of 4")
        contrast = page.get_by_label("Contrast")
        box = page.locator(STAGE).bounding_box()
        page.mouse.move(box["x"] + 50, box["y"] + 50)
        page.mouse.down()
        page.mouse.move(box["x"] + 120, box["y"] + 50)
        page.mouse.up()
        assert float(contrast.input_value()) > 10
        page.get_by_role("button", name="Reset").click()
        assert float(contrast.input_value()) == 0
        flicker = page.get_by_role("button", name="Flicker")
        flicker.click()
        page.wait_for_function("document.querySelector('.study-viewer .corner').innerText.includes('reference')")
        flicker.click()
        assert flicker.get_attribute("aria-pressed") == "false" and reader.wrong == []


def test_a_chart_leads_to_its_case(study, browser):
    "Drawn where the reader is, by mouse and by keyboard; the picture comes back for print"
    with Reader(browser) as reader:
        page = reader.open(study[0] / "reports" / "site" / "report.html")
        page.locator(".study-chart").scroll_into_view_if_needed()
        page.wait_for_selector(".study-chart .hint", timeout=120_000)
        assert not page.locator(".has-chart img").is_visible()
        page.locator(".study-chart .chart").focus()
        page.keyboard.press("End")
        spoken = page.locator(".study-chart .spoken").inner_text()
        assert re.match(r"case\d+, [\w ]+, [\w -]+: Dice \d", spoken), spoken
        page.keyboard.press("Enter")
        says(page, spoken.split(",")[0])
        page.get_by_role("button", name="Show the picture").click()
        assert page.locator(".has-chart img").is_visible()
        page.emulate_media(media="print")
        assert not page.locator(".study-chart").is_visible() and not page.locator(".study-viewer").is_visible()
        assert reader.wrong == []


def test_tables_sort_and_filter(study, browser):
    with Reader(browser) as reader:
        page = reader.open(study[0] / "reports" / "index.html")
        head = page.locator(".study-table th", has=page.locator("button")).nth(1)
        column = "t => [...t.closest('table').tBodies[0].rows].map(r => r.cells[t.cellIndex].textContent)"
        before = head.evaluate(column)
        head.locator("button").focus()
        for order in ("ascending", "descending"):
            page.keyboard.press("Enter")
            assert head.get_attribute("aria-sort") == order
        assert head.evaluate(column) == sorted(before, key=float, reverse=True)
        page.keyboard.press("Enter")
        assert head.get_attribute("aria-sort") is None and head.evaluate(column) == before and reader.wrong == []


def test_without_scripts_the_pictures_stand(study, browser):
    context = browser.new_context(java_script_enabled=False)
    page = context.new_page()
    page.goto((study[0] / "reports" / "index.html").as_uri())
    assert page.locator("main img").first.is_visible()
    assert "needs scripts" in page.inner_text(".study-viewer")
    context.close()


def test_single_page_prints_whole(study, browser):
    a4 = {"width": 703, "height": 1000}  # the width of an A4 page between its margins
    page = browser.new_page(viewport=a4)
    page.goto((study[0] / "reports" / "index.html").as_uri())
    page.emulate_media(media="print")
    wide = """[...document.querySelectorAll("main *")]
        .filter(e => e.getBoundingClientRect().right > innerWidth + 1
                     || (getComputedStyle(e).overflowX != "visible"
                         && e.scrollWidth > e.clientWidth + 1))
        .map(e => e.tagName + " " + e.textContent.slice(0, 60))"""
    assert page.evaluate(wide) == []
    assert page.pdf()[:4] == b"%PDF"
    page.close()


def test_figures_are_sharp_and_carry_their_words(study):
    text = (site_of(study[0]) / "report.html").read_text(encoding="utf-8")
    assert 'alt="Best Dice: the line rises from 0.2 to 0.6."' in text and "<figcaption>" in text
    made = re.search(r'<a [^>]*href="([^"]*)"[^>]*>(?:<span[^>]*>)?Made by dvc repro report, revision 1a2b', text)
    assert made and made[1].endswith("runs/index.html")
    assert re.search(r'drawn in <a [^>]*href="library/61_report-figures.html"', text)
    assert "fetch('https" not in text


def test_what_is_missing_is_noted_and_the_rest_is_shown(root, tmp_path):
    "No report, a damaged notebook, a run not there yet: notes, not a crash"
    write_run(tmp_path, "phantom_ct", "baseline", 0)
    broken = run_folders("phantom_ct", "focal", 0, tmp_path)[0]
    broken.mkdir(parents=True)
    (broken / "train.ipynb").write_text("{")
    params = settings(root, datasets=["phantom_ct"])
    lines = build_site(params, tmp_path)
    build_single_page(params, tmp_path)
    landing = (site_of(tmp_path) / "index.html").read_text(encoding="utf-8")
    for words in ("reports/report.ipynb: not there yet", "reports/organs.csv: not there yet",
                  "focal/seed0/train.ipynb: not readable",
                  "focal_tversky/seed0/train.ipynb: not there yet"):
        assert any(words in line for line in lines) and words in landing, words
    runs = (site_of(tmp_path) / "runs" / "index.html").read_text(encoding="utf-8")
    assert 'href="phantom_ct-baseline-seed0.html"' in runs
    assert "focal Tversky (not there yet)" in runs
    single = (tmp_path / "reports" / "index.html").read_text(encoding="utf-8")
    assert "The report is not there yet" in single


def test_a_failed_build_leaves_the_former_site(root, tmp_path, monkeypatch):
    from levit_study.report import site
    site_of(tmp_path).mkdir(parents=True)
    former = site_of(tmp_path) / "index.html"
    former.write_text("former")
    broken = {"config": {"extensions": ["no_such_extension"]}}
    monkeypatch.setitem(site.CONFIG, "sphinx", broken)
    with pytest.raises(site.StudyError, match="the site could not be built") as error:
        build_site(settings(root), tmp_path)
    assert "\n" not in str(error.value) and "no_such_extension" in str(error.value)
    assert former.read_text() == "former"
