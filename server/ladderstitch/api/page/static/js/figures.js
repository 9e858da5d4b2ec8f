// The last five minutes: attainment, quality and queue, as numbers, small charts and by replica.

import { byId, colour, element } from './dom.js';
import { count, percent } from './format.js';

const LOST_S = 30; // seconds after which a replica that has not answered is left out
const LINES = ['frontier', 'missed', 'met', 'muted']; // colours of replicas, which repeat

export class Figures {
  constructor() {
    this.replicas = new Map(); // by name: the figures, and when they came
    this.charts = [
      new SmallChart('attainment-chart', (b) => b.attainment, 100, '%', [-4, 104]),
      new SmallChart('quality-chart', (b) => b.quality, 100, '%'),
      new SmallChart('queue-chart', (b) => b.longest_queue, 1, '', [-0.2, null]),
    ];
  }

  setModel(model) {
    this.replicas.clear();
    byId('quality-title').textContent = `Mean ${model.quality_metric || 'quality'}`;
  }

  /** Take the figures of the replica that answered, and show those of all that did recently. */
  take(figures) {
    const now = performance.now();
    this.replicas.set(figures.replica, { figures, at: now });
    for (const [name, { at }] of this.replicas) {
      if (now - at > 1000 * LOST_S) this.replicas.delete(name);
    }
    const all = [...this.replicas.values()].map((entry) => entry.figures);
    this.showTotals(all);
    this.showReplicas(all);
    for (const chart of this.charts) chart.show(all);
  }

  showTotals(all) {
    const sum = (field) => all.reduce((total, f) => total + f.total[field], 0);
    const [met, missed, answered] = ['met', 'missed', 'answered'].map(sum);
    byId('attainment').textContent = percent(met + missed ? met / (met + missed) : null);
    byId('attainment-about').textContent = met + missed
      ? `${missed ? `${missed.toLocaleString('en')} of ` : 'all '}${count(met + missed, 'budget')} ${missed ? 'missed' : 'met'}`
      : 'no request with a budget yet';
    const weighted = all.filter((f) => f.total.quality !== null);
    const weight = weighted.reduce((total, f) => total + f.total.answered, 0);
    const mean = weighted.reduce((total, f) => total + f.total.quality * f.total.answered, 0) / weight;
    byId('quality').textContent = percent(weight ? mean : null);
    byId('quality-about').textContent = answered ? `over ${count(answered, 'answer')}` : 'no answer yet';
    byId('queue').textContent = all.reduce((total, f) => total + f.queue, 0).toLocaleString('en');
    byId('queue-about').textContent = `waiting now; longest ${Math.max(...all.map((f) => f.total.longest_queue))}`;
    byId('figures-about').textContent = all.length > 1 ? `all callers of ${count(all.length, 'replica')}` : `all callers of replica ${all[0].replica}`;
  }

  showReplicas(all) {
    byId('replicas-card').hidden = all.length < 2;
    byId('replicas').replaceChildren(...all.map((f) => row([
      f.replica, percent(f.total.attainment), percent(f.total.quality), String(f.queue),
      f.total.answered.toLocaleString('en'), f.total.rejected.toLocaleString('en'),
    ])));
  }
}

function row([name, ...numbers]) {
  return element('tr', {}, element('th', { scope: 'row', textContent: name }),
    ...numbers.map((text) => element('td', { className: 'number', textContent: text })));
}

/** The points that no line shows: those without a neighbour. */
function lonely(plot, series) {
  const values = plot.data[series];
  return [...values.keys()].filter((i) => values[i] !== null && (values[i - 1] ?? null) === null && (values[i + 1] ?? null) === null);
}

/** One line per replica over five minutes; gaps where there was nothing to measure. */
class SmallChart {
  constructor(id, read, factor, unit, range = null) {
    Object.assign(this, { box: byId(id), read, factor, unit, range, plot: null, lines: 0 });
    new ResizeObserver(() => this.plot?.setSize(this.size())).observe(this.box);
    matchMedia('(prefers-color-scheme: dark)').addEventListener('change', () => { this.lines = 0; });
  }

  size() { return { width: Math.max(120, this.box.clientWidth), height: 96 }; }

  show(all) {
    const { series, bucket_s: step } = all[0];
    const times = series.map((_, index) => (index + 1 - series.length) * step);
    const data = [times, ...all.map((f) => f.series.map((bucket) => {
      const value = this.read(bucket);
      return value === null ? null : this.factor * value;
    }))];
    if (this.lines !== all.length) {
      this.plot?.destroy();
      this.lines = all.length;
      this.plot = new window.uPlot(this.options(all.length), data, this.box);
    } else {
      this.plot.setData(data);
    }
  }

  limits(low, high) {
    if (low === null || high === null) return this.range?.[1] ? this.range : [0, 1];
    if (this.range) return [this.range[0], this.range[1] ?? Math.max(4.2, high * 1.1)];
    const margin = Math.max(0.25, 0.15 * (high - low)); // whole numbers, so that two ticks have room
    return [Math.floor(low - margin), Math.min(100, Math.ceil(high + margin))];
  }

  options(lines) {
    const axis = { stroke: colour('muted'), grid: { stroke: colour('grid'), width: 1 }, ticks: { show: false }, font: '11px system-ui' };
    const unit = this.unit ? ` ${this.unit}` : '';
    const integers = this.unit ? {} : { incrs: [1, 2, 5, 10, 20, 50, 100, 200, 500, 1000] };
    return {
      ...this.size(),
      padding: [8, 20, 0, 0],
      legend: { show: false },
      cursor: { show: false },
      scales: { x: { time: false, range: [-295, 0] }, y: { range: (_, low, high) => this.limits(low, high) } },
      axes: [
        { ...axis, splits: () => [-240, -120, 0], values: () => ['−4 min', '−2 min', 'now'], size: 22 },
        { ...axis, ...integers, values: (_, splits) => splits.map((v) => `${Number(v.toFixed(1))}${unit}`), size: 50, space: 28, splits: this.range?.[1] ? () => [0, 50, 100] : undefined },
      ],
      series: [{}, ...Array.from({ length: lines }, (_, index) => ({
        stroke: colour(LINES[index % LINES.length]), width: 2, spanGaps: false, points: { show: true, size: 4, filter: lonely },
      }))],
    };
  }
}

