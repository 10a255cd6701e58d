// Making elements, and changing them in place. Whatever comes from data becomes text, never markup.

export const at = (id) => document.getElementById(id);

/** An element with text, class and children; `attributes` are set as they are. */
export function el(name, { text, look, ...attributes } = {}, ...children) {
  const made = document.createElement(name);
  if (text !== undefined) made.textContent = text;
  if (look) made.className = look;
  for (const [key, value] of Object.entries(attributes)) {
    if (value === true) made.setAttribute(key, "");
    else if (value !== false && value !== null && value !== undefined) made.setAttribute(key, value);
  }
  made.append(...children);
  return made;
}

export function button(text, onClick, { look = "small", ...attributes } = {}) {
  const made = el("button", { text, look, type: "button", ...attributes });
  made.addEventListener("click", onClick);
  return made;
}

// Each of these touches the page only where something is different: a selection stays, nothing flickers.

export function setText(element, text) {
  if (element.textContent !== text) element.textContent = text;
}

export function setAttribute(element, name, value) {
  if (value === null || value === undefined || value === "") element.removeAttribute(name);
  else if (element.getAttribute(name) !== String(value)) element.setAttribute(name, String(value));
}

export function setLook(element, look) {
  if (element.dataset.look !== look) element.dataset.look = look;
}

export function show(element, shown) {
  if (element.hidden === shown) element.hidden = !shown;
}

/**
 * Keep the children of `parent` in step with `items`: one child for each key, made once, updated each time.
 * `make(item)` returns an element or an object with `root`; `update(made, item)` fills it in.
 */
export function keyed(parent, items, keyOf, make, update) {
  const rows = (parent.keyedRows ??= new Map());
  const wanted = new Set();
  let place = parent.firstElementChild;
  for (const item of items) {
    const key = keyOf(item);
    if (wanted.has(key)) continue; // the same thing told twice
    wanted.add(key);
    let made = rows.get(key);
    if (!made) rows.set(key, (made = make(item)));
    update(made, item);
    const root = made.root ?? made;
    if (root === place) place = place.nextElementSibling;
    else parent.insertBefore(root, place);
  }
  for (const [key, made] of rows) {
    if (wanted.has(key)) continue;
    (made.root ?? made).remove();
    rows.delete(key);
  }
}

/** Options of a select, changed only when they differ; the choice stays where it can. */
export function setOptions(select, pairs) {
  const now = JSON.stringify(pairs);
  if (select.dataset.options === now) return;
  select.dataset.options = now;
  const chosen = select.value;
  select.replaceChildren(...pairs.map(([value, text]) => new Option(text, value, false, value === chosen)));
}

/** A dot and a word: state in colour, and never in colour alone. */
export function badge() {
  return el("span", { look: "badge" });
}

export function setBadge(element, look, text, title = "") {
  setLook(element, look);
  setText(element, text);
  setAttribute(element, "title", title);
}
