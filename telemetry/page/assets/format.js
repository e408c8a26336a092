// Numbers as people read them: three digits, a unit, and a space that does not break.

const space = "\u202f";

// digits shows three of them, and never an exponent.
export function digits(n) {
  const whole = Math.abs(n) >= 1000 ? 0 : 3;
  return n.toLocaleString("en", whole ? { maximumSignificantDigits: 3, minimumSignificantDigits: n === 0 ? 1 : 3 } : { maximumFractionDigits: 0 });
}

// axis is a round number beside an axis.
export const axis = (n) => n.toLocaleString("en", n >= 10000 ? { notation: "compact" } : {});

export const count = (n) => n.toLocaleString("en");

// Each of these returns the number and its unit.
export function duration(seconds) {
  if (seconds >= 0.9995) return [digits(seconds), "s"];
  if (seconds >= 0.0009995) return [digits(seconds * 1e3), "ms"];
  return [digits(seconds * 1e6), "µs"];
}

export const percent = (share) => [(share * 100).toLocaleString("en", { minimumFractionDigits: 1, maximumFractionDigits: 1 }), "%"];

export const perSecond = (n) => [digits(n), "/s"];

export function bytesPerSecond(n) {
  const units = ["B/s", "KiB/s", "MiB/s", "GiB/s"];
  let i = 0;
  while (n >= 999.5 && i < units.length - 1) [n, i] = [n / 1024, i + 1];
  return [digits(n), units[i]];
}

export const text = ([number, unit]) => number + space + unit;

export function clock(date) {
  const now = new Date();
  const time = date.toLocaleTimeString("en-GB");
  return date.toDateString() === now.toDateString() ? time : `${date.toLocaleDateString("en-CA")} ${time}`;
}
