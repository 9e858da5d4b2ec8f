// What the page sends: an example image, an image of the user, or a prompt.

import { fetchExample } from './api.js';
import { byId, element } from './dom.js';

const MAX_SIDE = 1024; // pixels; the server takes images of up to 1 MiB from this page
const DRAWN = 56; // pixels of an example on the page, at most twice as many on fine screens

let own = null; // the user's image in base64

/** Show the inputs of a model's kind, and its examples. */
export async function showInputs(model) {
  byId('images').hidden = model.kind !== 'images';
  byId('prompt-box').hidden = model.kind !== 'text';
  byId('tensors').hidden = model.kind !== 'tensors';
  byId('actions').hidden = model.kind === 'tensors';
  byId('hard-label').hidden = model.kind !== 'images';
  if (model.kind === 'text') byId('tokens').max = Math.max(2, model.max_tokens - 64);
  byId('examples').replaceChildren();
  own = null;
  for (const [index, name] of (model.examples ?? []).entries()) {
    const canvas = addChoice(name, name.replace(/(-\d+)?\.\w+$/, '').replaceAll('-', ' '), !index);
    draw(canvas, await fetchExample(model.name, name));
  }
}

/** The chosen image as fields of a request; null without one. */
export function chosenImage() {
  const chosen = document.querySelector('input[name=image]:checked');
  if (!chosen) return null;
  return chosen.value === 'own' ? { image: own } : { example: chosen.value };
}

export const prompt = () => byId('prompt').value;
export const maxTokens = () => Math.max(2, Number(byId('tokens').value) || 2);

/** Take an image of the user as the input; a large one is made smaller. */
export async function takeUpload(file) {
  const bitmap = await createImageBitmap(file);
  const scale = Math.min(1, MAX_SIDE / Math.max(bitmap.width, bitmap.height));
  const canvas = element('canvas', {
    width: Math.max(1, Math.round(bitmap.width * scale)),
    height: Math.max(1, Math.round(bitmap.height * scale)),
  });
  canvas.getContext('2d').drawImage(bitmap, 0, 0, canvas.width, canvas.height);
  own = canvas.toDataURL('image/jpeg', 0.9).split(',')[1];
  byId('own-choice')?.remove();
  const shown = addChoice('own', file.name, true);
  shown.parentElement.id = 'own-choice';
  draw(shown, bitmap);
}

function addChoice(value, name, checked) {
  const input = element('input', { type: 'radio', name: 'image', value, checked });
  const canvas = element('canvas', { width: DRAWN, height: DRAWN });
  const label = element('label', { className: 'example', title: name }, input, canvas,
    element('span', { className: 'hidden', textContent: name }));
  byId('examples').append(label);
  return canvas;
}

function draw(canvas, bitmap) {
  const scale = Math.max(1, Math.round(window.devicePixelRatio));
  canvas.width = canvas.height = DRAWN * scale;
  const context = canvas.getContext('2d');
  context.imageSmoothingEnabled = bitmap.width > canvas.width; // small images show their pixels
  const side = Math.min(bitmap.width, bitmap.height);
  context.drawImage(bitmap, (bitmap.width - side) / 2, (bitmap.height - side) / 2, side, side,
    0, 0, canvas.width, canvas.height);
}
