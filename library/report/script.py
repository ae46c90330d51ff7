"""What moves on the page: charts drawn to the window's width, a cursor over all of them, the slider over preview steps.

The page allows this script alone, by its hash: nothing that stands in a caption can run.
"""

SCRIPT = r"""
'use strict';
const NS = 'http://www.w3.org/2000/svg', charts = JSON.parse(document.getElementById('numbers').textContent);
const count = number => number.toLocaleString('en');
const color = at => `var(--s${at % 6})`;
let smoothing = 6, logarithmic = false, cursor = null;

function element(name, attributes, parent, text) {
  const made = document.createElementNS(NS, name);
  for (const key in attributes) made.setAttribute(key, attributes[key]);
  if (text !== undefined) made.textContent = text;
  if (parent) parent.append(made);
  return made;
}

// Mean over the neighbours on both sides: centred, so that the curve does not lag behind its points.
function smooth(values, reach) {
  const sums = [0];
  for (const value of values) sums.push(sums[sums.length - 1] + value);
  return values.map((_, at) => {
    const first = Math.max(0, at - reach), end = Math.min(values.length, at + reach + 1);
    return (sums[end] - sums[first]) / (end - first);
  });
}

function reach(series) {
  const points = series.x.length;
  return smoothing ? Math.max(Math.min(4, points >> 4), Math.round(points * smoothing / 200)) : 0;
}
function lineOf(series) { return series.role === 'raw' ? smooth(series.y, reach(series)) : series.y; }

function shown(value) {
  const size = Math.abs(value);
  if (size !== 0 && (size < 0.001 || size >= 1e6)) return value.toExponential(3).replace(/\.?0*e\+?/, 'e');
  return String(+value.toPrecision(4));
}

function limits(chart) {
  const all = [];
  for (const series of [...chart.series, ...chart.ahead]) {
    const raw = series.role === 'raw' ? series.y.slice().sort((a, b) => a - b) : [];
    const cut = share => raw[Math.min(raw.length - 1, Math.max(0, Math.round(share * (raw.length - 1))))];
    if (series.role === 'raw' && chart.fitted && raw.length > 20) all.push(cut(0.01), cut(0.985));
    else all.push(...(raw.length ? raw : series.y));
    if (series.role === 'raw') all.push(...lineOf(series));
  }
  let low = Math.min(...all), high = Math.max(...all);
  if (logarithmic && low > 0) return [low / 1.05, high * 1.05, true];
  if (chart.zero) low = Math.min(0, low);
  const margin = (high - low) * 0.06 || Math.abs(high) * 0.1 || 1;
  return [chart.zero && low === 0 || low >= 0 && low - margin < 0 ? 0 : low - margin, high + margin, false];
}

function ticks(low, high, wanted) {
  const rough = (high - low) / wanted, power = 10 ** Math.floor(Math.log10(rough));
  const step = [1, 2, 5, 10].map(factor => factor * power).find(one => one >= rough), found = [];
  for (let at = Math.ceil(low / step); at * step <= high + step * 1e-9; at++) found.push(+(at * step).toPrecision(12));
  return found;
}

function logTicks(low, high) {
  const found = [];
  for (let power = Math.floor(Math.log10(low)); power <= Math.log10(high); power++)
    for (const factor of high / low > 300 ? [1] : high / low > 20 ? [1, 3] : [1, 1.5, 2, 3, 5, 7])
      if (factor * 10 ** power >= low && factor * 10 ** power <= high) found.push(factor * 10 ** power);
  return found.length > 1 ? found : ticks(low, high, 4);
}

const ends = list => Math.max(1, ...list.map(series => series.x[series.x.length - 1]));
const first = Math.min(...charts.flatMap(chart => [...chart.series, ...chart.ahead].map(series => series.x[0])));
const last = ends(charts.flatMap(chart => chart.series));

function draw(chart) {
  const host = document.getElementById('chart-' + chart.key), width = Math.max(240, host.clientWidth - 24);
  const height = chart.wide ? Math.min(340, Math.max(220, width * 0.42)) : 176, left = 54, right = 8, top = 6, bottom = 20;
  host.querySelector('svg')?.remove();
  const svg = element('svg', {viewBox: `0 0 ${width} ${height}`, height, role: 'img', 'aria-label': chart.title}, host);
  const [low, high, log] = limits(chart), inner = width - left - right;
  const end = Math.max(last, ends(chart.ahead)), span = Math.max(1, end - first), pad = span * 0.004;
  const x = step => left + (step - first + pad) / (span + 2 * pad) * inner;
  const scale = log ? Math.log : value => value;
  const y = value => top + (scale(high) - scale(Math.max(value, log ? 1e-30 : -Infinity))) / (scale(high) - scale(low))
    * (height - top - bottom);
  for (const value of log ? logTicks(low, high) : ticks(low, high, chart.wide ? 6 : 4)) {
    element('line', {class: 'grid', x1: left, x2: width - right, y1: y(value), y2: y(value)}, svg);
    element('text', {x: left - 7, y: y(value) + 4, 'text-anchor': 'end'}, svg, shown(value));
  }
  for (const step of ticks(first, end, Math.max(2, Math.min(10, inner / 80))).filter(Number.isInteger))
    element('text', {x: x(step), y: height - 4, 'text-anchor': x(step) > width - 24 ? 'end' : 'middle'}, svg, count(step));
  const clip = element('clipPath', {id: 'clip-' + chart.key}, svg);
  element('rect', {x: left, y: top - 2, width: inner, height: height - top - bottom + 4}, clip);
  const plot = element('g', {'clip-path': `url(#clip-${chart.key})`, fill: 'none'}, svg);
  const path = (xs, ys) => 'M' + xs.map((step, at) => `${x(step).toFixed(1)},${y(ys[at]).toFixed(1)}`).join('L');
  chart.ahead.forEach((series, at) => element('path', {d: path(series.x, series.y), stroke: color(at), 'stroke-width': 1.4,
    'stroke-opacity': 0.6, 'stroke-dasharray': '2 4'}, plot));
  chart.series.forEach((series, at) => {
    const stroke = color(at);
    if (series.role === 'raw') {
      if (series.lo) element('path', {fill: stroke, 'fill-opacity': 0.16, d: path([...series.x, ...series.x.slice().reverse()],
        [...series.hi, ...series.lo.slice().reverse()]) + 'Z'}, plot);
      else if (series.x.length > 150)
        element('path', {d: path(series.x, series.y), stroke, 'stroke-width': 0.8, 'stroke-opacity': 0.38}, plot);
      else series.x.forEach((step, i) => element('circle', {cx: x(step), cy: y(series.y[i]), r: 1.8, fill: stroke,
        'fill-opacity': 0.4}, plot));
    }
    element('path', {d: path(series.x, lineOf(series)), stroke, 'stroke-width': series.role === 'marks' ? 1.6 : 2,
      'stroke-linejoin': 'round'}, plot);
    if (series.role === 'marks' && series.x.length <= 120) series.x.forEach((step, i) => element('circle',
      {cx: x(step), cy: y(series.y[i]), r: 3, fill: stroke}, plot));
  });
  chart.line = element('line', {class: 'cursor', y1: top, y2: height - bottom, visibility: 'hidden'}, svg);
  chart.at = x;
  const move = event => {
    const box = svg.getBoundingClientRect(), place = (event.clientX - box.left) / box.width * width;
    point(Math.round(Math.min(last, Math.max(first, first + (place - left) / inner * (span + 2 * pad) - pad))));
  };
  svg.addEventListener('pointermove', move);
  svg.addEventListener('pointerdown', move);
  svg.addEventListener('pointerleave', () => point(null));
  read(chart);
}

function nearest(xs, step) {
  let low = 0, high = xs.length - 1;
  while (low < high) { const middle = (low + high) >> 1; if (xs[middle] < step) low = middle + 1; else high = middle; }
  return low > 0 && step - xs[low - 1] <= xs[low] - step ? low - 1 : low;
}

function read(chart) {
  const line = chart.line, out = document.querySelector(`#chart-${chart.key} .readout`), step = cursor ?? last;
  line.setAttribute('visibility', cursor === null ? 'hidden' : 'visible');
  line.setAttribute('x1', chart.at(step)); line.setAttribute('x2', chart.at(step));
  const told = chart.series.map((series, at) => {
    const i = nearest(series.x, step), value = lineOf(series)[i];
    const rare = chart.series.length > 1 && series.role === 'marks';
    return [shown(value) + (rare ? ` (step ${count(series.x[i])})` : ''), color(at)];
  });
  out.replaceChildren(`step ${count(step)}  `, ...told.map(([text, ink]) => {
    const part = document.createElement('span');
    part.style.color = ink; part.textContent = `${text}${chart.unit ? ' ' + chart.unit : ''}  `;
    return part;
  }));
}

function point(step) { cursor = step; charts.forEach(read); }
function drawAll() { charts.forEach(draw); }

const knob = document.getElementById('smoothing'), log = document.getElementById('logarithmic');
if (charts.length) {
  knob.addEventListener('input', () => { smoothing = +knob.value; drawAll(); });
  log.addEventListener('change', () => { logarithmic = log.checked; drawAll(); });
  document.getElementById('knobs').hidden = false;
  drawAll();
  let width = innerWidth;
  addEventListener('resize', () => { if (innerWidth !== width) { width = innerWidth; drawAll(); } });
}

const stacks = [...document.querySelectorAll('.stack')], slider = document.getElementById('slider');
if (slider) {
  const found = [...document.querySelectorAll('.stack img')].map(image => +image.dataset.step);
  const steps = [...new Set(found)].sort((a, b) => a - b);
  const name = document.getElementById('slide-step');
  const show = at => {
    const step = steps[at];
    name.textContent = step === 0 ? 'untrained' : 'step ' + count(step);
    for (const stack of stacks) {
      const images = [...stack.children], on = images.filter(image => +image.dataset.step <= step).pop() || images[0];
      for (const image of images) image.classList.toggle('on', image === on);
    }
  };
  slider.max = steps.length - 1; slider.value = steps.length - 1;
  slider.addEventListener('input', () => show(+slider.value));
  const by = steps => { slider.value = +slider.value + steps; show(+slider.value); };
  document.getElementById('earlier').addEventListener('click', () => by(-1));
  document.getElementById('later').addEventListener('click', () => by(1));
  document.getElementById('slide').hidden = steps.length < 2;
  show(steps.length - 1);
}

// Commands name files by where this page lies, which only the reader's own browser knows.
if (location.protocol === 'file:') {
  const folder = decodeURIComponent(location.pathname.replace(/[^/]*$/, '')).replace(/^\/(?=[A-Za-z]:)/, '');
  for (const place of document.querySelectorAll('.here')) place.textContent = folder + place.textContent;
}
"""
