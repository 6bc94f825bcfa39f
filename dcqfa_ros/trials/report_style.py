"""Style sheet of the trial report: light and dark by the reader's preference, readable on a phone and on paper."""

STYLE = """
:root {
  color-scheme: light dark;
  --bg: #f5f6f8; --card: #ffffff; --ink: #16202e; --soft: #5c6878; --line: #e2e6ec; --track: #e9edf2;
  --accent: #2f6bea; --good: #1d8a4e; --good-bg: #e0f4e8; --warn: #a2620a; --warn-bg: #fdf0da;
  --bad: #c22f3d; --bad-bg: #fce6e8; --shadow: 0 1px 2px rgba(16,32,56,.06), 0 6px 20px rgba(16,32,56,.05);
}
@media (prefers-color-scheme: dark) {
  :root {
    --bg: #0e131a; --card: #171e28; --ink: #e8edf4; --soft: #97a4b5; --line: #273140; --track: #253040;
    --accent: #6c9bff; --good: #58cb8c; --good-bg: #143222; --warn: #f0b35a; --warn-bg: #362a12;
    --bad: #ff7e88; --bad-bg: #3d1a20; --shadow: 0 1px 2px rgba(0,0,0,.4);
  }
}
* { box-sizing: border-box; }
html { scroll-behavior: smooth; }
body {
  margin: 0; background: var(--bg); color: var(--ink);
  font: 15px/1.5 system-ui, -apple-system, "Segoe UI", Roboto, "Helvetica Neue", Arial, sans-serif;
}
main { max-width: 1120px; margin: 0 auto; padding: 40px 24px 64px; }
h1 { font-size: 30px; line-height: 1.2; letter-spacing: -.02em; margin: 0 0 12px; }
h2 { font-size: 18px; letter-spacing: -.01em; margin: 40px 0 14px; }
.facts { display: flex; flex-wrap: wrap; gap: 8px; margin: 0; padding: 0; list-style: none; }
.facts li {
  background: var(--card); border: 1px solid var(--line); border-radius: 8px; padding: 3px 10px;
  font-size: 13.5px;
}
.facts span { color: var(--soft); margin-right: 6px; }
.tiles {
  display: grid; grid-template-columns: repeat(auto-fit, minmax(190px, 1fr)); gap: 14px; margin-top: 26px;
}
.tile, .card, .table-card {
  background: var(--card); border: 1px solid var(--line); border-radius: 14px; box-shadow: var(--shadow);
}
.tile { padding: 16px 18px; }
.tile .name { color: var(--soft); font-size: 13px; }
.tile .value {
  font-size: 30px; font-weight: 650; letter-spacing: -.02em; line-height: 1.25;
  font-variant-numeric: tabular-nums;
}
.tile .value small { font-size: 16px; font-weight: 500; color: var(--soft); letter-spacing: 0; }
.tile .note { color: var(--soft); font-size: 12.5px; }
.faults {
  margin: 14px 0 0; padding: 12px 18px; border-radius: 14px; background: var(--bad-bg); color: var(--ink);
}
.faults a { color: inherit; }
.faults .pill { background: var(--card); }
.card { padding: 18px; }
.table-card { overflow-x: auto; }
table { border-collapse: collapse; width: 100%; font-variant-numeric: tabular-nums; }
th { text-align: left; color: var(--soft); font-size: 12.5px; font-weight: 550; white-space: nowrap; }
th, td { padding: 10px 14px; border-bottom: 1px solid var(--line); }
tbody tr:last-child td { border-bottom: 0; }
tbody tr:hover { background: color-mix(in srgb, var(--accent) 5%, transparent); }
td.n, th.n { text-align: right; }
td a { color: var(--accent); text-decoration: none; font-weight: 600; }
td a:hover { text-decoration: underline; }
.score { display: flex; align-items: center; gap: 10px; min-width: 170px; }
.bar { flex: 1; height: 8px; border-radius: 4px; background: var(--track); overflow: hidden; }
.bar i { display: block; height: 100%; border-radius: 4px; background: var(--accent); }
.bar i.full { background: var(--good); }
.pill {
  display: inline-block; border-radius: 999px; padding: 1px 10px; font-size: 12.5px; font-weight: 550;
  white-space: nowrap;
  background: var(--track); color: var(--soft);
}
.pill.good { background: var(--good-bg); color: var(--good); }
.pill.warn { background: var(--warn-bg); color: var(--warn); }
.pill.bad { background: var(--bad-bg); color: var(--bad); }
.trials { display: grid; gap: 18px; }
.trial {
  display: grid; grid-template-columns: 320px minmax(0, 1fr); gap: 22px; scroll-margin-top: 16px;
  break-inside: avoid;
}
.trial.no-video { grid-template-columns: minmax(0, 1fr); }
.trial video {
  width: 100%; height: auto; display: block; border-radius: 10px; border: 1px solid var(--line);
  background: #e2e6ec;
}
.trial header { display: flex; flex-wrap: wrap; align-items: center; gap: 10px; margin-bottom: 6px; }
.trial h3 { margin: 0; font-size: 16px; }
.trial .big { margin-left: auto; font-size: 22px; font-weight: 650; font-variant-numeric: tabular-nums; }
.trial .big small { color: var(--soft); font-size: 13px; font-weight: 450; }
dl { display: flex; flex-wrap: wrap; gap: 4px 22px; margin: 8px 0 0; font-size: 13px; }
dl div { display: flex; gap: 6px; }
dt { color: var(--soft); }
dd { margin: 0; font-variant-numeric: tabular-nums; }
.chart { width: 100%; height: auto; display: block; font-size: 11.5px; }
.chart text { fill: var(--soft); font-variant-numeric: tabular-nums; }
.chart .middle { text-anchor: middle; }
.chart .end { text-anchor: end; }
.chart .grid { stroke: var(--line); }
.chart .axis { stroke: var(--soft); opacity: .6; }
.chart .area { fill: var(--accent); opacity: .12; }
.chart .curve { fill: none; stroke: var(--accent); stroke-width: 2; stroke-linejoin: round; }
.chart .limit { stroke: var(--good); stroke-width: 1.5; stroke-dasharray: 5 4; }
.chart text.limit-label { fill: var(--good); }
.chart .best { fill: var(--card); stroke: var(--accent); stroke-width: 2.5; }
.chart text.best-label {
  fill: var(--ink); font-weight: 600; paint-order: stroke; stroke: var(--card); stroke-width: 4px;
}
.chart .dot { fill: var(--accent); opacity: .8; }
.chart .band { fill: var(--accent); opacity: .13; }
.chart .mean { stroke: var(--ink); stroke-width: 1.5; }
.strip text { font-size: 12.5px; }
.chart text.mean-label { fill: var(--ink); font-weight: 600; }
footer {
  margin-top: 44px; color: var(--soft); font-size: 13px; border-top: 1px solid var(--line);
  padding-top: 18px;
}
footer p { max-width: 78ch; margin: 0 0 10px; }
footer code { font: 12.5px ui-monospace, SFMono-Regular, Menlo, Consolas, monospace; }
@media (max-width: 760px) {
  main { padding: 24px 14px 40px; }
  .trial { grid-template-columns: minmax(0, 1fr); }
}
@media print { body { background: #fff; } .tile, .card, .table-card { box-shadow: none; } }
"""
