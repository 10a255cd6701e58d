// Numbers as people read them. Null is "not known" and becomes a dash.

const DASH = "–";
const known = (value) => value !== null && value !== undefined && Number.isFinite(value);
const grouped = new Intl.NumberFormat("en");

export const count = (value) => (known(value) ? grouped.format(value) : DASH);

/** MiB in, with its unit: "812 MiB", "23.5 GiB". */
export function size(mib) {
  if (!known(mib)) return DASH;
  if (Math.abs(mib) < 1000) return `${Math.round(mib)} MiB`;
  const gib = mib / 1024;
  return `${gib < 100 ? gib.toFixed(1) : Math.round(gib)} GiB`;
}

export function speed(perSecond) {
  if (!known(perSecond)) return DASH;
  return perSecond >= 100 ? Math.round(perSecond).toString() : perSecond.toFixed(1);
}

/** Milliseconds in: "0.8 ms", "340 ms", "2.41 s", "1 min 20 s". */
export function duration(ms) {
  if (!known(ms)) return DASH;
  if (ms < 1) return ms === 0 ? "0 ms" : `${ms.toFixed(1)} ms`;
  if (ms < 1000) return `${Math.round(ms)} ms`;
  if (ms < 10_000) return `${(ms / 1000).toFixed(2)} s`;
  if (ms < 60_000) return `${(ms / 1000).toFixed(1)} s`;
  return age(ms / 1000);
}

/** Seconds in, roughly: "42 s", "3 min 20 s", "5 h 10 min", "2 d 4 h". */
export function age(seconds) {
  if (!known(seconds)) return DASH;
  const whole = Math.max(0, Math.floor(seconds));
  if (whole < 60) return `${whole} s`;
  if (whole < 3600) return `${Math.floor(whole / 60)} min ${whole % 60} s`;
  if (whole < 86_400) return `${Math.floor(whole / 3600)} h ${Math.floor((whole % 3600) / 60)} min`;
  return `${Math.floor(whole / 86_400)} d ${Math.floor((whole % 86_400) / 3600)} h`;
}

export const clock = (unix) => new Date(unix * 1000).toTimeString().slice(0, 8);
export const clockShort = (unix) => new Date(unix * 1000).toTimeString().slice(0, 5);
export const moment = (unix) => new Date(unix * 1000).toLocaleString();

export const words = (name) => name.replaceAll("_", " ");
export const plural = (n, one, many = `${one}s`) => `${count(n)} ${n === 1 ? one : many}`;

/** "model:default" as clients call it: "model". */
export const publicName = (key) => key.replace(/:default$/, "");
