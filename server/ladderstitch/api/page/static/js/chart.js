// The chart: the frontier as a line of uPlot, and every stitch and answer as a mark of our own.

import { byId, colour } from './dom.js';
import { milliseconds, percent, plainMilliseconds } from './format.js';

const SHOWN_S = 45; // seconds for which an answer stays on the chart
const NEAR = 18; // pixels within which the pointer finds a mark

/** The range of latencies, ms: from less than the fastest stitch takes to many times the slowest. */
export function latencyRange(model) {
  const line = model.variants.filter((variant) => model.frontier.includes(variant.id));
  const all = line.map((variant) => variant.latency_ms);
  return [Math.min(...all) / 3, Math.max(...all) * 20];
}

export class FrontierChart {
  constructor(onLayout) {
    this.box = byId('chart');
    this.onLayout = onLayout;
    this.answers = [];
    this.last = null;
    this.budget = 1;
    this.plot = null;
    new ResizeObserver(() => this.resize()).observe(this.box);
    matchMedia('(prefers-color-scheme: dark)').addEventListener('change', () => this.rebuild());
  }

  setModel(model, range) {
    Object.assign(this, { model, range, answers: [], last: null });
    this.byVariant = new Map(model.variants.map((variant) => [variant.id, variant]));
    this.rebuild();
  }

  /** Take new latencies of the same model, which the server corrects as it runs. */
  update(model) {
    this.model = model;
    this.byVariant = new Map(model.variants.map((variant) => [variant.id, variant]));
    this.plot?.setData(this.frontier());
  }

  setBudget(milliseconds_) { this.budget = milliseconds_; this.redraw(); }

  /** Show the latest answer to this page with a ring, until the next one. */
  setLast(answer) { this.last = answer; this.redraw(); }

  add(answers) { this.answers.push(...answers); }

  redraw() {
    const oldest = performance.now() - 1000 * SHOWN_S;
    this.answers = this.answers.filter((answer) => answer.at >= oldest);
    this.plot?.redraw(false);
  }

  rebuild() {
    if (!this.model) return;
    this.plot?.destroy();
    this.marks = [];
    this.plot = new window.uPlot(this.options(), this.frontier(), this.box);
    this.tip = this.box.appendChild(Object.assign(document.createElement('div'), { className: 'tip', hidden: true }));
    this.resize();
  }

  resize() {
    if (!this.plot || !this.box.clientWidth) return;
    this.plot.setSize({ width: this.box.clientWidth, height: this.height() });
  }

  height() { return this.box.clientWidth < 560 ? 280 : 380; }

  frontier() {
    const line = this.model.frontier.map((id) => this.byVariant.get(id));
    line.sort((a, b) => a.latency_ms - b.latency_ms);
    return [line.map((v) => v.latency_ms), line.map((v) => this.y(v.quality))];
  }

  /** Percent; models whose quality was not measured are drawn on one line. */
  y(quality) { return quality === null ? 50 : 100 * quality; }

  qualityRange() {
    const all = this.model.variants.filter((v) => v.quality !== null).map((v) => 100 * v.quality);
    if (!all.length) return [0, 100];
    const [low, high] = [Math.min(...all), Math.max(...all)];
    const margin = Math.max(0.5, 0.12 * (high - low));
    return [low - margin, Math.min(100, high + margin)];
  }

