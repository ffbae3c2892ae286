"use strict";

/** Sort the results below a header; a second click turns the order round. */
function sortBy(header) {
  const table = header.closest("table");
  const column = header.cellIndex;
  const up = header.getAttribute("aria-sort") !== "ascending";
  for (const other of table.tHead.rows[0].cells) other.removeAttribute("aria-sort");
  header.setAttribute("aria-sort", up ? "ascending" : "descending");
  const body = table.tBodies[0];
  const rows = [...body.rows].sort((a, b) => compare(a.cells[column], b.cells[column], up));
  body.append(...rows);
}

/** Numbers by value, texts by alphabet; what has no value stays at the end. */
function compare(a, b, up) {
  const [x, y] = [a.dataset.value, b.dataset.value];
  if (x === "" || y === "") return (x === "") - (y === "");
  const [m, n] = [Number(x), Number(y)];
  const order = Number.isNaN(m) || Number.isNaN(n) ? x.localeCompare(y) : m - n;
  return up ? order : -order;
}

/** Show the rows, figures and cells that every filter lets through. */
function filterAll() {
  const words = document.querySelector("#search").value.toLowerCase().split(/\s+/);
  const chosen = [...document.querySelectorAll(".filters select")].filter((s) => s.value);
  for (const item of document.querySelectorAll("[data-labels]")) {
    const labels = JSON.parse(item.dataset.labels);
    const text = Object.values(labels).join(" ").toLowerCase();
    const found = words.every((word) => text.includes(word));
    const fits = chosen.every((s) => !(s.name in labels) || labels[s.name] === s.value);
    item.hidden = !(found && fits);
  }
}

function enlarge(button) {
  const dialog = document.querySelector("#enlarged");
  const image = button.querySelector("img");
  Object.assign(dialog.querySelector("img"), { src: image.src, alt: image.alt });
  dialog.showModal();
}

for (const header of document.querySelectorAll("table.numbers thead th"))
  header.querySelector("button").addEventListener("click", () => sortBy(header));
for (const control of document.querySelectorAll(".filters select, #search"))
  control.addEventListener("input", filterAll);
for (const button of document.querySelectorAll("figure button"))
  button.addEventListener("click", () => enlarge(button));
document.querySelector("#enlarged").addEventListener("click", (e) => e.currentTarget.close());
