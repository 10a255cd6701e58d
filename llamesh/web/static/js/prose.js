// What a model writes, as text that grows: code blocks are set apart, everything else stays as it was written.

import { el } from "./dom.js";

const FENCE = /^ {0,3}(```|~~~)/;

export class Prose {
  constructor(root) {
    this.root = root;
    this.line = ""; // the last one, which may go on
    this.code = null; // the fence that opened the block that we are in
    this.block = null;
    this.tail = null; // the text node of the last line
    this.text = "";
  }

  add(text) {
    this.text += text;
    const parts = text.split("\n");
    parts.forEach((part, index) => {
      if (index) this.endLine();
      if (part) this.grow(part);
    });
  }

  grow(part) {
    this.line += part;
    if (!this.block) this.startBlock();
    if (!this.tail) this.block.append((this.tail = document.createTextNode("")));
    this.tail.data = this.line;
  }

  startBlock() {
    this.block = this.code ? el("code") : el("p");
    this.root.append(this.code ? el("pre", { tabindex: "0" }, this.block) : this.block);
  }

  endLine() {
    const fence = FENCE.exec(this.line)?.[1];
    if (fence && (!this.code || this.code === fence)) {
      this.tail?.remove();
      if (this.block && !this.block.textContent) (this.code ? this.block.parentElement : this.block).remove();
      this.code = this.code ? null : fence;
      this.block = null;
    } else if (this.line === "" && !this.code) {
      this.block = null; // an empty line ends a paragraph
    } else {
      if (!this.block) this.startBlock();
      this.block.append("\n");
    }
    this.line = "";
    this.tail = null;
  }
}
