/** What repeated measurements say. */

export interface Spread {
  median: number;
  min: number;
  max: number;
}

/** Of at least one value. */
export function spreadOf(values: readonly number[]): Spread {
  if (values.length === 0) throw new RangeError('no values');
  const sorted = [...values].sort((a, b) => a - b);
  const middle = sorted.length >> 1;
  const median = sorted.length % 2 === 1 ? sorted[middle] : (sorted[middle - 1] + sorted[middle]) / 2;
  return { median, min: sorted[0], max: sorted[sorted.length - 1] };
}

export function medianOf(values: readonly number[]): number {
  return spreadOf(values).median;
}

/** How far the values lie apart: (max - min) / median, as a whole percentage; 0 if the median is 0. */
export function spreadPercent({ median, min, max }: Spread): number {
  return median === 0 ? 0 : Math.round(((max - min) / median) * 100);
}