  options() {
    const [low, high] = this.range;
    const measured = this.model.variants.some((variant) => variant.quality !== null);
    const axis = { stroke: colour('muted'), grid: { stroke: colour('grid'), width: 1 }, ticks: { show: false }, font: '12px system-ui', labelFont: '12px system-ui', labelSize: 22 };
    const what = this.model.kind === 'text' ? 'Time of a token' : 'Latency';
    const metric = measured ? `${this.model.quality_metric}, %` : 'quality not measured';
    return {
      width: this.box.clientWidth || 600,
      height: this.height(),
      padding: [18, 14, 0, 0],
      legend: { show: false },
      cursor: { drag: { x: false, y: false }, x: false, y: false, points: { show: false } },
      scales: {
        x: { time: false, distr: 3, range: () => [low, high] },
        y: { range: () => this.qualityRange() },
      },
      axes: [
        { ...axis, label: `${what}, ms (log scale)`, splits: () => oneTwoFive(low, high, this.box.clientWidth < 560), filter: (_, splits) => splits, values: (_, splits) => splits.map(tick), size: 30 },
        { ...axis, label: metric, size: tickWidth, show: true, values: (_, splits) => splits.map((v) => (measured ? String(v) : '')) },
      ],
      series: [{}, { stroke: colour('frontier'), width: 2, paths: window.uPlot.paths.stepped({ align: 1 }), points: { show: false } }],
      hooks: { drawAxes: [() => this.drawBudget()], draw: [() => this.drawMarks()], setCursor: [() => this.showTip()] },
    };
  }

  /** Shade what is too late, and draw the budget as a line; the slider follows the plot. */
  drawBudget() {
    const { ctx, bbox } = this.plot;
    this.onLayout(bbox.left / devicePixelRatio, bbox.width / devicePixelRatio);
    const x = this.plot.valToPos(this.budget, 'x', true);
    ctx.save();
    ctx.fillStyle = colour('late');
    ctx.fillRect(x, bbox.top, bbox.left + bbox.width - x, bbox.height);
    ctx.strokeStyle = colour('budget');
    ctx.lineWidth = 2 * devicePixelRatio;
    ctx.setLineDash([6 * devicePixelRatio, 4 * devicePixelRatio]);
    ctx.beginPath();
    ctx.moveTo(x, bbox.top);
    ctx.lineTo(x, bbox.top + bbox.height);
    ctx.stroke();
    ctx.fillStyle = colour('budget');
    ctx.font = `600 ${12 * devicePixelRatio}px system-ui`;
    const text = `budget ${milliseconds(this.budget)}`;
    const fits = x + ctx.measureText(text).width <= ctx.canvas.width;
    ctx.textAlign = fits ? 'left' : 'right';
    ctx.textBaseline = 'bottom';
    ctx.fillText(text, x, bbox.top - 3 * devicePixelRatio);
    ctx.restore();
  }

  drawMarks() {
    const pen = new Pen(this.plot);
    this.marks = [];
    const onFrontier = new Set(this.model.frontier);
    for (const variant of this.model.variants) {
      const place = this.place(variant.latency_ms, variant.quality);
      if (onFrontier.has(variant.id)) pen.dot(place, 3.5, colour('frontier'));
      else pen.ring(place, 3, colour('other'), 1.25);
      this.remember(place, `${variant.name}: ${milliseconds(variant.latency_ms)}, ${percent(variant.quality)}`);
    }
    const now = performance.now();
    const [late, others] = [true, false].map((missed) => this.answers.filter((a) => (a.met === false) === missed));
    for (const answer of [...others, ...late]) { // crosses on top: many dots may be at one place
      pen.fade = Math.max(0.15, 1 - (now - answer.at) / (1000 * SHOWN_S));
      this.drawAnswer(pen, answer);
    }
    pen.fade = 1;
    if (this.last) {
      const place = this.drawAnswer(pen, this.last);
      pen.ring(place, 10, colour(this.last.met === false ? 'missed' : 'met'), 2);
    }
  }

