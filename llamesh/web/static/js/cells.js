// What the states of a model on a node are called, and how they look.

const DOWNLOADS = {
  needed: { look: "idle", text: "to download" },
  coming: { look: "busy", text: "downloading" },
};

const CELLS = {
  loaded: { look: "good", text: "loaded" },
  loading: { look: "busy", text: "loading" },
  fits: { look: "idle", text: "fits" },
  needs_eviction: { look: "idle", text: "needs eviction" },
  missing: { look: "off", text: "file missing" },
  never: { look: "off", text: "can't run here" },
  failed: { look: "bad", text: "failed" },
  unknown: { look: "off", text: "not known" },
};

/** Look and text of a cell. What has to be fetched isn't a mistake; a file that isn't there is one. */
export const faceOf = (cell) => (cell.state === "missing" && DOWNLOADS[cell.download]) || CELLS[cell.state] || CELLS.unknown;
