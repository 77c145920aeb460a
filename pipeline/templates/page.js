"use strict";
// Draws a chart when it comes near the window, in the colours of the theme; sorts tables; remembers nothing.
const read = (id) => JSON.parse(document.getElementById(id).textContent);
const palette = read("palette"), charts = read("charts"), hidden = new Set(), drawn = new Set();
const root = document.documentElement, systemDark = matchMedia("(prefers-color-scheme: dark)");
const dark = () => (root.dataset.theme ? root.dataset.theme === "dark" : systemDark.matches);
const colour = (name) => (palette[name] ?? ["#777777", "#aaaaaa"])[dark() ? 1 : 0];

let library; // plotly.js, packed: unpacked when the first chart is drawn
function plotly() {
  library ??= (async () => {
    const bytes = Uint8Array.from(atob(document.getElementById("plotly").textContent), (c) => c.charCodeAt(0));
    const script = document.createElement("script");
    script.textContent = await new Response(new Blob([bytes]).stream().pipeThrough(new DecompressionStream("gzip"))).text();
    document.head.append(script);
    return window.Plotly;
  })();
  return library;
}

function traces(chart) {
  return chart.data.filter((trace) => !hidden.has(trace.legendgroup)).map((trace) => {
    const own = colour(trace.legendgroup), painted = { ...trace };
    if (trace.fill) return { ...painted, fillcolor: own + (dark() ? "3a" : "2a"), line: { width: 0 } };
    if (trace.error_x) painted.error_x = { ...trace.error_x, color: own };
    return { ...painted, marker: { ...trace.marker, color: own }, line: { ...trace.line, color: own } };
  });
}

function layout(chart) {
  const style = getComputedStyle(root), [text, line, card] = ["--text", "--line", "--card"].map((name) => style.getPropertyValue(name));
  const axis = (own) => ({ gridcolor: line, linecolor: line, zeroline: false, automargin: true, ...own, title: { standoff: 8, ...own?.title } });
  return {
    paper_bgcolor: "transparent", plot_bgcolor: "transparent", font: { family: "inherit", size: 12, color: text },
    margin: { l: 8, r: 12, t: 8, b: 8 }, hoverlabel: { bgcolor: card, bordercolor: line, font: { color: text } },
    showlegend: false, hovermode: "closest",
    dragmode: matchMedia("(pointer: coarse)").matches ? false : "zoom",
    ...chart.layout, xaxis: axis(chart.layout.xaxis), yaxis: axis(chart.layout.yaxis),
  };
}

async function draw(place) {
  const chart = charts[place.dataset.chart], Plotly = await plotly();
  await Plotly.react(place, traces(chart), layout(chart), { displayModeBar: false, responsive: true });
  place.dataset.drawn = "yes";
}

function paint() {
  for (const swatch of document.querySelectorAll("[data-colour]")) swatch.style.background = colour(swatch.dataset.colour);
  for (const place of drawn) draw(place);
}

const watcher = new IntersectionObserver((seen) => {
  for (const { isIntersecting, target } of seen) {
    if (!isIntersecting) continue;
    watcher.unobserve(target);
    drawn.add(target);
    draw(target).catch((error) => {
      target.textContent = "This browser cannot draw the chart; its figures are in curves.csv and verdicts.json.";
      throw error;
    });
  }
}, { rootMargin: "300px" });
for (const place of document.querySelectorAll("[data-chart]")) watcher.observe(place);

for (const chip of document.querySelectorAll(".chip")) {
  chip.addEventListener("click", () => {
    const name = chip.dataset.optimizer, shown = hidden.delete(name) || !hidden.add(name);
    chip.setAttribute("aria-pressed", String(shown));
    paint();
  });
}
document.getElementById("theme").addEventListener("click", () => {
  root.dataset.theme = dark() ? "light" : "dark";
  paint();
});
systemDark.addEventListener("change", paint);
document.getElementById("all").addEventListener("click", () => {
  for (const block of document.querySelectorAll("details.benchmark")) block.open = true;
});
const follow = () => { // a link to a benchmark opens it
  const block = document.getElementById(location.hash.slice(1));
  if (block instanceof HTMLDetailsElement) block.open = true;
};
addEventListener("hashchange", follow);
follow();

function sort(header) {
  const table = header.closest("table"), body = table.tBodies[0], column = header.cellIndex;
  const down = header.getAttribute("aria-sort") === "ascending";
  const key = (row) => row.cells[column].dataset.sort ?? row.cells[column].textContent;
  const number = (text) => (text === "inf" ? Infinity : text.trim() === "" ? NaN : Number(text));
  const order = (a, b) => {
    const [x, y] = [number(key(a)), number(key(b))];
    if (Number.isNaN(x) || Number.isNaN(y)) return key(a).localeCompare(key(b));
    return x === y ? 0 : x < y ? -1 : 1;
  };
  const rows = [...body.rows].sort((a, b) => (down ? order(b, a) : order(a, b)));
  for (const other of header.parentElement.cells) other.removeAttribute("aria-sort");
  header.setAttribute("aria-sort", down ? "descending" : "ascending");
  body.append(...rows);
}
for (const header of document.querySelectorAll("thead th")) {
  header.addEventListener("click", () => sort(header));
  header.addEventListener("keydown", (event) => { if (event.key === "Enter") sort(header); });
}
paint();
