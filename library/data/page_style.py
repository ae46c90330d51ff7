"""The look of the data page. Light or dark as the reader's system is; one column on a phone."""

STYLE = """
:root { color-scheme: light dark; --paper: #faf9f7; --card: #ffffff; --ink: #22211f; --soft: #68645e; --line: #e2ded7;
  --bar: #4e79a7; --error: #b3261e; --warning: #9a5b00; --note: #3a6ea5; --lost: #fbdcd9; }
@media (prefers-color-scheme: dark) { :root { --paper: #171615; --card: #211f1e; --ink: #ebe8e3; --soft: #a5a099;
  --line: #383532; --bar: #7ba6d6; --error: #ff8f86; --warning: #f0b054; --note: #8fbcec; --lost: #5c2521; } }
* { box-sizing: border-box; }
body { margin: 0 auto; max-width: 1280px; padding: 20px 18px 60px; background: var(--paper); color: var(--ink);
  font: 15px/1.5 system-ui, "Segoe UI", Roboto, "Open Sans", "DejaVu Sans", sans-serif; overflow-wrap: anywhere; }
h1 { font-size: 25px; line-height: 1.25; margin: 8px 0 2px; } h2 { font-size: 19px; margin: 38px 0 10px; }
h3 { font-size: 15px; margin: 18px 0 6px; }
p { margin: 4px 0; max-width: 75ch; } .soft { color: var(--soft); } .small { font-size: 13px; }
.tiles { display: grid; grid-template-columns: repeat(auto-fit, minmax(136px, 1fr)); gap: 10px; margin: 18px 0; }
.tile, .finding, .card { background: var(--card); border: 1px solid var(--line); border-radius: 8px; padding: 10px 12px; }
.tile b { display: block; font-size: 23px; line-height: 1.3; font-variant-numeric: tabular-nums; }
.finding { margin: 8px 0; border-left: 5px solid var(--note); }
.finding.error { border-left-color: var(--error); } .finding.warning { border-left-color: var(--warning); }
.badge { display: inline-block; padding: 0 7px; border-radius: 9px; font-size: 12px; border: 1px solid currentColor;
  color: var(--note); margin-right: 6px; }
.error > .title .badge { color: var(--error); } .warning > .title .badge { color: var(--warning); }
.finding .title { font-weight: 600; } .finding ul { margin: 6px 0 0; padding: 0; list-style: none; }
.pictures { display: flex; flex-wrap: wrap; gap: 10px; } .pictures li { width: 150px; font-size: 12px; color: var(--soft); }
.pictures img { display: block; max-width: 100%; max-height: 96px; border-radius: 4px; margin-bottom: 3px; }
.words li { font-size: 13px; color: var(--soft); padding: 1px 0; }
.bucket { display: grid; grid-template-columns: 30px 88px minmax(60px, 1fr) minmax(110px, 350px); gap: 1px 8px;
  align-items: center; font-size: 13px; font-variant-numeric: tabular-nums; margin: 2px 0; }
.bucket svg { display: block; } .bucket .shape { width: 28px; height: 22px; } .bucket .bar { width: 100%; height: 14px; }
.shape rect { fill: none; stroke: var(--soft); stroke-width: 1.5; } .bar rect { fill: var(--bar); }
.sheet { display: grid; grid-template-columns: repeat(auto-fill, minmax(250px, 1fr)); gap: 12px; align-items: start; }
.card.wide { grid-column: 1 / -1; } .card { padding: 10px; min-width: 0; }
.card h3 { margin: 0 0 6px; font-size: 13px; } .shots { display: flex; flex-wrap: wrap; gap: 12px; }
.shot { flex: 1 1 200px; max-width: 300px; min-width: 0; }
.shot img { display: block; max-width: 100%; border-radius: 4px; background: var(--line); }
.caption { margin: 6px 0 2px; font-size: 14px; max-height: 11em; overflow-y: auto; }
.caption mark { background: none; color: inherit; text-decoration: underline dotted var(--warning) 2px; }
.caption mark.lost { background: var(--lost); text-decoration: line-through var(--error) 1px; }
.over { color: var(--error); font-weight: 600; }
.facts { display: flex; gap: 10px; align-items: flex-start; margin-top: 8px; font-size: 12px; color: var(--soft); }
.whole { position: relative; flex: none; line-height: 0; } .whole img { max-width: 84px; max-height: 84px; border-radius: 3px; }
.whole svg { position: absolute; inset: 0; width: 100%; height: 100%; }
.whole rect { fill: none; stroke: #ff2d78; stroke-width: 2; vector-effect: non-scaling-stroke; }
.scroll { overflow-x: auto; } table { border-collapse: collapse; font-size: 13px; min-width: 860px; width: 100%;
  overflow-wrap: break-word; }
th { white-space: nowrap; } td { overflow-wrap: anywhere; } td.word { overflow-wrap: normal; }
th, td { text-align: left; vertical-align: top; padding: 6px 10px 6px 0; border-bottom: 1px solid var(--line); }
td.number, th.number { text-align: right; font-variant-numeric: tabular-nums; }
details summary { cursor: pointer; color: var(--soft); font-size: 13px; }
pre { white-space: pre-wrap; margin: 4px 0; font: 12px/1.45 ui-monospace, Menlo, Consolas, "DejaVu Sans Mono", monospace; }
@media (max-width: 560px) { body { padding: 12px 12px 40px; } h1 { font-size: 21px; }
  .bucket { grid-template-columns: 30px 80px 1fr; } .bucket .numbers { grid-column: 2 / -1; }
  .shot { flex-basis: 44%; } .sheet { grid-template-columns: 1fr; } }
"""
