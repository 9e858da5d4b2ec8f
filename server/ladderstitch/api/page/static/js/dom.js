// Short names for what every file does with the document.

export const byId = (id) => document.getElementById(id);

/** Return a new element with properties and children; text is never parsed as HTML. */
export function element(tag, properties = {}, ...children) {
  const made = Object.assign(document.createElement(tag), properties);
  made.append(...children);
  return made;
}

/** Return the value of a custom property of the page's colours, which follow the scheme. */
export function colour(name) {
  return getComputedStyle(document.documentElement).getPropertyValue(`--${name}`).trim();
}
