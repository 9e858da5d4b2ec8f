// The page: which model is shown, what is sent, and how often the server is asked for figures.

import * as api from './api.js';
import { clearAnswers, showAnswer, showNote, showRefusal, showWriting } from './answers.js';
import { BudgetSlider } from './budget.js';
import { FrontierChart, latencyRange } from './chart.js';
import { byId, element } from './dom.js';
import { Figures } from './figures.js';
import { capitalised, count, milliseconds, percent } from './format.js';
import { chosenImage, maxTokens, prompt, showInputs, takeUpload } from './inputs.js';

const POLL_MS = 1000;
const MODELS_EVERY = 15; // polls between two looks at the models, whose latencies change slowly
const REPEAT_MS = 250;

const slider = new BudgetSlider((budget) => { chart.setBudget(budget); if (isImages()) send(); });
const chart = new FrontierChart((left, width) => slider.align(left, width));
const figures = new Figures();

let models = [];
let model = null;
let sending = false;
let sendAgain = false; // the budget has moved while a request was on its way
let known = { replica: '', number: 0 }; // the last answer that the server has shown
let newest = new Map(); // by replica: the highest number of an answer that is shown
let polls = 0;

const isImages = () => model?.kind === 'images';

// ---- models

async function loadModels() {
  const answer = await api.fetchModels();
  models = answer.models;
  byId('replica').textContent = answer.replica;
  byId('state').textContent = answer.serving ? 'serving' : 'not serving';
  byId('state').className = `state ${answer.serving ? 'good' : 'bad'}`;
  show(models.length ? 'app' : 'loading');
  byId('forget').hidden = !api.token.get();
  fillPicker();
  const same = models.find((m) => m.name === model?.name);
  if (!same) {
    const wanted = decodeURIComponent(location.hash.slice(1));
    if (models.length) showModel(models.find((m) => m.name === wanted) ?? models[0]);
  } else {
    model = same;
    chart.update(model);
  }
}

function fillPicker() {
  const names = models.map((m) => m.name);
  const select = byId('model');
  byId('picker').hidden = names.length < 2;
  if ([...select.options].map((option) => option.value).join('\n') === names.join('\n')) return;
  select.replaceChildren(...names.map((name) => element('option', { value: name, textContent: name })));
}

function showModel(next) {
  model = next;
  byId('model').value = model.name;
  known = { replica: '', number: 0 };
  newest = new Map();
  const range = latencyRange(model);
  const slowest = Math.max(...model.frontier.map((id) => model.variants.find((v) => v.id === id).latency_ms));
  describe();
  clearAnswers();
  figures.setModel(model);
  slider.setRange(range, Math.min(range[1], 2 * slowest + (isImages() ? 2 : 0)));
  chart.budget = slider.value;
  chart.setModel(model, range);
  showInputs(model).catch(fail);
}

function describe() {
  const what = model.kind === 'text' ? 'path' : 'network';
  byId('about').textContent = `${model.name}: ${count(model.variants.length, what)} in one set of weights, measured on this machine`;
  byId('legend-other').textContent = `other ${what}`;
  byId('budget-label').textContent = model.kind === 'text' ? 'Budget of a token' : 'Latency budget';
  byId('budget-hint').textContent = model.kind === 'text'
    ? 'The mean time between tokens. Press Send to write with this budget.'
    : 'From arrival to answer, at the server. The frontier shows compute alone, so answers lie to its right.';
  const latency = model.kind === 'text' ? 'Token' : 'Latency';
  byId('th-latency').textContent = latency;
  for (const id of ['th-name', 'th-log-name']) byId(id).textContent = model.kind === 'text' ? 'Path' : 'Stitch';
  byId('th-quality').textContent = capitalised(model.quality_metric);
  const line = model.frontier.map((id) => model.variants.find((v) => v.id === id));
  byId('frontier-rows').replaceChildren(...line.map((v) => element('tr', {},
    element('th', { scope: 'row', textContent: v.name }),
    element('td', { className: 'number', textContent: milliseconds(v.latency_ms) }),
    element('td', { className: 'number', textContent: percent(v.quality) }))));
  const [first, last] = [line[0], line.at(-1)];
  byId('chart-summary').textContent = `${count(line.length, what)} on the frontier, from ${first.name} (${milliseconds(first.latency_ms)}, ${percent(first.quality)}) to ${last.name} (${milliseconds(last.latency_ms)}, ${percent(last.quality)}).`;
}

// ---- requests

/** Send a request with the budget of now; one at a time, and again if the budget moved meanwhile. */
async function send() {
  if (sending) { sendAgain = true; return; }
  sending = true;
  const [asked, budget] = [model, slider.value];
  try {
    const answer = asked.kind === 'text' ? await writeText(asked, budget) : await classify(asked, budget);
    if (answer && asked.name === model.name) chart.setLast(answer);
    poll(false);
  } catch (error) {
    if (error.status === 401 || error.status === 403) fail(error);
    else if (error instanceof api.CallFailed) showRefusal(error, budget);
    else showRefusal({ message: `The server does not answer: ${error.message}`, code: 'UNREACHABLE' }, budget);
  } finally {
    sending = false;
  }
  if (sendAgain && isImages()) { sendAgain = false; send(); }
}

