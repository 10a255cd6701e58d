// What the states of a model on a node are called, and how they look.

export const CELLS = {
  loaded: { look: "good", text: "loaded" },
  loading: { look: "busy", text: "loading" },
  fits: { look: "idle", text: "fits" },
  needs_eviction: { look: "idle", text: "needs eviction" },
  missing: { look: "off", text: "file missing" },
  never: { look: "off", text: "can't run here" },
  failed: { look: "bad", text: "failed" },
  unknown: { look: "off", text: "not known" },
};
