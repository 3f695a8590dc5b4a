// Charts in place of pictures, drawn by Vega from <div class="study-chart">, which report.charts writes. A point names its case; a click, or Enter,
// opens the case in the viewer. The picture stays for print, where scripts are off, and where Vega fails.
(() => {
"use strict";
const own = document.currentScript && document.currentScript.src;
const color = name => getComputedStyle(document.body).getPropertyValue(`--pst-color-${name}`).trim();
const paragraph = (className, words) => Object.assign(document.createElement("p"), {className, textContent: words});

let library;
function vega() { // in the page already, or beside this script
  if (!library) library = window.vegaEmbed ? Promise.resolve() : new Promise((resolve, reject) => {
    const script = Object.assign(document.createElement("script"), {src: new URL("vega.js", own), onload: resolve, onerror: reject});
    document.head.append(script);
  });
  return library;
}

function look() { // the page's colours, light or dark
  const [base, muted, border] = ["text-base", "text-muted", "border"].map(color);
  const words = {labelColor: base, titleColor: base, labelFontSize: 11, titleFontSize: 12, titleFontWeight: "normal"};
  return {background: "transparent", font: "system-ui, -apple-system, 'Segoe UI', 'DejaVu Sans', sans-serif", view: {stroke: border},
    axis: {...words, gridColor: border, gridOpacity: .5, domainColor: muted, tickColor: muted, labelLimit: 130},
    legend: {...words, orient: "top", direction: "horizontal", title: null, symbolSize: 70, labelLimit: 220, columns: document.body.clientWidth < 600 ? 2 : 6},
    rule: {color: base}};
}

// A colour that is read on white, for a dark page.
function lighter(value) {
  if (typeof value !== "string" || !/^#[0-9a-f]{6}$/i.test(value)) return value;
  return "#" + [1, 3, 5].map(k => Math.round(parseInt(value.slice(k, k + 2), 16) * .65 + 255 * .35).toString(16).padStart(2, "0")).join("");
}

class Chart {
  constructor(place, chart) {
    this.chart = chart;
    this.frame = Object.assign(document.createElement("div"), {className: "chart", tabIndex: 0});
    this.frame.setAttribute("role", "group");
    this.frame.setAttribute("aria-label", `${chart.title}. Arrow keys go from point to point, Enter opens the case.`);
    this.spoken = paragraph("spoken", "");
    this.spoken.setAttribute("role", "status");
    place.append(Object.assign(document.createElement("h4"), {textContent: chart.title}), paragraph("note", chart.note || ""), this.frame, this.spoken);
    this.frame.addEventListener("keydown", event => this.key(event));
  }

  async draw() {
    if (this.view) this.view.finalize();
    const dark = matchMedia("(prefers-color-scheme: dark)").matches && document.documentElement.dataset.theme !== "light" || document.documentElement.dataset.theme === "dark";
    const options = {mode: "vega-lite", actions: false, renderer: "svg", config: look(), tooltip: {theme: dark ? "dark" : "light"}};
    const page = color("background"), seen = value => value === "page" ? page : dark ? lighter(value) : value;
    const narrow = this.frame.clientWidth < 480, lines = value => narrow && String(value).length > 34 ? value.split(/ (?=\()/) : value;
    const spec = JSON.parse(JSON.stringify(this.chart.spec), (key, value) => key === "title" ? lines(value) : seen(value)); // hollow marks have the page's colour
    this.view = await window.vegaEmbed(this.frame, spec, options);
    this.view.view.addEventListener("click", (event, item) => { if (item && item.datum) this.open(item.datum); });
    this.at = null;
  }

  points() { // of what the legend has left, from left to right
    const points = [...this.frame.querySelectorAll("path[aria-roledescription='point'], .mark-symbol path")].filter(path => path.__data__?.datum?.case);
    return points.map(path => ({path, box: path.getBoundingClientRect(), datum: path.__data__.datum}))
      .filter(each => each.path.style.display !== "none").sort((a, b) => a.box.x - b.box.x || a.box.y - b.box.y);
  }

  key(event) {
    const by = {ArrowRight: 1, ArrowLeft: -1, ArrowDown: 1, ArrowUp: -1}[event.key], points = this.points();
    if (event.key === "Enter" && this.at) { event.preventDefault(); this.open(this.at); }
    if (!by && event.key !== "Home" && event.key !== "End" || !points.length) return;
    event.preventDefault();
    const now = points.findIndex(each => each.datum === this.at), last = points.length - 1;
    const next = event.key === "Home" ? 0 : event.key === "End" ? last : Math.min(last, Math.max(0, now + by));
    this.frame.querySelectorAll("path.at").forEach(path => path.classList.remove("at"));
    points[next].path.classList.add("at");
    this.at = points[next].datum;
    this.spoken.textContent = this.at.words;
  }

  open(datum) {
    if (!datum.case) return;
    this.spoken.textContent = datum.words;
    const detail = {dataset: this.chart.dataset, name: datum.case, loss: datum.key, structure: datum.structure};
    document.dispatchEvent(new CustomEvent("study:case", {detail}));
  }
}

function pictureOf(place) { // the last one before the chart
  const before = [...document.images].filter(image => image.compareDocumentPosition(place) & Node.DOCUMENT_POSITION_FOLLOWING);
  const image = before[before.length - 1];
  return image && (image.closest("figure") || image.parentElement);
}

async function fill(place) {
  const charts = JSON.parse(place.querySelector(".data").textContent), picture = pictureOf(place);
  try {
    await vega();
    const drawn = charts.map(chart => new Chart(place, chart));
    for (const chart of drawn) await chart.draw();
    const viewer = document.querySelector(".study-viewer"), opens = viewer ? " A click on a point opens its case in the viewer below." : "";
    const hint = paragraph("hint", `Hover names the case; a click on the legend shows one loss, a double click all.${opens} `);
    place.append(hint);
    if (picture) {
      const caption = picture.querySelector("figcaption");
      if (caption) caption.before(place); // a chart, too, stands above its caption
      const button = Object.assign(document.createElement("button"), {type: "button", textContent: "Show the picture"});
      button.setAttribute("aria-pressed", "false");
      button.addEventListener("click", () => button.setAttribute("aria-pressed", picture.classList.toggle("picture")));
      hint.append(button);
      picture.classList.add("has-chart");
    }
    return drawn;
  } catch (error) { // the picture is still there
    place.replaceChildren(paragraph("hint", `The chart could not be drawn: ${error.message || "no Vega"}.`));
    return [];
  }
}

function start() {
  const drawn = [];
  const near = new IntersectionObserver(seen => seen.filter(each => each.isIntersecting).forEach(async ({target}) => {
    near.unobserve(target);
    drawn.push(...await fill(target));
  }), {rootMargin: "800px"}); // drawn when the reader comes near
  document.querySelectorAll(".study-chart").forEach(place => near.observe(place));
  const again = async () => { for (const chart of drawn) await chart.draw(); };
  matchMedia("(prefers-color-scheme: dark)").addEventListener("change", again);
  new MutationObserver(again).observe(document.documentElement, {attributes: true, attributeFilter: ["data-theme"]});
}
if (document.readyState === "loading") document.addEventListener("DOMContentLoaded", start); else start();
})();