async function classify(asked, budget) {
  const image = chosenImage();
  if (!image) { showNote('Choose an image of your own first.'); return null; }
  const fields = { ...image, budget_ms: budget, hard: byId('hard').checked };
  const answer = await api.predict(asked.name, fields);
  answer.latency_ms = answer.total_ms;
  // the server computes with instants, which may change the last digits of a small budget
  if (Math.abs(answer.budget_ms / budget - 1) < 0.01) answer.budget_ms = budget;
  answer.detail = `queue ${milliseconds(answer.queue_ms)}, compute ${milliseconds(answer.compute_ms)}`;
  showAnswer(asked, answer);
  return answer;
}

async function writeText(asked, budget) {
  let text = '';
  const start = prompt();
  showWriting(start, text);
  const answer = await api.generate(asked.name, start, maxTokens(), budget, (part) => {
    text += part;
    showWriting(start, text);
  });
  Object.assign(answer, {
    met: answer.budgets_met, latency_ms: answer.mean_token_ms, budget_ms: budget,
    detail: `first token ${milliseconds(answer.first_token_ms)}, answer ${milliseconds(answer.total_ms)}`,
  });
  showAnswer(asked, answer, start, text);
  return answer;
}

// ---- figures

/** Ask for what has happened since the last time; other callers' answers become marks, too. */
async function poll(again = true) {
  let wait = POLL_MS;
  if (model && !document.hidden) {
    try {
      if (again && (polls += 1) % MODELS_EVERY === 0) await loadModels();
      take(await api.fetchFigures(model.name, known.replica, known.number));
    } catch (error) {
      if (error.status === 401 || error.status === 403) fail(error);
      else if (!(error instanceof api.CallFailed)) setUnreachable();
      wait = Math.max(POLL_MS, 1000 * (error.retryAfterS || 1));
    }
  } else if (!model) {
    await loadModels().catch(fail);
  }
  if (again) setTimeout(poll, wait);
}

function take(found) {
  if (found.model !== model.name) return; // the user has picked another one meanwhile
  const shown = newest.get(found.replica) ?? 0;
  const isRestarted = found.number < shown; // its numbers begin again
  const fresh = found.answers.filter((answer) => isRestarted || answer.number > shown);
  newest.set(found.replica, found.number);
  known = { replica: found.replica, number: found.number };
  chart.add(fresh.map((answer) => ({
    ...answer,
    latency_ms: model.kind === 'text' ? answer.token_ms ?? answer.total_ms : answer.total_ms,
    at: performance.now() - 1000 * answer.age_s,
  })));
  chart.redraw();
  const now = found.slowdown.toFixed(found.slowdown < 10 ? 1 : 0);
  byId('slowdown').textContent = `Measured on ${model.device}, ${count(model.threads, 'thread')}; compute now takes ${now} times as long.`;
  figures.take(found);
}

// ---- access and start

function show(id) {
  for (const name of ['login', 'loading', 'app']) byId(name).hidden = name !== id;
}

function fail(error) {
  if (error.status === 401 || error.status === 403) {
    if (byId('login').hidden) {
      byId('token-error').textContent = api.token.get() ? error.message : '';
      api.token.forget();
      model = null;
      show('login');
      byId('token').focus();
    }
    byId('state').textContent = 'locked';
    byId('replica').textContent = '';
    byId('forget').hidden = true;
  } else {
    setUnreachable();
  }
}

function setUnreachable() {
  byId('state').textContent = 'no answer';
  byId('state').className = 'state bad';
  polls = -1; // ask for the models next: the server may have been started again
}

byId('token-form').addEventListener('submit', (event) => {
  event.preventDefault();
  api.token.set(byId('token').value.trim());
  byId('token').value = '';
  byId('login').hidden = true;
  loadModels().catch(fail);
});
byId('forget').addEventListener('click', () => { api.token.forget(); location.reload(); });
byId('model').addEventListener('change', (event) => {
  location.hash = encodeURIComponent(event.target.value);
  showModel(models.find((m) => m.name === event.target.value));
});
byId('try').addEventListener('submit', (event) => { event.preventDefault(); send(); });
byId('examples').addEventListener('change', send);
byId('upload').addEventListener('change', async (event) => {
  const [file] = event.target.files;
  if (!file) return;
  event.target.value = ''; // so that the same file can be chosen again
  try {
    await takeUpload(file);
  } catch {
    showRefusal({ message: `${file.name}: expected a PNG or JPEG image`, code: 'INVALID_ARGUMENT' }, slider.value);
    return;
  }
  send();
});
setInterval(() => { if (byId('repeat').checked && model && !document.hidden) send(); }, REPEAT_MS);
document.addEventListener('visibilitychange', () => { if (!document.hidden) poll(false); });
poll();