  /** Draw an answer: the shape, not only the colour, says whether it met its budget. */
  drawAnswer(pen, answer) {
    const place = this.place(answer.latency_ms, answer.quality);
    if (answer.met === false) pen.cross(place, 4.5, colour('missed'));
    else if (answer.met) pen.dot(place, 4.5, colour('met'));
    else pen.ring(place, 4, colour('met'), 1.5);
    const budget = answer.budget_ms ? `budget of ${milliseconds(answer.budget_ms)} ` : 'budget ';
    const verdict = { true: `${budget}met`, false: `${budget}missed` }[answer.met] ?? 'no budget';
    const name = this.byVariant.get(answer.variant_id)?.name ?? '';
    this.remember(place, `answer by ${name}: ${milliseconds(answer.latency_ms)}, ${percent(answer.quality)}, ${verdict}`);
    return place;
  }

  /** Pixels of a mark; what is beyond the chart is put at its edge. */
  place(latencyMs, quality) {
    const [low, high] = this.range;
    const x = this.plot.valToPos(Math.min(high, Math.max(low, latencyMs)), 'x', true);
    return [x, this.plot.valToPos(this.y(quality), 'y', true)];
  }

  remember([x, y], text) {
    const { left, top } = this.plot.bbox;
    this.marks.push({ x: (x - left) / devicePixelRatio, y: (y - top) / devicePixelRatio, text });
  }

  /** Say what the mark next to the pointer is. */
  showTip() {
    if (!this.tip) return;
    const { left, top } = this.plot.cursor;
    const far = (mark) => Math.hypot(mark.x - left, mark.y - top);
    const nearest = left < 0 ? null : this.marks.reduce((best, mark) => (best && far(best) < far(mark) ? best : mark), null);
    this.tip.hidden = !nearest || far(nearest) > NEAR;
    if (this.tip.hidden) return;
    this.tip.textContent = nearest.text;
    const x = this.plot.over.offsetLeft + nearest.x;
    const most = this.box.clientWidth - this.tip.offsetWidth - 4;
    this.tip.style.left = `${Math.max(4, Math.min(most, x - this.tip.offsetWidth / 2))}px`;
    this.tip.style.top = `${this.plot.over.offsetTop + nearest.y - this.tip.offsetHeight - 12}px`;
  }
}

/** Pixels that the labels of the ticks take, with their gap. */
const tickWidth = (_, labels) => 14 + 7 * Math.max(2, ...(labels ?? []).map((text) => text.length));

/** Marks on the canvas of a plot; sizes in CSS pixels. */
class Pen {
  constructor(plot) { this.ctx = plot.ctx; this.scale = devicePixelRatio; this.fade = 1; }

  path(draw, colour_, width) {
    const { ctx } = this;
    ctx.save();
    ctx.globalAlpha = this.fade;
    ctx.beginPath();
    draw(ctx);
    if (width) {
      Object.assign(ctx, { strokeStyle: colour_, lineWidth: width * this.scale, lineCap: 'round' });
      ctx.stroke();
    } else {
      ctx.fillStyle = colour_;
      ctx.fill();
    }
    ctx.restore();
  }

  dot([x, y], radius, colour_) { this.path((c) => c.arc(x, y, radius * this.scale, 0, 7), colour_, 0); }

  ring([x, y], radius, colour_, width) { this.path((c) => c.arc(x, y, radius * this.scale, 0, 7), colour_, width); }

  cross([x, y], size, colour_) {
    const s = size * this.scale;
    this.path((c) => {
      c.moveTo(x - s, y - s); c.lineTo(x + s, y + s);
      c.moveTo(x + s, y - s); c.lineTo(x - s, y + s);
    }, colour_, 2.25);
  }
}

/** Round values in a range for a logarithmic axis; only powers of ten and their halves if narrow. */
function oneTwoFive(low, high, narrow) {
  const steps = narrow ? [1] : [1, 2, 5];
  const values = [];
  for (let power = Math.floor(Math.log10(low)); power <= Math.log10(high); power += 1) {
    values.push(...steps.map((step) => Number(`${step}e${power}`)));
  }
  return values.filter((value) => value >= low && value <= high);
}

const tick = (value) => (value >= 1 ? String(value) : plainMilliseconds(value).replace(/0+$/, ''));
