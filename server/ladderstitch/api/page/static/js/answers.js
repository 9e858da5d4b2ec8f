// The answers to this page: the latest one in full, the ones before it as rows.

import { byId, element } from './dom.js';
import { count, milliseconds, percent, plainPair } from './format.js';
import { stages, sumByPath, tokensByPath } from './stitch.js';

const ROWS = 8;
const QUIET_MS = 600; // without a further answer, after which the last one is read aloud

let announcement = 0; // the timer of the text for screen readers
let rows = [];

/** Forget the answers of the model before. */
export function clearAnswers() {
  rows = [];
  showNote('Move the slider, or press Send.');
  byId('log').replaceChildren(element('tr', {}, element('td', { colSpan: 4, className: 'muted', textContent: 'None yet.' })));
}

/** Show a text in the place of an answer. */
export function showNote(text) {
  byId('answer').replaceChildren(element('p', { className: 'muted', textContent: text }));
}

/** Show an answer; `prompt` and `text` are those of a language model, null for an image. */
export function showAnswer(model, answer, prompt = null, text = null) {
  const variant = model.variants.find((v) => v.id === answer.variant_id);
  const strip = answer.spans ? tokensByPath(model, answer.spans) : stages(model, variant);
  const parts = [verdictLine(answer)];
  if (text !== null) parts.push(written(prompt, text.trimEnd()));
  if (answer.top?.length) parts.push(classes(answer.top));
  parts.push(element('h3', { textContent: titleOf(answer), id: 'stitch' }), strip);
  if (answer.quality !== null) {
    const metric = `${percent(answer.quality)} ${model.quality_metric}`;
    parts.push(element('p', { className: 'muted small', textContent: `${metric} on ${model.quality_data}` }));
  }
  byId('answer').replaceChildren(...parts);
  addRow(badge(verdictOf(answer)), timeText(answer), pathsOf(answer), percent(answer.quality));
  announce(`${verdictOf(answer).text}. ${answer.variant_name}, ${timeText(answer)}${answer.top?.length ? `: ${answer.top[0].label}` : ''}.`);
}

/** Show a text that is being written. */
export function showWriting(prompt, text) {
  byId('answer').replaceChildren(written(prompt, text || ' …'));
}

/** The prompt, and what the model has written after it. */
function written(prompt, text) {
  return element('p', { className: 'written' }, element('span', { className: 'muted', textContent: prompt }), text);
}

/** Show that the server refused a request, and why; with a budget, it was missed. */
export function showRefusal(error, budgetMs) {
  const isLate = ['BUDGET_INFEASIBLE', 'EXPIRED_IN_QUEUE', 'EXPIRED_IN_COMPUTE', 'OVERLOADED'].includes(error.code);
  const verdict = { text: isLate ? 'Missed: refused' : 'Refused', mark: '✕', name: 'missed' };
  byId('answer').replaceChildren(
    element('p', { className: 'verdict' }, badge(verdict)),
    element('p', { textContent: error.message }),
  );
  addRow(badge(verdict), `– of ${milliseconds(budgetMs)}`, error.code ?? `HTTP ${error.status}`, '–');
  announce(`${verdict.text}: ${error.message}`);
}

function verdictOf(answer) {
  if (answer.met === false) return { text: 'Missed', mark: '✕', name: 'missed' };
  return answer.met ? { text: 'Met', mark: '✓', name: 'met' } : { text: 'No budget', mark: '○', name: 'free' };
}

function badge({ text, mark, name }) {
  return element('span', { className: `badge ${name}` }, element('span', { textContent: `${mark} `, ariaHidden: 'true' }), text);
}

/** "0.92 of 2.0 ms", or both with their own units if they differ much. */
function timeText(answer) {
  const per = answer.spans ? ' a token' : '';
  if (answer.budget_ms === null) return milliseconds(answer.latency_ms) + per;
  const both = [answer.latency_ms, answer.budget_ms];
  if (Math.max(...both) >= 1000) return `${both.map(milliseconds).join(' of ')}${per}`;
  return `${plainPair(...both).join(' of ')} ms${per}`;
}

function verdictLine(answer) {
  const both = [answer.latency_ms, answer.budget_ms];
  const isShort = answer.budget_ms !== null && Math.max(...both) < 1000;
  const [taken, budget] = isShort ? plainPair(...both).map((text) => `${text} ms`) : both.map(milliseconds);
  const line = element('p', { className: 'verdict' }, badge(verdictOf(answer)),
    element('strong', { className: 'took', textContent: taken }));
  const per = answer.spans ? ' a token' : '';
  if (answer.budget_ms !== null) line.append(element('span', { className: 'muted', textContent: `of ${budget}${per}` }));
  if (answer.detail) line.append(element('span', { className: 'muted small detail', textContent: answer.detail }));
  return line;
}

function classes(top) {
  const list = element('ol', { className: 'classes' });
  for (const { label, probability } of top.slice(0, 3)) {
    const bar = element('span', { className: 'bar', ariaHidden: 'true' }, element('span'));
    bar.firstChild.style.width = `${100 * probability}%`;
    list.append(element('li', {}, element('span', { textContent: label }), bar,
      element('span', { className: 'number', textContent: probability < 0.005 ? '< 1 %' : percent(probability, 0) })));
  }
  return list;
}

/** Add a row; the roles keep it a row of a table where narrow screens lay it out as a grid. */
function addRow(shown, time, stitch, quality) {
  const cell = (className, content) => element('td', { role: 'cell', className }, content);
  rows.unshift(element('tr', { role: 'row' }, cell('', shown), cell('time', time), cell('name', stitch), cell('number', quality)));
  rows = rows.slice(0, ROWS);
  byId('log').replaceChildren(...rows);
}

function titleOf(answer) {
  if (!answer.spans) return `Stitch ${answer.variant_name}`;
  const paths = sumByPath(answer.spans).length;
  const changes = answer.spans.length - 1;
  return changes ? `${count(paths, 'path')}, ${count(changes, 'change')} within the answer` : `Path ${answer.variant_name}`;
}

/** The stitch, or the tokens of each path: "small × 12, large × 36". */
function pathsOf(answer) {
  if (!answer.spans) return answer.variant_name;
  return sumByPath(answer.spans).map(([name, tokens]) => `${name} × ${tokens}`).join(', ');
}

function announce(text) {
  clearTimeout(announcement); // a screen reader could not keep up with a moving slider
  announcement = setTimeout(() => { byId('status').textContent = text; }, QUIET_MS);
}
