"""Style and script of the HTML report. Plain text constants: the page must work from a mail attachment."""

CSS = """
:root { color-scheme: light dark; --font: system-ui, -apple-system, "Segoe UI", Roboto, "DejaVu Sans", sans-serif;
  --paper: #ffffff; --card: #f6f7f9; --ink: #1b1f24; --muted: #5b6673; --grid: #dfe3e8;
  --accent: #2b6cb0; --warn: #9a5b00;
  --c0: #2b6cb0; --c1: #c2410c; --c2: #d69e2e; --c3: #2f855a;
  --c4: #805ad5; --c5: #b83280; --c6: #0e7490; --c7: #8a94a1; }
@media (prefers-color-scheme: dark) { :root {
  --paper: #14171b; --card: #1c2127; --ink: #e6e9ed; --muted: #9aa6b2; --grid: #323a43;
  --accent: #63b3ed; --warn: #f0b35c;
  --c0: #63b3ed; --c1: #f6875a; --c2: #ecc94b; --c3: #68d391;
  --c4: #b794f4; --c5: #f687b3; --c6: #4fd1c5; --c7: #7b8794; } }
* { box-sizing: border-box; }
body { margin: 0 auto; max-width: 1380px; padding: 28px 24px 60px; background: var(--paper); color: var(--ink);
  font: 15px/1.45 var(--font); }
h1 { font-size: 24px; margin: 0 0 2px; overflow-wrap: anywhere; }
h1 small { font-weight: 400; color: var(--muted); font-size: 17px; white-space: nowrap; }
h2 { font-size: 16px; margin: 30px 0 10px; }
p { margin: 4px 0; }
.muted { color: var(--muted); }
.cards { display: grid; grid-template-columns: repeat(auto-fit, minmax(138px, 1fr)); gap: 10px; margin: 18px 0 8px; }
.card { background: var(--card); border-radius: 8px; padding: 10px 14px; }
.card:first-child { grid-column: span 2; }
.card b { display: block; font-size: 21px; font-weight: 600; font-variant-numeric: tabular-nums; white-space: nowrap; }
.card span { color: var(--muted); font-size: 13px; }
.plots { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(440px, 100%), 1fr)); gap: 14px;
  margin-top: 14px; }
figure { margin: 0; background: var(--card); border-radius: 8px; padding: 12px 14px; }
figure.wide { grid-column: 1 / -1; }
figcaption { font-size: 13px; font-weight: 600; margin-bottom: 6px; }
figcaption span { font-weight: 400; color: var(--muted); }
svg { width: 100%; height: auto; display: block; }
svg * { stroke-linejoin: round; stroke-linecap: butt; }
svg use:hover { stroke: var(--ink); stroke-width: 2; }
ul { margin: 6px 0; padding-left: 20px; }
.tools { display: flex; flex-wrap: wrap; gap: 8px 14px; align-items: center; margin: 0 0 8px; }
.tools input[type=search] { flex: 1 1 220px; max-width: 420px; }
input, select { font: inherit; color: inherit; background: var(--card); border: 1px solid var(--grid);
  border-radius: 6px; padding: 5px 9px; }
.frame { overflow: auto; max-height: 82vh; border: 1px solid var(--grid); border-radius: 8px; }
table { border-collapse: collapse; width: 100%; font-size: 13px; font-variant-numeric: tabular-nums; }
th { position: sticky; top: 0; background: var(--card); text-align: left; font-weight: 600; padding: 0; z-index: 1;
  box-shadow: inset 0 -1px var(--grid); }
th button { all: unset; cursor: pointer; display: block; box-sizing: border-box; width: 100%; padding: 7px 8px;
  white-space: nowrap; }
th button:focus-visible, .open:focus-visible { outline: 2px solid var(--accent); outline-offset: -2px; }
th[aria-sort=ascending] button::after { content: " ▲"; font-size: 9px; }
th[aria-sort=descending] button::after { content: " ▼"; font-size: 9px; }
td { padding: 5px 8px; border-top: 1px solid var(--grid); vertical-align: top; }
td.n, th.n { text-align: right; white-space: nowrap; }
td.s { white-space: nowrap; }
td.site { font-family: ui-monospace, "SF Mono", Menlo, "DejaVu Sans Mono", monospace; font-size: 12px;
  min-width: 200px; overflow-wrap: break-word; }
td.m { min-width: 108px; }
td.w { min-width: 170px; max-width: 380px; color: var(--muted); overflow-wrap: anywhere; }
tr.float td { color: var(--muted); }
tr.float td.w { color: var(--warn); }
tr.member td.site { padding-left: 28px; }
tr.member td { background: var(--card); }
.open { all: unset; cursor: pointer; }
.open::before { content: "▸ "; color: var(--accent); }
.open[aria-expanded=true]::before { content: "▾ "; }
.count { color: var(--muted); white-space: nowrap; }
.key { display: inline-block; width: 9px; height: 9px; border-radius: 50%; margin-right: 6px; }
table.scores { width: auto; min-width: min(560px, 100%); }
table.scores th { position: static; background: none; padding: 4px 14px 4px 0; }
table.scores td { padding: 4px 14px 4px 0; }
table.scores th.n, table.scores td.n { padding: 4px 0 4px 24px; }
@media print { .tools { display: none; } .frame { max-height: none; } th { position: static; } }
"""

