/** Where a map's points and their labels stand: no label lies over another one, or over a point. */

export interface Place {
  x: number;
  y: number;
  /** Where the label begins, on its middle line; absent where there is no room for one. */
  label?: { x: number; y: number };
}

interface Box {
  left: number;
  right: number;
  top: number;
  bottom: number;
}

const MARGIN = 28;
const LETTER = 7.2;
const LINE = 15;
const GAP = 7;
const DOT = 5;

/** Points scaled to a picture of this size, in pixels, y upwards; with labels of so many letters each. */
export function layout(points: { x: number; y: number; letters: number }[], width: number, height: number): Place[] {
  const across = scale(
    points.map(({ x }) => x),
    MARGIN,
    width - MARGIN,
  );
  const up = scale(
    points.map(({ y }) => y),
    height - MARGIN,
    MARGIN,
  );
  const places: Place[] = points.map(({ x, y }) => ({ x: across(x), y: up(y) }));
  const taken: Box[] = places.map(({ x, y }) => ({ left: x - DOT, right: x + DOT, top: y - DOT, bottom: y + DOT }));
  places.forEach((place, at) => {
    const long = points[at]!.letters * LETTER;
    for (const [left, middle] of around(place, long)) {
      const box = { left, right: left + long, top: middle - LINE / 2, bottom: middle + LINE / 2 };
      const inside = box.left >= 0 && box.right <= width && box.top >= 0 && box.bottom <= height;
      if (!inside || taken.some((other, of) => of !== at && overlap(box, other))) continue;
      taken.push(box);
      place.label = { x: left, y: middle };
      return;
    }
  });
  return places;
}

/** Where 0 lies, if it lies within the picture. */
export function zero(values: number[], from: number, to: number): number | undefined {
  if (Math.min(...values) > 0 || Math.max(...values) < 0) return undefined;
  return scale(values, from, to)(0);
}

export function edges(width: number, height: number) {
  return { across: [MARGIN, width - MARGIN], up: [height - MARGIN, MARGIN] } as const;
}

function around({ x, y }: Place, long: number): [number, number][] {
  return [
    [x + GAP, y],
    [x - GAP - long, y],
    [x - long / 2, y - LINE],
    [x - long / 2, y + LINE],
    [x + GAP, y - LINE],
    [x + GAP, y + LINE],
    [x - GAP - long, y - LINE],
    [x - GAP - long, y + LINE],
  ];
}

function overlap(one: Box, other: Box): boolean {
  return one.left < other.right && one.right > other.left && one.top < other.bottom && one.bottom > other.top;
}

function scale(values: number[], from: number, to: number): (value: number) => number {
  const least = Math.min(...values);
  const range = Math.max(...values) - least;
  return (value) => (range ? from + ((value - least) / range) * (to - from) : (from + to) / 2);
}
