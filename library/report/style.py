"""The look of the report: that of the data page, with charts and a strip of previews."""

from library.data.page_style import STYLE as SHARED

STYLE = SHARED + """
:root { --s0: #3b6fb6; --s1: #c9571c; --s2: #2c8a6b; --s3: #8a4fa3; --s4: #a88400; --s5: #b8336a; --faint: #eeebe5; }
@media (prefers-color-scheme: dark) { :root { --s0: #7fb0ee; --s1: #f29a63; --s2: #62c7a4; --s3: #c59add; --s4: #dcbc4c;
  --s5: #f08bb4; --faint: #2a2826; } }
header { display: flex; flex-wrap: wrap; gap: 4px 18px; align-items: baseline; justify-content: space-between; }
header h1 { margin: 8px 0 0; } header p { margin: 0; }
.state { font-weight: 600; } .state.good { color: var(--s2); } .state.bad { color: var(--error); }
.course { height: 6px; border-radius: 3px; background: var(--line); margin: 12px 0 0; overflow: hidden; }
.course div { height: 100%; border-radius: 3px; background: var(--s0); }
.tiles { grid-template-columns: repeat(auto-fit, minmax(104px, 1fr)); margin: 14px 0; }
  .tile span { display: block; line-height: 1.3; }
.tile b { font-size: 20px; white-space: nowrap; }
#pictures .sheet { grid-template-columns: repeat(auto-fill, minmax(min(100%, 270px), 1fr)); }
#pictures .wide { grid-column: span 2; } #pictures .shot { flex: 1 1 110px; max-width: 190px; }
  #pictures .wide .caption { font-size: 13px; }
.charts { display: grid; grid-template-columns: repeat(auto-fill, minmax(min(100%, 390px), 1fr)); gap: 12px; }
.chart { background: var(--card); border: 1px solid var(--line); border-radius: 8px; padding: 10px 12px 6px; min-width: 0;
  margin: 0; }
.chart.wide { grid-column: 1 / -1; } .chart figcaption { display: flex; flex-wrap: wrap; gap: 2px 14px; align-items: baseline; }
.chart b { font-size: 14px; } .chart .keys { display: flex; flex-wrap: wrap; gap: 0 14px; font-size: 12px; color: var(--soft); }
.chart .keys span { white-space: nowrap; } .chart .keys i { display: inline-block; width: 14px; height: 3px; border-radius: 2px;
  margin-right: 5px; vertical-align: 3px; background: currentColor; }
.chart .readout { margin-left: auto; font-size: 12px; font-variant-numeric: tabular-nums; min-height: 1.5em; white-space: nowrap;
  overflow: hidden; text-overflow: ellipsis; }
.chart svg { display: block; width: 100%; margin-top: 4px; touch-action: pan-y; }
  .chart text { fill: var(--soft); font-size: 11px;
  font-variant-numeric: tabular-nums; } .chart .grid { stroke: var(--faint); }
  .chart .cursor { stroke: var(--soft); stroke-dasharray: 3 3; }
.knobs { display: flex; flex-wrap: wrap; gap: 6px 22px; align-items: center; margin: 0 0 10px; font-size: 13px;
  color: var(--soft); }
.knobs label { display: flex; gap: 8px; align-items: center; } input[type=range] { accent-color: var(--s0); }
input[type=checkbox] { accent-color: var(--s0); margin: 0; }
.slide { position: sticky; top: 0; z-index: 2; display: flex; gap: 12px; align-items: center; padding: 10px 0;
  background: var(--paper); }
.slide input { flex: 1; min-width: 0; } .slide output { min-width: 92px; font-weight: 600; font-variant-numeric: tabular-nums; }
.slide button { font: inherit; font-size: 13px; color: inherit; background: var(--card); border: 1px solid var(--line);
  border-radius: 6px;
  padding: 2px 10px; cursor: pointer; }
.strips { display: grid; grid-template-columns: repeat(auto-fill, minmax(min(100%, 270px), 1fr)); gap: 12px; align-items: start; }
.strip { background: var(--card); border: 1px solid var(--line); border-radius: 8px; padding: 10px; margin: 0; min-width: 0; }
.stack { display: grid; border-radius: 4px; overflow: hidden; background: var(--line); }
  .stack img { grid-area: 1 / 1; width: 100%; height: auto;
  display: block; visibility: hidden; } .stack img.on { visibility: visible; }
.strip figcaption { margin-top: 7px; font-size: 14px; } .strip .prompt { max-height: 6em; overflow-y: auto; margin: 0; }
.steps li { margin: 12px 0; } .steps { padding-left: 20px; margin: 0; }
  .steps pre { background: var(--card); border: 1px solid var(--line);
  border-radius: 6px; padding: 8px 10px; margin: 6px 0; overflow-x: auto; white-space: pre-wrap; overflow-wrap: anywhere; }
table.settings, table.files { min-width: 0; }
table.settings td:first-child { white-space: nowrap; width: 1%; padding-right: 28px; }
table.settings td { font-family: ui-monospace, Menlo, Consolas, "DejaVu Sans Mono", monospace; font-size: 12px; }
h2 { border-top: 1px solid var(--line); padding-top: 16px; }
@media (max-width: 560px) { .tiles { grid-template-columns: 1fr 1fr; } .chart .readout { margin-left: 0; width: 100%; }
  #pictures .wide { grid-column: auto; } .strips { grid-template-columns: 1fr 1fr; gap: 8px; } .strip { padding: 7px; }
  .strip figcaption { font-size: 12px; }
  table.settings td:first-child { white-space: normal; } .slide output { min-width: 78px; } .slide button { padding: 2px 7px; } }
@media print { .slide, .knobs { display: none; } .chart, .strip, .tile { break-inside: avoid; } }
"""
