// Numbers for people.

const whole = new Intl.NumberFormat("en", { maximumFractionDigits: 0 });

/** About three digits. */
export function rounded(number) {
  return number >= 100 ? whole.format(number) : String(Number(number.toPrecision(2)));
}

/** Bytes in the unit that suits them. */
export function size(bytes) {
  const units = ["B", "KiB", "MiB", "GiB", "TiB"];
  const unit = bytes < 1 ? 0 : Math.min(units.length - 1, Math.floor(Math.log2(bytes) / 10));
  return `${rounded(bytes / 1024 ** unit)} ${units[unit]}`;
}

/** A whole number with separators. */
export const count = (number) => whole.format(number);
