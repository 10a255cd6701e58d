// A text field with a list that narrows as one types: the combobox of the ARIA guide.

import { el, setAttribute, show } from "./dom.js";

const SHOWN = 100;

export class Combo {
  constructor(input, list) {
    Object.assign(this, { input, list, items: [], marked: -1, value: "" });
    input.addEventListener("focus", () => input.select());
    input.addEventListener("click", () => {
      input.select(); // what is typed next takes the place of the choice
      this.open("");
    });
    input.addEventListener("input", () => this.open(input.value));
    input.addEventListener("keydown", (event) => this.key(event));
    input.addEventListener("blur", () => this.close());
    // Before the field loses the focus, and with it the list.
    list.addEventListener("pointerdown", (event) => {
      event.preventDefault();
      const option = event.target.closest("[role=option]");
      if (option) this.choose(option.dataset.value);
    });
  }

  /** items: [{value, note, rank}]. The choice stays; without one that of the least rank is taken. */
  setItems(items) {
    this.items = items;
    if (!items.some((one) => one.value === this.value) && items.length) {
      this.value = items.reduce((best, one) => (one.rank < best.rank ? one : best)).value;
      if (document.activeElement !== this.input) this.input.value = this.value;
    }
    if (!items.length) this.input.value = this.value = "";
  }

  open(sought) {
    const wanted = sought.trim().toLowerCase();
    const found = this.items.filter((one) => `${one.value} ${one.note}`.toLowerCase().includes(wanted)).slice(0, SHOWN);
    this.list.replaceChildren(...found.map((one, index) => el("li", {
      role: "option", id: `${this.list.id}-${index}`, "data-value": one.value,
      "aria-selected": String(one.value === this.value),
    }, el("span", { text: one.value }), el("small", { text: one.note, look: "dim" }))));
    if (!found.length) this.list.append(el("li", { text: "no model is called so", look: "dim" }));
    show(this.list, true);
    setAttribute(this.input, "aria-expanded", "true");
    this.mark(found.length ? Math.max(0, found.findIndex((one) => one.value === this.value)) : -1);
  }

  close() {
    show(this.list, false);
    setAttribute(this.input, "aria-expanded", "false");
    setAttribute(this.input, "aria-activedescendant", "");
    this.input.value = this.value;
  }

  mark(index) {
    const options = [...this.list.querySelectorAll("[role=option]")];
    this.marked = options.length ? (index + options.length) % options.length : -1;
    options.forEach((option, at) => option.classList.toggle("marked", at === this.marked));
    options[this.marked]?.scrollIntoView({ block: "nearest" });
    setAttribute(this.input, "aria-activedescendant", options[this.marked]?.id);
  }

  choose(value) {
    this.value = value;
    this.close();
  }

  key(event) {
    if (event.key === "ArrowDown" || event.key === "ArrowUp") {
      event.preventDefault();
      if (this.list.hidden) this.open("");
      else this.mark(this.marked + (event.key === "ArrowDown" ? 1 : -1));
    } else if (event.key === "Enter" && !this.list.hidden) {
      event.preventDefault();
      const option = this.list.querySelector(".marked");
      if (option) this.choose(option.dataset.value);
    } else if (event.key === "Escape" && !this.list.hidden) {
      event.preventDefault();
      this.close();
    }
  }
}
