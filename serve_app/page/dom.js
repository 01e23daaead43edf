/** All elements are made here. Input from people and the service is inserted as text only, never as HTML. */

/** Return the element with an id of index.html. */
export const byId = (id) => document.getElementById(id);

/**
 * Make an element. `props` are properties (`className`), listeners (`onclick`) or else attributes
 * (`aria-label`). Children are elements or strings; null is skipped.
 */
export function el(tag, props = {}, ...children) {
  const node = document.createElement(tag);
  for (const [name, value] of Object.entries(props)) {
    if (name.startsWith("on")) node.addEventListener(name.slice(2), value);
    else if (name in node) node[name] = value;
    else node.setAttribute(name, value);
  }
  node.append(...children.filter((child) => child !== null));
  return node;
}

let labels = 0;

/** Return a field with an input and its label. */
export function labelled(text, input) {
  input.id ||= `input-${(labels += 1)}`;
  return el("div", { className: "field" }, el("label", { htmlFor: input.id }, text), input);
}
