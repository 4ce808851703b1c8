/** Sizes of pictures: shapes of about the model's own number of pixels, and free ones. */

export const MULTIPLE = 32;

export interface Shape {
  name: string;
  across: number;
  down: number;
}

export const SHAPES: readonly Shape[] = [
  { name: "Square", across: 1, down: 1 },
  { name: "Portrait", across: 3, down: 4 },
  { name: "Landscape", across: 4, down: 3 },
  { name: "Tall", across: 9, down: 16 },
  { name: "Wide", across: 16, down: 9 },
];

export function snap(value: number, largest: number): number {
  return Math.min(largest, Math.max(MULTIPLE, Math.round(value / MULTIPLE) * MULTIPLE));
}

/** The size of `shape` whose number of pixels is nearest to that of `like`. */
export function sizeOf(shape: Shape, like: readonly [number, number], largest: number): [number, number] {
  const unit = Math.sqrt((like[0] * like[1]) / (shape.across * shape.down));
  return [snap(shape.across * unit, largest), snap(shape.down * unit, largest)];
}
