// Numbers with their units, the same way everywhere.

/** Milliseconds with two significant digits or more: 0.42 ms, 4.2 ms, 42 ms, 1.2 s. */
export function milliseconds(value) {
  if (value === null || value === undefined) return '–';
  if (value >= 1000) return `${(value / 1000).toFixed(value < 10000 ? 1 : 0)} s`;
  return `${plainMilliseconds(value)} ms`;
}

/** The same without a unit, for pairs such as "0.4 of 2.0 ms" and for axes. */
export function plainMilliseconds(value) {
  if (value >= 10) return value.toFixed(0);
  if (value >= 1) return value.toFixed(1);
  if (value >= 0.1) return value.toFixed(2);
  return value.toPrecision(2);
}

/** Both of a pair without units, with as many digits as tell different values apart. */
export function plainPair(one, other) {
  const [a, b] = [one, other].map(plainMilliseconds);
  if (a !== b || one === other) return [a, b];
  for (let digits = 3; digits < 7; digits += 1) {
    const longer = [one, other].map((value) => value.toPrecision(digits));
    if (longer[0] !== longer[1]) return longer;
  }
  return [a, b];
}

/** A share as a percentage. */
export function percent(share, digits = 1) {
  return share === null || share === undefined ? '–' : `${(100 * share).toFixed(digits)} %`;
}

/** A count with its noun: "1 budget", "2 budgets". */
export function count(number, noun) {
  return `${number.toLocaleString('en')} ${noun}${number === 1 ? '' : 's'}`;
}

/** A metric as a heading: "top-1 accuracy" becomes "Top-1 accuracy". */
export function capitalised(text) {
  return text ? text[0].toUpperCase() + text.slice(1) : 'Quality';
}
