// The budget slider. Its scale is the chart's, so that the thumb is below the line it moves.

import { byId } from './dom.js';
import { milliseconds } from './format.js';

const STEPS = 400;
const THUMB = 24; // width in pixels, as in page.css

export class BudgetSlider {
  constructor(onMove) {
    this.input = byId('budget');
    this.range = [1, 10];
    this.input.addEventListener('input', () => { this.show(); onMove(this.value); });
  }

  /** Take the range of the chart, milliseconds, and start at a value inside it. */
  setRange([low, high], start) {
    this.range = [low, high];
    this.input.value = Math.round(STEPS * Math.log(start / low) / Math.log(high / low));
    this.show();
  }

  /** Milliseconds; equal steps of the thumb are equal ratios. */
  get value() {
    const [low, high] = this.range;
    return Number((low * (high / low) ** (this.input.value / STEPS)).toPrecision(3));
  }

  /** Put the track below the plot: its left edge and width are those of the plotting area. */
  align(left, width) {
    this.input.style.marginLeft = `${left - THUMB / 2}px`;
    this.input.style.width = `${width + THUMB}px`;
  }

  show() {
    const text = milliseconds(this.value);
    byId('budget-value').textContent = text;
    this.input.setAttribute('aria-valuetext', text);
  }
}
