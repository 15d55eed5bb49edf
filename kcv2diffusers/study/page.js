"use strict";
const data = JSON.parse(document.getElementById("data").textContent);
const $ = (id) => document.getElementById(id);
const hidden = data.settings.map(() => new Set()); // values filtered out, by setting
let visible = [], at = -1;

function make(name, attributes = {}, ...children) {
  const svg = ["svg", "line", "circle", "text", "title"].includes(name);
  const element = svg ? document.createElementNS("http://www.w3.org/2000/svg", name) : document.createElement(name);
  for (const [key, value] of Object.entries(attributes)) element.setAttribute(key, value);
  element.append(...children); // strings become text
  return element;
}

const number = (value, digits = 3) => (value === null ? "–" : value.toFixed(digits));
const words = (cell) => data.settings.map((s, n) => [s.name, s.values[cell.settings[n]]]);
const measured = (cell) => data.measures.map((m, n) => [m.name, number(cell.measures[n])]);
const list = (pairs) => pairs.flatMap(([name, value]) => [make("dt", {}, name), make("dd", {}, value)]);
const alternative = `${data.prompts.join("; ")}: ${data.seeds.length} pictures each`;

function sorted(cells) {
  const by = Number($("order").value);
  if (by < 0) return cells; // the best first, as they came
  const sign = data.measures[by].more ? -1 : 1;
  const value = (cell) => cell.measures[by] ?? -sign * Infinity;
  return [...cells].sort((a, b) => sign * (value(a) - value(b)) || 0);
}

function card(cell, place) {
  const button = make("button", { type: "button", class: "cell", "data-cell": cell.id },
    make("strong", {}, make("span", {}, `${place + 1}`), make("span", {}, `score ${number(cell.score, 2)}`)),
    make("img", { src: cell.sheet, alt: alternative, loading: "lazy" }),
    make("dl", {}, ...list([...words(cell), ...measured(cell)])));
  button.addEventListener("click", () => enlarge(place));
  return make("li", {}, button);
}

function chart(measure, n, by) {
  const values = data.settings[by]?.values ?? ["all"];
  const points = visible.filter((cell) => cell.measures[n] !== null);
  const numbers = points.map((cell) => cell.measures[n]);
  let low = Math.min(...numbers), high = Math.max(...numbers);
  if (!(high > low)) { low -= 0.05; high += 0.05; }
  const [width, height, left, top, bottom] = [360, 190, 44, 10, 160];
  const x = (column) => left + ((width - left) * (column + 0.5)) / values.length;
  const y = (value) => bottom - ((bottom - top) * (value - low)) / (high - low);
  const svg = make("svg", { viewBox: `0 0 ${width} ${height}`, role: "img" });
  for (const value of [low, high]) {
    svg.append(make("line", { x1: left, x2: width, y1: y(value), y2: y(value) }),
      make("text", { x: left - 5, y: y(value) + 4, "text-anchor": "end" }, value.toFixed(2)));
  }
  const told = values.map((value, column) => {
    const here = points.filter((cell) => by < 0 || cell.settings[by] === column);
    here.forEach((cell, k) => {
      const spread = ((k * 0.618) % 1) - 0.5; // beside each other, the same each time
      const dot = make("circle", { r: 3, cx: x(column) + (spread * 0.6 * (width - left)) / values.length, cy: y(cell.measures[n]) });
      dot.append(make("title", {}, words(cell).map((pair) => pair.join(" ")).join(", ")));
      dot.addEventListener("click", () => enlarge(visible.indexOf(cell)));
      svg.append(dot);
    });
    const mean = here.length ? here.reduce((sum, cell) => sum + cell.measures[n], 0) / here.length : null;
    if (mean !== null) {
      const half = (0.35 * (width - left)) / values.length;
      svg.append(make("line", { class: "mean", x1: x(column) - half, x2: x(column) + half, y1: y(mean), y2: y(mean) }));
    }
    const most = Math.max(4, Math.floor(46 / values.length));
    svg.append(make("text", { x: x(column), y: height - 8, "text-anchor": "middle" },
      value.length > most ? value.slice(0, most - 1) + "…" : value));
    return `${value}: mean ${number(mean)}`;
  });
  svg.setAttribute("aria-label", `${measure.name}. ${told.join(", ")}`);
  const note = measure.more ? "" : " (less is better)";
  return make("figure", {}, make("figcaption", {}, measure.name + note), svg);
}

function show() {
  visible = sorted(data.cells.filter((cell) => cell.settings.every((value, n) => !hidden[n].has(value))));
  $("count").textContent = `${visible.length} of ${data.cells.length} cells`;
  $("cells").replaceChildren(...visible.map(card));
  const by = Number($("by").value);
  $("charts").replaceChildren(...(visible.length ? data.measures.map((m, n) => chart(m, n, by)) : []));
}

function enlarge(place) {
  if (place < 0 || place >= visible.length) return;
  at = place;
  const cell = visible[at];
  $("large-title").textContent = `${at + 1} of ${visible.length}: cell ${cell.id}, run ${cell.run}`;
  $("large-image").src = cell.sheet;
  $("large-image").alt = alternative;
  $("large-settings").replaceChildren(...list([["score", number(cell.score, 2)], ...words(cell), ...measured(cell)]));
  $("train").textContent = data.train[cell.run];
  $("draw").textContent = cell.draw;
  $("before").disabled = at === 0;
  $("after").disabled = at === visible.length - 1;
  if (!$("large").open) $("large").showModal();
}

data.settings.forEach((setting, n) => {
  const boxes = setting.values.map((value, at) => {
    const box = make("input", { type: "checkbox" });
    box.checked = true;
    box.addEventListener("change", () => {
      box.checked ? hidden[n].delete(at) : hidden[n].add(at);
      show();
    });
    return make("label", {}, box, value);
  });
  $("filters").append(make("fieldset", {}, make("legend", {}, setting.name), ...boxes));
  $("by").append(make("option", { value: n }, setting.name));
});
if (!data.settings.length) $("by").append(make("option", { value: -1 }, "nothing"));
$("order").append(make("option", { value: -1 }, "best first"));
data.measures.forEach((m, n) => $("order").append(make("option", { value: n }, m.name)));
$("prompts").style.gridTemplateColumns = `repeat(${data.prompts.length}, minmax(0, 1fr))`;
$("prompts").append(...data.prompts.map((prompt) => make("span", {}, prompt)));
$("order").addEventListener("change", show);
$("by").addEventListener("change", show);
$("filters").addEventListener("submit", (event) => event.preventDefault());
$("reset").addEventListener("click", () => {
  hidden.forEach((values) => values.clear());
  for (const box of $("filters").querySelectorAll("input")) box.checked = true;
  show();
});
$("before").addEventListener("click", () => enlarge(at - 1));
$("after").addEventListener("click", () => enlarge(at + 1));
$("close").addEventListener("click", () => $("large").close());
$("large").addEventListener("click", (event) => event.target === $("large") && $("large").close());
$("large").addEventListener("keydown", (event) => {
  if (event.key === "ArrowLeft") enlarge(at - 1);
  if (event.key === "ArrowRight") enlarge(at + 1);
});
$("large").addEventListener("close", () => $("cells").querySelectorAll("button")[at]?.focus());
show();
