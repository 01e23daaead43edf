/** The one way in which this page makes elements: what people or the service wrote only ever becomes text. */

/** Return the element with an id of index.html. */
export const byId = (id) => document.getElementById(id);

/**
 * Make an element. `props` are properties (`className`), listeners (`onclick`) or else attributes
 * (`aria-label`); children are elements or texts, and nothing where null.
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

/** Return an input of any kind together with its label, for a grid of them. */
export function labelled(text, input) {
  input.id ||= `input-${(labels += 1)}`;
  return el("div", { className: "field" }, el("label", { htmlFor: input.id }, text), input);
}
