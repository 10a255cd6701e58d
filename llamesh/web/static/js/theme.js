// The colours: as the system says, light or dark. A plain script, so that it is done before anything is drawn.
"use strict";

(() => {
  const NAME = "llamesh-theme"; // a preference and no secret: it may stay
  const MODES = ["auto", "light", "dark"];
  const dark = window.matchMedia("(prefers-color-scheme: dark)");
  let mode = "auto";
  try {
    const kept = localStorage.getItem(NAME);
    if (MODES.includes(kept)) mode = kept;
  } catch {
    // Storage may be forbidden; then the choice lasts as long as the page.
  }

  function apply() {
    const look = mode === "auto" ? (dark.matches ? "dark" : "light") : mode;
    document.documentElement.dataset.theme = look;
    const button = document.getElementById("theme");
    if (button) {
      button.textContent = mode[0].toUpperCase() + mode.slice(1);
      button.setAttribute("aria-label", `Colours: ${mode}`);
    }
  }

  function next() {
    mode = MODES[(MODES.indexOf(mode) + 1) % MODES.length];
    try {
      localStorage.setItem(NAME, mode);
    } catch {
      // See above.
    }
    apply();
  }

  dark.addEventListener("change", apply);
  document.addEventListener("DOMContentLoaded", () => {
    document.getElementById("theme").addEventListener("click", next);
    apply();
  });
  apply();
})();