SCRIPT = """
(() => {
  const [table, grouped, flat, find, which, merge, shown] =
    ["sites", "grouped", "flat", "find", "which", "merge", "shown"].map(id => document.getElementById(id));
  const rows = [...flat.rows], total = rows.length;
  const close = () => {
    grouped.querySelectorAll("tr.member").forEach(r => r.remove());
    grouped.querySelectorAll(".open").forEach(b => b.setAttribute("aria-expanded", "false"));
  };
  const value = (row, i) => row.cells[i].dataset.v ?? row.cells[i].textContent;
  function refresh() {
    const words = find.value.toLowerCase().split(/\\s+/).filter(Boolean), kind = which.value;
    // A search is for single sites; without one, equal layers may stand as one line.
    const together = merge.checked && !words.length;
    grouped.hidden = !together; flat.hidden = together; close();
    const passes = row => (kind === "all" || row.classList.contains(kind))
      && words.every(w => row.textContent.toLowerCase().includes(w));
    let n = 0;
    for (const row of rows) { const ok = passes(row); row.hidden = !ok; n += ok; }
    for (const row of grouped.rows) row.hidden = !passes(row);
    shown.textContent = n === total ? total + " sites" : n + " of " + total + " sites";
  }
  function sort(head) {
    const i = head.cellIndex, down = head.getAttribute("aria-sort") === "ascending";
    for (const h of table.tHead.rows[0].cells) h.removeAttribute("aria-sort");
    head.setAttribute("aria-sort", down ? "descending" : "ascending");
    close();
    const number = head.classList.contains("n");
    const compare = (a, b) => {
      const x = value(a, i), y = value(b, i);
      if (number) {  // rows without a figure stay last in both directions
        const p = x === "" ? NaN : +x, q = y === "" ? NaN : +y;
        if (isNaN(p) || isNaN(q)) return isNaN(p) - isNaN(q);
        return p === q ? 0 : (p < q) === down ? 1 : -1;
      }
      return (down ? -1 : 1) * x.localeCompare(y, undefined, { numeric: true });
    };
    for (const body of table.tBodies) body.append(...[...body.rows].sort(compare));
  }
  for (const head of table.tHead.rows[0].cells) head.firstElementChild.addEventListener("click", () => sort(head));
  grouped.addEventListener("click", event => {
    const button = event.target.closest(".open");
    if (!button) return;
    const open = button.getAttribute("aria-expanded") === "true", row = button.closest("tr");
    button.setAttribute("aria-expanded", String(!open));
    if (open) { while (row.nextElementSibling?.classList.contains("member")) row.nextElementSibling.remove(); return; }
    let last = row;
    for (const k of row.dataset.members.split(",")) {
      const copy = document.getElementById("r" + k).cloneNode(true);
      copy.removeAttribute("id"); copy.hidden = false; copy.classList.add("member");
      last.after(copy); last = copy;
    }
  });
  for (const tool of [find, which, merge]) tool.addEventListener("input", refresh);
  refresh();
})();
"""
