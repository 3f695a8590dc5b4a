// Tables of results: a click on a column's name sorts, a field above filters. Small tables stay as they are.
(() => {
"use strict";
const text = cell => cell ? cell.textContent.trim() : "";
const number = words => { // the first number of a cell; "−" as papers print it
  const found = words.replace(/−/g, "-").match(/^[<>]?\s*([+-]?\d+(?:,\d{3})*(?:\.\d+)?(?:e[+-]?\d+)?)/i);
  return found ? parseFloat(found[1].replace(/,/g, "")) : NaN;
};

function sortable(table) {
  const body = table.tBodies[0], heads = [...table.tHead.rows[table.tHead.rows.length - 1].cells];
  const first = [...body.rows]; // a third click brings the order of the report back
  heads.forEach((head, column) => {
    if (!text(head)) return;
    const button = Object.assign(document.createElement("button"), {type: "button"});
    button.append(...head.childNodes);
    head.append(button);
    button.addEventListener("click", () => {
      const next = {ascending: "descending", descending: null}, now = head.getAttribute("aria-sort");
      const order = now ? next[now] : "ascending";
      heads.forEach(each => each.removeAttribute("aria-sort"));
      if (order) head.setAttribute("aria-sort", order);
      body.append(...(order ? sorted(first, column, order) : first));
    });
  });
  table.classList.add("study-table");
}

function sorted(rows, column, order) {
  const words = new Map(rows.map(row => [row, text(row.cells[column])]));
  const filled = rows.filter(row => !["", "–", "nan", "NaN"].includes(words.get(row)));
  const numeric = filled.every(row => !Number.isNaN(number(words.get(row))));
  const compare = numeric ? (a, b) => number(a) - number(b) : (a, b) => a.localeCompare(b, undefined, {numeric: true});
  const up = [...filled].sort((a, b) => compare(words.get(a), words.get(b)) * (order === "ascending" ? 1 : -1));
  return [...up, ...rows.filter(row => !filled.includes(row))]; // what is undefined stays last
}

function filterable(table, number) {
  const id = `study-filter-${number}`, rows = [...table.tBodies[0].rows];
  const place = Object.assign(document.createElement("div"), {className: "study-filter"});
  const label = Object.assign(document.createElement("label"), {htmlFor: id, textContent: "Rows with"});
  const field = Object.assign(document.createElement("input"), {type: "search", id});
  const count = document.createElement("span");
  count.setAttribute("role", "status");
  field.addEventListener("input", () => {
    const wanted = field.value.toLowerCase().split(/\s+/).filter(Boolean);
    rows.forEach(row => { row.hidden = !wanted.every(word => row.textContent.toLowerCase().includes(word)); });
    count.textContent = wanted.length ? `${rows.filter(row => !row.hidden).length} of ${rows.length} rows` : "";
  });
  place.append(label, field, count);
  const box = table.closest(".pst-scrollable-table-container") || table;
  box.before(place);
}

const start = () => document.querySelectorAll(".cell_output table, .bd-article .pst-scrollable-table-container table").forEach((table, number) => {
  if (!table.tHead || table.tBodies.length !== 1 || table.closest(".study-viewer, .answer") || table.classList.contains("study-table")) return;
  const count = table.tBodies[0].rows.length, plain = ![...table.querySelectorAll("td, th")].some(cell => cell.rowSpan > 1 || cell.colSpan > 1);
  if (count > 2 && plain) sortable(table);
  if (count > 9) filterable(table, number);
});
if (document.readyState === "loading") document.addEventListener("DOMContentLoaded", start); else start();
})();
