// A stitch as a strip of cells: the blocks of each anchor, or the tokens of each path.

import { element } from './dom.js';
import { count } from './format.js';

const SHADES = 5;
const MAX_CELLS = 64; // more are drawn in proportion

/** The strip of an image model's network, or of a path: which anchor runs which blocks. */
export function stages(model, variant) {
  const anchors = 1 + Math.max(0, ...model.variants.flatMap((v) => v.stages.map((s) => s.anchor)));
  const parts = variant.stages.map((stage) => ({
    size: stage.last - stage.first + 1,
    rank: anchors > 1 ? stage.anchor / (anchors - 1) : 1,
  }));
  const labels = variant.stages.map((s) => `anchor ${s.anchor}, blocks ${s.first}–${s.last}`);
  const most = Math.max(...model.variants.map((v) => sizeOf(v.stages)));
  return strip(parts, most, labels, ' → ', variant.precision === 'int8' ? ', 8-bit' : '');
}

/** The strip of an answer: how many tokens each path wrote, in order. */
export function tokensByPath(model, spans) {
  const bySpeed = [...model.variants].sort((a, b) => a.latency_ms - b.latency_ms).map((v) => v.id);
  const last = Math.max(1, bySpeed.length - 1);
  const parts = spans.map((span) => ({ size: span.tokens, rank: bySpeed.indexOf(span.variant_id) / last }));
  const labels = sumByPath(spans).map(([name, tokens]) => `${name}, ${count(tokens, 'token')}`);
  return strip(parts, parts.reduce((total, part) => total + part.size, 0), labels, ' · ');
}

/** The tokens of each path, in order of first use: the strip shows when each was used. */
export function sumByPath(spans) {
  const sums = new Map();
  for (const span of spans) {
    sums.set(span.variant_name, (sums.get(span.variant_name) ?? 0) + span.tokens);
  }
  return [...sums];
}

const sizeOf = (some) => some.reduce((total, stage) => total + stage.last - stage.first + 1, 0);

/** Cells of `parts` on a line of `most`, so that a short stitch is a short strip. */
function strip(parts, most, labels, between, suffix = '') {
  const bar = element('div', { className: 'strip' });
  const line = element('p', { className: 'small' });
  for (const [index, label] of labels.entries()) { // a name breaks at no hyphen
    if (index) line.append(between);
    line.append(element('span', { className: 'whole', textContent: label }));
  }
  line.append(suffix);
  for (const part of parts) {
    const shade = `shade-${Math.round(part.rank * (SHADES - 1))}`;
    const cells = Math.max(1, Math.round(part.size * Math.min(1, MAX_CELLS / most)));
    for (let cell = 0; cell < cells; cell += 1) {
      bar.append(element('span', { className: `block ${shade}${cell ? '' : ' first'}` }));
    }
  }
  bar.style.width = `${(100 * sizeOfParts(parts)) / most}%`;
  bar.setAttribute('aria-hidden', 'true'); // the labels say the same
  return element('div', { className: 'stitch' }, bar, line);
}

const sizeOfParts = (parts) => parts.reduce((total, part) => total + part.size, 0);
