"""The style sheet of the page: light, printable, one column on a narrow window."""

STYLE = """
:root { --ink: #1f2328; --soft: #59626c; --line: #dfe3e7; --paper: #ffffff; --ground: #f5f6f8;
  --good: #1a7f37; --doubtful: #9a6700; --bad: #b3261e; }
* { box-sizing: border-box; }
body { margin: 0; background: var(--ground); color: var(--ink);
  font: 14px/1.45 system-ui, -apple-system, "Segoe UI", Roboto, "Helvetica Neue", Arial, sans-serif; }
main { max-width: 1280px; margin: 0 auto; padding: 20px; }
h1, h2, h3, p, ul, figure, dl { margin: 0; }
h2 { font-size: 18px; margin: 26px 0 10px; }
h3 { font-size: 14px; margin-bottom: 2px; }
.banner { border-left: 8px solid; border-radius: 6px; background: var(--paper); padding: 14px 20px;
  display: flex; flex-wrap: wrap; gap: 8px 32px; justify-content: space-between; }
.banner > div { flex: 1 1 400px; min-width: 0; }
.banner.good { border-color: var(--good); background: #eef8f0; }
.banner.doubtful { border-color: var(--doubtful); background: #fff8e6; }
.banner.bad { border-color: var(--bad); background: #fdeeec; }
.banner h1 { font-size: 26px; line-height: 1.2; letter-spacing: 0.01em; }
.good h1 { color: var(--good); } .doubtful h1 { color: var(--doubtful); } .bad h1 { color: var(--bad); }
.banner ul { margin-top: 6px; padding-left: 18px; }
.banner .headline { font-size: 17px; font-weight: 600; }
.banner .reason { font-weight: 600; }
.banner .load { flex: 0 1 auto; color: var(--soft); text-align: right; }
.banner .load strong { color: var(--ink); }
.tiles { display: grid; grid-template-columns: repeat(auto-fit, minmax(140px, 1fr)); gap: 12px; margin: 12px 0; }
.tile, .card { background: var(--paper); border: 1px solid var(--line); border-radius: 6px; }
.tile { padding: 10px 14px; }
.tile .name { color: var(--soft); }
.tile .value { font-size: 27px; font-weight: 650; line-height: 1.2; font-variant-numeric: tabular-nums;
  white-space: nowrap; }
.tile .value small { font-size: 15px; font-weight: 500; color: var(--soft); }
.tile .note { color: var(--soft); font-size: 12.5px; }
.tile.bad .value { color: var(--bad); }
.card { padding: 12px 16px; margin-bottom: 12px; break-inside: avoid; min-width: 0; overflow-x: auto; }
.columns { display: grid; grid-template-columns: minmax(0, 1.45fr) minmax(0, 1fr); gap: 0 12px; align-items: start; }
.halves { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 480px), 1fr)); gap: 0 12px;
  align-items: start; }
.columns.even { grid-template-columns: minmax(0, 1.2fr) minmax(0, 1fr); }
figure.card, figure svg { overflow: visible; }
figure svg { display: block; width: 100%; height: auto; }
figcaption { color: var(--soft); font-size: 12.5px; }
table { border-collapse: collapse; width: 100%; font-variant-numeric: tabular-nums; }
th, td { padding: 3px 0 3px 10px; text-align: right; vertical-align: top; }
th:first-child, td:first-child { padding-left: 0; }
thead th { color: var(--soft); font-weight: 500; border-bottom: 1px solid var(--line); vertical-align: bottom; }
tbody th { font-weight: 500; text-align: left; }
tbody tr + tr > * { border-top: 1px solid #f0f2f4; }
td:not(.words) { white-space: nowrap; }
.words { text-align: left; }
.missed { color: var(--bad); font-weight: 600; }
dl { display: grid; grid-template-columns: max-content minmax(0, 1fr); gap: 3px 14px; }
dt { color: var(--soft); }
dd { margin: 0; overflow-wrap: anywhere; }
details { background: var(--paper); border: 1px solid var(--line); border-radius: 6px; margin-bottom: 12px; }
summary { padding: 10px 16px; font-weight: 600; cursor: pointer; }
details dl { padding: 0 16px 14px; }
footer { color: var(--soft); font-size: 12.5px; }
@media (max-width: 960px) { .columns, .columns.even { grid-template-columns: minmax(0, 1fr); } main { padding: 12px; }
  .banner .load { text-align: left; } }
@media print { body { background: none; } main { padding: 0; } .banner { print-color-adjust: exact; } }
"""
